"""Builder `events`: bring your own log of events, with optional user and item tables.

Every option is a column name or an SQL expression (DuckDB) over the event `e`, the item `i` (the
row of `items` with the event's item) and `e.filename`; a name that only one of them has needs no
prefix. DEFAULTS says what each option means. configs/sparsectr_movielens.py
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
from ctr_jax.data.options import with_defaults
from ctr_jax.data.plan import DEFAULT_BUCKETS, Field, Plan
from ctr_jax.data.raw_files import file_columns, find_files
from ctr_jax.data.raw_types import FLOATS, is_nan, not_of_type, refuse_lists
from ctr_jax.data.row_checks import check_rows, equal, unique_key
from ctr_jax.data.sql import own, sql_name

UNITS = {"s": 1, "ms": 1000, "us": 1_000_000}
DEFAULTS: dict[str, Any] = {
    "name": "",
    "max_candidates": 1,
    "min_count": 2,
    "valid_fraction": 0.05,
    "on_bad_row": "raise",
    "buckets": DEFAULT_BUCKETS,
    "events": "events.parquet",  # file names or globs, within raw_dir or absolute
    "types": {},  # DuckDB types of columns that the first rows, or files, do not tell
    "user": "user",
    "time": "time",  # a number in time_unit, or a date-time, which without a zone is UTC's
    "time_unit": "s",
    "time_floor": 0,  # seconds; every stored time is floored to a multiple of it
    "label": "label",  # 0 or 1 (or a condition), read where the event is a target
    "is_behaviour": "TRUE",  # events that enter the history of later requests
    # "event" (each its own), "time" (of one user at one time), a number of seconds (of one user in
    # one time bucket, at the time of its first event) or SQL of a request id.
    "request": "event",
    "ties": "strict",  # "order": the file's order decides what was before; "strict": earlier times
    "train": "",  # conditions: which events are targets of which split; train comes before test
    "valid": "",  # taken out of both; empty = the last valid_fraction of train by time
    "test": "",
    "items": "",  # file with one row per items_key; `item` is that key of an event
    "items_key": "item",
    "item": "item",
    "users": "",
    "users_key": "user",
    "prior": {},  # histories from before the log; see Events.load
    "candidate": {},  # {column: SQL}, likewise the next three
    "context": {},
    "behaviour": {},
    "user_columns": {},  # over the user table; "user" columns of the data set
    "kinds": {},  # {"group/column": "quantile" | "standard"}; the others are ids
    "vocabularies": {},  # {"group/column": vocabulary}; columns of one name share one
}
_PRIOR = {"file", "user", "items", "time", "behaviour"}
# Beside raw columns, of which any name may be.
_ITEM, _USER, _POSITION = own("item"), own("user"), own("position")


class Events(PreparedBuilder, skip_registration=True):
    """See the module's docstring for the options."""

    @staticmethod
    def raw_files(options: Mapping[str, Any]) -> list[Path]:
        options = complete(options)
        files = find_files(options["raw_dir"], options["events"])
        for name in (options["items"], options["users"], options["prior"].get("file")):
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
        )

    @staticmethod
    def shard_keys(options: Mapping[str, Any]) -> dict[str, str]:
        options = complete(options)
        keys = {"raw_events": options["user"], "raw_users": sql_name(options["users_key"])}
        if options["prior"]:
            keys["raw_prior"] = sql_name(options["prior"]["user"])
        return keys

    def load(self, con: duckdb.DuckDBPyConnection, report: Report) -> None:
        """Creates the views of plan.py.

        `prior` = dict(file, user, items, time, behaviour) adds the items of a list column, in
        order, to the history of its user at one time; `behaviour` gives SQL over `p` (the row, and
        p.item, which hides a column of that name) and `i` for the columns that differ from the
        events' own.
        """
        options = complete(self.options)
        _check_types(options)
        skip = {"on_bad_row": options["on_bad_row"], "types": options["types"]}
        events = self.read_table(
            con,
            "raw_events",
            find_files(options["raw_dir"], options["events"]),
            report,
            numeric=(options["time"], options["label"]),
            **skip,
        )
        source = self._source(con, options, report, skip)
        if options["users"]:
            files = find_files(options["raw_dir"], options["users"])
            users = self.read_table(con, "raw_users", files, report, **skip)
            unique_key(con, users, options["users_key"], type_of(con, options["user"], source))
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
        columns = "".join(f', ({sql}) AS "{key}"' for key, sql in _event_columns(options).items())
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
        self._create_behaviours(con, options, report, skip)
        _create_users(con, options)

    def _source(self, con, options, report, skip) -> str:
        """FROM clause: events `e`, joined with their items `i` if there is an item table."""
        if not options["items"]:
            return "(SELECT rowid, * FROM raw_events) e"
        files = find_files(options["raw_dir"], options["items"])
        items = self.read_table(con, "raw_items", files, report, **skip)
        kind = type_of(con, options["item"], "raw_events e")
        refuse_lists(f"data.item {options['item']!r}", kind)
        unique_key(con, items, options["items_key"], kind)
        return f"""(SELECT rowid, *, ({options["item"]}) AS {_ITEM} FROM raw_events e) e
            LEFT JOIN raw_items i ON {_equals_item(con, options, f"e.{_ITEM}", kind)}"""

    def _create_behaviours(self, con, options, report, skip) -> None:
        columns = "".join(f', "behaviour/{name}"' for name in options["behaviour"])
        query = f"SELECT user_key, order_time, time, seq, keep {columns} FROM good_events"
        if options["prior"]:
            self._create_prior_behaviours(con, options, report, skip)
            query += " UNION ALL SELECT * FROM prior_behaviours"
        con.execute(f"CREATE OR REPLACE VIEW behaviours AS {query}")

    def _create_prior_behaviours(self, con, options, report, skip) -> None:
        prior = options["prior"]
        files = find_files(options["raw_dir"], prior["file"])
        table = self.read_table(con, "raw_prior", files, report, **skip)
        for column in (prior["user"], prior["items"], prior["time"]):
            if column not in table.columns:
                raise DataError(f"{files[0]}: no column {column!r}; it has {list(table.columns)}")
        kind = table.columns[prior["items"]]
        if not kind.endswith("]"):
            raise DataError(f"{files[0]}: column {prior['items']!r} is {kind}, not one of lists")
        user, items, time = (sql_name(prior[k]) for k in ("user", "items", "time"))
        source = f"(SELECT rowid, * FROM raw_prior WHERE len({items}) > 0) p"
        value = time_value(con, options, f"p.{time}", source)
        checks = {
            "missing or negative time": (f"{value} IS NULL OR {value} < 0", f"p.{time}"),
            **_too_late(value, f"p.{time}", options),
        }
        good = check_rows(con, table, source, "p.rowid", checks, report, options["on_bad_row"])
        sql = {**options["behaviour"], **prior.get("behaviour", {})}
        columns = "".join(f', ({sql[name]}) AS "behaviour/{name}"' for name in options["behaviour"])
        join = ""
        if options["items"]:
            equals = _equals_item(con, options, "p.item", kind[: kind.rindex("[")])
            join = f"LEFT JOIN raw_items i ON {equals}"
        hidden = [sql_name(c) for c in table.columns if c.lower() == "item"]
        rest = f"* EXCLUDE ({hidden[0]})" if hidden else "*"
        # Before the user's own events of the same time: negative seq, oldest first.
        con.execute(
            f"""
            CREATE OR REPLACE VIEW prior_behaviours AS
            SELECT p.{user} AS user_key, {value} AS order_time,
                   {stored_time(value, options)} AS time,
                   p.rowid * 1000000 + p.{_POSITION} - {1 << 62} AS seq, TRUE AS keep {columns}
            FROM (SELECT rowid, {rest}, unnest({items}) AS item,
                         generate_subscripts({items}, 1) AS {_POSITION}
                  FROM raw_prior) p {join} WHERE {good}"""
        )


