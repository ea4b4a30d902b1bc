"""Types of raw columns: told from the first rows of a CSV or from the schemas of parquet files.

No cast here may change a value in silence. DuckDB reads '1.5' as the BIGINT 2, so a CSV column of
whole numbers is read as text and cast where it is digits; a parquet column of another type than
the table's must come back equal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from ctr_jax.data.csv_reader import reader
from ctr_jax.data.errors import DataError
from ctr_jax.data.raw_files import file_columns, first_line, is_parquet, open_csv
from ctr_jax.data.sql import from_parquet, sql_name

INTEGERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER")
WIDE_INTEGERS = ("UBIGINT", "HUGEINT", "UHUGEINT")
# From these numbers on, several whole numbers are one float.
_MERGED_FROM = {"DOUBLE": 2**53, "FLOAT": 2**24}
FLOATS = tuple(_MERGED_FROM)
_SAMPLE_ROWS = 20_480
_NEARLY_ALL, _MOST = 0.99, 0.5  # shares of numbers that make a CSV column a number
# Beside what other programs write for whole numbers of a column with gaps: '2.0'.
_WHOLE = r"'\s*[+-]?\d+(\.0*)?\s*'"


def is_integer(kind: str) -> bool:
    return kind in INTEGERS + WIDE_INTEGERS


def refuse_lists(what: str, kind: str) -> None:
    """Raises DataError if a DuckDB type is one of lists."""
    if kind.endswith("]") or kind.startswith("MAP"):
        raise DataError(
            f"{what} is a list, {kind}; use an expression that gives a single value, such as "
            "array_to_string(column, '|') or column[1]"
        )


@dataclasses.dataclass(frozen=True)
class Cell:
    """SQL of one column of a file on its way into the table.

    Attributes:
      value: the value in the table's type.
      misfit: predicate of rows whose value the table's type does not hold; "" = there are none.
      absent: the file has no such column.
    """

    column: str
    value: str
    misfit: str = ""
    absent: bool = False


def absent_cell(column: str, wanted: str) -> Cell:
    """The cell of a column that the file lacks."""
    return Cell(column, f"CAST(NULL AS {wanted})", absent=True)


def csv_cell(column: str, wanted: str) -> tuple[str, Cell]:
    """The type to read a CSV column as, and the cell; all but whole numbers are the reader's."""
    name = sql_name(column)
    if not is_integer(wanted):
        return wanted, Cell(column, name)
    return "VARCHAR", _text_cell(column, wanted)


def parquet_cell(column: str, found: str, wanted: str) -> Cell:
    """The cell of a parquet column of type `found`."""
    name = sql_name(column)
    value = f"TRY_CAST({name} AS {wanted})"
    if found == wanted:
        return Cell(column, name)
    if found == "VARCHAR":
        return _text_cell(column, wanted)
    if wanted == "VARCHAR" or (found in FLOATS and wanted in FLOATS):
        return Cell(column, f"CAST({name} AS {wanted})")
    if found in FLOATS and is_integer(wanted):  # NaN is a missing value
        odd = f"{not_whole(name)} OR {merged(name, found)}"
        return Cell(column, value, f"{odd} OR ({_finite(name)} AND {value} IS NULL)")
    return Cell(column, value, f"{name} IS DISTINCT FROM TRY_CAST({value} AS {found})")


def _text_cell(column: str, wanted: str) -> Cell:
    name = sql_name(column)
    return Cell(column, f"TRY_CAST({name} AS {wanted})", not_of_type(name, wanted))


def not_of_type(text: str, wanted: str) -> str:
    """SQL predicate of texts that are there and that a type does not hold."""
    other = f" OR NOT regexp_full_match({text}, {_WHOLE})" if is_integer(wanted) else ""
    return f"{text} IS NOT NULL AND (TRY_CAST({text} AS {wanted}) IS NULL{other})"


def _finite(name: str) -> str:
    return f"coalesce(isfinite({name}), FALSE)"


def is_nan(number: str) -> str:
    """SQL predicate of NaN.

    DuckDB's isnan leaves out row groups of parquet by their statistics, which do not tell of NaN.
    """
    return f"CAST({number} AS VARCHAR) = 'nan'"


def not_whole(number: str) -> str:
    """SQL predicate of floats that are no whole number of 64 bits; NaN is missing."""
    odd = f"({number} <> trunc({number}) OR abs({number}) >= 2^63)"
    return f"coalesce(NOT {is_nan(number)} AND {odd}, FALSE)"


def merged(number: str, kind: str) -> str:
    """SQL predicate of floats that several whole numbers are equal to, so that an id is lost."""
    return f"coalesce(NOT {is_nan(number)} AND abs({number}) >= {_MERGED_FROM[kind]}, FALSE)"


def no_id(value: str, kind: str, wanted: str) -> str:
    """SQL predicate of values of type `kind` that are no ids of type `wanted`; "" = all are."""
    if kind == "VARCHAR" != wanted:
        return not_of_type(value, wanted)
    if kind in FLOATS and wanted not in FLOATS:
        return merged(value, kind)
    return ""


def column_types(
    con: duckdb.DuckDBPyConnection,
    files: Sequence[Path],
    *,
    types: Mapping[str, str],
    numeric: Sequence[str],
    nulls: Sequence[str],
    quote: str,
) -> dict[str, str]:
    """{column: DuckDB type} of raw files, the columns being the first's that has rows.

    {} if none has: types that nothing tells would not be those of the other files.

    Args:
      types, numeric, nulls, quote: as of raw.load.
    Raises:
      DataError: a file cannot be read, or no type holds what parquet files have.
    """
    for path in files:
        if is_parquet(path):
            return _parquet_types(con, [p for p in files if is_parquet(p)], types)
        if found := _csv_types(con, path, numeric, nulls, quote):
            return {column: types.get(column, kind) for column, kind in found.items()}
    return {}


