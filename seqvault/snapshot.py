"""Snapshot: an immutable, memory-mapped set of histories for training, read like a Vault."""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from seqvault import querying
from seqvault.bulk import user_runs
from seqvault.errors import Damage, VaultError
from seqvault.files import Files
from seqvault.index import ENTRY
from seqvault.manifest import BUILDING, read_manifest, write_manifest
from seqvault.reading import Layout, read_last_n, read_rows
from seqvault.schema import Schema, words_of
from seqvault.segments import segment_path
from seqvault.writing import PartWriter

INDEX = "index.sv"
_WHOLE = 1 << 62  # a snapshot has one segment, and a user one part


def bulk_build(
    path: str | os.PathLike,
    schema: Schema,
    num_users: int,
    blocks: Iterable[Mapping[str, np.ndarray]],
    *,
    users: np.ndarray | None = None,
) -> str:
    """Writes the snapshot `path` from columns sorted by (user, position), and returns its hash.

    Streaming: memory does not grow with rows. Atomic: everything is written and fsynced in
    `<path>.building`, which is then renamed. What a killed build left there is cleaned by the next
    one and is never taken for a snapshot. The content hash does not depend on where the blocks are
    cut, nor on how parts are packed.

    Args:
      schema: the columns beside `time`.
      num_users: U; users are rows 0 .. U - 1, and any of them may have no behaviours.
      blocks: dicts of equally long one-dimensional arrays, one per column of the schema, plus
        `user` (not decreasing) and `time` (seconds, not decreasing within a user).
      users: [U] the ids that rows stand for; the row numbers by default.
    Raises:
      VaultError: a block lacks a column or has a wrong type; a value does not fit its column;
        users are not sorted or out of range, or times decrease; the message names user, position
        and value. Or another process is building this path.
      FileExistsError: `path` exists; snapshots are immutable.
    """
    files = Files()
    with _building(files, Path(path)) as directory:
        ids = np.arange(num_users) if users is None else np.asarray(users).astype(np.int64)
        entries = np.zeros(num_users, ENTRY)
        entries["user"], entries["place"] = ids, -1
        writer = PartWriter(files, directory, 1, 0, _WHOLE)
        hashes = {name: hashlib.sha256() for name in schema.stored}
        rows = 0
        for numbers, edges, columns in user_runs(blocks, schema):
            if numbers[0] < 0 or numbers[-1] >= num_users:
                wrong = numbers[0] if numbers[0] < 0 else numbers[-1]
                raise VaultError(
                    f"user {wrong} is not one of the {num_users} users 0 .. {num_users - 1}"
                )
            words = words_of(columns, schema)
            for name, dtype in schema.stored.items():
                hashes[name].update(columns[name].astype(dtype.newbyteorder("<")).data)
            for i, number in enumerate(numbers.tolist()):
                mine = words[:, edges[i] : edges[i + 1]]
                place, size = writer.write(mine, int(ids[number]), 0, 0)
                entries[number] = (ids[number], place, size, mine.shape[1], mine[0, -1], 0)
            rows += words.shape[1]
        writer.sync()
        writer.close()
        index = entries.tobytes()
        files.write_whole(directory / INDEX, index)
        content = {
            "schema": schema.to_json(),
            "num_users": int(num_users),
            "num_behaviours": rows,
            "lengths": hashlib.sha256(entries["rows"].astype("<i8").tobytes()).hexdigest(),
            "users": hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest(),
            "columns": {name: h.hexdigest() for name, h in hashes.items()},
        }
        content_hash = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        write_manifest(files, directory, {
            "kind": "snapshot", "content": content, "content_hash": content_hash,
            "segments": {"1": writer.size},
            "index": {"bytes": len(index), "crc32": zlib.crc32(index)},
        })  # fmt: skip
    return content_hash


