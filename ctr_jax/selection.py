"""Which behaviours a search keeps, as masks.

A mask and not indices: a gather of the selected, and the scatter that is its gradient, take longer
than a product with all. No gradient goes through a choice.

Axis letter: L history, oldest first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def largest(scores: jax.Array, mask: jax.Array, k: int) -> jax.Array:
    """Where the k largest of scores[..., L] are among those where `mask`; all if there are fewer.

    Scores are compared in float32, and of equal ones the newer wins.
    """
    length = scores.shape[-1]
    mask = jnp.broadcast_to(mask, scores.shape)
    if k >= length:
        return mask
    scores = jax.lax.stop_gradient(scores).astype(jnp.float32)
    scores = jnp.where(scores == 0, 0, scores)  # -0.0 too
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    # As unsigned integers floats are in order once the negative ones are turned round.
    sign = jnp.uint32(1 << 31)
    order = jnp.where(mask, jnp.where(bits >= sign, ~bits, bits | sign), 0)
    border = _kth(order, k, 32)
    above = order > border
    place = jnp.arange(1, length + 1, dtype=jnp.uint32)
    place = jnp.where(order == border, place, 0)
    left = k - jnp.sum(above, -1, keepdims=True, dtype=jnp.int32)
    return mask & (above | (place >= _kth(place, left, length.bit_length())))


def most_recent(mask: jax.Array, k: int) -> jax.Array:
    """Where the last k of mask[..., L] are; all if there are fewer."""
    newer = jax.lax.cumsum(mask.astype(jnp.int32), mask.ndim - 1, reverse=True)
    return mask & (newer <= k)


def _kth(x: jax.Array, k: jax.Array | int, bits: int) -> jax.Array:
    """The k-th largest of uint32 x[..., L] < 2^bits, [..., 1]: the greatest t such that k of x are
    >= t, bit by bit. On a CPU a fifth of the time of lax.top_k, or less."""

    def step(i, t):
        more = t | (jnp.uint32(1) << (bits - 1 - i).astype(jnp.uint32))
        return jnp.where(jnp.sum(x >= more, -1, keepdims=True, dtype=jnp.int32) >= k, more, t)

    return jax.lax.fori_loop(0, bits, step, jnp.zeros_like(x[..., :1]))
