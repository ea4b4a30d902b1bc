"""Raw CSV and parquet files -> DuckDB tables, with every bad row named or counted.

Tables keep the files' order: a row's `rowid` says which file and row it was, so a message can name
the line (CSV; 1-based, the header is line 1) or the row group (parquet). The slow search for the
line happens only once something is wrong.
"""

from __future__ import annotations

import bisect
import csv
import dataclasses
import gzip
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq

from ctr_jax.data.errors import DataError

PARQUET = (".parquet", ".pq")
_SAMPLE_ROWS = 20_480
_REJECTS = 5
_NEARLY_ALL, _MOST = 0.99, 0.5  # shares of numbers that make a CSV column a number
_KINDS = {
    "CAST": "value of the wrong type",
    "MISSING COLUMNS": "row of the wrong width",
    "TOO MANY COLUMNS": "row of the wrong width",
    "UNQUOTED VALUE": "quote that is not closed",
    "LINE SIZE OVER MAXIMUM": "line that is too long",
    "INVALID ENCODING": "text that is not UTF-8",
    "INVALID STATE": "malformed row",
}


@dataclasses.dataclass
class RawTable:
    """A table that holds raw files one after the other.

    Attributes:
      name: the DuckDB table.
      files: the files, in order.
      first: the rowid of each file's first row.
      columns: {column: DuckDB type}.
      header: whether CSV files begin with a header line.
      rejected: {number of a CSV file: numbers of its rows, from 1, that are not in the table}; the
        header and blank lines count.
    """

    name: str
    files: list[Path]
    first: list[int]
    columns: dict[str, str]
    header: bool = True
    rejected: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

    def place(self, rowid: int) -> str:
        """ "file: line 12" or "file: row group 3, row 7" of a row, found by reading the file."""
        i = bisect.bisect_right(self.first, rowid) - 1
        path, row = self.files[i], rowid - self.first[i]
        if path.suffix in PARQUET:
            metadata = pq.ParquetFile(path).metadata
            for group in range(metadata.num_row_groups):
                if row < metadata.row_group(group).num_rows:
                    return f"{path}: row group {group}, row {row}"
                row -= metadata.row_group(group).num_rows
            return f"{path}: row {row}"
        with _open_text(path) as file:
            reader = csv.reader(file)
            wanted = row + int(self.header)
            rejected = set(self.rejected.get(i, ()))
            seen = -1
            for number, line in enumerate(reader, 1):
                seen += bool(line) and number not in rejected  # blank lines are no rows
                if seen == wanted:
                    return f"{path}: line {reader.line_num}"
        return f"{path}: row {row}"


def find_files(raw_dir: str | Path, patterns: str | Sequence[str]) -> list[Path]:
    """Files of `raw_dir` that the patterns (names or globs) name, sorted within each pattern.

    Raises:
      DataError: a pattern names nothing.
    """
    found: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = sorted(p for p in Path(raw_dir).glob(pattern) if p.is_file())
        if not matches:
            raise DataError(
                f"{Path(raw_dir) / pattern}: no such file; put the raw files there or set "
                "data.raw_dir"
            )
        found += matches
    return found


def distinct_names(files: Sequence[Path]) -> dict[Path, str]:
    """What to call each file: its name, or its path below what all share where names repeat."""
    if len({path.name for path in files}) == len(set(files)):
        return {path: path.name for path in files}
    shared = os.path.commonpath([path.parent for path in files])
    return {path: os.path.relpath(path, shared) for path in files}


