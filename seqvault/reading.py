"""Batched reads of the newest behaviours out of parts, wherever the parts live."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from seqvault.errors import DamagedError, MissingError, VaultError
from seqvault.part import DAMAGED, FOUND, MISSING, NEVER, read_chains
from seqvault.schema import TIME, Schema


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
    buffer, offsets, columns = layout.zeros(cells)
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
    return Found(taken, reached, first, previous, previous_bytes, columns)


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
