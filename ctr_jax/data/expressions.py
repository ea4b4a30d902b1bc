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

# What SQL may read, beside what a WITH of its own defines; table functions that read nothing.
_RAW_TABLES = ("raw_events", "raw_items", "raw_users", "raw_prior")
_OF_LISTS = ("unnest", "range", "generate_series")
_MANY = ("unnest", "unlist", "generate_subscripts")  # of a row they make several
# Functions of the clock, of chance or of the session; `age` of a single date is one as well.
UNSTABLE = frozenset(
    """
    ago currval current_connection_id current_database current_date current_localtime
    current_localtimestamp current_query current_query_id current_schema current_schemas
    current_setting current_transaction_id gen_random_uuid get_current_time
    get_current_timestamp getvariable nextval now random setseed setval sleep_ms stats today
    transaction_timestamp txid_current uuid uuidv4 uuidv7 vector_type write_log
    """.split()
)
# Names that DuckDB takes for values of the session where no column has them.
_SESSION = frozenset(
    """
    current_catalog current_date current_role current_schema current_time current_timestamp
    current_user localtime localtimestamp session_user user
    """.split()
)
_NO_COLUMN = re.compile(
    r'"(?P<table>[^"]+)" does not have a column named "(?P<of_table>.+?)"'
    r'|Referenced column "(?P<column>.+?)" not found'
)


def type_of(con: duckdb.DuckDBPyConnection, sql: str, source: str) -> str:
    """The DuckDB type of an expression."""
    return con.execute(f"DESCRIBE SELECT ({sql}) AS value FROM {source}").fetchone()[1]


def check_alone(expressions: Mapping[str, str]) -> None:
    """Checks that every {option: SQL} is one expression, over raw tables and nothing else.

    So none reads a file or runs a statement, and all give the same whenever they are asked, which
    is several times in one preparation.

    Raises:
      DataError: one isn't.
    """
    with duckdb.cursor() as con:
        for option, sql in expressions.items():
            if flaw := _flaw(con, sql):
                raise DataError(f"data.{option} {sql!r}: {flaw}")


def _flaw(con: duckdb.DuckDBPyConnection, sql: str) -> str:
    """Why SQL is no expression over raw tables alone; "" if it is."""
    trees = [_parsed(con, f"SELECT {sql}"), _parsed(con, f"SELECT ({sql})")]
    for tree in trees:  # with and without brackets: none within closes the outer ones
        if tree["error"]:
            return f"{tree['error_type'].capitalize()} Error: {tree['error_message']}"
    nodes = list(_nodes(trees[1]))
    defined = {entry["key"] for node in nodes for entry in node.get("cte_map", {}).get("map", ())}
    tables = {*_RAW_TABLES, *(name.lower() for name in defined if name.isidentifier())}
    if any(selected.get("class") == "STAR" for selected in _selected(trees[1])):
        return "it stands for several columns; name one"
    if any(_function(node) in _MANY for node in _nodes(trees[1], within_subqueries=False)):
        return "it makes several rows of one; take a single value, such as column[1]"
    for node in nodes:
        if other := _other_source(node, tables):
            return f"it reads {other}; it may read columns and {', '.join(_RAW_TABLES)}"
        name = _function(node)
        if name in UNSTABLE or (name == "age" and len(node["arguments"]) == 1):
            return (
                f"{name}() does not give the same each time it is asked; take what the log has, "
                "such as hash(user) % 10 < 8 for a random share"
            )
        if node.get("sample"):
            return "a sample is not the same each time it is drawn"
        if node.get("class") == "PARAMETER":
            return "it has a parameter, for which there is no value"
    return ""


def _other_source(node: Mapping[str, Any], tables: Collection[str]) -> str:
    """What a node of a FROM clause reads if it is none of `tables`; "" = nothing else."""
    kind = node.get("type")
    if kind == "SHOW_REF":
        return "the catalogue"
    if kind == "TABLE_FUNCTION":
        name = node["function"]["function_name"]
        return "" if name.lower() in _OF_LISTS else f"{name}()"
    if kind == "BASE_TABLE":
        name = ".".join(
            filter(None, (node["catalog_name"], node["schema_name"], node["table_name"]))
        )
        return "" if name.lower() in tables else repr(name)
    return ""