def load(
    con: duckdb.DuckDBPyConnection,
    name: str,
    files: Sequence[Path],
    report: dict[str, Any],
    *,
    on_bad_row: str,
    columns: Mapping[str, str] | None = None,
    types: Mapping[str, str] | None = None,
    numeric: Sequence[str] = (),
    nulls: Sequence[str] = ("",),
    quote: str = '"',
    header: bool = True,
    skip_files: bool = False,
) -> RawTable:
    """Creates the table `name` from all `files`, in file order, plus a column `filename`.

    Args:
      columns: {column: DuckDB type} that must be there; others are left out. None = all columns
        of the first file that has rows, which the other files must have too.
      types: overrides of inferred types (CSV without `columns`: BIGINT or DOUBLE where at least
        99 % of the first 20,480 rows allow it, else VARCHAR; whole numbers are never DOUBLE, which
        would merge ids of 17 digits and more).
      numeric: columns that are numbers if most of those rows are.
      nulls: CSV texts that mean missing.
      skip_files: with on_bad_row = "skip", leave out whole files that cannot be read.
      report: rows read per file and rows skipped by reason are added to it.
    Raises:
      DataError: a column is missing, a file is truncated or corrupt, or a row is malformed and
        `on_bad_row` is "raise".
    """
    if on_bad_row not in ("raise", "skip"):
        raise DataError(f"on_bad_row is {on_bad_row!r}; use 'raise' or 'skip'")
    table = create(
        con, name, files, columns=columns, types=types, numeric=numeric, nulls=nulls, quote=quote,
        header=header,
    )  # fmt: skip
    names = distinct_names(files)
    for path in files:
        have = file_columns(path) if header or path.suffix in PARQUET else list(table.columns)
        missing = [c for c in table.columns if c not in have]
        if missing:
            raise DataError(f"{path}: no column {missing[0]!r}; the file has {have}")
        table.first.append(con.execute(f"SELECT count(*) FROM {name}").fetchone()[0])
        if path.suffix in PARQUET:
            _insert_parquet(con, table, path)
        else:
            try:
                _insert_csv(con, table, path, have, report, on_bad_row, nulls, quote)
            except DataError as error:
                if on_bad_row == "raise" or not skip_files:
                    raise
                report["skipped"]["unreadable files"] = (
                    report["skipped"].get("unreadable files", 0) + 1
                )
                report.setdefault("unreadable_files", []).append(str(error))
        rows = con.execute(f"SELECT count(*) FROM {name}").fetchone()[0] - table.first[-1]
        report["rows"][names[path]] = rows
    return table


def create(
    con: duckdb.DuckDBPyConnection,
    name: str,
    files: Sequence[Path],
    *,
    columns: Mapping[str, str] | None = None,
    types: Mapping[str, str] | None = None,
    numeric: Sequence[str] = (),
    nulls: Sequence[str] = ("",),
    quote: str = '"',
    header: bool = True,
) -> RawTable:
    """Creates the table `name`, still without rows; see `load` for the options."""
    if not columns:
        found = (
            _inferred(con, path, file_columns(path), types or {}, numeric, nulls, quote)
            for path in files
        )
        columns = next(filter(None, found), None)
    if not columns:
        raise DataError(f"{files[0]}: no rows, only a header")
    # DuckDB has a `rowid` of its own, which places every row, and `filename` is added here.
    if taken := [c for c in columns if c.lower() in ("rowid", "filename")]:
        raise DataError(f"{files[0]}: a column cannot be called {taken[0]!r} here; rename it")
    definition = ", ".join(f"{sql_name(c)} {t}" for c, t in columns.items())
    con.execute(f"CREATE OR REPLACE TABLE {name} ({definition}, filename VARCHAR)")
    return RawTable(name, list(files), [], dict(columns), header)


def file_columns(path: Path) -> list[str]:
    """Column names of a CSV (blanks around names cut off) or parquet file.

    Raises:
      DataError: the file is empty, truncated or not what its name says.
    """
    try:
        if path.suffix in PARQUET:
            return list(pq.ParquetFile(path).schema_arrow.names)
        with _open_text(path) as file:
            names = next(csv.reader(file), [])
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: cannot be read, truncated or corrupt: {_line(error)}") from error
    if not names:
        raise DataError(f"{path}: the file is empty; expected a header line")
    return [n.strip().removeprefix("\ufeff") for n in names]


def _insert_parquet(con: duckdb.DuckDBPyConnection, table: RawTable, path: Path) -> None:
    select = ", ".join(f"CAST({sql_name(c)} AS {t})" for c, t in table.columns.items())
    try:
        con.execute(
            f"INSERT INTO {table.name} SELECT {select}, ? FROM "
            "read_parquet(?, hive_partitioning = false)",
            [path.name, str(path)],
        )
    except duckdb.Error as error:
        raise DataError(f"{_bad_row_group(path)}: {_line(error)}") from error


