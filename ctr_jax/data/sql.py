"""Names, texts and paths as SQL that DuckDB takes as they stand."""

from __future__ import annotations

import re
from pathlib import Path


def sql_name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


def sql_text(value: object) -> str:
    return "'" + str(value).replace("'", "''") + "'"


def plain_path(path: Path) -> str:
    """A path for a reader of DuckDB, which takes `*`, `?` and `[` for a glob unless in brackets."""
    return re.sub(r"[*?[]", r"[\g<0>]", str(path))


def sql_path(path: Path) -> str:
    """SQL text of the path of a file to read."""
    return sql_text(plain_path(path))


def from_parquet(path: Path) -> str:
    """SQL that reads a parquet file; names of folders, such as date=2024-01-01, are no columns."""
    return f"read_parquet({sql_path(path)}, hive_partitioning = false)"


def own(name: str) -> str:
    """SQL of a column of ours beside raw columns, by a name that nobody gives one of his."""
    return sql_name(f"ctr_jax {name}")
