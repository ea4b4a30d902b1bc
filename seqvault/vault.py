"""Vault: batched reads of user histories from a memory-mapped snapshot."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from seqvault.errors import VaultError
from seqvault.manifest import OFFSETS, read_manifest, sha256_of
from seqvault.schema import TIME, Schema


def open(path: str | os.PathLike) -> Vault:
    """Opens the snapshot at `path` for reading; files are mapped, not read.

    Raises:
      VaultError: there is no whole snapshot: the message names the file that is missing, of the
        wrong size, damaged, or of a newer format. `Vault.verify` also checks every byte.
    """
    directory = Path(path)
    fields = read_manifest(directory)
    arrays = {}
    for name, entry in fields["files"].items():
        file = directory / f"{name}.bin"
        try:
            size = file.stat().st_size
        except FileNotFoundError:
            raise VaultError(f"{file}: missing from the snapshot") from None
        if size != entry["bytes"]:
            raise VaultError(f"{file}: {size} bytes, the manifest says {entry['bytes']}")
        arrays[name] = _mapped(file, np.dtype(entry["dtype"]).newbyteorder("<"), entry["rows"])
    schema = Schema.from_json(fields["schema"])
    if missing := sorted({OFFSETS, *schema.stored} - set(arrays)):
        raise VaultError(f"{directory}: the manifest has no file for {missing}")
    offsets = arrays.pop(OFFSETS)
    if offsets[0] != 0 or offsets[-1] != fields["num_behaviours"]:
        raise VaultError(f"{directory / OFFSETS}.bin: damaged (it does not span all behaviours)")
    return Vault(directory, fields, schema, offsets, arrays)


def _mapped(file: Path, dtype: np.dtype, rows: int) -> np.ndarray:
    if not rows:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(file, dtype, mode="r", shape=(rows,)).view(np.ndarray)


class Vault:
    """An immutable snapshot of all users' histories; reads are vectorised and thread-safe.

    Attributes:
      path: the snapshot's directory.
      schema: its columns.
      num_users: U.
      num_behaviours: rows over all users.
      content_hash: sha256 of everything held; equal content has an equal hash.
    """

    def __init__(
        self,
        path: Path,
        fields: Mapping,
        schema: Schema,
        offsets: np.ndarray,
        columns: Mapping[str, np.ndarray],
    ):
        self.path = path
        self.schema = schema
        self.num_users: int = fields["num_users"]
        self.num_behaviours: int = fields["num_behaviours"]
        self.content_hash: str = fields["content_hash"]
        self._files = fields["files"]
        self._offsets = offsets
        self._columns = columns
        self._longest: int | None = None

    def __repr__(self) -> str:
        return (
            f"Vault({str(self.path)!r}, {self.num_users} users, {self.num_behaviours} behaviours, "
            f"columns {list(self.schema.columns)})"
        )

    def lengths(self, users: np.ndarray) -> np.ndarray:
        """How many behaviours each of `users` [B] has: [B] int64."""
        start, stop = self._span(users)
        return stop - start

    def resolve(self, users: np.ndarray, before_time: np.ndarray) -> np.ndarray:
        """End positions: how many behaviours of each user are strictly earlier than a time.

        The one function by which both preparation and serving turn a time into a position.

        Args:
          users: [B] rows of users.
          before_time: [B] seconds, or one number for all.
        Returns:
          [B] int64 in 0 .. length.
        """
        start, stop = self._span(users)
        return self._search(start, stop, before_time) - start

    def last_n(
        self,
        users: np.ndarray,
        n: int,
        *,
        end: np.ndarray | None = None,
        before: np.ndarray | None = None,
        columns: Iterable[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """The last `n` behaviours of each user, right-aligned, padded with 0 on the left.

        Args:
          users: [B] rows of users.
          end: [B] positions; behaviours 0 .. end - 1 of the user are seen.
          before: [B] seconds; behaviours strictly earlier are seen. With neither `end` nor
            `before`, the whole history is seen.
          columns: the columns wanted; all of the schema by default. Time always comes along.
        Returns:
          {column: [B, n] of the schema's dtype, "time": [B, n] int32, "mask": [B, n] bool}.
        Raises:
          VaultError: a user or an end is out of range, a column is unknown, or both `end` and
            `before` are given.
        """
        columns = list(self.schema.columns if columns is None else columns)
        if unknown := sorted(set(columns) - set(self.schema.stored)):
            raise VaultError(f"no column {unknown}; the store has {list(self.schema.columns)}")
        if end is not None and before is not None:
            raise VaultError("give `end` or `before`, not both")
        if n < 0:
            raise VaultError(f"n is {n}; it must not be negative")
        start, stop = self._span(users)
        if before is not None:
            stop = self._search(start, stop, before)
        elif end is not None:
            stop = self._checked_stop(users, start, stop, end)
        seen = np.minimum(stop - start, n)
        mask = np.arange(n) >= (n - seen)[:, None]
        # The rows to read, user after user: only what is seen is touched, however long n is.
        first = np.cumsum(seen) - seen
        rows = np.arange(seen.sum()) + np.repeat(stop - seen - first, seen)
        out = {}
        for name in dict.fromkeys([*columns, TIME]):
            out[name] = np.zeros(mask.shape, self.schema.stored[name])
            out[name][mask] = self._columns[name][rows]
        out["mask"] = mask
        return out

    def verify(self) -> None:
        """Reads every byte and checks it against the manifest.

        Raises:
          VaultError: a file's content is not what was written; the message names the file.
        """
        for name, entry in self._files.items():
            file = self.path / f"{name}.bin"
            if sha256_of(file) != entry["sha256"]:
                raise VaultError(f"{file}: damaged (its sha256 is not the manifest's)")

    def _span(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and one past the last row of each user: two [B] int64 arrays."""
        users = np.asarray(users)
        if users.ndim != 1 or (users.dtype.kind not in "iu" and users.size):
            raise VaultError(f"users must be a vector of integers, not {users.dtype}{users.shape}")
        users = users.astype(np.int64)
        bad = (users < 0) | (users >= self.num_users)
        if bad.any():
            raise VaultError(
                f"user {users[bad.argmax()]} is not in the store; it has users 0 .. "
                f"{self.num_users - 1}"
            )
        start, stop = self._offsets[users], self._offsets[users + 1]
        return start.astype(np.int64), stop.astype(np.int64)

    def _search(self, start: np.ndarray, stop: np.ndarray, before_time: np.ndarray) -> np.ndarray:
        """The first row of each span whose time is not below `before_time`, by bisection."""
        before_time = np.broadcast_to(np.asarray(before_time, np.int64), start.shape)
        times, low, high = self._columns[TIME], start.copy(), stop.copy()
        while (open_ := low < high).any():
            middle = (low + high) >> 1
            # closed spans may point one past the last row; their value is not used
            earlier = times.take(middle, mode="clip").astype(np.int64) < before_time
            low = np.where(open_ & earlier, middle + 1, low)
            high = np.where(open_ & ~earlier, middle, high)
        return low

    def _checked_stop(
        self, users: np.ndarray, start: np.ndarray, stop: np.ndarray, end: np.ndarray
    ) -> np.ndarray:
        end = np.asarray(end, np.int64)
        bad = (end < 0) | (end > stop - start)
        if bad.any():
            i = int(np.broadcast_to(bad, start.shape).argmax())
            raise VaultError(
                f"end {np.broadcast_to(end, start.shape)[i]} is not a position of user "
                f"{np.asarray(users)[i]}, who has {stop[i] - start[i]} behaviours"
            )
        return start + end
