"""Sorted streams of the shards -> one sorted stream, a block of each in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

Block = Mapping[str, np.ndarray]


def merged(streams: Iterable[Iterable[Block]], keys: Sequence[str]) -> Iterator[Block]:
    """Merges streams of blocks that are sorted by `keys`.

    Args:
      streams: each of dicts of equally long arrays. Rows of equal keys belong to one stream and
        keep their order.
    Yields:
      blocks in the order of `keys`, over all rows.
    """
    iterators = [iter(stream) for stream in streams]
    heads = {i: block for i, it in enumerate(iterators) if (block := _next(it, keys)) is not None}
    while heads:
        # Up to the earliest end of a head, no stream can bring anything smaller.
        limit = min(tuple(block[key][-1] for key in keys) for block in heads.values())
        parts = []
        for i, block in list(heads.items()):
            count = _up_to(block, keys, limit)
            parts.append({name: values[:count] for name, values in block.items()})
            if count < len(block[keys[0]]):
                heads[i] = {name: values[count:] for name, values in block.items()}
            elif (following := _next(iterators[i], keys)) is not None:
                heads[i] = following
            else:
                del heads[i]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        order = np.lexsort([joined[key] for key in reversed(keys)])
        yield {name: values[order] for name, values in joined.items()}


def _next(stream: Iterator[Block], keys: Sequence[str]) -> Block | None:
    """The stream's next block that has rows."""
    return next((block for block in stream if len(block[keys[0]])), None)


def _up_to(block: Block, keys: Sequence[str], limit: tuple) -> int:
    """How many rows of a sorted block do not come after `limit`."""
    before = np.zeros(len(block[keys[0]]), bool)
    equal = ~before
    for key, bound in zip(keys, limit, strict=True):
        before |= equal & (block[key] < bound)
        equal &= block[key] == bound
    return int(np.count_nonzero(before | equal))
