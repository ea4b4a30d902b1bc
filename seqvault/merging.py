"""The writer's housekeeping: merging tails, checkpoints, bulk loads."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from seqvault import log, querying
from seqvault.bulk import check_event_ids, user_runs
from seqvault.errors import DamagedError, MissingError, VaultError
from seqvault.files import kill_point
from seqvault.index import ENTRY, Index
from seqvault.manifest import write_manifest
from seqvault.part import NO_PLACE
from seqvault.reading import Found
from seqvault.schema import TIME, Schema, words_of
from seqvault.segments import segment_number
from seqvault.state import State, Stream, index_bytes
from seqvault.writing import kept_rows

if TYPE_CHECKING:
    from seqvault.vault import Vault

GROUP = 256  # users that are read, packed and committed together
_CARRY_ROWS = 1 << 18
_LOG_BYTES = 64 << 20  # a log longer than this, and than a checkpoint, is due for one


def file_entry(name: str, data: bytes) -> dict:
    """What the manifest says of a file."""
    return {"file": name, "bytes": len(data), "crc32": zlib.crc32(data)}


def merge(vault: Vault, budget: int | None, min_rows: int) -> int:
    """See Vault.merge."""
    state, parts = vault._state, vault._parts
    before, damaged = parts.written, set()
    for number, stream in enumerate(state.streams):
        entries = stream.index.entries
        with_tail = np.flatnonzero(entries["tail"])
        counts = stream.tail.counts(entries["tail"][with_tail])
        with_tail, counts = with_tail[counts >= min_rows], counts[counts >= min_rows]
        order = with_tail[np.argsort(-counts, kind="stable")]
        for start in range(0, len(order), GROUP):
            if budget is not None and parts.written - before >= budget:
                break
            users = entries["user"][order[start : start + GROUP]].copy()
            damaged |= commit(vault, number, users)
    if checkpoint_is_due(state):
        checkpoint(vault)
    complain(damaged, "merged")
    return parts.written - before


def complain(damaged: set[int], done: str) -> None:
    """Raises DamagedError if there are users whose damaged histories were left as they are."""
    if damaged:
        users = sorted(damaged)
        raise DamagedError(
            f"the history of user {users[0]} is damaged"
            + (f"; so are {len(users) - 1} more" if len(users) > 1 else "")
            + f"; all others were {done}",
            tuple(users),
        )


def commit(
    vault: Vault, stream: int, users: np.ndarray, moved: np.ndarray | None = None
) -> set[int]:
    """Writes new parts of `users` and commits them; the users left out, as theirs are damaged.

    Their fresh rows stay in the log until the commit is; a crash before leaves unnamed bytes in a
    segment, which the next writer cuts off. `moved` is `_rewrite`'s.
    """
    state, parts = vault._state, vault._parts
    segment, size = parts.segment, parts.size
    try:
        merged, damaged = _rewrite(vault, stream, users, moved)
        if not len(merged):
            return damaged
        parts.flush()
        kill_point("during_merge")
        parts.sync()
        touched = dict(parts.sizes)
        record = log.frame(log.MERGE, log.merge_payload(stream, merged, touched))
    except BaseException as error:
        _cut(vault, segment, size)
        if isinstance(error, OSError):
            raise VaultError(f"{vault.path}: {error.strerror}; nothing was merged") from error
        raise

    def take() -> None:
        state.committed.update(touched)
        state.streams[stream].commit(merged)
        state.open_segments()

    try:
        vault._logged(record, False, take)
    except VaultError:  # and after nothing else: whoever reads the log may have the record
        if not vault._broken:
            _cut(vault, segment, size)
        raise
    parts.sizes = {parts.segment: parts.size}
    return damaged


def _cut(vault: Vault, segment: int, size: int) -> None:
    """Cuts off parts that nothing will name; a writer that cannot must not write behind them."""
    vault._broken = f"segment {segment} was not cut"
    try:
        vault._parts.cut(segment, size)
    except OSError as error:
        vault._broken = f"segment {segment} cannot be cut ({error.strerror})"
    else:
        vault._broken = None


def _rewrite(
    vault: Vault, number: int, users: np.ndarray, moved: np.ndarray | None
) -> tuple[np.ndarray, set[int]]:
    """Writes new parts of `users`, fresh rows included: (entries, users whose parts are damaged).

    Parts that stay as they are in the longer history are left alone, unless a fresh row belongs
    into one, or it is not older than row `moved` [B] of the history.
    """
    state = vault._state
    looked = querying.look_up(state, number, users, None)
    merged, damaged = np.zeros(len(users), ENTRY), set()
    for i, user in enumerate(users.tolist()):
        one, who = looked.part(np.array([i])), users[i : i + 1]
        kept = kept_rows(one.rows[0], one.totals[0], state.block_rows)
        if moved is not None:
            kept = min(kept, int(moved[i]))
        try:
            _, found = querying.together(one, who, None, one.rows - kept)
            if kept and (found.first[0] != kept or _is_late(one, found)):
                kept = 0
                _, found = querying.together(one, who, None, one.rows)
        except (DamagedError, MissingError):
            damaged.add(user)
            continue
        link = (int(found.previous[0]), int(found.previous_bytes[0])) if kept else (NO_PLACE, 0)
        place, size = vault._parts.write_chain(
            words_of(found.columns, state.schema), user, number, state.packing, state.block_rows,
            kept, *link,
        )  # fmt: skip
        merged[i] = (user, place, size, one.totals[0], found.columns[TIME][-1], 0)
    return merged[merged["rows"] > 0], damaged


def _is_late(one: querying.Looked, found: Found) -> bool:
    """Whether a fresh row of the one user may belong before the rows found."""
    fresh = one.fresh.get(TIME, ())
    return len(fresh) > 0 and fresh[0] <= found.columns[TIME][0]


def checkpoint_is_due(state: State) -> bool:
    """Whether the log is long, in itself and against what a checkpoint writes."""
    index = sum(s.index.count for s in state.streams) * ENTRY.itemsize
    tails = sum(s.tail.live for s in state.streams) * 24
    return state.log_end > max(_LOG_BYTES, 2 * (index + tails))


def checkpoint(vault: Vault, schema: Schema | None = None) -> None:
    """See Vault.checkpoint."""
    _checkpoint(vault, vault._state.streams, vault._state.committed, schema)


def _checkpoint(
    vault: Vault, streams: list[Stream], committed: dict[int, int], schema: Schema | None
) -> None:
    """Commits `streams` and `committed` as the vault's next generation."""
    state, files = vault._state, vault._files
    generation = state.manifest["generation"] + 1
    names = {kind: f"{kind}-{generation:06d}" for kind in ("index", "carry", "log")}
    schemas = [*state.schemas.values(), *([schema] if schema else [])]
    index = index_bytes(streams)
    carry = b"".join(
        log.frame(log.APPEND, payload)
        for number, stream in enumerate(streams)
        for payload in _carried(number, stream)
    )
    as_it_is = streams is state.streams and schema is None and not state.damages
    vault._broken = "a checkpoint was left half-way"  # until the writer stands on its files
    try:
        vault._parts.sync()
        files.write_whole(vault.path / f"{names['index']}.sv", index)
        files.write_whole(vault.path / f"{names['carry']}.log", carry)
        files.write_whole(vault.path / f"{names['log']}.log", b"")
        manifest = {
            **state.manifest,
            "generation": generation,
            "schemas": [s.to_json() for s in schemas],
            "segments": {str(s): b for s, b in committed.items()},
            "index": file_entry(f"{names['index']}.sv", index),
            "carry": [{"file": f"{names['carry']}.log", "bytes": len(carry)}],
            "log": f"{names['log']}.log",
            # Whoever has replayed the log has what this holds, unless it holds more.
            "previous": [state.log_path.name, state.log_end] if as_it_is else None,
        }
        write_manifest(files, vault.path, manifest)
    except OSError as error:
        vault._broken = f"a checkpoint failed ({error.strerror})"
        raise VaultError(f"{vault.path}: {error.strerror}; the last checkpoint stays") from error
    vault.checkpointed += len(index) + len(carry)
    try:
        _remove_old(vault, committed)
        _go_on(vault, manifest if as_it_is else None)
    except OSError as error:
        raise VaultError(
            f"{vault.path}: {error.strerror}; the checkpoint is made, but the writer cannot go on"
        ) from error
    vault._broken = None


