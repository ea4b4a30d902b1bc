"""LayerNorm of the behaviours and what recency adds to them, zero where padded.

    y_l = (x_l - mean_l) / sigma_l * scale + bias + table[index_l]

Decided here (laser.md 3 has no such step): see model.py. One function with a gradient of its own,
as STA reads every behaviour for every candidate and head. XLA on a CPU lets each reader make a
cheap operand anew, and takes a division for dear: what ends in one is made once. So sigma divides
last, here and in the gradient (docs/laser.md, Speed, has what that is worth); and the variance is
mean(x^2) - mean^2, as in Flax's LayerNorm, for which x - mean need not be an array of its own.

Axis letters: B requests, L history, d model width.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.softmax import accumulation_dtype
from laser_jax.recency import summed_by_row

EPSILON = 1e-6


class BehaviourNorm(nn.Module):
    """The equation, with its scale and bias."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        table: jax.Array | None = None,
        index: jax.Array | None = None,
    ) -> jax.Array:
        """x [B, L, d], mask [B, L] bool; table [rows, d] and index [B, L], or neither -> [B, L, d];
        statistics in float32 at least."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        rows = bias[None] if table is None else table + bias
        index = jnp.zeros(mask.shape, jnp.int32) if index is None else index
        return normalised(x, scale, rows, index, mask)


@jax.custom_vjp
def normalised(
    x: jax.Array, scale: jax.Array, rows: jax.Array, index: jax.Array, mask: jax.Array
) -> jax.Array:
    """y of the equation in x's dtype, bias within rows [n, d]; gradients to x, scale and rows."""
    return _forward(x, scale, rows, index, mask)[0]


def _forward(x, scale, rows, index, mask):
    wide = x.astype(accumulation_dtype(x.dtype))
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide).mean(-1, keepdims=True) - jnp.square(mean)
    sigma = jnp.sqrt(jnp.maximum(variance, 0) + EPSILON)
    y = jnp.where(mask[..., None], (wide - mean) * scale + rows[index] * sigma, 0) / sigma
    return y.astype(x.dtype), (x, mean, sigma, scale, rows, index, mask)


def _backward(residuals, dy):
    x, mean, sigma, scale, rows, index, mask = residuals
    dy = jnp.where(mask[..., None], dy, 0).astype(mean.dtype)
    unit = (x.astype(mean.dtype) - mean) / sigma
    along_unit = dy * (x.astype(mean.dtype) - mean) / sigma  # of scale
    # Means over d as products with `scale`: as sums they take XLA on a CPU ten times as long.
    weights = scale.astype(mean.dtype)[:, None] / len(scale)
    inner = dy * scale - dy @ weights - unit * (along_unit @ weights)
    dx = inner / sigma
    dscale = jnp.sum(along_unit, (0, 1))
    drows = summed_by_row(index, dy, len(rows))
    return dx.astype(x.dtype), dscale.astype(scale.dtype), drows.astype(rows.dtype), None, None


normalised.defvjp(_forward, _backward)
