"""Queries on the state of a vault: parts and fresh tails put together."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from seqvault.errors import VaultError
from seqvault.reading import Found, Layout, read_last_n, read_rows
from seqvault.schema import TIME
from seqvault.segments import FileSource
from seqvault.state import State

if TYPE_CHECKING:
    from seqvault.vault import Vault

_FAR = 1 << 62  # seconds
EVERYTHING = np.iinfo(np.int32).max


class Looked(NamedTuple):
    """What the state holds of some users, copied, so that it can be used without its lock.

    Attributes:
      held: [4 or more, B] `places` and `sizes`: the newest part and its bytes; `rows` in all parts;
        and `newest`: their newest time.
      starts: [B + 1] and fresh: {column: [rows]}, the fresh rows of each by (time, arrival);
        `starts` is None if nobody has any.
    """

    source: FileSource
    layout: Layout
    stream: int
    held: np.ndarray
    starts: np.ndarray | None
    fresh: dict[str, np.ndarray]

    @property
    def places(self) -> np.ndarray:
        return self.held[0]

    @property
    def sizes(self) -> np.ndarray:
        return self.held[1]

    @property
    def rows(self) -> np.ndarray:
        return self.held[2]

    @property
    def newest(self) -> np.ndarray:
        return self.held[3]

    @property
    def totals(self) -> np.ndarray:
        """[B] behaviours of each."""
        return self.rows if self.starts is None else self.rows + np.diff(self.starts)

    def part(self, which: np.ndarray) -> Looked:
        """The same of the users at positions `which`."""
        starts, fresh = self.starts, self.fresh
        if starts is not None:
            counts = np.diff(starts)[which]
            starts = np.concatenate([[0], np.cumsum(counts)])
            rows = np.repeat(self.starts[:-1][which] - starts[:-1], counts) + np.arange(starts[-1])
            fresh = {name: values[rows] for name, values in fresh.items()}
        return self._replace(held=self.held.take(which, 1), starts=starts, fresh=fresh)

    def read(self, users, limits, befores, wants, rights, cells, follow=True) -> Found:
        """`reading.read_rows` of these users' parts."""
        return read_rows(
            self.source, self.layout, self.stream, users, self.places, self.sizes, limits,
            befores, wants, rights, cells, follow,
        )  # fmt: skip


def look_up(state: State, stream: int, users: np.ndarray, names: tuple[str, ...] | None) -> Looked:
    """What the state holds of `users` [B]; columns `names` (None: all) of the fresh rows."""
    layout = state.layout(names)
    tail = state.streams[stream].tail
    held, any_fresh = state.streams[stream].index.look_up(users)
    starts, fresh = None, {}
    if any_fresh:
        starts, numbers = tail.rows(held[4])
        records = tail.take(numbers)
        fresh = {name: records[name] for name in layout.names}
    return Looked(state.segments.source, layout, stream, held, starts, fresh)