def _remove_old(vault: Vault, committed: dict[int, int]) -> None:
    """Removes what the last checkpoint had and the one just made has not; damaged files stay."""
    state, files = vault._state, vault._files
    old = [state.log_path.name, state.manifest["index"]["file"]]
    old += [entry["file"] for entry in state.manifest["carry"]]
    damaged = {d.file for d in state.damages}
    for name in old:
        with contextlib.suppress(FileNotFoundError):  # one that was lost is in `damages`
            if name in damaged:  # evidence
                files.rename(vault.path / name, vault.path / f"{name}.damaged")
            else:
                files.remove(vault.path / name)
    kept = {None, vault._parts.segment, *committed}
    for path in [*vault.path.iterdir()]:
        if segment_number(path.name) not in kept:
            files.remove(path)
    files.sync_directory(vault.path)


def _go_on(vault: Vault, manifest: dict | None) -> None:
    """Makes the writer stand on its new checkpoint: `manifest` if all of it is in memory."""
    state, written, logged = vault._state, vault._parts.written, vault._log
    vault._parts.close()
    vault._log = None  # a failure below must not leave a closed file's number behind
    logged.close()
    with vault._mutex:
        if manifest is None or not state.switch_log(manifest):
            damages = [d for d in state.damages if d.file.startswith("blocks")]
            vault._state = State(vault.path)  # before the old one is closed: reads go on
            state.close()
            vault._state.damages += damages
        vault._take_over()
    vault._parts.written = written


