"""What a serving process sends for a batch of `last_n`: self-describing, checksummed, versioned.

    header   magic, version, flags, columns, users B, n, bytes of the payload, bytes of it
             unpacked, checksum of all else                                          28 bytes
    payload  per column: bytes of its name, its type, its name
             per user: how many rows, uint32
             per column: the rows of all users, oldest first, without padding

Under flag 1 the payload is one zstd frame, times are differences to the row before, and a column
holds the lowest byte of every value, then the next one: what compresses integers best.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

import numpy as np
import zstandard

from seqvault.errors import VaultError
from seqvault.log import MAX_RATIO, unpack_zstd
from seqvault.schema import MAX_COLUMNS, TIME

MAGIC, VERSION = b"SQVW", 1
_ZSTD = 1
_HEADER = struct.Struct("<4sBBHIIIII")
_COLUMN = struct.Struct("<BB")
_TYPES = [
    np.dtype(name)
    for name in ("?", "i1", "u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f4", "<f8")
]


def pack(found: Mapping[str, np.ndarray], level: int = 0) -> bytes:
    """The message of what `last_n` gave: {column: [B, n], "mask": [B, n]}, right-aligned.

    Args:
      level: of zstd; 0 sends rows as they are, for half the CPU and twice the bytes (see
        docs/seqvault.md).
    Raises:
      VaultError: a column has a name or a type that a message cannot carry.
    """
    mask = found["mask"]
    counts = mask.sum(1).astype("<u4")
    columns = {name: values[mask] for name, values in found.items() if name != "mask"}
    parts = []
    for name, values in columns.items():
        encoded, dtype = name.encode(), values.dtype.newbyteorder("<")
        if len(encoded) > 255 or not name.isascii():
            raise VaultError(f"column name {name!r}: a message takes up to 255 ASCII letters")
        if dtype not in _TYPES:
            raise VaultError(f"column {name!r} is {dtype}, which a message does not take")
        number = _TYPES.index(dtype)
        parts.append(_COLUMN.pack(len(encoded), number) + encoded)
    parts.append(counts.tobytes())
    for name, values in columns.items():
        values = values.astype(values.dtype.newbyteorder("<"), copy=False)
        if level and name == TIME:
            values = np.diff(values, prepend=values.dtype.type(0))
        parts.append(_by_significance(values) if level else values.tobytes())
    payload = b"".join(parts)
    flags, unpacked = 0, len(payload)
    if level:
        flags, payload = _ZSTD, zstandard.compress(payload, level)
        if unpacked > MAX_RATIO * len(payload):  # nobody would unpack it
            return pack(found)
    head = _HEADER.pack(
        MAGIC, VERSION, flags, len(columns), *mask.shape, len(payload), unpacked, 0
    )  # fmt: skip
    head = head[:-4]
    return head + struct.pack("<I", zlib.crc32(payload, zlib.crc32(head))) + payload


def unpack(message: bytes, users: int, n: int) -> dict[str, np.ndarray]:
    """What `pack` was given, from a message that nobody need trust.

    Takes no more memory than MAX_RATIO times the message's and what the arrays asked for need.

    Args:
      users, n: what was asked; an answer of another shape is refused.
    Raises:
      VaultError: the message is damaged, no such message, or not the answer to that question.
    """
    if len(message) < _HEADER.size:
        raise VaultError(f"a message of {len(message)} bytes is too short")
    magic, version, flags, columns, batch, most, size, unpacked, checksum = _HEADER.unpack_from(
        message
    )
    if magic != MAGIC:
        raise VaultError("not an answer of a vault")
    payload = memoryview(message)[_HEADER.size :]
    if zlib.crc32(payload, zlib.crc32(message[: _HEADER.size - 4])) != checksum:
        raise VaultError("a message does not match its checksum")
    if version != VERSION or flags & ~_ZSTD:
        raise VaultError(f"a message of version {version} and flags {flags}; known is {VERSION}")
    if (batch, most) != (users, n):
        raise VaultError(f"an answer for {batch} users and n {most}; asked were {users} and {n}")
    if size != len(payload) or columns > MAX_COLUMNS + 2:  # the time and the stream
        raise VaultError("a message that is not what its header says")
    if flags & _ZSTD:
        if unpacked > MAX_RATIO * size:
            raise VaultError(f"a message of {size} bytes that claims to hold {unpacked}")
        payload = memoryview(unpack_zstd(payload, unpacked))
    dtypes, at = _columns(payload, columns)
    if at + 4 * batch > len(payload):
        raise VaultError("a message without all its counts")
    counts = np.frombuffer(payload, "<u4", batch, at).astype(np.int64)
    at += 4 * batch
    rows = int(counts.sum())
    whole = at + rows * sum(dtype.itemsize for dtype in dtypes.values())
    if len(payload) != unpacked or len(payload) != whole or (counts > n).any():
        raise VaultError("a message that does not hold the rows it announces")
    mask = np.arange(n) >= n - counts[:, None]
    out = {}
    for name, dtype in dtypes.items():
        data = np.frombuffer(payload, np.uint8, rows * dtype.itemsize, at)
        at += len(data)
        if flags & _ZSTD:
            data = np.ascontiguousarray(data.reshape(dtype.itemsize, rows).T).reshape(-1)
        values = data != 0 if dtype.kind == "b" else data.view(dtype)
        if flags & _ZSTD and name == TIME:
            values = np.cumsum(values, dtype=dtype)  # differences wrap, and wrap back
        out[name] = np.zeros((batch, n), dtype.newbyteorder("="))
        out[name][mask] = values
    return out | {"mask": mask}


def _by_significance(values: np.ndarray) -> bytes:
    """The lowest byte of every value, then the next one of every value, and so on."""
    return values.view(np.uint8).reshape(len(values), values.dtype.itemsize).T.tobytes()


def _columns(payload: memoryview, count: int) -> tuple[dict[str, np.dtype], int]:
    """({name: dtype}, where they end) of a payload's column table."""
    dtypes: dict[str, np.dtype] = {}
    at = 0
    for _ in range(count):
        if at + _COLUMN.size > len(payload):
            raise VaultError("a message without all its columns")
        length, number = _COLUMN.unpack_from(payload, at)
        at += _COLUMN.size
        name = bytes(payload[at : at + length]).decode("ascii", "replace")
        at += length
        if number >= len(_TYPES) or name in dtypes or at > len(payload) or name == "mask":
            raise VaultError(f"a message with an impossible column {name!r}")
        dtypes[name] = _TYPES[number]
    return dtypes, at
