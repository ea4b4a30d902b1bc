"""SQL expressions of a config: what they refer to, and whether the raw tables have it."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import duckdb

from ctr_jax.data.errors import DataError
from ctr_jax.data.raw import RawTable

_NO_COLUMN = re.compile(
    r'"(?P<table>[^"]+)" does not have a column named "(?P<of_table>.+?)"'
    r'|Referenced column "(?P<column>.+?)" not found'
)


def type_of(con: duckdb.DuckDBPyConnection, sql: str, source: str) -> str:
    """The DuckDB type of an expression."""
    return con.execute(f"DESCRIBE SELECT ({sql}) AS value FROM {source}").fetchone()[1]


def check_expressions(
    con: duckdb.DuckDBPyConnection,
    expressions: Mapping[str, str],
    source: str,
    tables: Mapping[str, RawTable],
) -> None:
    """Checks that every expression {option: SQL} can be meant over a FROM clause.

    Args:
      tables: {alias in `source`: the raw table that it stands for}.
    Raises:
      DataError: it cannot; names the option, and the columns there are where one is not.
    """
    for option, sql in expressions.items():
        try:
            type_of(con, sql, source)
        except (duckdb.BinderException, duckdb.CatalogException, duckdb.ParserException) as error:
            if found := _NO_COLUMN.search(str(error)):
                named = [tables[found["table"]]] if found["table"] in tables else tables.values()
                column = found["of_table"] or found["column"]
                raise no_column(option, sql, column, named) from error
            message = " ".join(str(error).split("\n\nLINE")[0].split())
            raise DataError(f"data.{option} {sql!r}: {message}") from error


def check_column(option: str, column: str, table: RawTable) -> None:
    """Raises DataError if a raw table lacks the column that an option names."""
    if column not in table.columns:
        raise no_column(option, column, column, [table])


def no_column(option: str, sql: str, column: str, tables: Iterable[RawTable]) -> DataError:
    """The error of an option whose SQL names a column that none of the tables has."""
    tables = list(tables)
    known = [name for table in tables for name in table.columns]
    near = difflib.get_close_matches(column, known, n=2, cutoff=0.65)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    has = ", ".join(f"{table.files[0].name} has {list(table.columns)}" for table in tables)
    has = has or "there is no data.user_table"  # the one table that SQL may do without
    return DataError(f"data.{option} {sql!r}: no column {column!r}; {has}{hint}")


def mentioned(
    con: duckdb.DuckDBPyConnection, expressions: Iterable[str], aliases: Collection[str]
) -> set[str] | None:
    """Names in the expressions, in small letters, all columns that they refer to among them.

    None where they may refer to any: by `*`, COLUMNS(...) or a table's alias alone.
    """
    names: set[str] = set()
    for sql in expressions:
        for node in _nodes(_parsed(con, sql)):
            column = [name.lower() for name in node.get("column_names", ())]
            whole_row = len(column) == 1 and column[0] in aliases
            if node.get("class") == "STAR" or node.get("ref_type") == "NATURAL" or whole_row:
                return None
            for value in node.values():
                texts = value if isinstance(value, list) else [value]
                names.update(text.lower() for text in texts if isinstance(text, str))
    return names


def looks_elsewhere(con: duckdb.DuckDBPyConnection, sql: str) -> bool:
    """Whether an expression looks at other rows: by OVER (...) or a subquery."""
    return any(node.get("class") in ("WINDOW", "SUBQUERY") for node in _nodes(_parsed(con, sql)))


def may_leave_user(
    con: duckdb.DuckDBPyConnection, sql: str, user: str, tables: Collection[str]
) -> bool:
    """Whether an expression may look at rows of other users.

    Every OVER (...) whose PARTITION BY has the SQL of the user does not; nor does a subquery that
    reads none of `tables`, which hold rows of users.
    """
    [wanted] = _selected(_parsed(con, user)) or [None]
    for node in _nodes(_parsed(con, sql)):
        if node.get("class") == "WINDOW" and _bare(wanted) not in map(_bare, node["partitions"]):
            return True
        if node.get("class") == "SUBQUERY":
            if any(part.get("table_name") in tables for part in _nodes(node)):
                return True
    return False


def _parsed(con: duckdb.DuckDBPyConnection, sql: str) -> dict[str, Any]:
    """DuckDB's syntax tree of SELECT (sql); one that cannot be parsed has no statements."""
    text = con.execute("SELECT json_serialize_sql(?)", [f"SELECT ({sql})"]).fetchone()[0]
    return json.loads(text)


def _selected(tree: Mapping[str, Any]) -> list[Any]:
    return [s for of in tree.get("statements", ()) for s in of["node"]["select_list"]]


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
    for part in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(part, dict | list):
            yield from _nodes(part)


def _bare(tree: Any) -> Any:
    """A tree that is equal for equal SQL, wherever that stands and with or without prefixes."""
    if isinstance(tree, list):
        return [_bare(part) for part in tree]
    if not isinstance(tree, dict):
        return tree
    if "column_names" in tree:
        return tree["column_names"][-1].lower()
    return {k: _bare(part) for k, part in tree.items() if not k.startswith("query_location")}