def _carried(number: int, stream: Stream) -> Iterable[bytes]:
    """Payloads that put the stream's fresh rows back, in the order of their arrival."""
    entries, tail = stream.index.entries, stream.tail
    numbers = np.flatnonzero(entries["tail"])
    if not len(numbers):
        return
    starts, rows = tail.rows(entries["tail"][numbers])
    users = np.repeat(entries["user"][numbers], np.diff(starts))
    order = np.argsort(rows)
    rows, users = rows[order], users[order]
    for start in range(0, len(rows), _CARRY_ROWS):
        some = slice(start, start + _CARRY_ROWS)
        records = tail.take(rows[some])
        columns = {n: records[n] for n in tail.schema.stored}
        yield log.append_payload(number, tail.schema, users[some], columns)


def bulk_load(vault: Vault, blocks: Iterable[Mapping[str, np.ndarray]], number: int) -> int:
    """See Vault.bulk_load."""
    state, parts = vault._state, vault._parts
    segment, size = parts.segment, parts.size
    stream = state.streams[number]
    entries: list[np.ndarray] = []
    rows = 0
    try:
        for users, edges, columns in user_runs(blocks, state.schema):
            known = stream.index.find(users)
            if (known >= 0).any():
                i = int((known >= 0).argmax())
                error = VaultError(f"user {users[i]} is in the stream already")
                raise error.at_row(rows + int(edges[i]))
            if state.schema.event_id:
                check_event_ids(users, edges, columns[state.schema.event_id], rows)
            words = words_of(columns, state.schema)
            new = np.zeros(len(users), ENTRY)
            for i, user in enumerate(users.tolist()):
                mine = words[:, edges[i] : edges[i + 1]]
                place, length = parts.write_chain(
                    mine, user, number, state.packing, state.block_rows
                )
                new[i] = (user, place, length, mine.shape[1], mine[0, -1], 0)
            entries.append(new)
            rows += words.shape[1]
        parts.sync()
    except BaseException as error:
        _cut(vault, segment, size)
        if isinstance(error, OSError):
            raise VaultError(f"{vault.path}: {error.strerror}; nothing was loaded") from error
        raise
    if rows:
        streams = list(state.streams)
        loaded = np.concatenate([stream.index.entries, *entries])
        streams[number] = Stream(state.schema, Index(loaded), stream.tail)
        _checkpoint(vault, streams, {**state.committed, **parts.sizes}, None)
    return rows
