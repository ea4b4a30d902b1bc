"""Sorted columns, checked and cut into users: what bulk loads take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from seqvault.errors import VaultError
from seqvault.schema import TIME, Schema, check_values

USER = "user"


def user_runs(
    blocks: Iterable[Mapping[str, np.ndarray]], schema: Schema
) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]]:
    """Whole users of sorted columns: (users [U], edges [U + 1], columns [rows]).

    Args:
      blocks: dicts of equally long one-dimensional arrays, one per column of the schema, plus
        `user` (not decreasing) and `time` (seconds, not decreasing within a user).
    Raises:
      VaultError: a block lacks a column or has a wrong type; a value does not fit its column;
        users are not sorted or times decrease. The message names user, position and value, and
        `row` is that of the input.
    """
    carry: dict[str, np.ndarray] | None = None
    row = 0  # of the input, where the carried rows start
    for block in blocks:
        block = _checked(block, schema, row + (len(carry[USER]) if carry else 0))
        if not len(block[USER]):
            continue
        if carry is not None:
            block = {n: np.concatenate([carry[n], c]) for n, c in block.items()}
        _check_order(block, row)
        users = block[USER]
        edges = np.flatnonzero(np.concatenate([[True], users[1:] != users[:-1]]))
        last = int(edges[-1])  # the last user may go on in the next block
        carry = {n: c[last:].copy() for n, c in block.items()}
        if last:
            done = {n: c[:last] for n, c in block.items()}
            yield done.pop(USER)[edges[:-1]], edges, done
        row += last
    if carry is not None:
        users = carry.pop(USER)
        yield users[:1], np.array([0, len(users)]), carry


def check_event_ids(users: np.ndarray, edges: np.ndarray, ids: np.ndarray, row: int) -> None:
    """Raises VaultError if a user has an event id twice: a bulk load drops nothing.

    `row` is that of the input where `ids` start.
    """
    owners = np.repeat(np.arange(len(users)), np.diff(edges))
    order = np.lexsort([ids, owners])
    ids, owners = ids[order], owners[order]
    twice = (ids[1:] == ids[:-1]) & (owners[1:] == owners[:-1])
    if twice.any():
        i = int(twice.argmax())
        raise VaultError(f"user {users[owners[i]]} has the event id {ids[i]} twice").at_row(
            row + int(order[i + 1])
        )


def _checked(block: Mapping[str, np.ndarray], schema: Schema, row: int) -> dict[str, np.ndarray]:
    """The block's columns in their schema types."""
    wanted = {USER: np.dtype(np.int64), **schema.stored}
    if set(block) != set(wanted):
        raise VaultError(
            f"block at row {row} has columns {sorted(block)}, the schema wants {sorted(wanted)}"
        ).at_row(row)
    columns = {}
    for name, dtype in wanted.items():
        values = np.asarray(block[name])
        if values.ndim != 1 or len(values) != len(block[USER]):
            raise VaultError(
                f"block at row {row}: column {name!r} has shape {values.shape}, "
                f"user has {np.shape(block[USER])}"
            ).at_row(row)
        try:
            check_values(name, values, dtype)
        except VaultError as error:
            at = error.row
            where = f"block at row {row}" if at is None else _where(block[USER], at, row)
            raise VaultError(f"{where}: {error}").at_row(row + (at or 0)) from None
        columns[name] = values.astype(dtype, copy=False)
    return columns


def _where(users: np.ndarray, at: int, row: int) -> str:
    position = int(np.count_nonzero(users[:at] == users[at]))
    return f"user {users[at]}, position {position} of the block (input row {row + at})"


def _check_order(block: Mapping[str, np.ndarray], row: int) -> None:
    users, times = block[USER], block[TIME]
    bad = users[1:] < users[:-1]
    if bad.any():
        i = int(bad.argmax()) + 1
        raise VaultError(
            f"{_where(users, i, row)}: users must be sorted, but user {users[i]} comes after user "
            f"{users[i - 1]}"
        ).at_row(row + i)
    bad = (users[1:] == users[:-1]) & (times[1:] < times[:-1])
    if bad.any():
        i = int(bad.argmax()) + 1
        raise VaultError(
            f"{_where(users, i, row)}: times must not decrease, but time {times[i]} comes after "
            f"{times[i - 1]}"
        ).at_row(row + i)
