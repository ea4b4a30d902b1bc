"""Raw files: which ones there are, what to call them, and the names of their columns."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ctr_jax.data.errors import DataError, check_distinct

_PARQUET = (".parquet", ".pq")
_LONGEST_CELL = 1 << 30  # characters; Python's csv module stops at 131,072 unless told
_NO_TEXT = ("\0", "\ufffd")  # the latter stands for bytes that are no UTF-8
_SEPARATORS = ";\t|"


def is_parquet(path: Path) -> bool:
    return path.suffix.lower() in _PARQUET


def compression(path: Path) -> str | None:
    """How a CSV file is compressed, by its suffix in small or capital letters."""
    return {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())


def find_files(raw_dir: str | Path, patterns: str | Sequence[str]) -> list[Path]:
    """Files that the patterns (names or globs, within `raw_dir` or absolute) name, each once.

    They are sorted within each pattern; a file of two patterns stands where the first has it.

    Raises:
      DataError: there is no pattern, or one names nothing.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not patterns or not all(patterns):
        raise DataError(f"{raw_dir}: data names no raw file there; give a name or a glob")
    found: dict[str, Path] = {}
    for pattern in patterns:
        named = Path(raw_dir, pattern)  # the pattern alone where it is absolute
        root = Path(named.anchor if Path(pattern).is_absolute() else raw_dir)
        matches = [named] if named.is_file() else sorted(root.glob(str(named.relative_to(root))))
        matches = [path for path in matches if path.is_file()]
        if not matches:
            raise DataError(f"{named}: no such file; put the raw files there or set data.raw_dir")
        for path in matches:
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def distinct_names(files: Sequence[Path]) -> dict[Path, str]:
    """What to call each file: its name, or its path below what all share where names repeat."""
    if len({path.name for path in files}) == len(set(files)):
        return {path: path.name for path in files}
    shared = os.path.commonpath([path.parent for path in files])
    return {path: os.path.relpath(path, shared) for path in files}


def file_columns(path: Path) -> list[str]:
    """Column names of a CSV (blanks around names cut off, "" = none) or parquet file.

    Raises:
      DataError: the file is empty, truncated or not what its name says; or its names are not
        distinct, case not counting.
    """
    try:
        if is_parquet(path):
            names = list(pq.ParquetFile(path).schema_arrow.names)
        else:
            with open_csv(path) as rows:
                names = [name.strip() for name in next(rows, [])]
    except (OSError, EOFError, ValueError, csv.Error) as error:
        raise DataError(
            f"{path}: cannot be read, truncated or corrupt: {first_line(error)}"
        ) from error
    if not names:
        raise DataError(f"{path}: the file is empty; expected a header line")
    if any(mark in name for name in names for mark in _NO_TEXT):
        raise DataError(
            f"{path}: the header is no text in UTF-8; Parquet and compressed files are known by "
            "their suffix, .parquet or .pq, .gz and .zst"
        )
    if len(names) == 1 and (found := [s for s in _SEPARATORS if s in names[0]]):
        raise DataError(
            f"{path}: the header looks separated by {found[0]!r} ({names[0][:80]!r}); separate "
            "columns by commas"
        )
    check_distinct(f"{path}: columns", filter(None, names))
    return names


@contextlib.contextmanager
def open_csv(path: Path) -> Iterator[csv.reader]:
    """The rows of a CSV file, the header among them; an empty one for a blank line."""
    csv.field_size_limit(_LONGEST_CELL)
    with _open_text(path) as file:
        yield csv.reader(file)


def _open_text(path: Path) -> io.TextIOBase:
    stream = pa.input_stream(path, compression=compression(path))
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="")


def first_line(error: object) -> str:
    return str(error).strip().splitlines()[0]
