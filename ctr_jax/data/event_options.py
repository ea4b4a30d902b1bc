"""Options of the builder `events`: their defaults, their checks, and the SQL that they hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import duckdb

from ctr_jax.data.errors import DataError
from ctr_jax.data.event_times import UNITS
from ctr_jax.data.expressions import mentioned
from ctr_jax.data.options import with_defaults
from ctr_jax.data.plan import DEFAULT_BUCKETS
from ctr_jax.data.raw_files import file_columns, find_files

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
    "time_unit": "s",  # or ms, us; date-times are floored to it
    "time_floor": 0,  # seconds; every stored time is floored to a multiple of it
    "label": "label",  # 0 or 1 (or a condition), read where the event is a target
    "weight": "",  # of a target in losses and metrics, a number of 0 or more; "" = all alike
    "is_behaviour": "TRUE",  # events that enter the history of later requests
    # "event" (each its own), "time" (of one user at one time), a number of seconds (of one user in
    # one time bucket, at the time of its first event) or SQL of a request id.
    "request": "event",
    "ties": "strict",  # "order": the file's order decides what was before; "strict": earlier times
    "train": "",  # conditions: which events are targets of which split; train comes before test
    "valid": "",  # taken out of both; empty = the last valid_fraction of train by time
    "test": "",
    "item_table": "",  # file with one row per items_key; `item` is that key of an event
    "items_key": "item",
    "item": "item",
    "user_table": "",  # likewise, by users_key
    "users_key": "user",
    "prior": {},  # histories from before the log; see Events.load
    "candidate": {},  # {column: SQL}, likewise the next three
    "context": {},
    "behaviour": {},
    "user_columns": {},  # over the user table; "user" columns of the data set
    "kinds": {},  # {"group/column": "quantile" | "standard"}; the others are ids
    "vocabularies": {},  # {"group/column": vocabulary}; columns of one name share one
}
_PRIOR = ("file", "user", "items", "time")  # and, optionally, behaviour
_RENAMED = {"items": "item_table", "users": "user_table"}  # ConfigDict has a method `items`


def complete(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with their defaults.

    Raises:
      DataError: an option is unknown or has no possible value.
    """
    for old in sorted(_RENAMED.keys() & options.keys()):
        raise DataError(f"data.{old} is data.{_RENAMED[old]}; give the file there")
    full = with_defaults("events", options, DEFAULTS)
    if full["time_unit"] not in UNITS:
        raise DataError(f"data.time_unit is {full['time_unit']!r}; use one of {sorted(UNITS)}")
    if not full["train"] or not full["test"]:
        raise DataError("data.train and data.test must say which events are targets of which split")
    for name, default in DEFAULTS.items():
        if isinstance(default, dict) and not isinstance(full[name], Mapping):
            raise DataError(f"data.{name} is {full[name]!r}; use a dict, {{}} for nothing")
    _check_prior(full["prior"], full["behaviour"])
    if _number(full["request"]) is not None:
        full["request"] = _whole_seconds("request", full["request"], 1)
    full["time_floor"] = _whole_seconds("time_floor", full["time_floor"], 0)
    return full


def check_types(options: Mapping[str, Any]) -> None:
    """Raises DataError if `types` names a column that no raw table has."""
    tables = (
        options["events"],
        options["item_table"],
        options["user_table"],
        options["prior"].get("file"),
    )
    firsts = [find_files(options["raw_dir"], files)[0] for files in tables if files]
    known = {column for path in firsts for column in file_columns(path) if column}
    if unknown := sorted(set(options["types"]) - known):
        raise DataError(f"data.types names {unknown}; the raw tables have {sorted(known)}")


def _check_prior(prior: Mapping[str, Any], behaviour: Mapping[str, Any]) -> None:
    """Raises DataError if prior histories are given by half or for columns that there are not."""
    if unknown := sorted(set(prior) - {*_PRIOR, "behaviour"}):
        raise DataError(f"data.prior has no options {unknown}; it knows {[*_PRIOR, 'behaviour']}")
    if prior and (missing := [name for name in _PRIOR if not prior.get(name)]):
        raise DataError(f"data.prior lacks {missing}")
    if unknown := sorted(set(prior.get("behaviour", ())) - set(behaviour)):
        raise DataError(
            f"data.prior.behaviour names {unknown}; the columns of data.behaviour are "
            f"{sorted(behaviour)}"
        )


def _number(value: Any) -> float | None:
    """A number, which a command line gives as text; None = it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _whole_seconds(option: str, value: Any, least: int) -> int:
    number = _number(value)
    if number is None or not (number >= least and number.is_integer()):
        raise DataError(f"data.{option} is {value!r}; use whole seconds, at least {least}")
    return int(number)


def target_range(options: Mapping[str, Any]) -> str:
    """SQL of the split range an event is a target of, or NULL; valid may be a part of train."""
    cases = " ".join(
        f"WHEN ({options[r]}) THEN '{r}'" for r in ("valid", "train", "test") if options[r]
    )
    return f"CASE {cases} END"


def event_columns(options: Mapping[str, Any]) -> dict[str, str]:
    """{"group/name": SQL} of the columns of an event."""
    groups = ("context", "candidate", "behaviour")
    return {f"{group}/{name}": sql for group in groups for name, sql in options[group].items()}


def event_expressions(options: Mapping[str, Any]) -> dict[str, str]:
    """{option: SQL over an event and its item}."""
    optional = ("weight", "valid")
    names = ("user", "time", "label", "weight", "is_behaviour", "train", "valid", "test", "request")
    found = {name: str(options[name]) for name in names if options[name] or name not in optional}
    if is_given_request(options):
        del found["request"]
    columns = event_columns(options).items()
    return {**found, **{key.replace("/", ".", 1): str(sql) for key, sql in columns}}


def user_expressions(options: Mapping[str, Any]) -> dict[str, str]:
    """{option: SQL over a row of the user table}."""
    return {f"user_columns.{name}": str(sql) for name, sql in options["user_columns"].items()}


def all_expressions(options: Mapping[str, Any]) -> dict[str, str]:
    """{option: SQL} of all options that hold SQL."""
    prior = options["prior"].get("behaviour", {}).items()
    return {
        "item": str(options["item"]),
        **event_expressions(options),
        **user_expressions(options),
        **{f"prior.behaviour.{name}": str(sql) for name, sql in prior},
    }


def is_given_request(options: Mapping[str, Any]) -> bool:
    """Whether `request` is one of the ways that it names, not SQL of a request id."""
    return isinstance(options["request"], int) or options["request"] in ("event", "time")


def needed_columns(con: duckdb.DuckDBPyConnection, options: Mapping[str, Any]) -> set[str] | None:
    """Columns that every raw file must have, in small letters; None = all."""
    prior = options["prior"]
    names = mentioned(con, all_expressions(options).values(), aliases=("e", "i", "p"))
    keys = [options["items_key"], options["users_key"]]
    keys += [prior[name] for name in ("user", "items", "time") if name in prior]
    return names if names is None else names | {key.lower() for key in keys}
