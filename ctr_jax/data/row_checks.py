"""Checks of raw rows by value: the first bad row is named, or bad rows are skipped and counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import duckdb

from ctr_jax.data.errors import DataError
from ctr_jax.data.raw import RawTable
from ctr_jax.data.raw_types import FLOATS, merged, no_id, refuse_lists
from ctr_jax.data.sql import sql_name, sql_text


def check_rows(
    con: duckdb.DuckDBPyConnection,
    table: RawTable,
    source: str,
    row: str,
    checks: Mapping[str, tuple[str, str]],
    report: dict[str, Any],
    on_bad_row: str,
) -> str:
    """Applies row checks; returns an SQL predicate of the good rows.

    Args:
      source: the FROM clause, over which all SQL here is written.
      row: SQL of the row's rowid in `table`.
      checks: {what is wrong: (SQL predicate of bad rows, SQL of the value to show)}; a row counts
        under the first that holds.
    Raises:
      DataError: a row is bad and `on_bad_row` is "raise".
    """
    reason = " ".join(f"WHEN {bad} THEN {sql_text(what)}" for what, (bad, _) in checks.items())
    reason = f"CASE {reason} END"
    if on_bad_row == "raise":
        shown = " ".join(
            f"WHEN {bad} THEN CAST({value} AS VARCHAR)" for bad, value in checks.values()
        )
        first = con.execute(
            f"""
            SELECT {row} AS bad_row, {reason} AS reason, CASE {shown} END FROM {source}
            WHERE ({reason}) IS NOT NULL ORDER BY bad_row LIMIT 1"""
        ).fetchone()
        if first is not None:
            number, what, value = first
            raise DataError(
                f"{table.place(number)}: {what}: {value!r}; correct the row, or set "
                "data.on_bad_row = 'skip' to leave such rows out",
                order=(1, table.name, number),
            )
        return "TRUE"
    counts = con.execute(
        f"SELECT {reason} AS reason, count(*) FROM {source} GROUP BY reason ORDER BY reason"
    ).fetchall()
    bad_rows = {what: count for what, count in counts if what is not None}
    for what, count in bad_rows.items():
        report["skipped"][what] = report["skipped"].get(what, 0) + count
    return f"(({reason}) IS NULL)" if bad_rows else "TRUE"


def unique_key(
    con: duckdb.DuckDBPyConnection, table: RawTable, column: str, kind: str = ""
) -> None:
    """Checks the key column of a table.

    Args:
      kind: the DuckDB type of what is compared with it by `equal`, if not the key's own.
    Raises:
      DataError: a key is no id of that type, or two rows share a key.
    """
    refuse_lists(f"{table.files[0]}: column {column!r}", table.columns[column])
    key = sql_name(column)
    if kind and (predicate := no_id(key, table.columns[column], kind)):
        bad = con.execute(
            f"SELECT rowid, {key} FROM {table.name} WHERE {predicate} ORDER BY 1 LIMIT 1"
        ).fetchone()
        if bad is not None:
            raise DataError(
                f"{table.place(bad[0])}: {column} {bad[1]!r} is no {kind}, as what refers to it "
                "is; correct the row, or set data.types",
                order=(0, table.name, bad[0]),
            )
    if kind and kind != "VARCHAR" == table.columns[column]:
        key = f"TRY_CAST({key} AS {kind})"
    twice = con.execute(
        f"SELECT {key}, max(rowid) FROM {table.name} WHERE {key} IS NOT NULL "
        "GROUP BY 1 HAVING count(*) > 1 ORDER BY 2 LIMIT 1"
    ).fetchone()
    if twice is not None:
        raise DataError(
            f"{table.place(twice[1])}: {column} {twice[0]!r} occurs twice; keep one row",
            order=(0, table.name, twice[1]),
        )


def equal(left: str, left_kind: str, right: str, right_kind: str) -> str:
    """SQL of equality; a text beside another type is read as that, and equals nothing if it isn't.

    DuckDB's own comparison would fail there, without the row; and a float beside whole numbers
    would equal several.
    """
    floats = [(x, kind) for x, kind in ((left, left_kind), (right, right_kind)) if kind in FLOATS]
    if left_kind == right_kind or "VARCHAR" not in (left_kind, right_kind):
        exact = "".join(f" AND NOT {merged(*one)}" for one in floats if len(floats) == 1)
        return f"{left} = {right}{exact}"
    if left_kind == "VARCHAR":
        return f"TRY_CAST({left} AS {right_kind}) = {right}"
    return f"{left} = TRY_CAST({right} AS {left_kind})"
