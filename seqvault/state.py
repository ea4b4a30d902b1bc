"""The state of a vault in memory: checkpoint plus log, the same for the writer and every reader.

MANIFEST, MANIFEST.copy   schemas, streams, and the names of the files below
index-<g>.sv              the index entries at checkpoint g
carry-<g>.log             the fresh rows at checkpoint g, as log records
log-<g>.log               what happened since
blocks-<s>.sv             segments of parts
lock                      held by the one writer
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from seqvault import log
from seqvault.errors import Damage, MissingError, VaultError
from seqvault.index import ENTRY, Index, offset_of, place_of, segment_of
from seqvault.manifest import read_manifest
from seqvault.part import CHUNK, HEAD_MAGIC, NO_PLACE, PREFIX, TAIL_MAGIC, TRAILER
from seqvault.part import ENTRY as CHUNK_ENTRY
from seqvault.reading import Layout
from seqvault.schema import Schema
from seqvault.segments import MAX_SEGMENT, Segments, committed_bytes, segment_number, segment_path
from seqvault.tail import Tail, under_schema
from seqvault.writing import check_sizes

_TRAILER = struct.Struct("<qqIIIIIIHBBIII")
_COUNT = struct.Struct("<q")
_WINDOW = 64 << 20  # bytes of the log that replaying holds at a time, if a record is not longer
_TAIL_ROWS = 1 << 20  # a tail may hold as many rows as this, dead ones included


class Stream:
    """One named stream of behaviours: who has which parts and which fresh rows."""

    def __init__(self, schema: Schema, index: Index | None = None, tail: Tail | None = None):
        self.index = index or Index()
        self.tail = tail or Tail(schema)

    def add(self, users: np.ndarray, columns: dict[str, np.ndarray]) -> None:
        """Appends rows [N] to the fresh tail."""
        numbers = self.index.find_or_add(users)
        self.tail.add(self.index.entries, numbers, columns)

    def commit(self, merged: np.ndarray) -> None:
        """Points users at their new parts (dtype index.ENTRY), which hold their fresh rows."""
        numbers = self.index.find_or_add(merged["user"].astype(np.int64))
        entries = self.index.entries
        self.tail.drop(entries, numbers)
        entries[numbers] = merged
        if self.tail.count > max(2 * self.tail.live, _TAIL_ROWS):
            self.tail = self.tail.compacted(entries)


class State:
    """Everything a read needs.

    Attributes:
      manifest: the manifest's fields.
      schemas: {version: Schema}; `schema` is the newest.
      names: the streams' names, in the order of their numbers.
      streams: [Stream].
      committed: {segment: bytes that hold whole parts}.
      damages: what opening found damaged.
      log_end: where the next log record starts.
      log_seen: bytes of the log that replaying has looked at; those behind `log_end` are torn.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.manifest, self.damages = read_manifest(directory)
        if self.manifest.get("kind") != "vault":
            raise VaultError(f"{directory}: a {self.manifest.get('kind')}, not a live vault")
        try:
            schemas = [Schema.from_json(s) for s in self.manifest["schemas"]]
            self.schema = schemas[-1]
            self.names = tuple(map(str, self.manifest["streams"]))
            self.committed = committed_bytes(self.manifest)
            self.block_rows = self.manifest["block_rows"]
            check_sizes(self.block_rows, self.manifest["segment_bytes"])
            self.log_path = _inside(directory, self.manifest["log"])
            index, carry = self.manifest["index"], self.manifest["carry"]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise VaultError(f"{directory}: not the manifest of a vault ({error!r})") from None
        self.schemas = {s.version: s for s in schemas}
        self.segments = Segments(directory)
        self._layouts: dict[tuple[str, ...] | None, Layout] = {}
        self.streams = self._load_index(index)
        for entry in carry:
            self._load_carry(entry)
        self.log_end = self.log_seen = 0
        try:
            self._log_fd: int | None = os.open(self.log_path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise VaultError(f"{self.log_path}: missing from the vault") from None
        try:
            self.replay()
            self.open_segments()
        except BaseException:
            self.close()
            raise

    @property
    def log_is_damaged(self) -> bool:
        """Whether a record of the log is lost, and with it maybe the names of segments."""
        return any(d.file == self.log_path.name for d in self.damages)

    def open_segments(self) -> None:
        """Opens every segment that holds parts; names one that is missing.

        Beside a damaged log every segment that is there may: a later part may lead to one that only
        a lost record named. All of them are taken as they are, so nothing removes them.
        """
        if self.log_is_damaged:
            for file in self.directory.iterdir():
                segment = segment_number(file.name)
                if segment is not None and segment <= MAX_SEGMENT:
                    with contextlib.suppress(FileNotFoundError):  # a checkpoint removes some
                        self.committed.setdefault(segment, file.stat().st_size)
        for segment, size in self.committed.items():
            try:
                if size:
                    self.segments.open([segment])
            except MissingError:
                damage = Damage(segment_path(self.directory, segment).name, 0, "missing")
                if damage not in self.damages:
                    self.damages.append(damage)

    def stream(self, name: str) -> int:
        """Raises VaultError if there is no such stream."""
        if name not in self.names:
            raise VaultError(f"no stream {name!r}; the vault has {list(self.names)}")
        return self.names.index(name)

    @property
    def packing(self) -> int:
        """The number that new parts carry: which of the manifest's schemas they follow."""
        return len(self.schemas) - 1

    def layout(self, columns: tuple[str, ...] | None) -> Layout:
        """How parts of every schema version fill `columns`."""
        if columns not in self._layouts:
            self._layouts[columns] = Layout([*self.schemas.values()], columns)
        return self._layouts[columns]

    def replay(self) -> None:
        """Applies what was logged behind `log_end`; a torn record stays for later.

        Raises:
          VaultError: the state is closed.
        """
        if self._log_fd is None:
            raise VaultError(f"{self.directory}: closed")
        size = os.fstat(self._log_fd).st_size
        if size <= self.log_end:
            return
        changed, window = False, _WINDOW
        while self.log_end < size:
            data = _pread(self._log_fd, min(size - self.log_end, window), self.log_end)
            self.log_seen = self.log_end + len(data)
            more = len(data) == window and self.log_seen < size
            records, damages, end = log.read(data, self.log_path.name, self.log_end, more)
            # Before a record is applied: whatever happens then, none is applied twice.
            stuck, self.log_end = end == self.log_end, end
            self.damages += damages
            changed |= bool(damages)
            for record in records:
                self._apply(record, self.log_path.name)
                changed |= record.kind == log.MERGE
            if not more:
                break
            window = 2 * window if stuck else _WINDOW
        if changed:
            self.open_segments()

    def switch_log(self, manifest: dict) -> bool:
        """Goes on with a newer checkpoint's log if this state has all that came before it.

        Raises:
          FileNotFoundError: that log is gone already; nothing has changed.
        """
        if manifest.get("previous") != [self.log_path.name, self.log_end]:
            return False
        if self.log_is_damaged:  # the writer may have had what this state has skipped
            return False
        if [s.to_json() for s in self.schemas.values()] != manifest["schemas"]:
            return False
        if list(self.names) != manifest["streams"]:
            return False
        path = _inside(self.directory, manifest["log"])
        # Before anything changes: a newer checkpoint may have removed it since.
        log_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        os.close(self._log_fd)
        self.manifest, self.log_path, self._log_fd = manifest, path, log_fd
        self.log_end = self.log_seen = 0
        self.committed = committed_bytes(manifest)
        self.segments.forget(set(self.committed))
        # What was missing may have been reclaimed before this reader opened it.
        self.damages = [d for d in self.damages if d.problem != "missing"]
        self.open_segments()
        for stream in self.streams:
            stream.tail = stream.tail.compacted(stream.index.entries)
        return True

    @property
    def closed(self) -> bool:
        return self._log_fd is None

    def close(self) -> None:
        if self._log_fd is not None:
            os.close(self._log_fd)
            self._log_fd = None
        self.segments.forget(set())

    def _apply(self, record: log.Record, name: str) -> None:
        try:
            if record.kind == log.APPEND:
                number, users, columns = log.parse_append(record.payload, self.schemas)
                self._stream_of(number).add(users, under_schema(columns, self.schema))
            elif record.kind == log.MERGE:
                number, merged, sizes = log.parse_merge(record.payload)
                if max(sizes) > MAX_SEGMENT or (merged["place"] < 0).any():
                    raise VaultError(f"a merge into segments {sorted(sizes)}")
                self._stream_of(number).commit(merged)
                self._cover(sizes)
                self._cover(_reach(merged))
            else:
                raise VaultError(f"a record of unknown kind {record.kind}")
        except VaultError as error:
            self.damages.append(Damage(name, record.offset, str(error)))

    def _cover(self, sizes: Mapping[int, int]) -> None:
        """Takes in that segments hold parts up to these bytes; no log makes one shorter."""
        for segment, size in sizes.items():
            self.committed[segment] = max(size, self.committed.get(segment, 0))

    def _stream_of(self, number: int) -> Stream:
        if number >= len(self.streams):
            raise VaultError(f"stream {number} of {len(self.streams)}")
        return self.streams[number]

    def _load_index(self, entry: dict) -> list[Stream]:
        """The streams as the index file has them, or as a walk over all parts finds them."""
        path = _inside(self.directory, entry["file"])
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            data = b""
        if len(data) == entry["bytes"] and zlib.crc32(data) == entry["crc32"]:
            return [Stream(self.schema, Index(e)) for e in parse_index(data, len(self.names))]
        self.damages.append(
            Damage(path.name, 0, "it does not match its checksum; rebuilt from the segments")
        )
        newest: list[dict[int, tuple]] = [{} for _ in self.names]
        for segment, size in sorted(self.committed.items()):
            path = segment_path(self.directory, segment)
            for part in walk(path, size, self.damages):
                if part.stream < len(newest):
                    place = place_of(segment, part.offset)
                    rows, newest_time = part.first_row + part.rows, part.newest
                    newest[part.stream][part.user] = (
                        part.user, place, part.bytes, rows, newest_time, 0,
                    )  # fmt: skip
        return [Stream(self.schema, Index(np.array([*n.values()], ENTRY))) for n in newest]

    def _load_carry(self, entry: dict) -> None:
        path = _inside(self.directory, entry["file"])
        data = path.read_bytes() if path.exists() else b""
        records, damages, end = log.read(data, path.name)
        if end != entry["bytes"] or len(data) != entry["bytes"]:
            damages.append(Damage(path.name, end, f"it should have {entry['bytes']} bytes"))
        self.damages += damages
        for record in records:
            self._apply(record, path.name)


def _reach(entries: np.ndarray) -> dict[int, int]:
    """{segment: where the last of the entries' parts in it ends}."""
    segments, ends = segment_of(entries["place"]), offset_of(entries["place"]) + entries["bytes"]
    return {int(s): int(ends[segments == s].max()) for s in np.unique(segments)}


def index_bytes(streams: list[Stream]) -> bytes:
    """The index file's content: per stream a count and its entries, without fresh tails."""
    parts = []
    for stream in streams:
        entries = stream.index.entries
        entries = entries.take(np.flatnonzero(entries["place"] >= 0))
        entries["tail"] = 0
        parts += [_COUNT.pack(len(entries)), entries.view(np.uint8).data]
    return b"".join(parts)


def parse_index(data: bytes, streams: int) -> Iterator[np.ndarray]:
    """Each stream's entries. Raises VaultError if `data` does not hold what its counts say."""
    at = 0
    for _ in range(streams):
        if at + _COUNT.size > len(data):
            raise VaultError("an index file without all streams")
        (count,) = _COUNT.unpack_from(data, at)
        at += _COUNT.size
        if not 0 <= count * ENTRY.itemsize <= len(data) - at:
            raise VaultError(f"an index file of {len(data)} bytes with {count} entries")
        yield np.frombuffer(data, ENTRY, count, at).copy()
        at += count * ENTRY.itemsize


class PartInfo:
    """What a part's trailer says."""

    __slots__ = (
        "offset", "bytes", "user", "stream", "version", "first_row", "rows", "newest",
        "previous", "previous_bytes",
    )  # fmt: skip


def walk(path: Path, size: int, damages: list[Damage]) -> Iterator[PartInfo]:
    """The parts in the first `size` bytes of a segment; one that makes no sense is named, skipped.

    Looks at prefixes and trailers only; `verify` checks the bytes between.
    """
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        damages.append(Damage(path.name, 0, "missing"))
        return
    with file:
        found = os.fstat(file.fileno()).st_size
        if found < size:
            damages.append(Damage(path.name, found, f"it should have {size} bytes"))
        at, size = 0, min(size, found)
        while at < size:
            info = _part_at(file.fileno(), at, size)
            if info is None:
                damages.append(Damage(path.name, at, "not the start of a part"))
                at = _next_part(file.fileno(), at + 1, size)
                continue
            yield info
            at += info.bytes


def _part_at(fd: int, at: int, size: int) -> PartInfo | None:
    head = os.pread(fd, PREFIX, at)
    if len(head) < PREFIX:
        return None
    magic, length = struct.unpack("<II", head)
    if magic != HEAD_MAGIC or length < PREFIX + TRAILER or at + length > size:
        return None
    tail = os.pread(fd, TRAILER + CHUNK_ENTRY, at + length - TRAILER - CHUNK_ENTRY)
    info = PartInfo()
    (newest,) = struct.unpack_from("<i", tail, 8)
    fields = _TRAILER.unpack_from(tail, CHUNK_ENTRY)
    info.user, info.previous, info.previous_bytes, info.first_row, info.rows = fields[:5]
    info.bytes, chunks, _, info.version, info.stream, _, _, _, magic = fields[5:]
    info.offset, info.newest = at, newest
    whole = magic == TAIL_MAGIC and info.bytes == length and chunks == -(-info.rows // CHUNK)
    return info if whole and info.previous >= NO_PLACE else None


def _next_part(fd: int, at: int, size: int) -> int:
    """Where the next part that makes sense starts; `size` if nowhere."""
    magic, window = struct.pack("<I", HEAD_MAGIC), 1 << 20
    while at < size:
        data = os.pread(fd, min(window, size - at), at)
        found = data.find(magic)
        while found >= 0:
            if _part_at(fd, at + found, size) is not None:
                return at + found
            found = data.find(magic, found + 1)
        if len(data) <= len(magic):
            break
        at += len(data) - len(magic) + 1
    return size


def _pread(fd: int, size: int, at: int) -> bytes:
    """`size` bytes from `at` on; fewer only at the file's end. One pread brings 2 GiB at most."""
    pieces = []
    while size and (piece := os.pread(fd, size, at)):
        pieces.append(piece)
        size, at = size - len(piece), at + len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _inside(directory: Path, name: str) -> Path:
    """The file of that name in the directory; a manifest must not name files elsewhere."""
    if not isinstance(name, str) or Path(name).name != name or name.startswith("."):
        raise VaultError(f"{directory}: the manifest names the file {name!r}")
    return directory / name
