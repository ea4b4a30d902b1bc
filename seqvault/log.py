"""The write-ahead log: checksummed records, and what can be said of a log that is not whole.

    header   magic, kind, flags, bytes of the payload, bytes of it unpacked, checksum of the
             payload, checksum of the header                                          24 bytes
    payload  of APPEND: stream, schema version, rows, users, then every column
             of MERGE: stream, further segments, how many entries, a segment and its committed
             bytes, the further ones and theirs, entries (index.py's, tail 0)

The log is the order of everything that happened since the last checkpoint: replaying it on the
checkpoint gives the state. A record that the file's end cuts off was never acknowledged: it is
torn, and the next writer cuts it away. Any other record that does not match its checksum is
damaged: it is named and skipped, and what follows it is found again by its header.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import zstandard

from seqvault.errors import Damage, VaultError
from seqvault.index import ENTRY
from seqvault.schema import Schema

APPEND, MERGE = 1, 2
MAGIC = b"SQLG"
_ZSTD = 1
_PACK_FROM = 4096  # bytes; smaller payloads are logged as they are
_HEADER = struct.Struct("<4sBBHIIII")
_BODY = struct.Struct("<HHI")
_COMMIT = struct.Struct("<HHI")
_COMMITTED = struct.Struct("<QQ")
MAX_PAYLOAD = 1 << 30
MAX_RATIO = 100  # a record that claims to unpack to more is refused: it could ask for any memory


class Record(NamedTuple):
    kind: int
    payload: bytes
    offset: int  # of its header
    end: int


def frame(kind: int, payload: bytes) -> bytes:
    """A record's bytes."""
    if len(payload) > MAX_PAYLOAD:
        raise VaultError(f"{len(payload)} bytes in one append; the most is {MAX_PAYLOAD}")
    flags, unpacked = 0, len(payload)
    if unpacked >= _PACK_FROM:
        packed = zstandard.compress(payload, 1)
        if len(packed) < unpacked <= MAX_RATIO * len(packed):
            flags, payload = _ZSTD, packed
    head = _HEADER.pack(MAGIC, kind, flags, 0, len(payload), unpacked, zlib.crc32(payload), 0)
    return head[:-4] + struct.pack("<I", zlib.crc32(head[:-4])) + payload


def read(
    data: bytes, name: str, base: int = 0, more: bool = False
) -> tuple[list[Record], list[Damage], int]:
    """The whole records of `data`, which starts at byte `base` of the log file `name`.

    Args:
      more: whether the file goes on behind `data`: what only the bytes there can tell is left.
    Returns:
      (records, damages, end): `end` is where the next record belongs, counted from the file's
      start; bytes behind it are a torn record or, with `more`, to be read with those that follow.
    """
    records: list[Record] = []
    damages: list[Damage] = []
    at = 0
    while at < len(data):
        head = data[at : at + _HEADER.size]
        if len(head) < _HEADER.size:
            if not more and not MAGIC.startswith(head[: len(MAGIC)]) and head.strip(b"\0"):
                damages.append(Damage(name, base + at, "not the start of a record"))
                at = len(data)
            break
        size = _header_size(head)
        if size is None:
            resumed = _next_header(data, at + 1)
            if resumed == len(data) and (more or not data[at:].strip(b"\0")):
                break  # or it is room that a file system gave and no write reached
            damages.append(Damage(name, base + at, "a record's header does not match its checksum"))
            at = resumed
            continue
        end = at + _HEADER.size + size
        if end > len(data):
            if not more and (resumed := _next_header(data, at + 1)) < len(data):
                damages.append(Damage(name, base + at, "a record is cut short"))
                at = resumed
                continue
            break
        kind, payload = _payload(data[at:end])
        if payload is None:
            damages.append(Damage(name, base + at, "a record does not match its checksum"))
        else:
            records.append(Record(kind, payload, base + at, base + end))
        at = end
    return records, damages, base + at


def _header_size(head: bytes) -> int | None:
    """Bytes of the payload that a header announces; None if it is no header."""
    magic, _, _, _, size, _, _, crc = _HEADER.unpack(head)
    if magic != MAGIC or crc != zlib.crc32(head[:-4]):
        return None
    return size


