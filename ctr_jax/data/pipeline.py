"""The input pipeline: prepared requests -> an iterator of RequestBatch, read ahead by threads.

The order has no state. Row r of the global batch at step s is number s * B + r of one endless
sequence: the epochs one after another, each a permutation of the split that is computed per index
from (seed, epoch). So any step is reached at once, batches run across the epochs' borders, and
every number of processes sees the same global batches.

With length buckets every batch holds requests of one bucket and is cut to that bucket's length, so
that short histories do not pay for long ones and there are as many compiled shapes as buckets. Each
bucket is an endless sequence of its own. What an epoch leaves of it, less than a batch, is carried
into the next: nothing is dropped or padded, and by the end of epoch e bucket k has given
floor(e n_k / B) batches. The batches of an epoch come in an order drawn from (seed, epoch).
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence

import grain
import jax
import numpy as np

from ctr_jax.batch import RequestBatch
from ctr_jax.config import check_buckets
from ctr_jax.data.errors import DataError
from ctr_jax.data.records import Requests
from ctr_jax.data.synthetic_random import GOLDEN, mix

_ROUNDS = 4  # pairs of Feistel rounds; 3 single rounds of random functions already look random


def train_batches(
    requests: Requests,
    *,
    batch_size: int,
    history_length: int,
    seed: int,
    length_buckets: Sequence[int] = (),
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 1,
    prefetch: int = 4,
) -> Iterator[RequestBatch]:
    """Endless shuffled batches from `start_step` on; a global batch depends on (seed, step) alone.

    Each epoch is a new permutation; epochs follow one another without a gap, and nothing is
    dropped or repeated within one. With buckets this holds for each bucket.

    Args:
      batch_size: B of the global batch; this process gets rows [pB/N, (p+1)B/N) of it.
      history_length: L of every batch.
      length_buckets: ascending lengths that end with history_length; L is then the least of them
        that holds the histories of the batch. () = off.
      workers: threads that prepare batches ahead; 0 prepares each when it is asked for.
      prefetch: batches prepared ahead.
    Returns:
      An iterator of batches; `close()` ends its threads.
    Raises:
      DataError: the split is empty.
      ValueError: batch_size is not a multiple of process_count, the buckets do not end with
        history_length, or a number is out of range.
    """
    rows = _process_rows(batch_size, process_index, process_count)
    if not len(requests):
        raise DataError(f"{requests!r}: an empty split cannot be trained on")
    if start_step < 0:
        raise ValueError(f"start_step is {start_step}; it must not be negative")

    buckets = by_length(requests, history_length, length_buckets) if length_buckets else []

    def batch(step: int) -> RequestBatch:
        step += start_step
        if not buckets:
            positions = step * batch_size + rows
            return requests.read(shuffled(positions, len(requests), seed), history_length)
        sizes = [len(bucket.records) for bucket in buckets]
        which, number = bucket_at(step, sizes, batch_size, seed)
        order = shuffled(number * batch_size + rows, sizes[which], seed + ((which + 1) << 32))
        return requests.read(buckets[which].records[order], buckets[which].length)

    return _prefetched(batch, sys.maxsize // batch_size - start_step, workers, prefetch)


def eval_batches(
    requests: Requests,
    *,
    batch_size: int,
    history_length: int,
    length_buckets: Sequence[int] = (),
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 1,
    prefetch: int = 4,
) -> Iterator[RequestBatch]:
    """Every record once, in the batches of `eval_plan`; those of a bucket have one shape.

    A batch that is not full is filled with empty rows, all zero and with candidate_mask False.
    Arguments, return value and errors are those of `train_batches`.
    """
    rows = _process_rows(batch_size, process_index, process_count)
    plan = eval_plan(
        requests,
        batch_size=batch_size,
        history_length=history_length,
        length_buckets=length_buckets,
    )

    def batch(step: int) -> RequestBatch:
        own = plan[step].records[rows[0] : rows[-1] + 1]
        return with_empty_rows(requests.read(own, plan[step].length), len(rows))

    return _prefetched(batch, len(plan), workers, prefetch)


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Records that are read with one history length.

    Attributes:
      records: [n] int64, ascending.
      length: L.
    """

    records: np.ndarray
    length: int


def eval_plan(
    requests: Requests, *, batch_size: int, history_length: int, length_buckets: Sequence[int] = ()
) -> list[Bucket]:
    """The records, at most B, and the L of each global batch of `eval_batches`.

    Stored order; with `length_buckets`, one bucket after another, each in stored order.
    """
    if length_buckets:
        buckets = by_length(requests, history_length, length_buckets)
    else:
        buckets = [Bucket(np.arange(len(requests)), history_length)]
    return [
        Bucket(bucket.records[first : first + batch_size], bucket.length)
        for bucket in buckets
        for first in range(0, len(bucket.records), batch_size)
    ]


def by_length(
    requests: Requests, history_length: int, length_buckets: Sequence[int]
) -> list[Bucket]:
    """The split by bucket: a request is in the first whose length holds its history.

    Raises:
      DataError: a file is damaged.
      ConfigError: the lengths do not ascend from 1 on and end with history_length.
    """
    check_buckets(length_buckets, history_length)
    edges = list(length_buckets)
    which = np.searchsorted(edges[:-1], requests.history_lengths())
    return [Bucket(np.flatnonzero(which == k), edge) for k, edge in enumerate(edges)]


def bucket_at(step: int, sizes: Sequence[int], batch_size: int, seed: int) -> tuple[int, int]:
    """Which bucket gives the batch of a step, and which of that bucket's batches it is.

    After e epochs bucket k with n_k requests has given floor(e n_k / B) batches; the step's epoch
    is the largest e with S(e) = sum_k floor(e n_k / B) <= step.

    Args:
      sizes: [K] requests of each bucket, not all 0.
    """

    def given(epochs: int) -> list[int]:
        return [epochs * size // batch_size for size in sizes]

    # S(e) lies in e N / B - K .. e N / B for N requests in K buckets: few epochs to choose from.
    first = step * batch_size // sum(sizes)
    last = (step + len(sizes)) * batch_size // sum(sizes) + 1
    epochs = range(first, last + 1)
    epoch = epochs[bisect.bisect_right(epochs, step, key=lambda e: sum(given(e))) - 1]
    before, after = given(epoch), given(epoch + 1)
    ends = np.cumsum([b - a for a, b in zip(before, after, strict=True)])
    count = int(ends[-1])
    place = int(shuffled(np.array([epoch * count + step - sum(before)]), count, seed)[0])
    which = int(np.searchsorted(ends, place, side="right"))
    return which, after[which] - int(ends[which]) + place


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
    keys = mix(epochs.astype(np.uint64) + np.uint64((seed * GOLDEN) & (2**64 - 1)))
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
        keys = mix(keys + np.uint64(number))
        # the top 32 bits: a sum with them cannot overflow, which would not be invertible mod a
        left = (left + (mix(keys ^ right) >> np.uint64(32))) % np.uint64(a)
        right = (right + (mix(~keys ^ left) >> np.uint64(32))) % np.uint64(b)
    return left * np.uint64(b) + right


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
