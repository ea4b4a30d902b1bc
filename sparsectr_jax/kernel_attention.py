"""KernelAttention: Linformer's (Wang et al. 2020), which SparseCTR compares with (4.4.1).

    K' = E_K^T K    V' = E_V^T V    softmax(q K'^T / sqrt(K)) V'        E_K, E_V [length, R]

The projections run over the sequence and are the same for all heads; each layer has its own. Not
causal: a behaviour's rows mix all behaviours, later ones too. A candidate has all of them before
it, and so sees what it may. There is no pair of behaviours, so no relative encoding.

Rows of E are counted from the newest behaviour: left padding changes nothing, and a shorter history
takes the newest rows. Padding adds nothing to K' and V'; an empty history gives 0.

Axis letters: B requests, C candidates, L history, H heads, K head width, R rows.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.softmax import accumulation_dtype, masked_softmax


class KernelAttention(nn.Module):
    """The attention between the projections and W_O.

    Attributes:
      rows: R. length: the longest history.
      scale: of the logits; None is K^-1/2.
    """

    rows: int
    length: int
    scale: float | None = None

    @nn.compact
    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        """q [B, n, H, K], k, v [B, L, H, K], mask [B, L] -> [B, n, H, K]."""
        dtype, length = accumulation_dtype(q.dtype), k.shape[1]

        def projected(x: jax.Array, name: str) -> jax.Array:
            bound = self.rows**-0.5

            def init(rng, shape):
                return jax.random.uniform(rng, shape, minval=-bound, maxval=bound)

            rows = self.param(name, init, (self.length, self.rows))[self.length - length :]
            x = jnp.where(mask[..., None, None], x, 0)
            return jnp.einsum("lr,blhk->brhk", rows.astype(x.dtype), x)

        k, v = projected(k, "key"), projected(v, "value")
        q = q * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        logits = jnp.einsum("bnhk,brhk->bhrn", q, k, preferred_element_type=dtype)
        seen = mask.any(-1)[:, None, None, None]
        weights = masked_softmax(logits, seen, -2).astype(v.dtype)
        return jnp.einsum("bhrn,brhk->bnhk", weights, v)