def _next_header(data: bytes, at: int) -> int:
    """Where the next whole header starts; the end of `data` if nowhere."""
    while (at := data.find(MAGIC, at)) >= 0:
        head = data[at : at + _HEADER.size]
        if len(head) == _HEADER.size and _header_size(head) is not None:
            return at
        at += 1
    return len(data)


def _payload(record: bytes) -> tuple[int, bytes | None]:
    _, kind, flags, _, _, unpacked, crc, _ = _HEADER.unpack_from(record)
    payload = record[_HEADER.size :]
    if zlib.crc32(payload) != crc or unpacked > MAX_RATIO * max(len(payload), 1):
        return kind, None
    if flags & _ZSTD:
        try:
            payload = unpack_zstd(payload, unpacked)
        except VaultError:
            return kind, None
    return (kind, payload) if len(payload) == unpacked else (kind, None)


def unpack_zstd(data: bytes, size: int, dictionary=None) -> bytes:
    """Unpacks a zstd frame that must hold `size` bytes; takes no more memory than it holds.

    Raises:
      VaultError: it is not such a frame.
    """
    try:
        if zstandard.frame_content_size(data) != size:
            raise VaultError(f"a compressed block does not hold the {size} bytes it should")
        return zstandard.ZstdDecompressor(dict_data=dictionary).decompress(data)
    except zstandard.ZstdError as error:
        raise VaultError(f"damaged compressed block ({error})") from None


def append_payload(
    stream: int, schema: Schema, users: np.ndarray, columns: Mapping[str, np.ndarray]
) -> bytes:
    """The payload of an APPEND: `users` [N] int64, `columns` of the schema's dtypes."""
    parts = [_BODY.pack(stream, schema.version, len(users)), users.astype("<i8").tobytes()]
    for name, dtype in schema.stored.items():
        parts.append(np.asarray(columns[name]).astype(dtype.newbyteorder("<")).tobytes())
    return b"".join(parts)


def parse_append(
    payload: bytes, schemas: Mapping[int, Schema]
) -> tuple[int, np.ndarray, dict[str, np.ndarray]]:
    """(stream, users, columns) of an APPEND, columns as its schema version has them.

    Raises:
      VaultError: the payload is not one.
    """
    stream, version, rows = _fixed(_BODY, payload)
    schema = schemas.get(version)
    if schema is None:
        raise VaultError(f"a record of schema version {version}, which the manifest does not have")
    widths = [8, *(d.itemsize for d in schema.stored.values())]
    if len(payload) != _BODY.size + rows * sum(widths):
        raise VaultError(f"a record of {rows} rows has {len(payload)} bytes")
    at = _BODY.size
    users = np.frombuffer(payload, "<i8", rows, at)
    at += 8 * rows
    columns = {}
    for name, dtype in schema.stored.items():
        columns[name] = np.frombuffer(payload, dtype.newbyteorder("<"), rows, at)
        at += dtype.itemsize * rows
    return stream, users, columns


def merge_payload(stream: int, entries: np.ndarray, sizes: Mapping[int, int]) -> bytes:
    """The payload of a MERGE: new entries (dtype ENTRY), and {segment: its committed bytes}.

    One record for all of it: a part of a merge that went missing would be worse than the whole.
    """
    head = _COMMIT.pack(stream, len(sizes) - 1, len(entries))
    return head + b"".join(_COMMITTED.pack(*pair) for pair in sizes.items()) + entries.tobytes()


def parse_merge(payload: bytes) -> tuple[int, np.ndarray, dict[int, int]]:
    """(stream, entries, {segment: its committed bytes}) of a MERGE.

    Raises:
      VaultError: the payload is not one.
    """
    stream, further, count = _fixed(_COMMIT, payload)
    at = _COMMIT.size + (1 + further) * _COMMITTED.size
    if len(payload) != at + count * ENTRY.itemsize:
        raise VaultError(f"a merge of {count} users has {len(payload)} bytes")
    sizes = dict(_COMMITTED.iter_unpack(payload[_COMMIT.size : at]))
    return stream, np.frombuffer(payload, ENTRY, count, at), sizes


def _fixed(layout: struct.Struct, payload: bytes) -> Iterator[int]:
    if len(payload) < layout.size:
        raise VaultError(f"a record's payload has {len(payload)} bytes")
    return layout.unpack_from(payload)