def _event_columns(options: Mapping[str, Any]) -> dict[str, str]:
    """{"group/name": SQL} of the columns of an event."""
    groups = ("context", "candidate", "behaviour")
    return {f"{group}/{name}": sql for group in groups for name, sql in options[group].items()}


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
    number = f"TRY_CAST(TRY({label}) AS DOUBLE)"
    target = f"({target_range(options)}) IS NOT NULL"
    checks = {
        "missing user": (_missing(con, user, source, "data.user"), user),
        "unparsable time": (f"{value} IS NULL", time),
        "negative time": (f"{value} < 0", time),
        **_too_late(value, time, options),
        "label not 0 or 1": (
            f"{target} AND ({number} IS NULL OR {number} NOT IN (0, 1))",
            f"TRY({label})",
        ),
    }
    request = options["request"]
    if isinstance(request, str) and request not in ("event", "time"):
        missing = _missing(con, f"({request})", source, "data.request")
        checks["missing request id"] = (missing, f"({request})")
    wanted = {
        f"value of {key} that is no number": (sql, "DOUBLE")
        for key, sql in _event_columns(options).items()
        if options["kinds"].get(key, "id") != "id"
    }
    wanted["is_behaviour that is not true or false"] = (options["is_behaviour"], "BOOLEAN")
    for table, sql in (("items", f"e.{_ITEM}"), ("users", user)):
        if options[table]:
            kind = type_of(con, sql_name(options[f"{table}_key"]), f"raw_{table}")
            wanted[f"value that is no {kind}, as {table}_key is"] = (sql, kind)
    for what, (sql, kind) in wanted.items():
        if kind != "VARCHAR" == type_of(con, sql, source):
            checks[what] = (not_of_type(f"({sql})", kind), f"({sql})")
    return checks


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
    if not options["users"]:
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