def last_n(
    looked: Looked,
    users: np.ndarray,
    n: int,
    before: np.ndarray | None,
    end: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """See Vault.last_n."""
    if before is not None:
        before = times_of(before, users)
    elif end is not None:
        end = checked_ends(users, looked.totals, end)
    if looked.starts is None:
        return read_last_n(
            looked.source, looked.layout, looked.stream, users, looked.held, n, before, end
        )
    batch = len(users)
    limits = looked.rows
    if before is None:
        end = looked.totals if end is None else end
        limits = np.minimum(looked.rows, end)
    cells = np.arange(batch) * n
    if before is not None:
        seen_fresh = _fresh_before(looked, before)
    else:
        seen_fresh = np.maximum(end - looked.rows, 0)
    late = _late(looked)
    fresh_wanted = np.minimum(seen_fresh, n)
    if late is not None:
        fresh_wanted[late] = n  # nothing is read from their parts here
    rights = cells + n - fresh_wanted
    found = looked.read(users, limits, before, n - fresh_wanted, rights, batch * n)
    taken = found.taken + fresh_wanted
    if late is not None:
        fresh_wanted[late] = taken[late] = 0
    total = int(fresh_wanted.sum())
    if total:  # the newest of each user's fresh rows that are seen, behind the parts' rows
        last = np.cumsum(fresh_wanted)
        inner = np.arange(total) - np.repeat(last - fresh_wanted, fresh_wanted)
        source = np.repeat(looked.starts[:-1] + seen_fresh - fresh_wanted, fresh_wanted) + inner
        target = np.repeat(rights, fresh_wanted) + inner
        for name, values in found.columns.items():
            values[target] = looked.fresh[name][source]
    out = {name: values.reshape(batch, n) for name, values in found.columns.items()}
    if late is not None:
        cut = before[late] if before is not None else end[late]
        _last_n_late(looked.part(late), users[late], n, cut, before is not None, out, taken, late)
    out["mask"] = np.arange(n) >= n - taken[:, None]
    return out


def _fresh_before(looked: Looked, before: np.ndarray) -> np.ndarray:
    """[B] how many of each user's fresh rows are earlier."""
    if looked.starts is None:
        return np.zeros(len(before), np.int64)
    earlier = looked.fresh[TIME] < np.repeat(before, np.diff(looked.starts))
    return np.diff(np.concatenate([[0], np.cumsum(earlier)])[looked.starts])


def _late(looked: Looked) -> np.ndarray | None:
    """Positions of users with a fresh row that belongs before one in their parts; None: nobody."""
    if looked.starts is None:
        return None
    counts = np.diff(looked.starts)
    some = np.flatnonzero((counts > 0) & (looked.places >= 0))
    late = some[looked.fresh[TIME][looked.starts[some]] < looked.newest[some]]
    return late if len(late) else None


def _last_n_late(looked, users, n, cut, by_time, out, taken, positions) -> None:
    """Fills rows `positions` of `out`, whose fresh rows must be sorted in among their parts'."""
    if by_time:
        befores, skips = cut, np.zeros(len(users), np.int64)
    else:
        befores, skips = None, looked.totals - cut
    wants = np.minimum(looked.rows, n + skips)
    starts, found = together(looked, users, befores, wants)
    columns = found.columns
    for i, position in enumerate(positions.tolist()):
        a, b = int(starts[i]), int(starts[i + 1])
        if by_time:
            b = a + int(np.searchsorted(columns[TIME][a:b], cut[i]))
        else:
            b = max(a, b - int(skips[i]))
        a = max(a, b - n)
        taken[position] = b - a
        for name, values in columns.items():
            out[name][position, n - (b - a) :] = values[a:b]


def together(
    looked: Looked, users: np.ndarray, befores: np.ndarray | None, wants: np.ndarray
) -> tuple[np.ndarray, Found]:
    """(starts [B + 1], found): the last `wants` rows of parts and all fresh ones, by time."""
    if befores is None:
        taken = np.minimum(wants, looked.rows)
    else:
        taken = np.minimum(wants, resolve_parts(looked, users, befores))
    counts = looked.totals - looked.rows
    starts = np.concatenate([[0], np.cumsum(taken + counts)])
    rights = starts[1:] - counts
    found = looked.read(users, looked.rows, befores, taken, rights, int(starts[-1]))
    if looked.starts is None:
        return starts, found
    target = np.repeat(rights - looked.starts[:-1], counts)
    target += np.arange(looked.starts[-1])
    for name, values in found.columns.items():
        values[target] = looked.fresh[name]
    late = _late(looked)
    if late is not None:
        for i in late.tolist():
            mine = slice(int(starts[i]), int(starts[i + 1]))
            order = np.argsort(found.columns[TIME][mine], kind="stable")
            for values in found.columns.values():
                values[mine] = values[mine][order]
    return starts, found


def resolve_parts(looked: Looked, users: np.ndarray, before: np.ndarray) -> np.ndarray:
    """[B] how many rows of each user's parts are earlier than `before` [B]."""
    none = np.zeros(len(users), np.int64)
    return looked.read(users, looked.rows, before, none, none, 0).reached


def resolve(looked: Looked, users: np.ndarray, before: np.ndarray) -> np.ndarray:
    """See Vault.resolve."""
    before = times_of(before, users)
    return resolve_parts(looked, users, before) + _fresh_before(looked, before)


def user_ids(users: np.ndarray) -> np.ndarray:
    """`users` as [B] int64; unsigned numbers of 64 bits keep their bits.

    Raises:
      VaultError: they are not a vector of integers.
    """
    users = np.asarray(users)
    if users.ndim != 1 or (users.dtype.kind not in "iu" and users.size):
        raise VaultError(f"users must be a vector of integers, not {users.dtype}{users.shape}")
    return np.ascontiguousarray(users, np.int64)


def one_user(user: int) -> np.int64:
    """One user id as int64. Raises VaultError if it is no number of 64 bits."""
    try:
        user = operator.index(user)
    except TypeError:
        raise VaultError(f"user {user!r} is not an integer") from None
    if not -(1 << 63) <= user < 1 << 64:
        raise VaultError(f"user {user} is no number of 64 bits")
    return np.uint64(user).astype(np.int64) if user >= 1 << 63 else np.int64(user)


def check_question(n: int, before: np.ndarray | None, end: np.ndarray | None) -> None:
    """Raises VaultError unless `last_n` can be asked so, of any kind of store."""
    if end is not None and before is not None:
        raise VaultError("give `end` or `before`, not both")
    if not isinstance(n, (int, np.integer)):
        raise VaultError(f"n is {n!r}; it must be an integer")
    if n < 0:
        raise VaultError(f"n is {n}; it must not be negative")


def times_of(before: np.ndarray, users: np.ndarray) -> np.ndarray:
    """`before` as [B] int64: of seconds that are not whole the next, as times are whole.

    Raises:
      VaultError: it is not made of numbers, or not one for each user.
    """
    before = np.asarray(before)
    if before.dtype.kind == "u":
        before = np.minimum(before.astype(np.uint64), np.uint64(_FAR))  # or it would wrap
    if before.dtype.kind == "f":
        if np.isnan(before).any():
            raise VaultError("a time in `before` is not a number")
        before = np.clip(np.ceil(before), -_FAR, _FAR)
    elif before.dtype.kind not in "iu" and before.size:
        raise VaultError(f"`before` must be seconds, not {before.dtype}")
    if before.shape != users.shape:
        before = per_user("before", before, len(users))
    return before.astype(np.int64)


def per_user(name: str, values: np.ndarray, batch: int) -> np.ndarray:
    """`values` as [batch]; one number is everybody's. Raises VaultError if there are others."""
    values = np.asarray(values)
    if values.size != 1 and values.shape != (batch,):
        raise VaultError(f"`{name}` has shape {values.shape}, there are {batch} users")
    return np.broadcast_to(values.reshape(-1), (batch,))


def checked_ends(users: np.ndarray, totals: np.ndarray, end: np.ndarray) -> np.ndarray:
    """`end` as [B] int64. Raises VaultError if one is no position of its user."""
    end = np.asarray(end)
    if end.dtype.kind not in "iu" and end.size:
        raise VaultError(f"`end` must be positions, not {end.dtype}")
    end = per_user("end", end, len(users)).astype(np.int64)
    bad = (end < 0) | (end > totals)
    if bad.any():
        i = int(bad.argmax())
        raise VaultError(
            f"end {end[i]} is not a position of user {users[i]}, who has {totals[i]} behaviours"
        )
    return end


def merged_by_time(found: Sequence[dict[str, np.ndarray]], n: int) -> dict[str, np.ndarray]:
    """The last n of several right-aligned reads, by time; ties in the order of the reads."""
    joined = {name: np.concatenate([f[name] for f in found], 1) for name in found[0]}
    # Padding first, then by time; a stable sort keeps ties in order.
    key = np.where(joined["mask"], joined[TIME].astype(np.int64), np.iinfo(np.int64).min)
    order = np.argsort(key, axis=1, kind="stable")[:, key.shape[1] - n :]
    out = {name: np.take_along_axis(values, order, 1) for name, values in joined.items()}
    out["stream"] = (order // max(n, 1)).astype(np.uint8) * out["mask"]
    return out


def runs(lengths: np.ndarray, block_rows: int) -> Iterator[tuple[int, int]]:
    """Users first .. last - 1 of each block of about `block_rows` rows, one user at least."""
    ends = np.cumsum(lengths)
    first, done = 0, 0
    while first < len(lengths):
        last = max(first + 1, int(np.searchsorted(ends, done + block_rows, side="right")))
        yield first, last
        first, done = last, int(ends[last - 1])


def whole(looked: Looked, users: np.ndarray) -> dict[str, np.ndarray]:
    """All behaviours of the users, one after the other; see Vault.scan."""
    starts, found = together(looked, users, None, looked.rows)
    return {"user": np.repeat(users, np.diff(starts)), **found.columns}


def new_events(state: State, stream: int, users: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """[N] bool: whether each row's event id is new to its user; of equal ones the first is."""
    name = state.schema.event_id
    who, which = np.unique(users, return_inverse=True)
    looked = look_up(state, stream, who, (name,))
    starts, found = together(looked, who, None, looked.rows)
    new = np.ones(len(users), bool)
    order = np.argsort(which, kind="stable")
    edges = np.searchsorted(which[order], np.arange(len(who) + 1))
    for i in range(len(who)):
        known = found.columns[name][starts[i] : starts[i + 1]]
        mine = order[edges[i] : edges[i + 1]]
        new[mine] = first_unknown(ids[mine], known)
    return new


def first_unknown(ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    """[N] bool: whether each of `ids` is not among the `known` ones, nor earlier in `ids`."""
    first = np.zeros(len(ids), bool)
    first[np.unique(ids, return_index=True)[1]] = True
    return first & ~np.isin(ids, known)


def stats(vault: Vault) -> dict:
    """See Vault.stats."""
    state = vault._state
    files = {}
    for file in vault.path.iterdir():
        with contextlib.suppress(FileNotFoundError):  # a checkpoint removes some meanwhile
            files[file.name] = file.stat().st_size
    blocks = sum(size for name, size in files.items() if name.startswith("blocks"))
    streams = {}
    for name, stream in zip(state.names, state.streams, strict=True):
        entries = stream.index.entries
        streams[name] = {
            "users": stream.index.count,
            "behaviours": int(entries["rows"].sum(dtype=np.int64)) + stream.tail.live,
            "fresh_behaviours": stream.tail.live,
            "index_bytes": stream.index.nbytes,
            "index_bytes_per_user": stream.index.nbytes / max(stream.index.count, 1),
            "tail_bytes": stream.tail.nbytes,
            "newest_parts_bytes": int(entries["bytes"].sum(dtype=np.int64)),
        }
    return {
        "streams": streams,
        "generation": state.manifest["generation"],
        "schema": state.schema.to_json(),
        "files": files,
        "block_bytes": blocks,
        "log_bytes": state.log_end,
        "disk_bytes": sum(files.values()),
        "preads": state.segments.reads,
        "written_bytes": {
            "log": vault.logged,
            "parts": vault._parts.written if vault._parts else 0,
            "checkpoints": vault.checkpointed,
        },
        "damages": [str(d) for d in vault.damages],
    }
