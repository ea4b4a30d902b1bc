"""Batched reads of the newest behaviours out of parts, wherever the parts live."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from seqvault.errors import DamagedError, VaultError
from seqvault.part import (
    DAMAGED,
    DONE,
    FIRST,
    NEED,
    NEVER,
    PREVIOUS,
    PREVIOUS_BYTES,
    REACHED,
    RESULTS,
    SHORT,
    STATUS,
    TAKEN,
    TRAILER,
    read_parts,
)
from seqvault.schema import TIME, Schema

# fetch(users, places, sizes, wanted bytes) [k] -> (buf, ends, available): bytes before each part's
# end, at least min(sizes, wanted); see part.read_parts.
Fetch = Callable[
    [np.ndarray, np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]
]


class Layout:
    """The output columns of a read, in one buffer; which stored column of which version fills them.

    Attributes:
      names: {column: dtype}, time first.
    """

    def __init__(self, schemas: Sequence[Schema], names: Iterable[str] | None):
        """`schemas`: by the number that parts carry; the last is what reads see."""
        schema = schemas[-1]
        stored = schema.stored
        names = list(schema.columns if names is None else names)
        if unknown := sorted(set(names) - set(stored)):
            raise VaultError(f"no column {unknown}; the store has {list(schema.columns)}")
        self.names = {n: stored[n] for n in dict.fromkeys([TIME, *names])}
        self.sizes = np.array([d.itemsize for d in self.names.values()], np.int64)
        order = {name: j for j, name in enumerate(self.names)}
        columns = max(len(s.stored) for s in schemas)
        self.wanted = np.full((len(schemas), columns), -1, np.int64)
        for version, older in enumerate(schemas):
            for c, name in enumerate(older.stored):
                self.wanted[version, c] = order.get(name, -1)
        self.defaults = np.array(
            [_bits(schema.defaults.get(n, 0), d) for n, d in self.names.items()], np.int64
        )

    def zeros(self, cells: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """(buffer, offsets [J], {column: its [cells] view of the buffer}), all zero."""
        lengths = (cells * self.sizes + 7) // 8 * 8
        ends = lengths.cumsum()
        offsets = ends - lengths
        buffer = np.zeros(int(ends[-1]), np.uint8)
        views = {
            name: buffer[offset : offset + cells * dtype.itemsize].view(dtype)
            for (name, dtype), offset in zip(self.names.items(), offsets.tolist(), strict=True)
        }
        return buffer, offsets, views


def _bits(value: float, dtype: np.dtype) -> int:
    """A default as the word that a part would hold."""
    value = np.asarray(value, dtype)
    if dtype.kind == "f":
        value = value.reshape(1).view(f"u{dtype.itemsize}")[0]
    return int(value.astype(np.int64)) if dtype.kind != "f" else int(np.int64(np.uint64(value)))


class Found(NamedTuple):
    """What read_rows brings.

    Attributes:
      taken: [B] rows of each user.
      reached: [B] rows of the user that limit and time let see.
      first: [B] the position of the newest part's first row.
      previous, previous_bytes: [B] the part before the oldest one read.
      columns: {column: [cells]}.
    """

    taken: np.ndarray
    reached: np.ndarray
    first: np.ndarray
    previous: np.ndarray
    previous_bytes: np.ndarray
    columns: dict[str, np.ndarray]


def read_rows(
    fetch: Fetch,
    layout: Layout,
    stream: int,
    users: np.ndarray,
    places: np.ndarray,
    sizes: np.ndarray,
    limits: np.ndarray,
    befores: np.ndarray | None,
    wants: np.ndarray,
    rights: np.ndarray,
    cells: int,
    follow: bool = True,
) -> Found:
    """The newest rows of each user's chain of parts, right-aligned in flat columns.

    Args:
      fetch: brings the bytes of parts.
      users, places, sizes: [B] whose newest part lies where; place -1: none.
      limits: [B] rows at positions below are seen.
      befores: [B] rows earlier are seen; None sees all.
      wants: [B] rows wanted at most.
      rights: [B] the cell before which a user's rows end.
      cells: length of every output column; cells that nothing fills are 0.
      follow: whether to go on to older parts.
    Raises:
      DamagedError: a part's bytes are not what was written.
    """
    batch = len(users)
    buffer, offsets, views = layout.zeros(cells)
    taken, reached = np.zeros(batch, np.int64), np.zeros(batch, np.int64)
    firsts = np.full(batch, -1, np.int64)
    befores = np.full(batch, NEVER) if befores is None else befores
    rights = rights.copy()
    settled = np.zeros(batch, bool)  # whether the newest row to be seen was met
    places, sizes, wants = places.copy(), sizes.astype(np.int64), wants.copy()
    hints = TRAILER + 8192 + wants * 16
    active = np.flatnonzero(places >= 0)
    damaged: list[int] = []
    while len(active):
        a = active
        buf, part_ends, available = fetch(users[a], places[a], sizes[a], hints[a])
        results = np.zeros((len(a), RESULTS), np.int64)
        read_parts(
            buf, part_ends, np.minimum(available, sizes[a]), users[a], stream, limits[a],
            befores[a], wants[a], rights[a], layout.wanted, layout.sizes, offsets,
            layout.defaults, buffer, results,
        )  # fmt: skip
        status = results[:, STATUS]
        done = status == DONE
        short = status == SHORT
        if short.any():  # read more, unless that is only what a damaged trailer claims
            need = results[:, NEED]
            status[short & ((need > sizes[a]) | (need <= hints[a]))] = DAMAGED
            hints[a] = np.maximum(hints[a], need)
        damaged += users[a[status == DAMAGED]].tolist()
        at, found = (a, results) if done.all() else (a[done], results[done])
        count = found[:, TAKEN]
        taken[at] += count
        rights[at] -= count
        wants[at] -= count
        reached[at] = np.where(settled[at], reached[at], found[:, REACHED])
        settled[at] |= found[:, REACHED] > found[:, FIRST]
        firsts[at] = np.where(firsts[at] < 0, found[:, FIRST], firsts[at])
        places[at], sizes[at] = found[:, PREVIOUS], found[:, PREVIOUS_BYTES]
        more = (places[at] >= 0) & ((wants[at] > 0) | ~settled[at]) & follow
        active = np.concatenate([a[status == SHORT], at[more]])
    if damaged:
        raise DamagedError(
            f"the history of user {damaged[0]} is damaged"
            + (f"; so are {len(damaged) - 1} more of the batch" if len(damaged) > 1 else ""),
            tuple(damaged),
        )
    return Found(taken, reached, firsts, places, sizes, views)
