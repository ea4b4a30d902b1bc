"""Builder `events`: bring your own log of events, with optional user and item tables.

Every option is a column name or an SQL expression (DuckDB) over the event `e`, the item `i` (the
row of `item_table` with the event's item) and `e.filename`; a name that only one of them has needs
no prefix. DEFAULTS of event_options.py says what each option means. configs/sparsectr_movielens.py
and configs/sparsectr_kuairand.py are worked examples of the two shapes of log: each event its own
request in file order, and requests of several impressions with item and user tables and histories
from before the log. examples/own_log.py is a page to copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb

from ctr_jax.data.builder import PreparedBuilder, Report
from ctr_jax.data.errors import DataError
from ctr_jax.data.event_options import (
    all_expressions,
    check_types,
    complete,
    event_columns,
    event_expressions,
    is_given_request,
    needed_columns,
    target_range,
    user_expressions,
)
from ctr_jax.data.event_times import seconds, stored_time, time_value, too_late
from ctr_jax.data.expressions import (
    check_alone,
    check_column,
    check_expressions,
    column_of,
    looks_elsewhere,
    may_leave_user,
    type_of,
)
from ctr_jax.data.plan import Field, Plan
from ctr_jax.data.raw import RawTable
from ctr_jax.data.raw_files import find_files
from ctr_jax.data.raw_types import FLOATS, is_nan, no_id, not_of_type, refuse_lists
from ctr_jax.data.row_checks import check_rows, equal, unique_key
from ctr_jax.data.sql import own, sql_name

LARGEST_WEIGHT = 1_000_000
# Beside raw columns, of which any name may be.
_ITEM, _USER, _POSITION, _ROW = own("item"), own("user"), own("position"), own("row")


class Events(PreparedBuilder, skip_registration=True):
    """See the module's docstring for the options."""

    @staticmethod
    def raw_files(options: Mapping[str, Any]) -> list[Path]:
        options = complete(options)
        check_alone(all_expressions(options))  # here, before any process runs one of them
        files = find_files(options["raw_dir"], options["events"])
        for name in (options["item_table"], options["user_table"], options["prior"].get("file")):
            if name:
                files += find_files(options["raw_dir"], name)
        return files

    @staticmethod
    def plan(options: Mapping[str, Any]) -> Plan:
        options = complete(options)
        groups = {"user": "user_columns"}
        fields = [
            Field(
                group,
                name,
                options["kinds"].get(f"{group}/{name}", "id"),
                options["vocabularies"].get(f"{group}/{name}", ""),
            )
            for group in ("user", "context", "behaviour", "candidate")
            for name in options[groups.get(group, group)]
        ]
        for option in ("kinds", "vocabularies"):
            unknown = sorted(set(options[option]) - {f.key for f in fields})
            if unknown:
                raise DataError(f"data.{option} names {unknown}, which are no columns")
        request = options["request"]
        return Plan(
            fields=tuple(fields),
            max_candidates=options["max_candidates"],
            request=request if request in ("event", "time") else "key",
            ties=options["ties"],
            impressions_are_behaviours=True,
            buckets=options["buckets"],
            min_count=options["min_count"],
            valid_fraction=options["valid_fraction"],
            own_valid=bool(options["valid"]),
            weighted=bool(options["weight"]),
        )

    @staticmethod
    def shard_keys(options: Mapping[str, Any]) -> dict[str, str]:
        options = complete(options)
        keys = {"raw_events": options["user"], "raw_users": sql_name(options["users_key"])}
        if options["prior"]:
            keys["raw_prior"] = sql_name(options["prior"]["user"])
        _check_within_users(options, keys)
        return keys

    def load(self, con: duckdb.DuckDBPyConnection, report: Report) -> None:
        """Creates the views of plan.py.

        `prior` = dict(file, user, items, time, behaviour) adds the items of a list column, in
        order, to the history of its user at one time; `behaviour` gives SQL over `p` (the row, and
        p.item, which hides a column of that name) and `i` for the columns that differ from the
        events' own.
        """
        options = complete(self.options)
        check_types(options)
        how = {"on_bad_row": options["on_bad_row"], "types": options["types"]}
        how["needed"] = needed_columns(con, options)
        events = self.read_table(
            con,
            "raw_events",
            find_files(options["raw_dir"], options["events"]),
            report,
            numeric=[
                column_of(con, str(options[name]))
                for name in ("time", "label", "weight")
                if options[name]
            ],
            **how,
        )
        source, tables = self._source(con, options, events, report, how)
        check_expressions(con, event_expressions(options), source, tables)
        self._read_users(con, options, source, report, how)
        options, source = _with_values(con, options, source)
        checks = _event_checks(con, source, options)
        good = check_rows(con, events, source, "e.rowid", checks, report, options["on_bad_row"])

        # The expression itself wherever it is needed: an alias would give way to a raw column.
        time = time_value(con, options, options["time"], source)
        request = options["request"]
        if request in ("event", "time"):
            request_key = ""
        elif isinstance(request, int):
            request_key = f", {seconds(time, options)} // {request} AS request_key"
        else:
            request_key = f", ({request}) AS request_key"
        columns = "".join(f', ({sql}) AS "{key}"' for key, sql in event_columns(options).items())
        if options["weight"]:
            columns += f", {_double(options['weight'])} AS weight"
        con.execute(
            f"""
            CREATE OR REPLACE VIEW good_events AS
            SELECT ({options["user"]}) AS user_key,
                   {time} AS order_time, {stored_time(time, options)} AS time, e.rowid AS seq,
                   coalesce(CAST(({options["is_behaviour"]}) AS BOOLEAN), FALSE) AS keep,
                   {target_range(options)} AS "range",
                   TRY_CAST(TRY({options["label"]}) AS UTINYINT) AS label {request_key} {columns}
            FROM {source} WHERE {good}"""
        )
        con.execute("CREATE OR REPLACE VIEW impressions AS SELECT * FROM good_events")
        self._create_behaviours(con, options, tables, report, how)
        _create_users(con, options)

    def finish(self, directory: Path) -> None:
        super().finish(directory)
        if max(last for _, last in self._report["times"].values()) < "2000":
            unit = complete(self.options)["time_unit"]
            print(
                f"warning: every time lies before 2000-01-01; are the log's times in {unit}? See "
                "data.time_unit",
                flush=True,
            )

    def _source(self, con, options, events, report, how) -> tuple[str, dict[str, RawTable]]:
        """FROM clause, and the raw tables in it by alias.

        They are the events `e`, joined with their items `i` if there is an item table.
        """
        if not options["item_table"]:
            return "(SELECT rowid, * FROM raw_events) e", {"e": events}
        check_expressions(con, {"item": options["item"]}, "raw_events e", {"e": events})
        files = find_files(options["raw_dir"], options["item_table"])
        items = self.read_table(con, "raw_items", files, report, **how)
        kind = type_of(con, options["item"], "raw_events e")
        refuse_lists(f"data.item {options['item']!r}", kind)
        check_column("items_key", options["items_key"], items)
        unique_key(con, items, options["items_key"], kind)
        source = f"""(SELECT rowid, *, ({options["item"]}) AS {_ITEM} FROM raw_events e) e
            LEFT JOIN raw_items i ON {_equals_item(con, options, f"e.{_ITEM}", kind)}"""
        return source, {"e": events, "i": items}

    def _read_users(self, con, options, source, report, how) -> None:
        """Creates raw_users if there is a user table; checks what is said of it."""
        rows, tables = f'(SELECT ({options["user"]}) AS "user" FROM {source})', {}
        if options["user_table"]:
            files = find_files(options["raw_dir"], options["user_table"])
            users = self.read_table(con, "raw_users", files, report, **how)
            check_column("users_key", options["users_key"], users)
            unique_key(con, users, options["users_key"], type_of(con, options["user"], source))
            rows, tables = "(SELECT * FROM raw_users)", {"user": users}
        check_expressions(con, user_expressions(options), rows, tables)

    def _create_behaviours(self, con, options, tables, report, how) -> None:
        columns = "".join(f', "behaviour/{name}"' for name in options["behaviour"])
        query = f"SELECT user_key, order_time, time, seq, keep {columns} FROM good_events"
        if options["prior"]:
            self._create_prior_behaviours(con, options, tables, report, how)
            query += " UNION ALL SELECT * FROM prior_behaviours"
        con.execute(f"CREATE OR REPLACE VIEW behaviours AS {query}")

    def _create_prior_behaviours(self, con, options, tables, report, how) -> None:
        prior = options["prior"]
        files = find_files(options["raw_dir"], prior["file"])
        # A user is compared with the events' own, to which DuckDB would round one of another type.
        users = {prior["user"]: type_of(con, "user_key", "good_events")}
        how = {**how, "types": {**how["types"], **users}}
        table = self.read_table(con, "raw_prior", files, report, **how)
        for name in ("user", "items", "time"):
            check_column(f"prior.{name}", prior[name], table)
        kind = table.columns[prior["items"]]
        if not kind.endswith("]"):
            raise DataError(f"{files[0]}: column {prior['items']!r} is {kind}, not one of lists")
        user, items, time = (sql_name(prior[k]) for k in ("user", "items", "time"))
        source = f"(SELECT rowid, * FROM raw_prior WHERE len({items}) > 0) p"
        value = time_value(con, options, f"p.{time}", source)
        checks = {
            "missing or negative time": (f"{value} IS NULL OR {value} < 0", f"p.{time}"),
            **too_late(value, f"p.{time}", options),
        }
        good = check_rows(con, table, source, "p.rowid", checks, report, options["on_bad_row"])
        sql = {**options["behaviour"], **prior.get("behaviour", {})}
        columns = "".join(f', ({sql[name]}) AS "behaviour/{name}"' for name in options["behaviour"])
        join = ""
        if options["item_table"]:
            equals = _equals_item(con, options, "p.item", kind[: kind.rindex("[")])
            join = f"LEFT JOIN raw_items i ON {equals}"
        hidden = [sql_name(c) for c in table.columns if c.lower() == "item"]
        rest = f"* EXCLUDE ({hidden[0]})" if hidden else "*"
        rows = f"""
            (SELECT rowid, {rest}, unnest({items}) AS item,
                    generate_subscripts({items}, 1) AS {_POSITION} FROM raw_prior) p {join}"""
        expressions = {f"prior.behaviour.{name}": str(sql[name]) for name in options["behaviour"]}
        named = {alias: t for alias, t in {**tables, "p": table}.items() if alias != "e"}
        check_expressions(con, expressions, rows, named)
        # Before the user's own events of the same time: negative seq, oldest first.
        con.execute(
            f"""
            CREATE OR REPLACE VIEW prior_behaviours AS
            SELECT p.{user} AS user_key, {value} AS order_time,
                   {stored_time(value, options)} AS time,
                   p.rowid * 1000000 + p.{_POSITION} - {1 << 62} AS seq, TRUE AS keep {columns}
            FROM {rows} WHERE {good}"""
        )


