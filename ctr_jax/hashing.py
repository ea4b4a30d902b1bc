"""Sign bits of random projections: vectors at a small angle agree in most of them (Charikar 2002).

    h(x) = 1[x R > 0]       R [s, bits], N(0, 1) entries
    P(a bit is the same in h(x) and h(y)) = 1 - angle(x, y) / pi

R is no parameter: it lies in the collection "hashes", drawn from the run's seed when a model is
initialised, kept in its checkpoints, and never changed.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


class SignHash(nn.Module):
    """h; the bits are computed in float32 whatever the vectors are, and no gradient goes through.

    Attributes:
      bits: number of columns of R.
    """

    bits: int

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [..., s] and y [..., s], by the same R -> bool [..., bits] of each."""

        def draw() -> jax.Array:
            return jax.random.normal(self.make_rng("params"), (x.shape[-1], self.bits), jnp.float32)

        projections = self.variable("hashes", "projections", draw).value

        def bits_of(x: jax.Array) -> jax.Array:
            x = jax.lax.stop_gradient(x).astype(jnp.float32)
            return jnp.matmul(x, projections, precision=jax.lax.Precision.HIGHEST) > 0

        return bits_of(x), bits_of(y)
