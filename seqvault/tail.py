"""The fresh tail: behaviours that no part holds yet, in DRAM, linked per user in arrival order."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numba import njit

from seqvault.schema import TIME, Schema

_PREVIOUS = "previous row"  # no column's name: it is no identifier


def _record(schema: Schema) -> np.dtype:
    """A row and what links it: together, so that reading one waits for memory once."""
    fields = [(_PREVIOUS, np.dtype(np.uint32)), *schema.stored.items()]
    fields.sort(key=lambda field: -field[1].itemsize)  # no gaps between
    return np.dtype(fields, align=True)


@njit(cache=True, nogil=True)
def _link(entries, numbers, first, previous):
    """Makes rows first .. the newest of entries `numbers` [N]."""
    for i in range(len(numbers)):
        previous[first + i] = entries[numbers[i]].tail
        entries[numbers[i]].tail = first + i + 1


@njit(cache=True, nogil=True)
def _count(heads, previous):
    """[B] rows behind each of `heads` [B].

    All users go a row back in turns: their rows come from memory side by side, while of one user
    each waits for the one before.
    """
    counts, rows = np.zeros(len(heads), np.int64), heads.astype(np.int64)
    waiting, n = np.arange(len(heads)), len(heads)
    while n:
        kept = 0
        for k in range(n):
            i = waiting[k]
            if rows[i]:
                counts[i] += 1
                rows[i] = previous[rows[i] - 1]
                waiting[kept] = i
                kept += 1
        n = kept
    return counts


@njit(cache=True, nogil=True)
def _collect(heads, previous, times, starts, rows):
    """Fills `rows` with each user's tail rows by (time, arrival)."""
    for i in range(len(heads)):
        at, row = starts[i + 1], np.int64(heads[i])
        while row:
            at -= 1
            rows[at] = row - 1
            row = np.int64(previous[row - 1])
        ordered = True
        for k in range(starts[i] + 1, starts[i + 1]):
            ordered &= times[rows[k]] >= times[rows[k - 1]]
        if not ordered:  # a merge sort is stable: ties stay in arrival order
            mine = rows[starts[i] : starts[i + 1]]
            mine[:] = mine[np.argsort(times[mine], kind="mergesort")]


class Tail:
    """The fresh rows of one stream; only the writer's side of a vault adds and drops them."""

    def __init__(self, schema: Schema, capacity: int = 1024):
        self.schema = schema
        self.count = 0  # rows, dead ones included
        self.live = 0
        self._records = np.zeros(capacity, _record(schema))

    @property
    def nbytes(self) -> int:
        return self._records.nbytes

    def add(
        self, entries: np.ndarray, numbers: np.ndarray, columns: Mapping[str, np.ndarray]
    ) -> None:
        """Adds rows, in order, to the entries `numbers` [N]; `columns` are those of the schema."""
        first, count = self.count, self.count + len(numbers)
        if count > len(self._records):
            records = np.zeros(max(count, 2 * len(self._records)), self._records.dtype)
            records[:first] = self._records[:first]
            self._records = records
        for name in self.schema.stored:
            self._records[name][first:count] = columns[name]
        _link(entries, numbers, first, self._records[_PREVIOUS])
        self.count, self.live = count, self.live + len(numbers)

    def counts(self, heads: np.ndarray) -> np.ndarray:
        """[B] rows behind each of `heads` [B] (the entries' `tail`)."""
        return _count(heads, self._records[_PREVIOUS])

    def rows(self, heads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(starts [B + 1], rows): the row numbers of each head by (time, arrival)."""
        starts = np.zeros(len(heads) + 1, np.int64)
        np.cumsum(self.counts(heads), out=starts[1:])
        rows = np.empty(starts[-1], np.int64)
        _collect(heads, self._records[_PREVIOUS], self._records[TIME], starts, rows)
        return starts, rows

    def take(self, rows: np.ndarray) -> np.ndarray:
        """A copy of these rows, as records: a column is a field, as of its name."""
        words = self._records.view(np.uint32).reshape(len(self._records), -1)
        # As rows of numbers: numpy takes records one field at a time.
        return words.take(rows, 0).view(self._records.dtype)[:, 0]

    def drop(self, entries: np.ndarray, numbers: np.ndarray) -> None:
        """Forgets the rows of entries `numbers`; their room comes back with `compacted`."""
        self.live -= int(self.counts(entries["tail"][numbers]).sum())
        entries["tail"][numbers] = 0

    def compacted(self, entries: np.ndarray, schema: Schema | None = None) -> Tail:
        """A tail of the live rows alone, under `schema`; entries are linked to it."""
        numbers = np.flatnonzero(entries["tail"])
        starts, rows = self.rows(entries["tail"][numbers])
        owners = np.repeat(numbers, np.diff(starts))
        new = Tail(schema or self.schema, max(1024, len(rows)))
        order = np.argsort(rows, kind="stable")  # by arrival again
        entries["tail"][numbers] = 0
        records = self.take(rows[order])
        columns = under_schema({n: records[n] for n in self.schema.stored}, new.schema)
        new.add(entries, owners[order], columns)
        return new


def under_schema(columns: Mapping[str, np.ndarray], schema: Schema) -> dict[str, np.ndarray]:
    """Rows written under another version as the schema reads them: widened, defaults filled in."""
    rows = len(columns[TIME])
    out = {}
    for name, dtype in schema.stored.items():
        if name in columns:
            out[name] = columns[name].astype(dtype, copy=False)
        else:
            out[name] = np.full(rows, schema.defaults.get(name, 0), dtype)
    return out