def _bad_row_group(path: Path) -> str:
    """Names the first row group that cannot be read."""
    file = pq.ParquetFile(path)
    for group in range(file.metadata.num_row_groups):
        try:
            file.read_row_group(group)
        except (OSError, ValueError):
            return f"{path}: row group {group} is corrupt"
    return str(path)


def _insert_csv(
    con: duckdb.DuckDBPyConnection,
    table: RawTable,
    path: Path,
    have: list[str],
    report: dict[str, Any],
    on_bad_row: str,
    nulls: Sequence[str],
    quote: str,
) -> None:
    types = {c: table.columns.get(c, "VARCHAR") for c in have}
    select = ", ".join(sql_name(c) for c in table.columns)
    reader = _reader(path, types, nulls, quote, table.header)
    insert = f"INSERT INTO {table.name} SELECT {select}, {sql_text(path.name)} FROM "
    if on_bad_row == "raise":
        try:
            con.execute(insert + reader("ignore_errors = false"))
        except duckdb.Error as error:
            where, kind, value = _first_reject(con, reader) or (str(path), "", "")
            problem = f"{kind}: {value!r}" if kind else f"truncated or corrupt: {_line(error)}"
            raise DataError(
                f"{where}: {problem}; correct the row, set data.on_bad_row = 'skip' to leave such "
                "rows out, or data.types if the column's type is not what its first rows tell"
            ) from error
        return
    try:
        con.execute(
            insert + reader("ignore_errors = true, store_rejects = true, rejects_limit = 0")
        )
    except duckdb.Error as error:
        raise DataError(f"{path}: truncated or corrupt: {_line(error)}") from error
    counts = {}
    if _has_rejects(con):
        lines = con.execute("SELECT DISTINCT line FROM reject_errors").fetchnumpy()["line"]
        table.rejected[len(table.first) - 1] = lines.astype(np.int64)
        counts = dict(
            con.execute(
                "SELECT CAST(error_type AS VARCHAR), count(DISTINCT line) FROM reject_errors "
                "GROUP BY 1 ORDER BY 1"
            ).fetchall()
        )
    rejected = _first_reject(con, None, "UNQUOTED VALUE")  # also empties DuckDB's list
    if rejected:
        where, kind, value = rejected
        raise DataError(f"{where}: {kind}: {value!r}; the rows after it cannot be told apart")
    for kind, count in counts.items():
        what = _KINDS.get(kind, kind.lower())
        report["skipped"][what] = report["skipped"].get(what, 0) + count


def _reader(path: Path, types: Mapping[str, str], nulls: Sequence[str], quote: str, header: bool):
    """A function of extra options -> the read_csv call of this file."""
    columns = ", ".join(f"{sql_text(c)}: {sql_text(t)}" for c, t in types.items())
    options = (
        f"columns = {{{columns}}}, header = {str(header).lower()}, auto_detect = false, "
        f"delim = ',', quote = {sql_text(quote)}, escape = {sql_text(quote)}, "
        f"nullstr = [{', '.join(map(sql_text, nulls))}], null_padding = false"
    )
    return lambda extra: f"read_csv({sql_text(path)}, {options}, {extra})"


def _first_reject(
    con: duckdb.DuckDBPyConnection, reader: Any, kind: str = ""
) -> tuple[str, str, str] | None:
    """(file and line, what is wrong, value) of the first malformed row; reads the file if asked."""
    if reader is not None:
        try:
            extra = f"ignore_errors = true, store_rejects = true, rejects_limit = {_REJECTS}"
            con.execute(f"CREATE OR REPLACE TEMP TABLE reread AS SELECT * FROM {reader(extra)}")
            con.execute("DROP TABLE reread")
        except duckdb.Error:
            return None
    if not _has_rejects(con):
        return None
    row = con.execute(
        f"""
        SELECT s.file_path, e.line, CAST(e.error_type AS VARCHAR), e.column_name, e.csv_line,
               e.error_message
        FROM reject_errors e JOIN reject_scans s USING (scan_id, file_id)
        {f"WHERE e.error_type = '{kind}'" if kind else ""} ORDER BY e.line LIMIT 1"""
    ).fetchone()
    _clear_rejects(con)
    if row is None:
        return None
    path, line, error, column, text, message = row
    what = _KINDS.get(error, error.lower())
    if error == "CAST":
        what += f" in column {column!r} ({_line(message)})"
    elif "COLUMNS" in error:
        what += f" ({_line(message)})"
    return f"{path}: line {line}", what, text[:120]


