"""Batched reads of the newest behaviours out of parts, wherever the parts live."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from seqvault.chains import FOUND, read_chains, read_last
from seqvault.errors import DamagedError, MissingError, VaultError
from seqvault.part import NEVER
from seqvault.schema import TIME, Schema
from seqvault.unpacking import DAMAGED, MISSING

_NO_CUT = np.zeros(0, np.int64)
_RECORD_BYTES = 2**31 - 1  # numpy's limit


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
        self._widths = np.array([*(d.itemsize for d in self.names.values()), 1], np.int64)
        self._plans: dict[tuple[int, ...], tuple[np.ndarray, int, np.dtype | None]] = {}
        order = {name: j for j, name in enumerate(self.names)}
        columns = max(len(s.stored) for s in schemas)
        self.wanted = np.full((len(schemas), columns), -1, np.int64)
        for version, older in enumerate(schemas):
            for c, name in enumerate(older.stored):
                self.wanted[version, c] = order.get(name, -1)
        defaults = [_bits(schema.defaults.get(n, 0), d) for n, d in self.names.items()]
        self._defaults = np.array([*defaults, 0], np.int64)

    def zeros(self, *shape: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Room for every column in that shape, all 0, and a mask.

        Returns:
          (buffer, the compiled reads' plan [3, J + 1], {column and "mask": view of the buffer}).
        """
        known = self._plans.get(shape)
        if known is None:
            if len(self._plans) > 64:
                self._plans.clear()
            known = self._plans[shape] = self._plan(shape)
        plan, size, record = known
        buffer = np.zeros(size, np.uint8)
        if record is not None:  # a field is a view at a quarter of what np.ndarray() costs
            whole = np.ndarray((), record, buffer)
            return buffer, plan, {name: whole[name] for name in record.names}
        fields = zip([*self.names, "mask"], [*self.names.values(), bool], plan[0], strict=True)
        return buffer, plan, {n: np.ndarray(shape, d, buffer, int(at)) for n, d, at in fields}

    def _plan(self, shape: tuple[int, ...]) -> tuple[np.ndarray, int, np.dtype | None]:
        """(plan, bytes, a record of the columns and the mask unless it is too long for numpy)."""
        lengths = (math.prod(shape) * self._widths + 7) // 8 * 8
        ends = lengths.cumsum()
        plan, size = np.stack([ends - lengths, self._widths, self._defaults]), int(ends[-1])
        if size > _RECORD_BYTES:
            return plan, size, None
        fields = {**self.names, "mask": np.dtype(bool)}
        record = np.dtype({
            "names": list(fields), "formats": [(dtype, shape) for dtype in fields.values()],
            "offsets": plan[0].tolist(), "itemsize": size,
        })  # fmt: skip
        return plan, size, record


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
    buffer, plan, columns = layout.zeros(cells)
    del columns["mask"]
    found = np.zeros((len(users), FOUND), np.int64)
    befores = np.full(len(users), NEVER) if befores is None else befores
    read_chains(
        source.mapped, source.fds, users, stream, places, sizes, limits, befores, wants, rights,
        follow, layout.wanted, plan, buffer, found,
    )  # fmt: skip
    status, taken, reached, first, previous, previous_bytes, reads = found.T
    source.segments.reads += int(reads.sum())
    if status.any():
        check_status(status, users)
    return Found(taken, reached, first, previous, previous_bytes, columns)


def read_last_n(
    source: Source,
    layout: Layout,
    stream: int,
    users: np.ndarray,
    held: np.ndarray,
    n: int,
    before: np.ndarray | None,
    end: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """The last `n` rows of each user's parts: {column: [B, n], "mask": [B, n]}.

    Args:
      users: [B] user ids.
      held: [3 or more, B] place and bytes of the newest part, and rows in all parts.
      before, end: [B] times or positions up to which rows are seen; one of them or neither.
    Raises:
      As `read_rows`.
    """
    buffer, plan, out = layout.zeros(len(users), n)
    found = np.zeros((len(users), FOUND), np.int64)
    cut = before if before is not None else end if end is not None else _NO_CUT
    failed, reads = read_last(
        source.mapped, source.fds, users, stream, held, n, cut, before is not None,
        layout.wanted, plan, buffer, found,
    )  # fmt: skip
    source.segments.reads += reads
    if failed:
        check_status(found[:, 0], users)
    return out


def check_status(status: np.ndarray, users: np.ndarray) -> None:
    """Raises what a read's status [B] calls for."""
    if (status == MISSING).any():
        missing = tuple(users[status == MISSING].tolist())
        raise MissingError("a segment is missing from the vault", missing)
    damaged = users[status == DAMAGED].tolist()
    raise DamagedError(
        f"the history of user {damaged[0]} is damaged"
        + (f"; so are {len(damaged) - 1} more of the batch" if len(damaged) > 1 else ""),
        tuple(damaged),
    )