@contextmanager
def _building(files: Files, path: Path) -> Iterator[Path]:
    """A locked, empty directory that becomes `path` when the block ends without an error.

    The lock (on the directory itself) tells a build that lives from what a killed one left.
    """
    directory = path.with_name(path.name + BUILDING)
    if path.exists():
        raise FileExistsError(f"{path} exists, and a snapshot is never changed; remove it")
    files.make_directory(directory)
    lock = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise VaultError(f"{directory}: another process is building {path.name}") from None
        if path.exists():
            raise FileExistsError(f"{path} exists, and a snapshot is never changed; remove it")
        for leftover in directory.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        try:
            yield directory
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        files.sync_directory(directory)
        directory.rename(path)
        files.sync_directory(path.parent)
    finally:
        os.close(lock)


class Snapshot:
    """An immutable snapshot of all users' histories; reads are thread-safe.

    Reads take what `Vault` reads take, users being rows 0 .. U - 1.

    Attributes:
      path: the snapshot's directory.
      schema: its columns.
      num_users: U.
      num_behaviours: rows over all users.
      users: [U] the ids that the rows stand for.
      content_hash: sha256 of everything held; equal content has an equal hash.
    """

    def __init__(self, path: str | os.PathLike):
        """Maps the snapshot at `path`; the index alone is read.

        Raises:
          VaultError: there is no whole snapshot; the message names the file that is missing, of
            the wrong size, damaged, or of a newer format. `verify` also checks every byte.
        """
        self.path = Path(path)
        manifest, self.damages = read_manifest(self.path)
        if manifest.get("kind") != "snapshot":
            raise VaultError(f"{self.path}: a {manifest.get('kind')}, not a snapshot")
        try:
            content, index = manifest["content"], manifest["index"]
            self.schema = Schema.from_json(content["schema"])
            self.num_users = int(content["num_users"])
            self.num_behaviours = int(content["num_behaviours"])
            self.content_hash = str(manifest["content_hash"])
            size = int(manifest["segments"]["1"])
            index_size, index_crc = int(index["bytes"]), int(index["crc32"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise VaultError(f"{self.path}: the manifest lacks {error}") from None
        self._source = _Mapped(_mapped(segment_path(self.path, 1), size))
        entries = _mapped(self.path / INDEX, index_size)
        if index_size != self.num_users * ENTRY.itemsize:
            raise VaultError(f"{self.path / INDEX}: {index_size} bytes for {self.num_users} users")
        if zlib.crc32(entries) != index_crc:
            raise VaultError(f"{self.path / INDEX}: damaged (it does not match its checksum)")
        self._entries = entries.view(ENTRY)
        self._layouts: dict[tuple[str, ...] | None, Layout] = {}

    def __repr__(self) -> str:
        return (
            f"Snapshot({str(self.path)!r}, {self.num_users} users, {self.num_behaviours} "
            f"behaviours, columns {list(self.schema.columns)})"
        )

    @property
    def users(self) -> np.ndarray:
        return self._entries["user"]

    def lengths(self, users: np.ndarray) -> np.ndarray:
        """How many behaviours each of `users` [B] has: [B] int64."""
        return self._entries["rows"][self._rows(users)].astype(np.int64)

    def resolve(self, users: np.ndarray, before_time: np.ndarray) -> np.ndarray:
        """End positions: how many behaviours of each user are strictly earlier than a time.

        The one function by which both preparation and serving turn a time into a position.

        Args:
          users: [B] rows of users.
          before_time: [B] seconds, or one number for all.
        Returns:
          [B] int64 in 0 .. length.
        """
        numbers = self._rows(users)
        before = querying.times_of(before_time, numbers)
        none = np.zeros(len(numbers), np.int64)
        lengths = self._entries["rows"][numbers].astype(np.int64)
        return self._read(numbers, (), lengths, before, none, none, 0).reached

    def last_n(
        self,
        users: np.ndarray,
        n: int,
        *,
        before: np.ndarray | None = None,
        end: np.ndarray | None = None,
        columns: Iterable[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """The last `n` behaviours of each user, right-aligned, padded with 0 on the left.

        Args:
          users: [B] rows of users.
          before: [B] seconds, or one number; behaviours strictly earlier are seen.
          end: [B] positions; behaviours 0 .. end - 1 of the user are seen. With neither, all are.
          columns: the columns wanted; all of the schema by default. Time always comes along.
        Returns:
          {column: [B, n] of the schema's dtype, "time": [B, n] int32, "mask": [B, n] bool}.
        Raises:
          VaultError: a user or an end is out of range, a column is unknown, both `end` and
            `before` are given, or (DamagedError) a history's bytes are damaged.
        """
        names = tuple(columns) if columns is not None else None
        querying.check_question(n, before, end)
        numbers = self._rows(users)
        limits = self._entries["rows"][numbers].astype(np.int64)
        if before is not None:
            before = querying.times_of(before, numbers)
        elif end is not None:
            end = querying.checked_ends(numbers, limits, end)
        users, places, sizes = self._parts(numbers)
        held = np.stack([places, sizes, limits])
        return read_last_n(self._source, self._layout(names), 0, users, held, n, before, end)

    def scan(
        self, *, columns: Iterable[str] | None = None, block_rows: int = 1 << 18
    ) -> Iterator[dict[str, np.ndarray]]:
        """All behaviours, sorted by (row, position), in blocks of about `block_rows` whole users.

        Yields:
          {"user": [N] int64 rows, "time": [N] int32, column: [N]}.
        """
        names = tuple(columns) if columns is not None else None
        ends = np.cumsum(self._entries["rows"], dtype=np.int64)
        first, done = 0, 0
        while first < self.num_users:
            last = max(first + 1, int(np.searchsorted(ends, done + block_rows, side="right")))
            numbers = np.arange(first, last)
            lengths = self._entries["rows"][first:last].astype(np.int64)
            rights = ends[first:last] - done
            found = self._read(numbers, names, lengths, None, lengths, rights, int(rights[-1]))
            yield {"user": np.repeat(numbers, lengths), **found.columns}
            first, done = last, int(ends[last - 1])

    def verify(self) -> list[Damage]:
        """Reads every byte of the snapshot's files and names all that is not as written."""
        from seqvault.verification import verify

        return verify(self.path)

    def _layout(self, names: tuple[str, ...] | None) -> Layout:
        if names not in self._layouts:
            self._layouts[names] = Layout([self.schema], names)
        return self._layouts[names]

    def _parts(self, numbers: np.ndarray) -> list[np.ndarray]:
        """User id, place and bytes of the rows' parts: each [B] int64."""
        entries = self._entries[numbers]
        return [entries[field].astype(np.int64) for field in ("user", "place", "bytes")]

    def _read(self, numbers, names, limits, before, wants, rights, cells):
        users, places, sizes = self._parts(numbers)
        return read_rows(
            self._source, self._layout(names), 0, users, places, sizes, limits, before, wants,
            rights, cells,
        )  # fmt: skip

    def _rows(self, users: np.ndarray) -> np.ndarray:
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
        return users


class _Mapped:
    """`reading.Source` of one mapped segment, which a snapshot numbers 1 and finds by offset."""

    fds = np.zeros(0, np.int32)

    def __init__(self, mapped: np.ndarray):
        self.mapped = mapped
        self.segments = self
        self.reads = 0  # none that anybody counts


def _mapped(path: Path, size: int) -> np.ndarray:
    """The file's bytes, which must be `size`."""
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise VaultError(f"{path}: {found} bytes, the manifest says {size}")
            if not size:  # an empty file cannot be mapped
                return np.zeros(0, np.uint8)
            return np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
    except FileNotFoundError:
        if not size and path.name != INDEX:  # no behaviours, no segment
            return np.zeros(0, np.uint8)
        raise VaultError(f"{path}: missing from the snapshot") from None
