"""Softmax over what a mask leaves."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """float32 for float32 and narrower, float64 for float64: what softmax and logits use."""
    return jnp.promote_types(dtype, jnp.float32)


def widened(x: jax.Array) -> jax.Array:
    """x in that type: a table that a loop reads adds its gradient up over the loop's rounds."""
    return x.astype(accumulation_dtype(x.dtype))


def masked_softmax(logits: jax.Array, mask: jax.Array, axis: int = -1) -> jax.Array:
    """Softmax over the entries where `mask`; an empty set gives 0, never a uniform row or NaN.

    Args:
      logits: any shape, any float dtype; entries outside the mask may hold anything but NaN.
      mask: bool, broadcastable to logits.
    Returns:
      logits' shape in float32 (float64 for float64 logits). Gradients are finite everywhere.
    """
    logits = logits.astype(accumulation_dtype(logits.dtype))
    logits = jnp.where(mask, logits, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.max(logits, axis, keepdims=True))
    # exp(-inf - 0) = 0 with gradient 0: a fully masked row has peak -inf and would give NaN.
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(peak), peak, 0))
    total = jnp.sum(weights, axis, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)
