"""Bulk build of a snapshot from sorted columns, streaming: memory does not grow with rows."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from seqvault.errors import VaultError
from seqvault.manifest import (
    BUILDING,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    OFFSETS,
    content_hash,
    sha256_of,
)
from seqvault.schema import TIME, Schema, narrowest_unsigned

_COPY_ROWS = 1 << 20


def bulk_build(
    path: str | os.PathLike,
    schema: Schema,
    num_users: int,
    blocks: Iterable[Mapping[str, np.ndarray]],
) -> str:
    """Writes the snapshot `path` from columns sorted by (user, position), and returns its hash.

    Atomic: everything is written and fsynced in `<path>.building`, which is then renamed. What a
    killed build left there is cleaned by the next one and is never taken for a snapshot. The
    result, and its content hash, do not depend on where the blocks are cut.

    Args:
      schema: the columns beside `time`.
      num_users: U; users are rows 0 .. U - 1, and any of them may have no behaviours.
      blocks: dicts of equally long one-dimensional arrays, one per column of the schema, plus
        `user` (not decreasing) and `time` (seconds, not decreasing within a user).
    Raises:
      VaultError: a block lacks a column or has a wrong type; a value is negative or does not fit
        its column; users are not sorted or times decrease; the message names user, position and
        value. Or another process is building this path.
      FileExistsError: `path` exists; snapshots are immutable.
    """
    with _building(Path(path)) as directory:
        counts = np.zeros(num_users, np.int64)
        writers = {
            name: _ColumnWriter(directory / f"{name}.bin", dtype)
            for name, dtype in schema.stored.items()
        }
        last_user, last_time, rows = 0, 0, 0
        for block in blocks:
            block = _checked_columns(block, schema, rows)
            users, times = block["user"], block[TIME]
            if not len(users):
                continue
            _check_values(block, schema, counts, last_user, last_time, rows)
            np.add(counts, np.bincount(users, minlength=num_users), out=counts)
            for name, writer in writers.items():
                writer.write(block[name])
            last_user, last_time, rows = int(users[-1]), int(times[-1]), rows + len(users)
        offsets = np.zeros(num_users + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        writers[OFFSETS] = _ColumnWriter(directory / f"{OFFSETS}.bin", np.dtype(np.int64))
        writers[OFFSETS].write(offsets)
        files = {name: writer.close() for name, writer in writers.items()}
        fields = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "schema": schema.to_json(),
            "num_users": int(num_users),
            "num_behaviours": rows,
            "files": files,
        }
        fields["content_hash"] = content_hash(fields)
        with open(directory / MANIFEST, "w") as file:
            json.dump(fields, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
    return fields["content_hash"]


@contextmanager
def _building(path: Path) -> Iterator[Path]:
    """A locked, empty directory that becomes `path` when the block ends without an error.

    The lock (on the directory itself) tells a build that lives from what a killed one left.
    """
    directory = path.with_name(path.name + BUILDING)
    if path.exists():
        raise FileExistsError(f"{path} exists, and a snapshot is never changed; remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    directory.mkdir(exist_ok=True)
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
        os.fsync(lock)
        directory.rename(path)
        parent = os.open(path.parent, os.O_RDONLY)
        os.fsync(parent)
        os.close(parent)
    finally:
        os.close(lock)


class _ColumnWriter:
    """One column's file, widened in place of a second pass: each width is passed at most once."""

    def __init__(self, path: Path, logical: np.dtype):
        self._path = path
        self._floating = logical.kind == "f"
        self.dtype = logical.newbyteorder("<") if self._floating else np.dtype(np.uint8)
        self._rows = 0
        self._file = open(path, "wb")

    def write(self, values: np.ndarray) -> None:
        if not self._floating and len(values):
            needed = narrowest_unsigned(values.max())
            if needed.itemsize > self.dtype.itemsize:
                self._widen(needed)
        self._file.write(np.ascontiguousarray(values, self.dtype.newbyteorder("<")).data)
        self._rows += len(values)

    def _widen(self, dtype: np.dtype) -> None:
        self._file.close()
        wide = self._path.with_suffix(".wide")
        with open(self._path, "rb") as narrow, open(wide, "wb") as file:
            while chunk := narrow.read(_COPY_ROWS * self.dtype.itemsize):
                values = np.frombuffer(chunk, self.dtype.newbyteorder("<"))
                file.write(values.astype(dtype.newbyteorder("<")).data)
        wide.replace(self._path)
        self._file = open(self._path, "ab")
        self.dtype = dtype

    def close(self) -> dict:
        """Makes the file durable; its entry in the manifest."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {
            "dtype": self.dtype.name,
            "rows": self._rows,
            "bytes": self._rows * self.dtype.itemsize,
            "sha256": sha256_of(self._path),
        }


def _checked_columns(
    block: Mapping[str, np.ndarray], schema: Schema, row: int
) -> dict[str, np.ndarray]:
    """The block's columns, if they are those of the schema and equally long."""
    wanted = {"user": np.dtype(np.int64), **schema.stored}
    if set(block) != set(wanted):
        raise VaultError(
            f"block at row {row} has columns {sorted(block)}, the schema wants {sorted(wanted)}"
        )
    columns = {name: np.asarray(block[name]) for name in wanted}
    for name, values in columns.items():
        if values.shape != (len(columns["user"]),) or values.ndim != 1:
            raise VaultError(
                f"block at row {row}: column {name!r} has shape {values.shape}, "
                f"user has {columns['user'].shape}"
            )
        kinds = "biuf" if wanted[name].kind == "f" else "biu"
        if values.dtype.kind not in kinds:
            raise VaultError(
                f"block at row {row}: column {name!r} is {values.dtype}, the schema says "
                f"{wanted[name]}"
            )
    return columns


def _check_values(
    block: Mapping[str, np.ndarray],
    schema: Schema,
    counts: np.ndarray,
    last_user: int,
    last_time: int,
    rows: int,
) -> None:
    """Raises on the first value that cannot be stored, naming user, position and value."""
    users, times = block["user"], block[TIME]

    def fail(i: int, problem: str) -> None:
        user = int(users[i])
        before = counts[user] if 0 <= user < len(counts) else 0
        position = before + int(np.count_nonzero(users[:i] == users[i]))
        raise VaultError(f"user {user}, position {position} (input row {rows + i}): {problem}")

    bad = (users < 0) | (users >= len(counts))
    if bad.any():
        i = int(bad.argmax())
        fail(i, f"user {users[i]} is not one of the {len(counts)} users 0 .. {len(counts) - 1}")
    previous = np.concatenate([[last_user], users[:-1]])
    bad = users < previous
    if bad.any():
        i = int(bad.argmax())
        fail(i, f"users must be sorted, but user {users[i]} comes after user {previous[i]}")
    for name, dtype in schema.stored.items():
        values = block[name]
        if dtype.kind == "f":
            bad = ~np.isfinite(values)
        else:
            largest = 1 if dtype.kind == "b" else np.iinfo(dtype).max
            if not (values.max() > largest or values.min() < 0):
                continue
            bad = (values > largest) | (values < 0)
        if bad.any():
            i = int(bad.argmax())
            why = "is not finite" if dtype.kind == "f" else f"does not fit 0 .. {largest} ({dtype})"
            fail(i, f"column {name!r} has value {values[i]}, which {why}")
    before = np.concatenate([[last_time], times[:-1]])
    bad = (users == previous) & (times < before)
    if bad.any():
        i = int(bad.argmax())
        fail(i, f"times must not decrease, but time {times[i]} comes after {before[i]}")
