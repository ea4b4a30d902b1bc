"""Raw CSV and parquet files -> DuckDB tables, with every bad row named or counted.

Tables keep the files' order: a row's `rowid` says which file and row it was, so a message can name
the line (CSV; 1-based, the header is line 1) or the row group (parquet). The slow search for the
line happens only once something is wrong.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq

from ctr_jax.data import csv_reader
from ctr_jax.data.errors import DataError
from ctr_jax.data.raw_files import (
    distinct_names,
    file_columns,
    first_line,
    is_parquet,
    open_csv,
)
from ctr_jax.data.raw_types import (
    Cell,
    absent_cell,
    all_null,
    column_types,
    csv_cell,
    parquet_cell,
    parquet_schema,
)
from ctr_jax.data.sql import from_parquet, own, sql_name, sql_text

_REJECTS = 5
_MISFIT = "a value does not fit its column"
_HINT = (
    "correct the row, set data.on_bad_row = 'skip' to leave such rows out, or data.types if the "
    "column's type is not what its first rows tell"
)


@dataclasses.dataclass
class RawTable:
    """A table that holds raw files one after the other.

    Attributes:
      name: the DuckDB table.
      files: the files, in order.
      first: the rowid of each file's first row.
      columns: {column: DuckDB type}.
      header: whether CSV files begin with a header line.
      rejected: {number of a CSV file: numbers of its rows, from 1, that could not be read}; the
        header and blank lines count.
      misfits: {number of a file: numbers of the rows read, from 0 and ascending, that are not in
        the table}.
    """

    name: str
    files: list[Path]
    first: list[int]
    columns: dict[str, str]
    header: bool = True
    rejected: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    misfits: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

    def place(self, rowid: int) -> str:
        """ "file: line 12" or "file: row group 3, row 7" of a row, found by reading the file."""
        i = bisect.bisect_right(self.first, rowid) - 1
        row = rowid - self.first[i]
        misfits = self.misfits.get(i, np.empty(0, np.int64))
        row += int(np.count_nonzero(misfits - np.arange(len(misfits)) <= row))
        if is_parquet(self.files[i]):
            return _parquet_place(self.files[i], row)
        line = _line_of(self.files[i], row, self.header, self.rejected.get(i, ()))
        return f"{self.files[i]}: line {line}" if line else f"{self.files[i]}: row {row}"


def _parquet_place(path: Path, row: int) -> str:
    metadata = pq.ParquetFile(path).metadata
    rest = row
    for group in range(metadata.num_row_groups):
        if rest < metadata.row_group(group).num_rows:
            return f"{path}: row group {group}, row {rest}"
        rest -= metadata.row_group(group).num_rows
    return f"{path}: row {row}"


def _line_of(path: Path, row: int, header: bool, rejected: Sequence[int]) -> int:
    """The line of a row of a CSV file, from 1; 0 if it is not there."""
    wanted, without, seen = row + int(header), set(rejected), -1
    with open_csv(path) as rows:
        for number, cells in enumerate(rows, 1):
            seen += bool(cells) and number not in without  # blank lines are no rows
            if seen == wanted:
                return rows.line_num
    return 0


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
    needed: Collection[str] | None = None,
) -> RawTable:
    """Creates the table `name` from all `files`, in file order, plus a column `filename`.

    Args:
      columns: {column: DuckDB type} that must be there; others are left out. None = all columns
        of the first file that has rows, which the other files must have too; those without a name
        are left out.
      needed: the columns that a file must have, in small letters; another that it lacks is NULL in
        its rows. None = all.
      types: overrides of inferred types (CSV without `columns`: BIGINT or DOUBLE where at least
        99 % of the first 20,480 rows allow it, else VARCHAR; whole numbers are never DOUBLE, which
        would merge ids of 17 digits and more).
      numeric: columns, in small letters, that are numbers, or else moments, if most of those rows
        are.
      nulls: CSV texts that mean missing.
      skip_files: with on_bad_row = "skip", leave out whole files that cannot be read.
      report: rows read per file and rows skipped by reason are added to it.
    Raises:
      DataError: a column is missing, a file is truncated or corrupt, or a row is malformed, or
        has a value that its column's type does not hold, and `on_bad_row` is "raise".
    """
    if on_bad_row not in ("raise", "skip"):
        raise DataError(f"on_bad_row is {on_bad_row!r}; use 'raise' or 'skip'")
    table = create(
        con, name, files, columns=columns, types=types, numeric=numeric, nulls=nulls, quote=quote,
        header=header,
    )  # fmt: skip
    names = distinct_names(files)
    for path in files:
        have = file_columns(path) if header or is_parquet(path) else list(table.columns)
        for column in table.columns:
            if column not in have and (needed is None or column.lower() in needed):
                raise DataError(f"{path}: no column {column!r}; the file has {have}")
        table.first.append(con.execute(f"SELECT count(*) FROM {name}").fetchone()[0])
        skipped = None if on_bad_row == "raise" else report["skipped"]
        if is_parquet(path):
            _insert_parquet(con, table, path, skipped)
        else:
            try:
                _insert_csv(con, table, path, have, skipped, nulls, quote)
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
        columns = column_types(
            con, files, types=types or {}, numeric=numeric, nulls=nulls, quote=quote
        )
    if not columns:
        raise DataError(f"{files[0]}: no rows, only a header")
    # DuckDB has a `rowid` of its own, which places every row, and `filename` is added here.
    if taken := [c for c in columns if c.lower() in ("rowid", "filename")]:
        raise DataError(f"{files[0]}: a column cannot be called {taken[0]!r} here; rename it")
    definition = ", ".join(f"{sql_name(c)} {t}" for c, t in columns.items())
    con.execute(f"CREATE OR REPLACE TABLE {name} ({definition}, filename VARCHAR)")
    return RawTable(name, list(files), [], dict(columns), header)


def _insert_parquet(
    con: duckdb.DuckDBPyConnection, table: RawTable, path: Path, skipped: dict[str, int] | None
) -> None:
    """Appends a file; `skipped` counts bad rows, None = they are errors."""
    source = from_parquet(path)
    try:
        found = parquet_schema(con, path)
        cells = [
            absent_cell(column, kind)
            if column not in found
            else Cell(column, f"CAST(NULL AS {kind})")
            if found[column] != kind and all_null(path, column)
            else parquet_cell(column, found[column], kind)
            for column, kind in table.columns.items()
        ]
        con.execute(_insert(table, path, cells, source))
    except duckdb.Error as error:
        if _MISFIT not in str(error):
            raise DataError(f"{_bad_row_group(path)}: {first_line(error)}") from error
        if skipped is None:
            row, problem = _first_misfit(con, table, cells, source)
            raise DataError(f"{_parquet_place(path, row)}: {problem}; {_HINT}") from error
        _insert_without_misfits(con, table, path, cells, (source, source), skipped)


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
    skipped: dict[str, int] | None,
    nulls: Sequence[str],
    quote: str,
) -> None:
    """As _insert_parquet; the file is read again only where something is wrong."""
    read_as, cells = {}, []
    for column, kind in table.columns.items():
        if column in have:
            read_as[column], cell = csv_cell(column, kind)
        else:
            cell = absent_cell(column, kind)
        cells.append(cell)
    columns = [(c, read_as.get(c, "VARCHAR")) for c in have]
    read = csv_reader.reader(path, columns, nulls, quote, table.header)
    try:
        con.execute(_insert(table, path, cells, read("ignore_errors = false")))
        return
    except duckdb.Error as error:
        failure = error
    csv_reader.clear_rejects(con)
    limit = _REJECTS if skipped is None else 0
    rejecting = read(f"ignore_errors = true, store_rejects = true, rejects_limit = {limit}")
    try:
        if skipped is None:
            misfit = _first_misfit(con, table, cells, rejecting)
        else:
            sources = rejecting, read("ignore_errors = true")
            _insert_without_misfits(con, table, path, cells, sources, skipped)
    except duckdb.Error:
        raise DataError(f"{path}: truncated or corrupt: {first_line(failure)}") from failure
    if skipped is None:
        problem = _first_bad_line(con, path, misfit, table.header)
        csv_reader.clear_rejects(con)
        raise DataError(
            f"{path}: {problem}; {_HINT}"
            if problem
            else f"{path}: truncated or corrupt: {first_line(failure)}"
        ) from failure
    unclosed = csv_reader.first_reject(con, "UNQUOTED VALUE")
    table.rejected[len(table.first) - 1] = csv_reader.rejected_lines(con)
    counts = csv_reader.reject_counts(con)
    csv_reader.clear_rejects(con)
    if unclosed:
        line, kind, value = unclosed
        raise DataError(
            f"{path}: line {line}: {kind}: {value!r}; the rows after it cannot be told apart"
        )
    for what, count in counts.items():
        skipped[what] = skipped.get(what, 0) + count


def _first_bad_line(
    con: duckdb.DuckDBPyConnection, path: Path, misfit: tuple[int, str] | None, header: bool
) -> str:
    """ "line 12: what is wrong" of the first bad row: one rejected or the first misfit."""
    problems = []
    if reject := csv_reader.first_reject(con):
        line, kind, text = reject
        problems.append((line, f"line {line}: {kind}: {text!r}"))
    if misfit is not None:
        # Rejected rows before it would make this too small, but never smaller than theirs.
        line = _line_of(path, misfit[0], header, ())
        problems.append((line, f"line {line}: {misfit[1]}"))
    return min(problems, key=lambda problem: problem[0])[1] if problems else ""


def _insert(table: RawTable, path: Path, cells: Sequence[Cell], source: str) -> str:
    """SQL that appends a file, and fails at a misfit."""
    values = ", ".join(
        f"CASE WHEN {cell.misfit} THEN error({sql_text(_MISFIT)}) ELSE {cell.value} END"
        if cell.misfit
        else cell.value
        for cell in cells
    )
    return f"INSERT INTO {table.name} SELECT {values}, {sql_text(path.name)} FROM {source}"


def _insert_without_misfits(
    con: duckdb.DuckDBPyConnection,
    table: RawTable,
    path: Path,
    cells: Sequence[Cell],
    sources: tuple[str, str],
    skipped: dict[str, int],
) -> None:
    """Appends the rows that fit, read from the second source; notes and counts the others."""
    rows = con.execute(_misfits(table, cells, sources[0])).fetchnumpy()["row"].astype(np.int64)
    table.misfits[len(table.first) - 1] = np.sort(rows)
    if len(rows):
        skipped[csv_reader.WRONG_TYPE] = skipped.get(csv_reader.WRONG_TYPE, 0) + len(rows)
    values = ", ".join(cell.value for cell in cells)
    misfit = " OR ".join(f"({cell.misfit})" for cell in cells if cell.misfit) or "FALSE"
    con.execute(
        f"INSERT INTO {table.name} SELECT {values}, {sql_text(path.name)} FROM {sources[1]} "
        f"WHERE NOT ({misfit})"
    )


def _first_misfit(
    con: duckdb.DuckDBPyConnection, table: RawTable, cells: Sequence[Cell], source: str
) -> tuple[int, str] | None:
    """(row, what is wrong) of the first row whose values do not all fit."""
    # To the end, without which DuckDB does not list the rows that it rejected on the way.
    found = con.execute(f"{_misfits(table, cells, source)} ORDER BY 1 LIMIT 1").fetchall()
    if not found:
        return None
    [(row, column, kind, value)] = found
    return row, f"{csv_reader.WRONG_TYPE} in column {column!r}, which is {kind}: {value!r}"


def _misfits(table: RawTable, cells: Sequence[Cell], source: str) -> str:
    """SQL of (row, column, type, value) of the rows whose values do not all fit."""
    bad = [cell for cell in cells if cell.misfit]

    def case(what) -> str:
        if not bad:
            return "NULL"
        return f"CASE {' '.join(f'WHEN {c.misfit} THEN {what(c)}' for c in bad)} END"

    # All columns are read, as they are for the table: the reader rejects by what it casts.
    read = ", ".join(sql_name(cell.column) for cell in cells if not cell.absent)
    return f"""
        SELECT {own("row")} AS "row", {case(lambda c: sql_text(c.column))} AS "column",
            {case(lambda c: sql_text(table.columns[c.column]))} AS "type",
            {case(lambda c: f"CAST({sql_name(c.column)} AS VARCHAR)")} AS "value"
        FROM (SELECT row_number() OVER () - 1 AS {own("row")}, * FROM {source})
        WHERE {"".join(f"({c.misfit}) OR " for c in bad)} hash({read}) IS NULL"""