def complete(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with their defaults.

    Raises:
      DataError: an option is unknown or has no possible value.
    """
    full = with_defaults("events", options, DEFAULTS)
    if full["time_unit"] not in UNITS:
        raise DataError(f"data.time_unit is {full['time_unit']!r}; use one of {sorted(UNITS)}")
    if not full["train"] or not full["test"]:
        raise DataError("data.train and data.test must say which events are targets of which split")
    unknown = sorted(set(full["prior"]) - _PRIOR)
    if unknown:
        raise DataError(f"data.prior has no options {unknown}; it knows {sorted(_PRIOR)}")
    full["request"] = _request(full["request"])
    return full


def _check_types(options: Mapping[str, Any]) -> None:
    """Raises DataError if `types` names a column that no raw table has."""
    tables = (options["events"], options["items"], options["users"], options["prior"].get("file"))
    firsts = [find_files(options["raw_dir"], files)[0] for files in tables if files]
    known = {column for path in firsts for column in file_columns(path) if column}
    if unknown := sorted(set(options["types"]) - known):
        raise DataError(f"data.types names {unknown}; the raw tables have {sorted(known)}")


def _request(request: Any) -> Any:
    """A number of seconds as an int, which a command line gives as text; the others unchanged."""
    try:
        number = float(request)
    except (TypeError, ValueError):
        return request
    if not (number >= 1 and number.is_integer()):
        raise DataError(f"data.request is {request!r}; use whole seconds, at least 1")
    return int(number)


def target_range(options: Mapping[str, Any]) -> str:
    """SQL of the split range an event is a target of, or NULL; valid may be a part of train."""
    cases = " ".join(
        f"WHEN ({options[r]}) THEN '{r}'" for r in ("valid", "train", "test") if options[r]
    )
    return f"CASE {cases} END"


def type_of(con: duckdb.DuckDBPyConnection, sql: str, source: str) -> str:
    """The DuckDB type of an expression."""
    return con.execute(f"DESCRIBE SELECT ({sql}) AS value FROM {source}").fetchone()[1]


def time_value(
    con: duckdb.DuckDBPyConnection, options: Mapping[str, Any], time: str, source: str
) -> str:
    """SQL of a time in `time_unit`, as BIGINT or DOUBLE; NULL where it cannot be read."""
    time, unit, kind = f"({time})", UNITS[options["time_unit"]], type_of(con, time, source)
    if kind.startswith(("TIMESTAMP", "DATE")):
        return f"CAST(floor(epoch_us(CAST({time} AS TIMESTAMP)) / {1_000_000 // unit}) AS BIGINT)"
    if kind in ("VARCHAR", *FLOATS) or kind.startswith("DECIMAL"):
        number = f"TRY_CAST({time} AS DOUBLE)"
        return f"CASE WHEN isfinite({number}) THEN {number} END"
    return f"TRY_CAST({time} AS BIGINT)"


def seconds(time: str, options: Mapping[str, Any]) -> str:
    """SQL of whole seconds from a time in `time_unit`."""
    return f"CAST(floor({time} / {UNITS[options['time_unit']]}) AS BIGINT)"


def stored_time(time: str, options: Mapping[str, Any]) -> str:
    """SQL of the int32 seconds that are stored, from a time in `time_unit`."""
    whole, floor = seconds(time, options), int(options["time_floor"])
    return (
        f"CAST({whole} // {floor} * {floor} AS INTEGER)" if floor else f"CAST({whole} AS INTEGER)"
    )


def _too_late(time: str, shown: str, options: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The row check of times that int32 seconds do not hold."""
    unit = options["time_unit"]
    largest = (2**31 - 1) * UNITS[unit]
    return {f"time after 2038 in unit {unit}": (f"{time} > {largest}", shown)}
