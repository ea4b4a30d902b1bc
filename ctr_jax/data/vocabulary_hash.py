"""Hashes of vocabularies: of their content, not of the bytes of a file, which change with the
parquet writer. Two vocabularies of one hash give the same values the same ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

DIGITS = 16
_BATCH_ROWS = 1 << 16  # part of what a hash is


def contents(path: Path, rows: int | None = None) -> Iterator[tuple[bytes, bytes]]:
    """(values and ids, counts) of the first `rows` values of vocabularies/<name>.parquet, in parts;
    None = all."""
    left = pq.read_metadata(path).num_rows if rows is None else rows
    for batch in pq.ParquetFile(path).iter_batches(_BATCH_ROWS):
        if left <= 0:
            return
        part = batch.slice(0, left)
        left -= len(part)
        values = "\0".join(map(str, part["value"].to_pylist())).encode()
        ids = part["id"].to_numpy().astype("<i4").tobytes()
        yield values + ids, part["count"].to_numpy().astype("<i8").tobytes()


def hash_of(path: Path, rows: int | None = None) -> str:
    """DIGITS of the sha256 of the values and ids of the first `rows` values; None = all."""
    meaning = hashlib.sha256()
    for content, _ in contents(path, rows):
        meaning.update(content)
    return meaning.hexdigest()[:DIGITS]
