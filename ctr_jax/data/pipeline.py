"""The input pipeline: prepared requests -> an iterator of RequestBatch, read ahead by threads.

The order has no state. Row r of the global batch at step s is number s * B + r of one endless
sequence: the epochs one after another, each a permutation of the split that is computed per index
from (seed, epoch). So any step is reached at once, batches run across the epochs' borders, and
every number of processes sees the same global batches.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator

import grain
import jax
import numpy as np

from ctr_jax.batch import RequestBatch
from ctr_jax.data.errors import DataError
from ctr_jax.data.records import Requests

_ROUNDS = 4  # pairs of Feistel rounds; 3 single rounds of random functions already look random
_GOLDEN = 0x9E3779B97F4A7C15


def train_batches(
    requests: Requests,
    *,
    batch_size: int,
    history_length: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 1,
    prefetch: int = 4,
) -> Iterator[RequestBatch]:
    """Endless shuffled batches from `start_step` on; a global batch depends on (seed, step) alone.

    Each epoch is a new permutation; epochs follow one another without a gap, and nothing is
    dropped or repeated within one.

    Args:
      batch_size: B of the global batch; this process gets rows [pB/N, (p+1)B/N) of it.
      history_length: L of every batch.
      workers: threads that prepare batches ahead; 0 prepares each when it is asked for.
      prefetch: batches prepared ahead.
    Returns:
      An iterator of batches; `close()` ends its threads.
    Raises:
      DataError: the split is empty.
      ValueError: batch_size is not a multiple of process_count, or a number is out of range.
    """
    rows = _process_rows(batch_size, process_index, process_count)
    if not len(requests):
        raise DataError(f"{requests!r}: an empty split cannot be trained on")
    if start_step < 0:
        raise ValueError(f"start_step is {start_step}; it must not be negative")

    def batch(step: int) -> RequestBatch:
        positions = (start_step + step) * batch_size + rows
        return requests.read(shuffled(positions, len(requests), seed), history_length)

    return _prefetched(batch, sys.maxsize // batch_size - start_step, workers, prefetch)


def eval_batches(
    requests: Requests,
    *,
    batch_size: int,
    history_length: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 1,
    prefetch: int = 4,
) -> Iterator[RequestBatch]:
    """Every record once, in stored order; ceil(records / B) batches of one shape.

    The last batch is filled with empty rows, all zero and with candidate_mask False. Arguments,
    return value and errors are those of `train_batches`.
    """
    rows = _process_rows(batch_size, process_index, process_count)

    def batch(step: int) -> RequestBatch:
        indices = step * batch_size + rows
        real = indices[indices < len(requests)]
        return with_empty_rows(requests.read(real, history_length), len(rows))

    return _prefetched(batch, math.ceil(len(requests) / batch_size), workers, prefetch)


def with_empty_rows(batch: RequestBatch, rows: int) -> RequestBatch:
    """The batch with empty rows (all zero, no valid candidate) appended until it has `rows`."""
    missing = rows - len(batch.user_id)
    if not missing:
        return batch
    return jax.tree.map(
        lambda x: np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)]), batch
    )


def shuffled(positions: np.ndarray, size: int, seed: int) -> np.ndarray:
    """The records at `positions` of the endless sequence of shuffled epochs.

    Epoch e is positions e * size .. (e + 1) * size - 1, in an order drawn from (seed, e). Any
    position costs the same: the permutation is a Feistel network over a grid a x b that just covers
    `size` (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"), applied again to what
    falls outside it.

    Args:
      positions: [N] int64, not negative.
      size: records of the split, in 1 .. 2**40.
    Returns:
      [N] int64 in 0 .. size - 1.
    """
    epochs, index = np.divmod(np.asarray(positions, np.int64), size)
    keys = _mix(epochs.astype(np.uint64) + np.uint64((seed * _GOLDEN) & (2**64 - 1)))
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    index = _feistel(index.astype(np.uint64), keys, a, b)
    while (outside := index >= size).any():
        index[outside] = _feistel(index[outside], keys[outside], a, b)
    return index.astype(np.int64)


def _feistel(index: np.ndarray, keys: np.ndarray, a: int, b: int) -> np.ndarray:
    """A keyed permutation of 0 .. a * b - 1, per element: [N] uint64."""
    left, right = np.divmod(index, np.uint64(b))
    for number in range(_ROUNDS):
        keys = _mix(keys + np.uint64(number))
        # the top 32 bits: a sum with them cannot overflow, which would not be invertible mod a
        left = (left + (_mix(keys ^ right) >> np.uint64(32))) % np.uint64(a)
        right = (right + (_mix(~keys ^ left) >> np.uint64(32))) % np.uint64(b)
    return left * np.uint64(b) + right


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea and Flood 2014): [N] uint64, wrapping arithmetic."""
    values = values + np.uint64(_GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _process_rows(batch_size: int, process_index: int, process_count: int) -> np.ndarray:
    """Rows [pB/N, (p+1)B/N) of the global batch: int64."""
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} must be a positive multiple of the {process_count} processes"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not in 0 .. {process_count - 1}")
    own = batch_size // process_count
    return np.arange(process_index * own, (process_index + 1) * own, dtype=np.int64)


class _Steps:
    """A Grain source whose elements are whole batches: reads and decoding stay batched."""

    def __init__(self, batch: Callable[[int], RequestBatch], length: int):
        self._batch, self._length = batch, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, step: int) -> RequestBatch:
        return self._batch(int(step))


def _prefetched(
    batch: Callable[[int], RequestBatch], steps: int, workers: int, prefetch: int
) -> Iterator[RequestBatch]:
    """batch(0), batch(1), ... in order, prepared ahead by `workers` threads."""
    options = grain.ReadOptions(
        num_threads=workers, prefetch_buffer_size=max(prefetch, workers) if workers else 0
    )
    return iter(grain.MapDataset.source(_Steps(batch, steps)).to_iter_dataset(options))
