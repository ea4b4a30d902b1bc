"""The stores that benchmarks/seqvault.py compares SeqVault with, behind one small interface.

load(blocks)              sorted columns, as bulk loads give them
append(users, columns)    a batch of behaviours
last_n(users, n)          {column: [B, n]} right-aligned, with "mask"
files()                   what lies on disk
close()
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import lmdb
import numpy as np
from rocksdict import (
    BlockBasedOptions,
    Cache,
    DBCompressionType,
    Options,
    Rdict,
    WriteBatch,
    WriteOptions,
)

COLUMNS = {
    "item": np.dtype("<u4"),
    "category": np.dtype("<u2"),
    "shop": np.dtype("<u4"),
    "action": np.dtype("u1"),
    "price": np.dtype("u1"),
}
STORED = {"time": np.dtype("<u4"), **COLUMNS}
CHUNK = 256  # behaviours in one value of the chunked layout
_USER = struct.Struct(">Q")
_CHUNK_KEY = struct.Struct(">QI")


def empty(batch: int, n: int) -> dict[str, np.ndarray]:
    out = {name: np.zeros((batch, n), dtype) for name, dtype in STORED.items()}
    return out | {"mask": np.zeros((batch, n), bool)}


def rocks_options(cache_bytes: int, direct: bool, block_bytes: int) -> Options:
    """Bloom filters, a block cache of the size given, zstd at every level.

    LZ4 above the bottom level, as is common, was not measured. A load ends in a full compaction, so
    what it would change is the rows appended since.
    """
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    table = BlockBasedOptions()
    table.set_block_cache(Cache(cache_bytes))
    table.set_block_size(block_bytes)
    table.set_bloom_filter(10, False)
    table.set_cache_index_and_filter_blocks(False)
    options.set_block_based_table_factory(table)
    options.set_compression_type(DBCompressionType.zstd())
    options.set_write_buffer_size(32 << 20)
    options.set_use_direct_reads(direct)
    return options


class RocksRows:
    """One key per behaviour: user, falling time, falling number -> the packed row (LastN)."""

    name = "rocksdb_per_behaviour"
    ROW = np.dtype(list(COLUMNS.items()))
    KEY = np.dtype([("user", ">u8"), ("time", ">u4"), ("number", ">u4")])

    def __init__(self, path: Path, cache_bytes: int = 256 << 20, direct: bool = False):
        self.path = path
        self._db = Rdict(str(path), rocks_options(cache_bytes, direct, 16 << 10))
        self._count = 0

    def load(self, blocks: Iterable[Mapping[str, np.ndarray]]) -> None:
        write = WriteOptions()
        write.disable_wal = True
        self._db.set_write_options(write)
        for block in blocks:
            self.append(block["user"], block)
        self._db.flush()
        self._db.compact_range(None, None)
        self._db.set_write_options(WriteOptions())

    def append(self, users: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
        rows, keys = np.empty(len(users), self.ROW), np.empty(len(users), self.KEY)
        for name in COLUMNS:
            rows[name] = columns[name]
        keys["user"], keys["time"] = users, 0xFFFFFFFF - np.asarray(columns["time"], np.uint32)
        keys["number"] = 0xFFFFFFFF - np.arange(self._count, self._count + len(users))
        self._count += len(users)
        keys, rows = keys.tobytes(), rows.tobytes()
        width, key_width = self.ROW.itemsize, self.KEY.itemsize
        batch = WriteBatch(raw_mode=True)
        for i in range(len(users)):
            batch.put(keys[i * key_width : (i + 1) * key_width], rows[i * width : (i + 1) * width])
        self._db.write(batch)

    def last_n(self, users: np.ndarray, n: int) -> dict[str, np.ndarray]:
        out = empty(len(users), n)
        for b, user in enumerate(users.tolist()):
            prefix = _USER.pack(user)
            keys, values = [], []
            for key, value in itertools.islice(self._db.items(from_key=prefix), n):
                if key[:8] != prefix:
                    break
                keys.append(key)
                values.append(value)
            if not keys:
                continue
            taken = slice(n - len(keys), n)
            found = np.frombuffer(b"".join(values), self.ROW)[::-1]
            times = np.frombuffer(b"".join(keys), self.KEY)["time"][::-1]
            out["time"][b, taken] = 0xFFFFFFFF - times.astype(np.uint32)
            for name in COLUMNS:
                out[name][b, taken] = found[name]
            out["mask"][b, taken] = True
        return out

    def files(self) -> list[Path]:
        return [p for p in self.path.rglob("*") if p.is_file()]

    def settle(self) -> None:
        self._db.flush()

    def close(self) -> None:
        self._db.close()


class RocksChunks(RocksRows):
    """The fair rival: 256 behaviours per value, columns packed, times as differences, zstd.

    The user's number of behaviours is kept in DRAM, so that a lookup is one multi-get.
    """

    name = "rocksdb_chunked"
    VALUE = np.dtype([(name, dtype, (CHUNK,)) for name, dtype in STORED.items()])

    def __init__(self, path: Path, cache_bytes: int = 256 << 20, direct: bool = False, counts=None):
        super().__init__(path, cache_bytes, direct)
        self.counts: dict[int, int] = counts if counts is not None else {}

    def append(self, users: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
        order = np.argsort(users, kind="stable")
        users = np.asarray(users)[order]
        columns = {name: np.asarray(columns[name])[order] for name in STORED}
        edges = np.flatnonzero(np.concatenate([[True], users[1:] != users[:-1], [True]]))
        batch = WriteBatch(raw_mode=True)
        open_keys = []
        for a in edges[:-1].tolist():
            user = int(users[a])
            open_keys.append(_CHUNK_KEY.pack(user, self.counts.get(user, 0) // CHUNK))
        held = self._db.get(open_keys)
        for (a, b), open_chunk in zip(itertools.pairwise(edges.tolist()), held, strict=True):
            user = int(users[a])
            count = self.counts.get(user, 0)
            inside = count % CHUNK
            pieces = -(-(inside + b - a) // CHUNK)
            values = np.zeros(pieces, self.VALUE)
            if inside:
                values[0] = np.frombuffer(open_chunk, self.VALUE)[0]
                values["time"][0] = np.cumsum(values["time"][0], dtype=np.uint32)
            for name in STORED:
                flat = values[name].reshape(-1)
                flat[inside : inside + b - a] = columns[name][a:b]
                values[name] = flat.reshape(pieces, CHUNK)
            last = (inside + b - a - 1) % CHUNK
            values["time"][-1, last:] = values["time"][-1, last]
            values["time"][:, 1:] = np.diff(values["time"], axis=1)
            for k in range(pieces):
                batch.put(_CHUNK_KEY.pack(user, count // CHUNK + k), values[k].tobytes())
            self.counts[user] = count + b - a
        self._db.write(batch)

    def last_n(self, users: np.ndarray, n: int) -> dict[str, np.ndarray]:
        out = empty(len(users), n)
        keys, spans = [], []
        for user in users.tolist():
            count = self.counts.get(user, 0)
            first, last = max(count - n, 0) // CHUNK, (count - 1) // CHUNK
            keys += [_CHUNK_KEY.pack(user, k) for k in range(first, last + 1)]
            spans.append((last + 1 - first, count - first * CHUNK))
        values = np.frombuffer(b"".join(self._db.get(keys)), self.VALUE)
        times = np.cumsum(values["time"], axis=1, dtype=np.uint32)
        at = 0
        for b, (chunks, stop) in enumerate(spans):
            taken = min(n, stop)
            for name in STORED:
                source = times if name == "time" else values[name]
                flat = source[at : at + chunks].reshape(-1)
                out[name][b, n - taken :] = flat[stop - taken : stop]
            out["mask"][b, n - taken :] = True
            at += chunks
        return out


class LmdbBlobs:
    """One value per user: all behaviours, column by column, in narrow types."""

    name = "lmdb_blob"
    WIDTH = sum(d.itemsize for d in STORED.values())

    def __init__(self, path: Path):
        self.path = path
        self._env = lmdb.open(str(path), map_size=16 << 30, sync=False, readahead=False)

    def load(self, blocks: Iterable[Mapping[str, np.ndarray]]) -> None:
        for block in blocks:
            self.append(block["user"], block)
        self.settle()

    def append(self, users: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
        order = np.argsort(users, kind="stable")
        users = np.asarray(users)[order]
        columns = {name: np.asarray(columns[name])[order] for name in STORED}
        edges = np.flatnonzero(np.concatenate([[True], users[1:] != users[:-1], [True]]))
        with self._env.begin(write=True) as transaction:
            for a, b in itertools.pairwise(edges.tolist()):
                key = _USER.pack(int(users[a]))
                held = transaction.get(key) or b""
                count, at, parts = len(held) // self.WIDTH, 0, []
                for name, dtype in STORED.items():
                    parts.append(held[at : at + count * dtype.itemsize])
                    parts.append(columns[name][a:b].astype(dtype).tobytes())
                    at += count * dtype.itemsize
                transaction.put(key, b"".join(parts))

    def last_n(self, users: np.ndarray, n: int) -> dict[str, np.ndarray]:
        out = empty(len(users), n)
        with self._env.begin(buffers=True) as transaction:
            for b, user in enumerate(users.tolist()):
                held = transaction.get(_USER.pack(user))
                if held is None:
                    continue
                count, at = len(held) // self.WIDTH, 0
                taken = min(n, count)
                for name, dtype in STORED.items():
                    end = at + count * dtype.itemsize
                    values = np.frombuffer(held, dtype, taken, end - taken * dtype.itemsize)
                    out[name][b, n - taken :] = values
                    at = end
                out["mask"][b, n - taken :] = True
        return out

    def files(self) -> list[Path]:
        return [self.path / "data.mdb"]

    def settle(self) -> None:
        self._env.sync(True)

    def close(self) -> None:
        self._env.close()
