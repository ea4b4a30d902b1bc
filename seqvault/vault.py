"""Vault: the live store of user histories. One writer; any number of readers, anywhere."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from seqvault import log, merging, querying
from seqvault.errors import VaultError
from seqvault.files import File, Files, kill_point
from seqvault.manifest import manifest_stamp, read_manifest, write_manifest
from seqvault.querying import one_user, user_ids
from seqvault.reader import Reader
from seqvault.schema import DEFAULT, TIME, Schema, checked_columns
from seqvault.state import State
from seqvault.writing import BLOCK_ROWS, SEGMENT_BYTES, PartWriter

LOCK = "lock"


class Vault(Reader):
    """A directory of user histories; see the module `seqvault` for the calls in one place.

    Users are integers of 64 bits. A stream is a named sequence of behaviours per user; all streams
    have the columns of one schema. Behaviours are ordered by (time, arrival): a late event takes
    its place by time for whoever reads later.

    Attributes:
      path: its directory.
      writable: whether this is the one writer.
    """

    def __init__(self, path: Path, state: State, files: Files, lock: int | None):
        """Use `create` or `open`."""
        super().__init__(path, state)
        self._files = files
        self._lock_fd = lock
        # Held by whoever writes; `_mutex` only while the state in memory changes, so that reads
        # go on while the disk works.
        self._writing = threading.RLock()
        self._log: File | None = None
        self._parts: PartWriter | None = None
        self._broken: str | None = None
        self.writable = lock is not None
        self.logged = 0  # bytes logged by this writer; with parts and checkpoints: what is written
        self.checkpointed = 0

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
          FileExistsError: there is something at `path`.
          VaultError: the streams' names are not distinct, or there are none.
        """
        path, files = Path(path), files or Files()
        if not streams or len(set(streams)) != len(streams) or len(streams) > 255:
            raise VaultError(f"streams {list(streams)}: 1 to 255 distinct names are needed")
        if block_rows < 1:
            raise VaultError(f"block_rows is {block_rows}; it must be positive")
        path.mkdir(parents=True)
        lock = _locked(path)
        for name in ("index-000000.sv", "carry-000000.log", "log-000000.log"):
            files.open(path / name).close()
        index = bytes(8 * len(streams))
        files.write_whole(path / "index-000000.sv", index)
        write_manifest(files, path, {
            "kind": "vault", "generation": 0, "schemas": [schema.to_json()],
            "streams": list(streams), "segments": {}, "block_rows": int(block_rows),
            "segment_bytes": int(segment_bytes), "log": "log-000000.log",
            "index": merging.file_entry("index-000000.sv", index),
            "carry": [{"file": "carry-000000.log", "bytes": 0}], "previous": None,
        })  # fmt: skip
        files.sync_directory(path.parent)
        return cls(path, State(path), files, lock)._take_over()

    @classmethod
    def open(
        cls, path: str | os.PathLike, *, write: bool = False, files: Files | None = None
    ) -> Vault:
        """Opens the vault at `path`, for reading unless `write`.

        Damaged files are named in `damages`; what does not depend on them is readable.

        Raises:
          VaultError: there is no vault, it cannot be read at all, or (`write`) another process
            writes to it.
        """
        path, files = Path(path), files or Files()
        lock = None
        if write:
            read_manifest(path)  # an error there is better than a lock file in a foreign directory
            lock = _locked(path)
        for attempt in range(10):
            stamp = manifest_stamp(path)
            try:
                vault = cls(path, State(path), files, lock)
                break
            except (VaultError, FileNotFoundError):
                if write or manifest_stamp(path) == stamp or attempt == 9:
                    raise
        vault._stamp = stamp
        return vault._take_over() if write else vault

    def _take_over(self) -> Vault:
        """Makes the state's files ready for writing: what a dead writer did not finish is cut."""
        state = self._state
        self._log = self._files.open(state.log_path)
        if self._log.size > state.log_end:
            self._log.truncate(state.log_end)
        named = {state.log_path.name, state.manifest["index"]["file"]}
        named |= {entry["file"] for entry in state.manifest["carry"]}
        for file in self.path.iterdir():
            stem, number = file.name.rpartition("-")[::2]
            if stem == "blocks" and int(number.removesuffix(".sv")) not in state.committed:
                self._files.remove(file)
            elif stem in ("index", "carry", "log") and file.name not in named:
                if not file.name.endswith(".damaged"):
                    self._files.remove(file)
            elif file.name.endswith(".part"):
                self._files.remove(file)
        segment = max(state.committed, default=1)
        size = state.committed.get(segment, 0)
        self._parts = PartWriter(
            self._files, self.path, segment, size, int(state.manifest["segment_bytes"])
        )
        if any(d.file.startswith("blocks") for d in state.damages):  # never write behind damage
            self._parts.segment, self._parts.size = segment + 1, 0
        return self

    def close(self) -> None:
        """Releases files and the writer's lock; everything acknowledged is in the files."""
        with self._writing, self._mutex:
            for file in (self._log, self._parts):
                if file is not None:
                    file.close()
            self._log = self._parts = None
            self._state.close()
            if self._lock_fd is not None:
                os.close(self._lock_fd)
                self._lock_fd = None
            self.writable = False

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
            only; or the disk is full or fails: then nothing was appended.
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
        columns = checked_columns(self.schema, users, behaviours)
        with self._writing:
            self._must_write()
            state, number = self._state, self._state.stream(stream)
            users = user_ids(users)
            if state.schema.event_id and len(users):
                new = querying.new_events(state, number, users, columns[state.schema.event_id])
                users, columns = users[new], {n: c[new] for n, c in columns.items()}
            if len(users):
                payload = log.append_payload(number, state.schema, users, columns)
                self._logged(log.frame(log.APPEND, payload), sync)
                with self._mutex:
                    state.streams[number].add(users, columns)
            return len(users)

    def _must_write(self) -> None:
        if self._broken:
            raise VaultError(f"{self.path}: {self._broken}; close and open it again")
        if not self.writable:
            raise VaultError(f"{self.path}: open for reading only; use open(path, write=True)")

    def _logged(self, record: bytes, sync: bool) -> None:
        """Puts a record into the log: all of it or, with a VaultError, nothing."""
        try:
            self._log.write(record)
        except OSError as error:
            if self._log.size != self._state.log_end:
                self._broken = f"the log cannot be written ({error})"
            raise VaultError(f"{self._log.path}: {error.strerror}; nothing appended") from error
        kill_point("after_data_write")
        if sync:
            try:
                self._log.sync()
            except OSError as error:  # what a failed fsync leaves is unknown until a reopen
                self._broken = f"the log could not be made durable ({error})"
                raise VaultError(f"{self._log.path}: {error.strerror}; not durable") from error
            kill_point("after_fsync")
        kill_point("before_index")
        self._state.log_end = self._log.size
        self.logged += len(record)

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
        """
        with self._writing:
            self._must_write()
            return merging.merge(self, budget, min_rows)

    def reclaim(self, budget: int | None = None, *, dead: float = 0.6) -> int:
        """Rewrites users out of segments that are dead by more than `dead`, and drops those.

        A user's parts that are older than all in such segments stay in place. The more dead a
        segment may be, the less is written, and the more disk is taken.

        Returns:
          Bytes of parts written, at most about `budget`.
        """
        with self._writing:
            self._must_write()
            return merging.reclaim(self, budget, dead)

    def checkpoint(self, schema: Schema | None = None) -> None:
        """Writes the index and starts a new log, so that opening has little to replay.

        `merge` does so when the log is long. With `schema` the vault goes on under a newer one.
        """
        with self._writing:
            self._must_write()
            merging.checkpoint(self, schema)

    def evolve(self, schema: Schema) -> None:
        """Goes on under a newer schema; what is stored reads as it says. See Schema.version.

        Raises:
          VaultError: the newer schema cannot read what the vault holds.
        """
        self.schema.check_successor(schema)
        self.checkpoint(schema)


def _locked(path: Path) -> int:
    """The writer's lock on a vault; the kernel drops it when the process dies."""
    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise VaultError(f"{path}: another process writes to this vault") from None
    return lock