def _with_values(
    con: duckdb.DuckDBPyConnection, options: Mapping[str, Any], source: str
) -> tuple[Mapping[str, Any], str]:
    """The options and the FROM clause, what looks at other rows being a column of a table there.

    DuckDB takes such an expression neither in WHERE nor in TRY, which the row checks need.
    """
    names = ["label", "weight", "train", "valid", "test"]
    names += [] if is_given_request(options) else ["request"]
    found = {name: options[name] for name in names if looks_elsewhere(con, str(options[name]))}
    if not found:
        return options, source
    columns = "".join(f", ({sql}) AS {own(name)}" for name, sql in found.items())
    con.execute(
        f"CREATE OR REPLACE TABLE event_values AS SELECT e.rowid AS {_ROW} {columns} FROM {source}"
    )
    values = {name: f"v.{own(name)}" for name in found}
    return {**options, **values}, f"{source} JOIN event_values v ON v.{_ROW} = e.rowid"


def _check_within_users(options: Mapping[str, Any], tables: Mapping[str, str]) -> None:
    """Raises DataError if SQL may look at other users' rows of tables that are cut by user."""
    with duckdb.cursor() as con:
        for option, sql in all_expressions(options).items():
            if may_leave_user(con, sql, options["user"], tables):
                raise DataError(
                    f"data.{option} {sql!r} may look at rows of other users, which other shards "
                    f"hold; let each OVER partition by {options['user']!r} among others, or use "
                    "python -m ctr_jax.data.prepare"
                )


