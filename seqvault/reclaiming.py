"""Reclaiming: users are rewritten out of segments that are mostly dead, which then go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from seqvault import querying
from seqvault.errors import Damage, DamagedError, MissingError, VaultError
from seqvault.index import place_of
from seqvault.merging import GROUP, checkpoint, commit, complain
from seqvault.part import NEVER
from seqvault.segments import segment_path
from seqvault.state import State, walk
from seqvault.verification import check_segment

if TYPE_CHECKING:
    from seqvault.vault import Vault


def reclaim(vault: Vault, budget: int | None, dead: float) -> int:
    """See Vault.reclaim."""
    state, parts = vault._state, vault._parts
    if state.log_is_damaged:
        raise VaultError(f"{state.log_path}: damaged, and it may have named what seems dead")
    before = parts.written
    living, damaged = _mostly_dead(vault, dead)
    # Parts of a user older than the oldest one that must go stay where they are, and who has left
    # one of the segments has left them all.
    oldest = {}
    for number in sorted({number for found in living.values() for number in found}):
        some = [found[number] for found in living.values() if number in found]
        users, which = np.unique(np.concatenate([u for u, _ in some]), return_inverse=True)
        first = np.full(len(users), NEVER)
        np.minimum.at(first, which, np.concatenate([f for _, f in some]))
        oldest[number] = users, first, np.zeros(len(users), bool)
    emptied: set[int] = set()
    for segment, found in living.items():
        done = True
        for number, (owners, _) in found.items():
            users, first, gone = oldest[number]
            at = np.searchsorted(users, owners)
            at = at[~gone[at]]
            for start in range(0, len(at), GROUP):
                if budget is not None and parts.written - before >= budget:
                    done = False
                    break
                some = at[start : start + GROUP]
                hurt = commit(vault, number, users[some], first[some])
                gone[some] = ~np.isin(users[some], list(hurt))
                damaged |= hurt
                done &= not hurt
        if done:
            emptied.add(segment)
    if emptied:
        with vault._mutex:
            for segment in emptied:
                del state.committed[segment]
        checkpoint(vault)
    complain(damaged, "moved")
    return parts.written - before


def _mostly_dead(
    vault: Vault, dead: float
) -> tuple[dict[int, dict[int, tuple[np.ndarray, np.ndarray]]], set[int]]:
    """({segment that is dead by more than `dead`: {stream: (users with a living part there, the
    first row of each one's oldest)}}, users whose damaged histories keep a segment).

    A segment with a damaged part is none: what cannot be read may be alive.
    """
    state = vault._state
    closed = {s: b for s, b in state.committed.items() if b and s != vault._parts.segment}
    out, damaged = {}, set()
    for segment, size in sorted(closed.items()):
        written: dict[int, dict[tuple[int, int], int]] = {}  # {stream: {(user, place): bytes}}
        path, problems = segment_path(vault.path, segment), []
        for info in walk(path, size, problems):
            if info.stream >= len(state.streams):
                problems.append(Damage(path.name, info.offset, f"a part of stream {info.stream}"))
                continue
            at = info.user, int(place_of(segment, info.offset))
            written.setdefault(info.stream, {})[at] = info.bytes
        held, found, hurt = 0, {}, set()
        for number, parts in written.items():
            oldest: dict[int, int] = {}
            users = np.unique(np.array([user for user, _ in parts], np.int64))
            for user, place, first in _chains(state, number, users, hurt):
                if (user, place) in parts:
                    held += parts[user, place]
                    oldest[user] = min(first, oldest.get(user, first))
            found[number] = np.array(sorted(oldest.items()), np.int64).reshape(-1, 2).T
        damaged |= hurt
        if hurt or problems or 1 - held / size <= dead:
            continue
        if not check_segment(path, size):
            out[segment] = found
    return out, damaged


def _chains(
    state: State, number: int, users: np.ndarray, damaged: set[int]
) -> Iterator[tuple[int, int, int]]:
    """(user, place, first row) of every part of `users`; adds to `damaged` whose cannot be read."""
    looked = querying.look_up(state, number, users, ())
    at = np.flatnonzero(looked.places >= 0)
    while len(at):
        looked, users = looked.part(at), users[at]
        none = np.zeros(len(users), np.int64)
        try:
            found = looked.read(users, looked.rows, None, none, none, 0, follow=False)
        except (DamagedError, MissingError) as error:
            damaged.update(error.users)
            at = np.flatnonzero(~np.isin(users, error.users))
            continue
        yield from zip(users.tolist(), looked.places.tolist(), found.first.tolist(), strict=True)
        held = np.stack([found.previous, found.previous_bytes, looked.rows])
        looked = looked._replace(held=held)
        at = np.flatnonzero(looked.places >= 0)