def check_expressions(
    con: duckdb.DuckDBPyConnection,
    expressions: Mapping[str, str],
    source: str,
    tables: Mapping[str, RawTable],
) -> None:
    """Checks that every expression {option: SQL} of check_alone can be meant over a FROM clause.

    Args:
      tables: {alias in `source`: the raw table that it stands for}.
    Raises:
      DataError: it cannot; names the option, and the columns there are where one is not.
    """
    described = con.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()
    session = _SESSION - {name.lower() for name, *_ in described}
    for option, sql in expressions.items():
        for node in _nodes(_parsed(con, f"SELECT ({sql})")):
            if len(name := node.get("column_names", ())) == 1 and name[0].lower() in session:
                raise no_column(option, sql, name[0], tables.values())
        try:
            # Beside all columns, with which nothing goes that adds up over rows.
            con.execute(f"DESCRIBE SELECT ({sql}) AS value, * FROM {source}")
        except (duckdb.BinderException, duckdb.CatalogException) as error:
            if found := _NO_COLUMN.search(str(error)):
                named = [tables[found["table"]]] if found["table"] in tables else tables.values()
                column = found["of_table"] or found["column"]
                raise no_column(option, sql, column, named) from error
            message = " ".join(str(error).split("\n\nLINE")[0].split())
            if "GROUP BY" in message:
                message = "it adds up over rows; say over which, by OVER (PARTITION BY ...)"
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


def column_of(con: duckdb.DuckDBPyConnection, sql: str) -> str:
    """The column of the event that an expression is, in small letters; "" if it is another."""
    [tree] = _selected(_parsed(con, f"SELECT ({sql})"))
    names = _bare(tree) if "column_names" in tree else []
    return names[0] if len(names) == 1 else ""


def mentioned(
    con: duckdb.DuckDBPyConnection, expressions: Iterable[str], aliases: Collection[str]
) -> set[str] | None:
    """Names in the expressions, in small letters, all columns that they refer to among them.

    None where they may refer to any: by `*`, COLUMNS(...) or a table's alias alone.
    """
    names: set[str] = set()
    for sql in expressions:
        for node in _nodes(_parsed(con, f"SELECT ({sql})")):
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
    nodes = _nodes(_parsed(con, f"SELECT ({sql})"))
    return any(node.get("class") in ("WINDOW", "SUBQUERY") for node in nodes)


def may_leave_user(
    con: duckdb.DuckDBPyConnection, sql: str, user: str, tables: Collection[str]
) -> bool:
    """Whether an expression may look at rows of other users.

    Every OVER (...) whose PARTITION BY has the SQL of the user does not; nor does a subquery that
    reads none of `tables`, which hold rows of users.
    """
    [wanted] = _selected(_parsed(con, f"SELECT ({user})")) or [None]
    for node in _nodes(_parsed(con, f"SELECT ({sql})")):
        if node.get("class") == "WINDOW" and _bare(wanted) not in map(_bare, node["partitions"]):
            return True
        if node.get("class") == "SUBQUERY":
            if any(part.get("table_name", "").lower() in tables for part in _nodes(node)):
                return True
    return False


def _parsed(con: duckdb.DuckDBPyConnection, query: str) -> dict[str, Any]:
    """DuckDB's syntax tree of a query; one that cannot be parsed has no statements."""
    return json.loads(con.execute("SELECT json_serialize_sql(?)", [query]).fetchone()[0])


def _selected(tree: Mapping[str, Any]) -> list[Any]:
    return [s for of in tree.get("statements", ()) for s in of["node"]["select_list"]]


def _nodes(tree: Any, within_subqueries: bool = True) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
        if not within_subqueries and tree.get("class") == "SUBQUERY":
            return
    for part in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(part, dict | list):
            yield from _nodes(part, within_subqueries)


def _function(node: Mapping[str, Any]) -> str:
    """The function that a node calls, in small letters; "" = none."""
    return str(node.get("function_name", "")).lower()


def _bare(tree: Any) -> Any:
    """A tree that is equal for equal SQL, wherever that stands and with or without `e.`."""
    if isinstance(tree, list):
        return [_bare(part) for part in tree]
    if not isinstance(tree, dict):
        return tree
    if "column_names" in tree:
        names = [name.lower() for name in tree["column_names"]]
        return names[1:] if names[0] == "e" and len(names) > 1 else names
    return {k: _bare(part) for k, part in tree.items() if not k.startswith("query_location")}