def _equals_item(con: duckdb.DuckDBPyConnection, options, item: str, kind: str) -> str:
    """SQL that the item `i` is the one whose key is `item`, of a DuckDB type."""
    key = f"i.{sql_name(options['items_key'])}"
    return equal(key, type_of(con, key, "raw_items i"), item, kind)


def _event_checks(
    con: duckdb.DuckDBPyConnection, source: str, options: Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
    """The row checks of the events, as of check_rows."""
    user, time, label = (f"({options[k]})" for k in ("user", "time", "label"))
    value = time_value(con, options, time, source)
    number = _double(options["label"])
    target = f"({target_range(options)}) IS NOT NULL"
    checks = {
        "missing user": (_missing(con, user, source, "data.user"), user),
        "unparsable time": (f"{value} IS NULL", time),
        "negative time": (f"{value} < 0", time),
        **too_late(value, time, options),
        "label not 0 or 1": (
            f"{target} AND ({number} IS NULL OR {number} NOT IN (0, 1))",
            f"TRY({label})",
        ),
    }
    if options["weight"]:
        weight = _double(options["weight"])
        checks[f"weight not from 0 to {LARGEST_WEIGHT:,}"] = (
            f"{target} AND ({weight} IS NULL OR NOT {weight} BETWEEN 0 AND {LARGEST_WEIGHT})",
            f"TRY({options['weight']})",
        )
    if not is_given_request(options):
        request = f"({options['request']})"
        missing = _missing(con, request, source, "data.request")
        checks["missing request id"] = (missing, request)
    wanted = {
        f"value of {key} that is no number": (sql, "DOUBLE")
        for key, sql in event_columns(options).items()
        if options["kinds"].get(key, "id") != "id"
    }
    wanted["is_behaviour that is not true or false"] = (options["is_behaviour"], "BOOLEAN")
    for table, sql in (("item", f"e.{_ITEM}"), ("user", user)):
        if options[f"{table}_table"]:
            kind = type_of(con, sql_name(options[f"{table}s_key"]), f"raw_{table}s")
            if bad := no_id(f"({sql})", type_of(con, sql, source), kind):
                checks[f"value that is no {kind}, as {table}s_key is"] = (bad, f"({sql})")
    for what, (sql, kind) in wanted.items():
        if kind != "VARCHAR" == type_of(con, sql, source):
            checks[what] = (not_of_type(f"({sql})", kind), f"({sql})")
    return checks


def _double(sql: str) -> str:
    """SQL of an expression as a DOUBLE, NULL where it is none."""
    return f"TRY_CAST(TRY({sql}) AS DOUBLE)"


def _missing(con: duckdb.DuckDBPyConnection, sql: str, source: str, option: str) -> str:
    """SQL predicate of a user or request id that is missing: as NaN and '' are in any id column."""
    kind = type_of(con, sql, source)
    refuse_lists(option, kind)
    if kind in FLOATS:
        return f"({sql} IS NULL OR {is_nan(sql)})"
    return f"({sql} IS NULL OR {sql} IN ('', 'nan'))" if kind == "VARCHAR" else f"{sql} IS NULL"


def _create_users(con: duckdb.DuckDBPyConnection, options: Mapping[str, Any]) -> None:
    columns = "".join(
        f', ({sql}) AS "user/{name}"' for name, sql in options["user_columns"].items()
    )
    users = "SELECT DISTINCT user_key FROM good_events"
    if not options["user_table"]:
        query = (
            f'SELECT user_key {columns} FROM (SELECT user_key, user_key AS "user" FROM ({users}))'
        )
    else:
        key = sql_name(options["users_key"])
        kinds = type_of(con, "user_key", "good_events"), type_of(con, key, "raw_users")
        # The key itself is known even where the table lacks the user.
        query = f"""SELECT {_USER} AS user_key {columns} FROM (
            SELECT k.user_key AS {_USER}, u.* REPLACE (k.user_key AS {key}) FROM ({users}) k
            LEFT JOIN raw_users u ON {equal("k.user_key", kinds[0], f"u.{key}", kinds[1])})"""
    con.execute(f"CREATE OR REPLACE VIEW users AS {query}")