def _has_rejects(con: duckdb.DuckDBPyConnection) -> bool:
    """DuckDB makes its table of rejected rows when the first row is rejected."""
    query = "SELECT count(*) FROM duckdb_tables() WHERE table_name = 'reject_errors'"
    return con.execute(query).fetchone()[0] > 0


def _clear_rejects(con: duckdb.DuckDBPyConnection) -> None:
    con.execute("DROP TABLE IF EXISTS reject_errors")
    con.execute("DROP TABLE IF EXISTS reject_scans")


def _inferred(
    con: duckdb.DuckDBPyConnection,
    path: Path,
    have: list[str],
    types: Mapping[str, str],
    numeric: Sequence[str],
    nulls: Sequence[str],
    quote: str,
) -> dict[str, str]:
    """Column types of a file: parquet's own, or CSV columns judged by their first rows.

    {} if there are none: types that nothing tells would not be those of the other files.
    Where all of them are malformed, every column is a text, and loading names the first.
    """
    if path.suffix in PARQUET:
        described = con.execute(
            "DESCRIBE SELECT * FROM read_parquet(?, hive_partitioning = false)", [str(path)]
        ).fetchall()
        return {row[0]: types.get(row[0], row[1]) for row in described}
    texts = dict.fromkeys(have, "VARCHAR")
    sample = f"(SELECT * FROM {_reader(path, texts, nulls, quote, True)('ignore_errors = true')} "
    sample += f"LIMIT {_SAMPLE_ROWS})"
    # A cast alone would not do: '1.5' casts to BIGINT, as 2.
    digits = "regexp_full_match({c}, '\\s*[+-]?\\d+\\s*')"
    shares = (
        f"count(*) FILTER ({digits})",
        f"count(TRY_CAST({{c}} AS BIGINT)) FILTER ({digits})",
        "count(TRY_CAST({c} AS DOUBLE))",
    )
    fits = ", ".join(
        f"{share.format(c=sql_name(c))} / nullif(count({sql_name(c)}), 0)"
        for c in have
        for share in shares
    )
    try:
        rows, *answers = con.execute(f"SELECT count(*), {fits} FROM {sample}").fetchone()
    except duckdb.Error as error:
        raise DataError(f"{path}: truncated or corrupt: {_line(error)}") from error
    if not rows and _is_header_alone(path):
        return {}
    found = {}
    for i, column in enumerate(have):
        whole, fit, real = (share or 0.0 for share in answers[3 * i : 3 * i + 3])
        enough = _MOST if column in numeric else _NEARLY_ALL
        kind = "DOUBLE" if real >= enough else "VARCHAR"
        if whole >= enough and whole == real:
            # An id that is too large is an id all the same; a time or label that is, is wrong.
            all_fit = fit == whole or (column in numeric and fit >= enough)
            kind = "BIGINT" if all_fit else "VARCHAR"
        found[column] = types.get(column, kind)
    return found


def _is_header_alone(path: Path) -> bool:
    with _open_text(path) as file:
        reader = csv.reader(file)
        next(reader, None)
        return not any(reader)


def _open_text(path: Path) -> io.TextIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", errors="replace", newline="")
    return open(path, encoding="utf-8", errors="replace", newline="")


def _line(error: object) -> str:
    return str(error).strip().splitlines()[0]


def sql_name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


def sql_text(value: object) -> str:
    return "'" + str(value).replace("'", "''") + "'"
