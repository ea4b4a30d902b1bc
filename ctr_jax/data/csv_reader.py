"""DuckDB's CSV reader: its call for one file, and what it says of the rows that it rejects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import duckdb
import numpy as np

from ctr_jax.data.raw_files import compression, first_line
from ctr_jax.data.sql import sql_path, sql_text

WRONG_TYPE = "value of the wrong type"
_KINDS = {
    "CAST": WRONG_TYPE,
    "MISSING COLUMNS": "row of the wrong width",
    "TOO MANY COLUMNS": "row of the wrong width",
    "UNQUOTED VALUE": "quote that is not closed",
    "LINE SIZE OVER MAXIMUM": "line that is too long",
    "INVALID ENCODING": "text that is not UTF-8",
    "INVALID STATE": "malformed row",
}


def reader(
    path: Path, columns: Sequence[tuple[str, str]], nulls: Sequence[str], quote: str, header: bool
) -> Callable[[str], str]:
    """A function of extra options -> the read_csv call of a file.

    Args:
      columns: (name, DuckDB type) of each column of the file; a nameless one gets a name of ours.
    """
    typed = ", ".join(
        f"{sql_text(name or f'ctr_jax column {i}')}: {sql_text(kind)}"
        for i, (name, kind) in enumerate(columns)
    )
    options = (
        f"columns = {{{typed}}}, header = {str(header).lower()}, auto_detect = false, "
        f"delim = ',', quote = {sql_text(quote)}, escape = {sql_text(quote)}, "
        f"nullstr = [{', '.join(map(sql_text, nulls))}], null_padding = false, "
        "hive_partitioning = false"
    )
    options += f", compression = {sql_text(compression(path) or 'none')}"
    return lambda extra: f"read_csv({sql_path(path)}, {options}, {extra})"


def first_reject(con: duckdb.DuckDBPyConnection, kind: str = "") -> tuple[int, str, str] | None:
    """(line, what is wrong, text) of the first row that was rejected, of a kind if one is given."""
    if not _has_rejects(con):
        return None
    row = con.execute(
        f"""
        SELECT line, CAST(error_type AS VARCHAR), column_name, csv_line, error_message
        FROM reject_errors {f"WHERE error_type = '{kind}'" if kind else ""}
        ORDER BY line LIMIT 1"""
    ).fetchone()
    if row is None:
        return None
    line, error, column, text, message = row
    what = _KINDS.get(error, error.lower())
    if error == "CAST":
        what += f" in column {column!r} ({first_line(message)})"
    elif "COLUMNS" in error:
        what += f" ({first_line(message)})"
    return line, what, text[:120]


def rejected_lines(con: duckdb.DuckDBPyConnection) -> np.ndarray:
    """Numbers of the rejected rows, from 1; the header and blank lines count: [N] int64."""
    if not _has_rejects(con):
        return np.empty(0, np.int64)
    lines = con.execute("SELECT DISTINCT line FROM reject_errors").fetchnumpy()["line"]
    return lines.astype(np.int64)


def reject_counts(con: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """{what is wrong: number of rows}."""
    if not _has_rejects(con):
        return {}
    counts: dict[str, int] = {}
    for kind, count in con.execute(
        "SELECT CAST(error_type AS VARCHAR), count(DISTINCT line) FROM reject_errors "
        "GROUP BY 1 ORDER BY 1"
    ).fetchall():
        what = _KINDS.get(kind, kind.lower())
        counts[what] = counts.get(what, 0) + count
    return counts


def clear_rejects(con: duckdb.DuckDBPyConnection) -> None:
    """Empties DuckDB's list of rejected rows, which is of the connection, not of a file."""
    con.execute("DROP TABLE IF EXISTS reject_errors")
    con.execute("DROP TABLE IF EXISTS reject_scans")


def _has_rejects(con: duckdb.DuckDBPyConnection) -> bool:
    """DuckDB makes its table of rejected rows when the first row is rejected."""
    query = "SELECT count(*) FROM duckdb_tables() WHERE table_name = 'reject_errors'"
    return con.execute(query).fetchone()[0] > 0
