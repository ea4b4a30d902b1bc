"""Batched reads of the newest behaviours out of parts, wherever the parts live."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from seqvault.chains import FOUND, read_chains, read_last
from seqvault.errors import DamagedError, MissingError, VaultError
from seqvault.part import NEVER
from seqvault.schema import TIME, Schema
from seqvault.unpacking import DAMAGED, MISSING

_NO_CUT = np.zeros(0, np.int64)


class Source(Protocol):
    """Where parts are: `fds` by segment number or, if there are none, the bytes `mapped`.

    `segments.reads` counts positional reads.
    """

    mapped: np.ndarray
    fds: np.ndarray


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
        self._items = tuple(self.names.items())
        self._offsets: dict[int, tuple[int, np.ndarray, list[int]]] = {}
        order = {name: j for j, name in enumerate(self.names)}
        columns = max(len(s.stored) for s in schemas)
        self.wanted = np.full((len(schemas), columns), -1, np.int64)
        for version, older in enumerate(schemas):
            for c, name in enumerate(older.stored):
                self.wanted[version, c] = order.get(name, -1)
        self.defaults = np.array(
            [_bits(schema.defaults.get(n, 0), d) for n, d in self.names.items()], np.int64
        )

    def zeros(self, cells: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Room for [cells] values of every column, all 0, and a mask.

        Returns:
          (buffer, offsets [J + 1] of the columns and the mask, the same as a list).
        """
        known = self._offsets.get(cells)
        if known is None:
            lengths = (cells * np.append(self.sizes, 1) + 7) // 8 * 8
            ends = lengths.cumsum()
            known = int(ends[-1]), ends - lengths, (ends - lengths).tolist()
            if len(self._offsets) > 64:
                self._offsets.clear()
            self._offsets[cells] = known
        size, offsets, listed = known
        return np.zeros(size, np.uint8), offsets, listed

    def views(
        self, buffer: np.ndarray, offsets: list[int], shape: tuple[int, ...]
    ) -> dict[str, np.ndarray]:
        """The columns of the buffer in that shape."""
        return {
            name: np.ndarray(shape, dtype, buffer, offset)
            for (name, dtype), offset in zip(self._items, offsets, strict=False)
        }


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
      first: [B] the position of the first row of the oldest part read.
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
    source: Source,
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
      source: where the parts are.
      users, places, sizes: [B] whose newest part lies where; place -1: none.
      limits: [B] rows at positions below are seen.
      befores: [B] rows earlier are seen; None sees all.
      wants: [B] rows wanted at most.
      rights: [B] the cell before which a user's rows end.
      cells: length of every output column; cells that nothing fills are 0.
      follow: whether to go on to older parts.
    Raises:
      DamagedError: a part's bytes are not what was written.
      MissingError: a segment is not there (any more).
    """
    buffer, offsets, listed = layout.zeros(cells)
    found = np.zeros((len(users), FOUND), np.int64)
    befores = np.full(len(users), NEVER) if befores is None else befores
    read_chains(
        source.mapped, source.fds, users, stream, places, sizes, limits, befores, wants, rights,
        follow, layout.wanted, layout.sizes, offsets, layout.defaults, buffer, found,
    )  # fmt: skip
    status, taken, reached, first, previous, previous_bytes, reads = found.T
    source.segments.reads += int(reads.sum())
    if status.any():
        check_status(status, users)
    columns = layout.views(buffer, listed, (cells,))
    return Found(taken, reached, first, previous, previous_bytes, columns)


def read_last_n(
    source: Source,
    layout: Layout,
    stream: int,
    users: np.ndarray,
    places: np.ndarray,
    sizes: np.ndarray,
    rows: np.ndarray,
    n: int,
    before: np.ndarray | None,
    end: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """The last `n` rows of each user's parts: {column: [B, n], "mask": [B, n]}.

    Args:
      users, places, sizes, rows: [B] whose newest part lies where, and rows in all parts.
      before, end: [B] times or positions up to which rows are seen; one of them or neither.
    Raises:
      As `read_rows`.
    """
    shape = len(users), n
    buffer, offsets, listed = layout.zeros(len(users) * n)
    found = np.zeros((len(users), FOUND), np.int64)
    cut = before if before is not None else end if end is not None else _NO_CUT
    failed, reads = read_last(
        source.mapped, source.fds, users, stream, places, sizes, rows, n, cut,
        before is not None, layout.wanted, layout.sizes, offsets, layout.defaults, buffer, found,
    )  # fmt: skip
    source.segments.reads += reads
    if failed:
        check_status(found[:, 0], users)
    out = layout.views(buffer, listed, shape)
    out["mask"] = np.ndarray(shape, bool, buffer, listed[-1])
    return out


def check_status(status: np.ndarray, users: np.ndarray) -> None:
    """Raises what a read's status [B] calls for."""
    if (status == MISSING).any():
        raise MissingError("a segment is missing from the vault")
    damaged = users[status == DAMAGED].tolist()
    raise DamagedError(
        f"the history of user {damaged[0]} is damaged"
        + (f"; so are {len(damaged) - 1} more of the batch" if len(damaged) > 1 else ""),
        tuple(damaged),
    )
