"""Chunking: cut a history into at most P runs of behaviours (SparseCTR 3.4.1).

Histories are right-aligned: the valid behaviours are the last ones, oldest first, with
non-decreasing times. All three methods give the same `Chunks`. Nothing here has a gradient.

Axis letters: B requests, L history, P chunks, m transition behaviours per chunk, d model width.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

METHODS = ("time", "fixed", "sim")
MAX_HISTORY = 32_767  # the chunks' exact mean time sums 17-bit and 15-bit halves in uint32


@flax.struct.dataclass
class Chunks:
    """Chunks of a batch of histories, oldest first; unused slots come last.

    Attributes:
      chunk_id: [B, L] int32, 1..P of each behaviour, 0 for padding; slot p holds chunk p + 1.
      start, end: [B, P] int32, first and last index of the chunk; -1 in unused slots.
      count: [B, P] int32 behaviours; 0 in unused slots.
      mean_time: [B, P] int32 seconds, t_start + floor(mean(t - t_start)), exact; 0 if unused.
      valid: [B, P] bool.
    """

    chunk_id: jax.Array
    start: jax.Array
    end: jax.Array
    count: jax.Array
    mean_time: jax.Array
    valid: jax.Array


def first_valid(mask: jax.Array) -> jax.Array:
    """[B, L] bool, true at the first valid behaviour of each history only."""
    before = jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))
    return mask & ~before


def from_starts(starts: jax.Array, times: jax.Array, mask: jax.Array) -> Chunks:
    """Chunks from the index where each begins.

    Args:
      starts: [B, P] int32 ascending; L in unused slots, which come last.
      times: [B, L] int32 seconds. mask: [B, L] bool, right-aligned.
    """
    batch, length = times.shape
    if length > MAX_HISTORY:
        raise ValueError(
            f"histories of {length} behaviours: the exact mean time holds to {MAX_HISTORY}"
        )
    valid = starts < length
    following = jnp.pad(starts[:, 1:], ((0, 0), (0, 1)), constant_values=length)
    count = following - starts
    position = jnp.arange(length, dtype=jnp.int32)
    chunk_id = jnp.sum(starts[:, :, None] <= position, 1, dtype=jnp.int32)
    chunk_id = jnp.where(mask, chunk_id, 0)

    # floor(mean(t - t_start)) from the halves t - t_start = 2^15 high + low: no sum can overflow.
    # As uint32, in which the difference of any two int32 in order is exact.
    t_start = jnp.take_along_axis(times, jnp.minimum(starts, length - 1), 1)
    offset = (times[:, None] - t_start[:, :, None]).astype(jnp.uint32)  # [B, P, L], fused
    member = chunk_id[:, None] == jnp.arange(1, starts.shape[1] + 1, dtype=jnp.int32)[:, None]
    high = jnp.sum(jnp.where(member, offset >> 15, 0), -1, dtype=jnp.uint32)
    low = jnp.sum(jnp.where(member, offset & 0x7FFF, 0), -1, dtype=jnp.uint32)
    size = jnp.maximum(count, 1).astype(jnp.uint32)
    mean_offset = (high // size) * 32_768 + ((high % size) * 32_768 + low) // size
    return Chunks(
        chunk_id=chunk_id,
        start=jnp.where(valid, starts, -1),
        end=jnp.where(valid, following - 1, -1),
        count=count,
        mean_time=jnp.where(valid, t_start + mean_offset.astype(jnp.int32), 0),
        valid=valid,
    )


def _largest(gaps: jax.Array, num_chunks: int) -> jax.Array:
    """Starts [B, P] at the `num_chunks` largest positive float gaps; ties go to the older one."""
    length = gaps.shape[1]
    top = min(num_chunks, length)
    values, index = jax.lax.top_k(gaps, top)
    starts = jnp.sort(jnp.where(values > 0, index.astype(jnp.int32), length), -1)
    return jnp.pad(starts, ((0, 0), (0, num_chunks - top)), constant_values=length)


def time_chunks(times: jax.Array, mask: jax.Array, num_chunks: int) -> Chunks:
    """TimeChunking: cut at the largest time gaps (SparseCTR 3.4.1).

    The first valid behaviour always starts a chunk, so that there are at most P chunks with or
    without padding (the paper's own count whenever there is padding); gaps of zero never cut.

    Args:
      times: [B, L] int32 seconds, non-decreasing where valid. mask: [B, L] bool, right-aligned.
    """
    after, before = times[:, 1:], times[:, :-1]
    gap = after - before  # int32: exact, then ordered
    gap = jnp.where((after > before) & (gap < 0), jnp.iinfo(jnp.int32).max, gap)  # 2^31 s or more
    gap = jnp.pad(gap, ((0, 0), (1, 0)))
    both = mask & ~first_valid(mask) & (gap > 0)
    # A positive int32 read as float32 keeps its order, and top_k has a fast path for float32 only.
    # The offset keeps small gaps out of the denormals, which CPUs flush to zero; gaps of more
    # than 66 years tie.
    bits = jnp.minimum(gap, 0x7E000000) + 0x00800000
    key = jnp.where(both, jax.lax.bitcast_convert_type(bits, jnp.float32), -1.0)
    return from_starts(
        _largest(jnp.where(first_valid(mask), jnp.inf, key), num_chunks), times, mask
    )


def fixed_chunks(times: jax.Array, mask: jax.Array, num_chunks: int) -> Chunks:
    """FixedChunking: ceil(n / P) behaviours per chunk, right-aligned so that the newest is full."""
    length = times.shape[1]
    n = jnp.sum(mask, 1, dtype=jnp.int32)[:, None]
    size = jnp.maximum(-(-n // num_chunks), 1)
    used = -(-n // size)
    slot = jnp.arange(num_chunks, dtype=jnp.int32)
    starts = jnp.maximum(length - (used - slot) * size, length - n)
    return from_starts(jnp.where(slot < used, starts, length), times, mask)


def sim_chunks(x: jax.Array, times: jax.Array, mask: jax.Array, num_chunks: int) -> Chunks:
    """SimChunking: TimeChunking with 1 - cos(x_i, x_{i-1}) for the gap; no gradient flows to x.

    Args:
      x: [B, L, d], the block's input.
    """
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(x * x, -1))
    dot = jnp.sum(x[:, 1:] * x[:, :-1], -1)
    cosine = dot / jnp.maximum(norm[:, 1:] * norm[:, :-1], 1e-12)
    gap = jnp.pad(1 - cosine, ((0, 0), (1, 0)))
    # Equal vectors have a cosine of 1 up to rounding: that is no gap.
    key = jnp.where(mask & (gap > 1e-6), gap, -1.0)
    return from_starts(
        _largest(jnp.where(first_valid(mask), jnp.inf, key), num_chunks), times, mask
    )


def transition_slots(chunks: Chunks, m: int) -> tuple[jax.Array, jax.Array]:
    """The last m behaviours of each chunk (SparseCTR 3.4.3); a shorter chunk gives all it has.

    Returns:
      index: [B, P, m] int32, ascending within the chunk; 0 in unused slots.
      valid: [B, P, m] bool.
    """
    index = chunks.end[..., None] - (m - 1) + jnp.arange(m, dtype=jnp.int32)
    valid = chunks.valid[..., None] & (index >= chunks.start[..., None])
    return jnp.where(valid, index, 0), valid