def _csv_types(
    con: duckdb.DuckDBPyConnection,
    path: Path,
    numeric: Sequence[str],
    nulls: Sequence[str],
    quote: str,
) -> dict[str, str]:
    """Column types by the first rows, {} if there are none.

    Where all of them are malformed, every column is a text, and loading names the first.
    """
    have = file_columns(path)
    named = [c for c in have if c]
    texts = reader(path, [(c, "VARCHAR") for c in have], nulls, quote, True)
    sample = f"(SELECT * FROM {texts('ignore_errors = true')} LIMIT {_SAMPLE_ROWS})"
    # A cast alone would not do: '1.5' casts to BIGINT, as 2.
    digits = "regexp_full_match({c}, '\\s*[+-]?\\d+\\s*')"
    shares = (
        f"count(*) FILTER ({digits})",
        f"count(TRY_CAST({{c}} AS BIGINT)) FILTER ({digits})",
        "count(TRY_CAST({c} AS DOUBLE))",
        "count(TRY_CAST({c} AS TIMESTAMPTZ))",
    )
    fits = ", ".join(
        f"{share.format(c=sql_name(c))} / nullif(count({sql_name(c)}), 0)"
        for c in named
        for share in shares
    )
    try:
        rows, *answers = con.execute(f"SELECT count(*), {fits} FROM {sample}").fetchone()
    except duckdb.Error as error:
        raise DataError(f"{path}: truncated or corrupt: {first_line(error)}") from error
    if not rows and _is_header_alone(path):
        return {}
    found = {}
    for i, column in enumerate(named):
        whole, fit, real, moment = (share or 0.0 for share in answers[4 * i : 4 * i + 4])
        is_numeric = column.lower() in numeric
        enough = _MOST if is_numeric else _NEARLY_ALL
        kind = "DOUBLE" if real >= enough else "VARCHAR"
        if whole >= enough and whole == real:
            # An id that is too large is an id all the same; a time or label that is, is wrong.
            all_fit = fit == whole or (is_numeric and fit >= enough)
            kind = "BIGINT" if all_fit else "VARCHAR"
        elif is_numeric and kind == "VARCHAR" and moment >= enough:
            kind = "TIMESTAMPTZ"  # UTC's where it has no zone
        found[column] = kind
    return found


def _is_header_alone(path: Path) -> bool:
    with open_csv(path) as rows:
        next(rows, None)
        return not any(rows)


def parquet_schema(con: duckdb.DuckDBPyConnection, path: Path) -> dict[str, str]:
    """{column: DuckDB type} of a parquet file."""
    described = con.execute(f"DESCRIBE SELECT * FROM {from_parquet(path)}").fetchall()
    return {row[0]: row[1] for row in described}


def all_null(path: Path, column: str) -> bool:
    """Whether a parquet file says that a column has no value at all."""
    file = pq.ParquetFile(path)
    if pa.types.is_null(file.schema_arrow.field(column).type):
        return True
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    chunks = [
        group.column(i)
        for group in groups
        for i in range(group.num_columns)
        if group.column(i).path_in_schema == column
    ]
    found = [chunk.statistics for chunk in chunks]
    return len(chunks) == len(groups) and all(
        s is not None and s.has_null_count and s.null_count == chunk.num_values
        for s, chunk in zip(found, chunks, strict=True)
    )


def _parquet_types(
    con: duckdb.DuckDBPyConnection, files: Sequence[Path], types: Mapping[str, str]
) -> dict[str, str]:
    """The columns of the first file, with types over all files that have them."""
    schemas = {path: parquet_schema(con, path) for path in files}
    return {
        column: types.get(column)
        or _joined(con, column, {p: s[column] for p, s in schemas.items() if column in s})
        for column in schemas[files[0]]
    }


def _joined(con: duckdb.DuckDBPyConnection, column: str, kinds: Mapping[Path, str]) -> str:
    """The type of a column that may have several: the first, or the wider one of two numbers'.

    What the type does not hold is a bad row of its file.
    """
    if len(set(kinds.values())) > 1:
        known = {p: k for p, k in kinds.items() if not all_null(p, column)}
        kinds = known or {p: k for p, k in kinds.items() if k != '"NULL"'}
    (path, first), *others = kinds.items()
    if len({first, *(kind for _, kind in others)}) == 1:
        return first
    floats = [p for p, kind in others if kind in FLOATS]
    if first == "VARCHAR" and floats:  # 2 is '2.0' then, which no text '2' is equal to
        raise DataError(
            f"{floats[0]}: column {column!r} is {kinds[floats[0]]}, but {first} in {path}; "
            f"set data.types = {{{column!r}: ...}}"
        )
    if first == "FLOAT":
        return "DOUBLE"
    if first in INTEGERS:
        if any(has_fractions(con, from_parquet(p), column) for p in floats):
            return "DOUBLE"
        return "BIGINT"
    return first


def has_fractions(con: duckdb.DuckDBPyConnection, source: str, column: str) -> bool:
    """Whether a column of floats, in a table, view or other SQL source, holds any."""
    query = f"SELECT count(*) FROM {source}"
    return con.execute(f"{query} WHERE {not_whole(sql_name(column))}").fetchone()[0] > 0
