"""LayerNorm of the behaviours and what recency adds to them, zero where padded.

    y_l = (x_l - mean_l) / sigma_l * scale + bias + table[index_l]

Decided here: see model.py. The variance is mean(x^2) - mean^2, as in
Flax's LayerNorm, for which x - mean need not be an array of its own.

STA reads y for every candidate and head, in training in several passes. XLA on a CPU lets each
reader make a cheap operand anew, and there y is better made once: `at_elements`.

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
    wide, mean, sigma = _statistics(x)
    return _scaled((wide - mean) / sigma, scale, rows, index, mask).astype(x.dtype)


def _statistics(x):
    wide = x.astype(accumulation_dtype(x.dtype))
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide).mean(-1, keepdims=True) - jnp.square(mean)
    return wide, mean, jnp.sqrt(jnp.maximum(variance, 0) + EPSILON)


def at_elements(sigma: jax.Array, x: jax.Array) -> jax.Array:
    """sigma [..., 1] at each element of x [..., d] (1 where that is NaN), to divide by.

    XLA does not repeat a division. But it makes one by a row's number a product, which it takes for
    cheap and repeats; that this is a row's number it cannot see. Some hundredths of a training step
    (`python -m benchmarks.cpu_steps once`).
    """
    return jnp.where(x == x, sigma, 1)


def _scaled(unit, scale, rows, index, mask):
    return jnp.where(mask[..., None], unit * scale + rows[index], 0)


def _forward(x, scale, rows, index, mask):
    wide, mean, sigma = _statistics(x)
    y = _scaled((wide - mean) / at_elements(sigma, wide), scale, rows, index, mask)
    return y.astype(x.dtype), (x, mean, sigma, scale, rows, index, mask)


def _backward(residuals, dy):
    x, mean, sigma, scale, rows, index, mask = residuals
    dy = jnp.where(mask[..., None], dy, 0).astype(mean.dtype)
    unit = (x.astype(mean.dtype) - mean) / sigma
    dy_unit = dy * unit
    # Means over d as products with `scale`: as sums they take XLA on a CPU ten times as long.
    weights = scale.astype(mean.dtype)[:, None] / len(scale)
    dx = (dy * scale - dy @ weights - unit * (dy_unit @ weights)) / sigma
    dscale, drows = jnp.sum(dy_unit, (0, 1)), summed_by_row(index, dy, len(rows))
    return dx.astype(x.dtype), dscale.astype(scale.dtype), drows.astype(rows.dtype), None, None


normalised.defvjp(_forward, _backward)
