"""Distinct ids at static shapes, without a host round trip.

`jnp.unique` sorts keys with a payload, which XLA does serially and slowly on CPU (50 ms for 200,000
ids on one core); a scratch hash table of scalars does the same in 4 ms.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from ctr_jax.features import PADDING

_BAD_ID = 2**31 - 2  # stands for a negative id: past the end of any table


def deduplicate(
    ids: jax.Array, capacity: int, implementation: str | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The distinct non-padding ids, and where each id went.

    Args:
      ids: [n] int32, 0 = padding.
      capacity: static size of `unique`; at least the number of distinct ids.
      implementation: "hash", distinct ids in order of first occurrence, fast where scalar scatters
        are (CPU, GPU); "sort", ascending, fast where sorting is (TPU); None picks by the platform.

    Returns:
      unique: [capacity] int32, zero beyond `count`.
      count: [] int32.
      slots: [n] int32 with unique[slots] == ids, and `capacity` at padding.

    Raises:
      ValueError: unknown implementation.
    """
    ids = jnp.where(ids < 0, _BAD_ID, ids)
    if implementation is None:
        return lax.platform_dependent(
            ids,
            tpu=lambda x: _deduplicate_by_sort(x, capacity),
            default=lambda x: _deduplicate_by_hash(x, capacity),
        )
    implementations = {"hash": _deduplicate_by_hash, "sort": _deduplicate_by_sort}
    if implementation not in implementations:
        raise ValueError(f"implementation {implementation!r} is not one of {set(implementations)}")
    return implementations[implementation](ids, capacity)


def _deduplicate_by_hash(ids, capacity):
    """Open addressing in a scratch table of at least 4 n slots, all ids probing at once.

    In each round the ids still pending bid for their slot and the lowest position takes it, from an
    earlier owner too, who has its place by then: copies of an id probe the same slots in the same
    rounds, so the winner is the id's first occurrence, and all copies find it at once. Strides are
    odd and the size a power of two: an id reaches every slot, and some are free; the loop ends.
    """
    n = ids.size
    bits = max(4, (4 * n - 1).bit_length())
    position = jnp.arange(n, dtype=jnp.int32)
    mixed = ids.astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
    bucket = (mixed >> (32 - bits)).astype(jnp.int32)
    stride = ((mixed ^ (mixed >> 15)).astype(jnp.int32) | 1) & (2**bits - 1)

    def probe(carry):
        owner, first, bucket, pending = carry
        owner = owner.at[jnp.where(pending, bucket, 2**bits)].min(position, mode="drop")
        found = owner[bucket]
        won = pending & (ids.at[found].get(mode="clip") == ids)
        first = jnp.where(won, found, first)
        pending = pending & ~won
        return owner, first, (bucket + stride) & (2**bits - 1), pending

    owner = jnp.full((2**bits,), n, jnp.int32)
    start = (owner, jnp.full((n,), n, jnp.int32), bucket, ids != PADDING)
    _, first, _, _ = lax.while_loop(lambda carry: jnp.any(carry[3]), probe, start)
    is_first = first == position
    rank = jnp.cumsum(is_first, dtype=jnp.int32) - 1
    place = jnp.where(is_first, rank, capacity)
    unique = jnp.zeros((capacity,), jnp.int32).at[place].set(ids, mode="drop")
    return unique, rank[-1] + 1, rank.at[first].get(mode="fill", fill_value=capacity)


def _deduplicate_by_sort(ids, capacity):
    """Three sorts, no scatter: by id, to find the distinct; back in order; and to compact.

    None has to be stable, as copies of an id have one slot: a TPU's compiler needs half the time.
    """
    place = jnp.arange(ids.size, dtype=jnp.int32)
    ordered, position = lax.sort((ids, place), num_keys=1, is_stable=False)
    previous = jnp.concatenate([jnp.full((1,), PADDING, jnp.int32), ordered[:-1]])
    is_first = ordered != previous  # never at padding, which sorts first
    rank = jnp.cumsum(is_first, dtype=jnp.int32) - 1
    slots = jnp.where(ordered == PADDING, capacity, rank)
    _, slots = lax.sort((position, slots), num_keys=1, is_stable=False)
    count = rank[-1] + 1
    unique = lax.sort(jnp.where(is_first, ordered, jnp.iinfo(jnp.int32).max), is_stable=False)
    unique = jnp.where(place < count, unique, PADDING)
    return jnp.pad(unique, (0, max(0, capacity - ids.size)))[:capacity], count, slots
