"""Vault: the live store of user histories. One writer; any number of readers, anywhere."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from seqvault import log, merging, querying, reclaiming
from seqvault.errors import VaultError
from seqvault.files import File, Files, kill_point
from seqvault.lock import LOCK, WriterLock
from seqvault.manifest import manifest_stamp, read_manifest, repair_copies, write_manifest
from seqvault.querying import one_user, user_ids
from seqvault.reader import Reader
from seqvault.schema import DEFAULT, TIME, Schema, check_evolution, checked_columns
from seqvault.segments import segment_path
from seqvault.state import State
from seqvault.writing import BLOCK_ROWS, SEGMENT_BYTES, PartWriter, check_sizes

_INITIAL = ("index-000000.sv", "carry-000000.log", "log-000000.log")
# What the writer makes and may remove; anything else in the directory is somebody's.
_MADE = re.compile(r"(blocks|index|carry|log)-\d{6,}\.(sv|log)")
_PART = re.compile(r"((index|carry|log)-\d{6,}\.(sv|log)|MANIFEST|MANIFEST\.copy)\.part")


class Vault(Reader):
    """A directory of user histories; see the module `seqvault` for the calls in one place.

    Users are integers of 64 bits. A stream is a named sequence of behaviours per user; all streams
    have the columns of one schema. Behaviours are ordered by (time, arrival): a late event takes
    its place by time for whoever reads later.

    Attributes:
      path: its directory.
    """

    def __init__(self, path: Path, state: State, files: Files, lock: WriterLock | None):
        """Use `create` or `open`."""
        super().__init__(path, state)
        self._files = files
        self._lock = lock
        # Held by whoever writes; `_mutex` only while the state in memory changes, so that reads
        # go on while the disk works.
        self._writing = threading.RLock()
        self._log: File | None = None
        self._parts: PartWriter | None = None
        self._broken: str | None = None
        self.logged = 0  # bytes logged by this writer; with parts and checkpoints: what is written
        self.checkpointed = 0

    @property
    def writable(self) -> bool:
        """Whether this is the one writer; in a fork of its process it is a reader."""
        return self._lock is not None and self._lock.mine

    # --- opening and closing

    @classmethod
    def create(
        cls,
        path: str | os.PathLike,
        schema: Schema,
        streams: Sequence[str] = (DEFAULT,),
        *,
        block_rows: int = BLOCK_ROWS,
        segment_bytes: int = SEGMENT_BYTES,
        files: Files | None = None,
    ) -> Vault:
        """Makes an empty vault at `path` and opens it for writing.

        Args:
          schema: the columns of a behaviour.
          streams: names of the behaviour streams.
          block_rows: reads of up to this many behaviours take one positional read at most.
          segment_bytes: a segment file is closed when it is this long.
          files: the file layer; tests pass their own.
        Raises:
          FileExistsError: there is something at `path`, other than what a creation left that died.
          VaultError: the streams' names are not distinct, or there are none; a size is not
            possible; or another process is creating this vault.
        """
        path, files = Path(path), files or Files()
        if isinstance(streams, str):
            raise VaultError(f"streams must be a sequence of names, not {streams!r}")
        if not streams or len(set(streams)) != len(streams) or len(streams) > 255:
            raise VaultError(f"streams {list(streams)}: 1 to 255 distinct names are needed")
        check_sizes(block_rows, segment_bytes)
        files.make_directory(path)
        _must_be_vacant(path)
        index_file, carry_file, log_file = _INITIAL
        index = bytes(8 * len(streams))

        def write_files() -> None:
            _must_be_vacant(path)  # still: another creation may have ended meanwhile
            for name in _INITIAL:
                files.open(path / name).close()
            files.write_whole(path / index_file, index)
            write_manifest(files, path, {
                "kind": "vault", "generation": 0, "schemas": [schema.to_json()],
                "streams": list(streams), "segments": {}, "block_rows": int(block_rows),
                "segment_bytes": int(segment_bytes), "log": log_file,
                "index": merging.file_entry(index_file, index),
                "carry": [{"file": carry_file, "bytes": 0}], "previous": None,
            })  # fmt: skip
            files.sync_directory(path.parent)  # a creation that died may have made `path`

        return cls._as_writer(path, files, write_files)

    @classmethod
    def open(
        cls, path: str | os.PathLike, *, write: bool = False, files: Files | None = None
    ) -> Vault:
        """Opens the vault at `path`, for reading unless `write`.

        Damaged files are named in `damages`; what does not depend on them is readable. The index,
        the carried rows, segments and one of the two manifests may be lost; the log may be damaged.

        Raises:
          VaultError: there is no vault, both manifests or the whole log are lost, or (`write`)
            another process writes to it.
        """
        path, files = Path(path), files or Files()
        if write:
            read_manifest(path)  # an error there is better than a lock file in a foreign directory
            return cls._as_writer(path, files)
        for attempt in range(10):
            stamp = manifest_stamp(path)
            try:
                vault = cls(path, State(path), files, None)
                break
            except (VaultError, FileNotFoundError):
                if manifest_stamp(path) == stamp or attempt == 9:
                    raise
        vault._stamp = stamp
        return vault

    @classmethod
    def _as_writer(
        cls, path: Path, files: Files, prepare: Callable[[], None] | None = None
    ) -> Vault:
        """The vault at `path`, locked, after `prepare`; on an error nothing stays open."""
        lock = WriterLock(path)
        with contextlib.ExitStack() as undo:
            undo.callback(lock.release)
            if prepare:
                prepare()
            state = State(path)
            undo.callback(state.close)
            repair_copies(files, path)  # a copy of another checkpoint names files that are to go
            vault = cls(path, state, files, lock)
            undo.callback(vault._close_files)
            vault._take_over()
            undo.pop_all()
        return vault

    def _take_over(self) -> None:
        """Makes the state's files ready for writing: what a dead writer did not finish is cut."""
        state = self._state
        self._log = self._files.open(state.log_path)
        if self._log.size > state.log_end:
            if self._log.size != state.log_seen:  # never cut what nobody has looked at
                raise VaultError(
                    f"{state.log_path}: {state.log_seen} of {self._log.size} bytes could be read"
                )
            self._log.truncate(state.log_end)
        named = {state.log_path.name, state.manifest["index"]["file"]}
        named |= {entry["file"] for entry in state.manifest["carry"]}
        named |= {segment_path(self.path, segment).name for segment in state.committed}
        for file in [*self.path.iterdir()]:
            made = _MADE.fullmatch(file.name) and file.name not in named
            if made or _PART.fullmatch(file.name):
                self._files.remove(file)
        segment = max(state.committed, default=1)
        size = state.committed.get(segment, 0)
        self._parts = PartWriter(
            self._files, self.path, segment, size, int(state.manifest["segment_bytes"])
        )
        # Never write behind damage, nor where parts may be that a lost record named.
        if state.log_is_damaged or any(d.file.startswith("blocks") for d in state.damages):
            self._parts.segment, self._parts.size = segment + 1, 0

    def close(self) -> None:
        """Releases files and the writer's lock; everything acknowledged is in the files."""
        with self._writing, self._mutex:
            self._close_files()
            self._state.close()
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def _close_files(self) -> None:
        for file in (self._log, self._parts):
            if file is not None:
                file.close()
        self._log = self._parts = None

    def __enter__(self) -> Vault:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def __repr__(self) -> str:
        mode = "writer" if self.writable else "reader"
        return f"Vault({str(self.path)!r}, {mode}, streams {list(self.streams)})"

    # --- writing

    def append(
        self,
        user: int,
        behaviours: Mapping[str, np.ndarray],
        *,
        stream: str = DEFAULT,
        sync: bool = False,
    ) -> int:
        """Appends behaviours of one user; they can be read when this returns.

        Args:
          behaviours: {"time": [N] int32 seconds, column: [N] ...}, all columns of the schema; one
            behaviour may be given as numbers.
          stream: the stream's name.
          sync: True: what this acknowledges survives a power loss; False: the death of the process.
        Returns:
          How many were appended: all, less those whose event id the user already has.
        Raises:
          VaultError: a column is missing or a value does not fit; the vault is open for reading
            only; or the disk is full or fails: then nothing was appended. But if it says "not
            durable", an fsync failed, and whether the behaviours are there is unknown until the
            vault is opened again; the same holds for an interrupt (KeyboardInterrupt). Both leave
            a writer that must be closed and opened again; without event ids, look before you retry.
        """
        behaviours = {name: np.atleast_1d(values) for name, values in behaviours.items()}
        rows = len(behaviours.get(TIME, ()))
        users = np.full(rows, one_user(user))
        return self.append_many(users, behaviours, stream=stream, sync=sync)

    def append_many(
        self,
        users: np.ndarray,
        behaviours: Mapping[str, np.ndarray],
        *,
        stream: str = DEFAULT,
        sync: bool = False,
    ) -> int:
        """Appends row i of `behaviours` to user `users[i]`: all of them or, on an error, none.

        See `append`.
        """
        users = user_ids(users)
        with self._writing:
            self._must_write()
            state, number = self._state, self._state.stream(stream)
            columns = checked_columns(state.schema, users, behaviours)  # `evolve` may change it
            if state.schema.event_id and len(users):
                new = querying.new_events(state, number, users, columns[state.schema.event_id])
                users, columns = users[new], {n: c[new] for n, c in columns.items()}
            if len(users):
                payload = log.append_payload(number, state.schema, users, columns)
                record = log.frame(log.APPEND, payload)
                self._logged(record, sync, lambda: state.streams[number].add(users, columns))
            elif sync:  # all of it is there, but maybe from an append that did not sync
                self._sync_log()
            return len(users)

    def _must_write(self) -> None:
        if self._state.closed:
            raise VaultError(f"{self.path}: closed")
        if self._lock is not None and not self._lock.mine:
            raise VaultError(
                f"{self.path}: process {self._lock.pid} writes to this vault, and this is a fork "
                "of it; its forks can only read"
            )
        if self._broken:
            raise VaultError(f"{self.path}: {self._broken}; close and open it again")
        if not self.writable:
            raise VaultError(f"{self.path}: open for reading only; use open(path, write=True)")

    def _logged(self, record: bytes, sync: bool, take: Callable[[], None]) -> None:
        """Puts a record into the log and, by `take`, into memory: both or, with a VaultError, none.

        Whatever else ends this (an interrupt) leaves a writer that knows that it is broken.
        """
        self._broken = "a record was left half-way"
        try:
            self._log.write(record)
        except OSError as error:
            whole = self._log.size == self._state.log_end
            self._broken = None if whole else f"the log cannot be written ({error})"
            raise VaultError(f"{self._log.path}: {error.strerror}; nothing appended") from error
        kill_point("after_data_write")
        if sync:
            self._sync_log()
            kill_point("after_fsync")
        kill_point("before_index")
        with self._mutex:
            self._state.log_end = self._log.size
            take()
        self.logged += len(record)
        self._broken = None

    def _sync_log(self) -> None:
        try:
            self._log.sync()
        except OSError as error:  # what a failed fsync leaves is unknown until a reopen
            self._broken = f"the log could not be made durable ({error})"
            raise VaultError(f"{self._log.path}: {error.strerror}; not durable") from error

    def bulk_load(
        self, blocks: Iterable[Mapping[str, np.ndarray]], *, stream: str = DEFAULT
    ) -> int:
        """Loads sorted columns of users that the stream does not have; see `bulk.load`.

        Args:
          blocks: dicts of equally long columns: `user` (not decreasing), `time` (not decreasing
            within a user) and all columns of the schema.
        Returns:
          Behaviours loaded. All of them are committed, durably, at the end; or, on an error, none.
        Raises:
          VaultError: as `append`; the columns are not sorted; a user is there already.
        """
        with self._writing:
            self._must_write()
            return merging.bulk_load(self, blocks, self._state.stream(stream))

    def merge(self, budget: int | None = None, *, min_rows: int = 1) -> int:
        """Moves fresh tails into parts, the longest first: one bounded step.

        Args:
          budget: stops when this many bytes of parts are written; None merges all.
          min_rows: leaves tails shorter than this where they are: a tail costs the rewriting of
            the newest part at least, up to twice `block_rows` behaviours, however short it is.
        Returns:
          Bytes of parts written; 0 when there was nothing to do.
        Raises:
          VaultError: as `append`. The fresh tails then stay where they are.
          DamagedError: parts of `users` are damaged; all others were merged.
        """
        with self._writing:
            self._must_write()
            return merging.merge(self, budget, min_rows)

    def reclaim(self, budget: int | None = None, *, dead: float = 0.6) -> int:
        """Rewrites users out of segments that are dead by more than `dead`, and drops those.

        A user's parts that are older than all in such segments stay in place. The more dead a
        segment may be, the less is written, and the more disk is taken. A segment with a damaged
        part is left alone.

        Returns:
          Bytes of parts written, at most about `budget`.
        Raises:
          VaultError: as `append`; or the log is damaged: what it lost may have named parts that
            look dead. `checkpoint` gives such a log up.
          DamagedError: parts of `users` are damaged; segments that hold theirs stay as they are.
        """
        with self._writing:
            self._must_write()
            return reclaiming.reclaim(self, budget, dead)

    def checkpoint(self, schema: Schema | None = None) -> None:
        """Writes the index and starts a new log, so that opening has little to replay.

        `merge` does so when the log is long. With `schema` the vault goes on under a newer one, as
        `evolve` says.
        """
        with self._writing:
            self._must_write()
            if schema is not None:
                check_evolution([*self._state.schemas.values()], schema)
            merging.checkpoint(self, schema)

    def evolve(self, schema: Schema) -> None:
        """Goes on under a newer schema; what is stored reads as it says. See Schema.version.

        Raises:
          VaultError: the newer schema cannot read what the vault holds.
        """
        self.checkpoint(schema)


def _must_be_vacant(path: Path) -> None:
    """Raises FileExistsError unless `path` is empty or has what a creation leaves that dies."""
    for file in path.iterdir():
        initial = file.name == LOCK or _PART.fullmatch(file.name)
        if file.name in _INITIAL:  # only the index gets content before there is a manifest
            initial = file.name == _INITIAL[0] or not file.stat().st_size
        if not initial:
            raise FileExistsError(f"{path} exists and holds {file.name}")
