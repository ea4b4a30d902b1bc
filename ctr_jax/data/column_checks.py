"""Checks of the columns of a data set, over the views that a builder has loaded."""

from __future__ import annotations

from collections.abc import Mapping

import duckdb

from ctr_jax.data.errors import DataError
from ctr_jax.data.plan import Field, Plan
from ctr_jax.data.raw_types import (
    FLOATS,
    INTEGERS,
    has_fractions,
    is_integer,
    not_of_type,
    refuse_lists,
)
from ctr_jax.data.sql import sql_name
from ctr_jax.data.vocabulary import column_types


def check_columns(con: duckdb.DuckDBPyConnection, plan: Plan) -> None:
    """Checks that every column is of single values and those of one vocabulary of one kind.

    Raises:
      DataError: a column holds lists, a number is wanted and a text is none, or ids that are
        written in different ways would share a vocabulary.
    """
    views = {"behaviour": "behaviours", "user": "impressions" if plan.inline_history else "users"}
    view = {f.key: views.get(f.group, "impressions") for f in plan.fields}
    types = {name: column_types(con, name) for name in set(view.values())}
    kinds = {f.key: types[view[f.key]][f.key] for f in plan.fields}
    for field in plan.fields:
        refuse_lists(f"column {field.key!r}", kinds[field.key])
        if field.kind != "id" and kinds[field.key] == "VARCHAR":
            _check_numbers(con, field, view[field.key])
    for name, fields in plan.vocabularies("id").items():
        _check_one_kind(con, name, fields, kinds, view)


def _check_numbers(con: duckdb.DuckDBPyConnection, field: Field, view: str) -> None:
    column = sql_name(field.key)
    bad = con.execute(
        f"SELECT min({column}) FROM {view} WHERE {not_of_type(column, 'DOUBLE')}"
    ).fetchone()[0]
    if bad is not None:
        raise DataError(
            f"column {field.key!r} is {field.kind!r} and has the value {bad!r}, which is no "
            "number; use TRY_CAST(... AS DOUBLE) where such a value is a missing one"
        )


def _check_one_kind(
    con: duckdb.DuckDBPyConnection,
    name: str,
    fields: list[Field],
    kinds: Mapping[str, str],
    view: Mapping[str, str],
) -> None:
    """Ids are compared as they are written, so that 2, 2.0 and true would be three."""
    integers = [f for f in fields if is_integer(kinds[f.key])]
    numbers = {kinds[f.key] for f in fields} <= {*INTEGERS, *FLOATS}
    for field in fields:
        kind = kinds[field.key]
        if not integers or is_integer(kind) or kind in ("VARCHAR", '"NULL"'):
            continue
        if not numbers or has_fractions(con, view[field.key], field.key):
            raise DataError(
                f"vocabulary {name!r}: {field.key!r} is {kind} and {integers[0].key!r} is "
                f"{kinds[integers[0].key]}, so that no id would be in both; cast one, or give it a "
                "vocabulary of its own"
            )
