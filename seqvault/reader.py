"""Following and reading a vault: what every process can do, the writer's included."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from seqvault import querying
from seqvault.errors import Damage, MissingError, VaultError
from seqvault.manifest import manifest_stamp, read_manifest
from seqvault.querying import user_ids
from seqvault.schema import DEFAULT, Schema
from seqvault.state import State

_SCAN_USERS = 4096  # whose lengths a scan asks for at a time


class Reader:
    """The reading half of `Vault`, which see; threads may share one.

    Attributes:
      path: the vault's directory.
    """

    @property
    def writable(self) -> bool:
        """Whether this is the one writer."""
        return False

    def __init__(self, path: Path, state: State):
        """Use `Vault.open`."""
        self.path = path
        self._state = state
        self._mutex = threading.RLock()
        self._stamp = manifest_stamp(path)

    @property
    def schema(self) -> Schema:
        return self._state.schema

    @property
    def streams(self) -> tuple[str, ...]:
        return self._state.names

    @property
    def damages(self) -> list[Damage]:
        """What opening and following the vault found damaged; `verify` looks at every byte."""
        return list(self._state.damages)

    def refresh(self) -> None:
        """Takes in what the writer did since the last read; every read does this by itself."""
        with self._mutex:
            self._refresh()

    def _refresh(self) -> None:
        """See `refresh`; for who has the mutex."""
        if self.writable:
            return
        stamp = manifest_stamp(self.path)
        self._state.replay()
        if stamp != self._stamp:
            self._follow(stamp)

    def _follow(self, stamp: tuple[int, int] | None) -> None:
        """Goes on with the checkpoint whose manifest has that stamp, or with a newer one."""
        for attempt in range(10):
            try:
                manifest, _ = read_manifest(self.path)
                if not self._state.switch_log(manifest):
                    old, self._state = self._state, State(self.path)
                    old.close()
                break
            except (VaultError, FileNotFoundError):
                newer = manifest_stamp(self.path)
                if newer == stamp or attempt == 9:
                    raise
                stamp = newer
        self._stamp = stamp
        self._state.replay()

    def last_n(
        self,
        users: np.ndarray,
        n: int,
        *,
        before: np.ndarray | None = None,
        end: np.ndarray | None = None,
        columns: Iterable[str] | None = None,
        stream: str | Sequence[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """The last `n` behaviours of each user, right-aligned, padded with 0 on the left.

        Args:
          users: [B] user ids; one that the vault does not know has no behaviours.
          before: [B] seconds, or one number; behaviours strictly earlier are seen.
          end: [B] positions; behaviours 0 .. end - 1 of the user are seen.
          columns: the columns wanted; all of the schema by default. Time always comes along.
          stream: a stream's name; several: merged by time (ties in the order given), with a column
            "stream" of indices into those given. None: the only stream, or all of them merged.
        Returns:
          {column: [B, n] of the schema's dtype, "time": [B, n] int32, "mask": [B, n] bool}.
        Raises:
          DamagedError: a history's bytes are damaged; its `users` says whose. Others are readable.
          VaultError: a column or stream is unknown, both `end` and `before` are given, an end is
            out of range, or `end` is asked of several streams.
        """
        names = tuple(columns) if columns is not None else None
        querying.check_question(n, before, end)
        users = user_ids(users)
        if stream is None:
            stream = self.streams if len(self.streams) > 1 else self.streams[0]
        if isinstance(stream, str):
            return self._last_n(users, n, before, end, names, stream)
        if end is not None:
            raise VaultError("positions are those of one stream; name it")
        if not len(stream):
            raise VaultError(f"no stream named; the vault has {list(self.streams)}")
        found = [self._last_n(users, n, before, None, names, name) for name in stream]
        return querying.merged_by_time(found, n)

    def _last_n(self, users, n, before, end, names, stream):
        return self._asked(stream, users, names, querying.last_n, n, before, end)

    def _asked(self, stream, users, names, question, *arguments):
        """question(what the state holds of the users, users, ...), read without the lock."""
        while True:
            with self._mutex:
                self._refresh()
                state = self._state
                looked = querying.look_up(state, state.stream(stream), users, names)
            try:
                return question(looked, users, *arguments)
            except MissingError:  # reclaimed meanwhile, if the state is a newer one
                with self._mutex:
                    self._refresh()
                    if self._state is state:
                        raise

    def lengths(self, users: np.ndarray, *, stream: str = DEFAULT) -> np.ndarray:
        """How many behaviours each of `users` [B] has in the stream: [B] int64."""
        users = user_ids(users)
        return self._asked(stream, users, (), lambda looked, _: looked.totals)

    def resolve(
        self, users: np.ndarray, before_time: np.ndarray, *, stream: str = DEFAULT
    ) -> np.ndarray:
        """End positions: how many behaviours of each user are strictly earlier than a time.

        Args:
          users: [B] user ids.
          before_time: [B] seconds, or one number for all.
        Returns:
          [B] int64 in 0 .. length.
        """
        users = user_ids(users)
        return self._asked(stream, users, (), querying.resolve, before_time)

    def users(self, *, stream: str = DEFAULT) -> np.ndarray:
        """Every user of a stream: sorted int64."""
        with self._mutex:
            self._refresh()
            return np.sort(self._state.streams[self._state.stream(stream)].index.entries["user"])

    def scan(
        self,
        *,
        columns: Iterable[str] | None = None,
        stream: str = DEFAULT,
        block_rows: int = 1 << 18,
    ) -> Iterator[dict[str, np.ndarray]]:
        """All behaviours, sorted by (user, time, arrival), in blocks of about `block_rows`.

        Every user is whole in one block. What is appended while the scan runs is seen for users
        that it has not reached.

        Yields:
          {"user": [N] int64, "time": [N] int32, column: [N]}.
        """
        names = tuple(columns) if columns is not None else None
        yield from self._scan(self.users(stream=stream), names, stream, block_rows)

    def _scan(self, users, names, stream, block_rows) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(users), _SCAN_USERS):
            group = users[start : start + _SCAN_USERS]
            lengths = self.lengths(group, stream=stream)
            for first, last in querying.runs(lengths, block_rows):
                yield self._asked(stream, group[first:last], names, querying.whole)

    # --- looking after it

    def verify(self) -> list[Damage]:
        """Reads every byte of the vault's files and names all that is not as written."""
        from seqvault.verification import verify

        return verify(self.path)

    def stats(self) -> dict:
        """Counts and bytes: users, behaviours, fresh ones, index, files, reads, writes."""
        with self._mutex:
            self._refresh()
            return querying.stats(self)

    def snapshot(self, path: str | os.PathLike, *, stream: str = DEFAULT) -> str:
        """Writes the stream as an immutable snapshot for training; its content hash.

        Rows of the snapshot are the users in rising order; `Snapshot.users` gives their ids.
        Later appends, late events among them, never enter it.
        """
        from seqvault.snapshot import bulk_build

        users = self.users(stream=stream)
        blocks = (
            {**block, "user": np.searchsorted(users, block["user"])}
            for block in self._scan(users, None, stream, 1 << 18)  # who comes later is not in it
        )
        return bulk_build(path, self.schema, len(users), blocks, users=users)
