"""Vocabularies that are given: those of another prepared data set (`data.vocabularies_from`).

Rows of a model's tables belong to ids, so a data set for a model that is there already, such as the
next day of its log, needs the encoding that the model was trained with. Vocabularies, quantile
edges, means and scales are taken as they are; values that they do not know are out-of-vocabulary.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctr_jax.data import vocabulary
from ctr_jax.data.errors import DataError
from ctr_jax.data.plan import Field, Plan
from ctr_jax.data.sql import from_parquet
from ctr_jax.features import FIRST_KNOWN, DataSpec

OPTION = "data.vocabularies_from"


def content_of(source: Path) -> str:
    """What stands for the vocabularies in another data set's fingerprint.

    Raises:
      DataError: `source` is no prepared data set.
    """
    spec = _spec(source)
    return spec.encoding_hash or spec.content_hash


def check(source: Path, plan: Plan) -> None:
    """Raises DataError naming every column of the plan that `source` has not, or has of another
    kind or vocabulary."""
    there = {f"{c.group}/{c.name}": c for c in _spec(source).columns}
    different = []
    for field in plan.fields:
        found, wanted = there.get(field.key), (field.kind, field.column.vocabulary)
        if found is None:
            different.append(f"no column {field.key!r}")
        elif (is_there := (_kind(source, found), found.vocabulary)) != wanted:
            names = " and ".join(f"{kind!r} {name}".rstrip() for kind, name in (is_there, wanted))
            different.append(f"column {field.key!r} is, there and here, {names}")
    if different:
        raise DataError(
            f"{OPTION} {source} has other columns than this data set: {'; '.join(different)}. "
            "Declare them as they are there, or fit the vocabularies anew"
        )


def take(
    con: duckdb.DuckDBPyConnection,
    plan: Plan,
    source: Path,
    directory: Path,
    counts: Callable[[list[Field]], str],
) -> tuple[dict[str, int], dict[str, vocabulary.Dense], dict[str, float]]:
    """What vocabulary.fit gives, taken from `source`; and {id vocabulary: share of the values it
    would be fitted on that it knows}.

    Raises:
      DataError: a vocabulary is missing, or its values are written in another way than the log's.
    """
    sizes, dense, known = {}, {}, {}
    for name, fields in plan.vocabularies("id").items():
        known[name] = _take_ids(con, plan, name, fields, _file(source, name), counts(fields))
        vocabulary.write_ids(con, name, directory)
        sizes[name] = FIRST_KNOWN + pq.read_metadata(directory / f"{name}.parquet").num_rows
    for name in plan.vocabularies("quantile"):
        path = shutil.copyfile(_file(source, name), directory / f"{name}.parquet")
        lower = pq.read_table(path)["value"].to_numpy()
        dense[name] = vocabulary.Dense(lower[1:].astype(np.float64))
        sizes[name] = FIRST_KNOWN + len(lower)
    for key in (f.key for f in plan.fields if f.kind == "standard"):
        dense[key] = vocabulary.standard(source, key)
    return sizes, dense, known


def _take_ids(
    con: duckdb.DuckDBPyConnection,
    plan: Plan,
    name: str,
    fields: list[Field],
    path: Path,
    counts: str,
) -> float:
    """Creates the table of one vocabulary; returns the share of the log's values that it knows.

    Whole numbers and texts are compared as they are written, as fitting does.
    """
    there = "BIGINT" if pa.types.is_integer(_value_type(path)) else "VARCHAR"
    here = vocabulary.id_type(con, plan, fields)
    both = there if there == here else "VARCHAR"
    table = vocabulary.table_name(name)
    con.execute(
        f"""
        CREATE OR REPLACE TABLE {table} AS
        SELECT CAST(value AS {both}) AS value, count, id FROM {from_parquet(path)}"""
    )
    known, total = con.execute(
        f"""
        SELECT coalesce(sum(n) FILTER (v.id IS NOT NULL), 0), coalesce(sum(n), 0)
        FROM ({counts}) c LEFT JOIN {table} v ON v.value = CAST(c.value AS {both})"""
    ).fetchone()
    if here != there and total and not known:  # such as 7 and 7.0
        keys = ", ".join(repr(f.key) for f in fields)
        kinds = {"BIGINT": "whole numbers", "VARCHAR": "fractions or texts"}
        raise DataError(
            f"{OPTION}: vocabulary {name!r} there is of {kinds[there]}, {keys} here of "
            f"{kinds[here]}, and none is written as any there; cast the column"
        )
    return round(int(known) / int(total), 4) if total else 1.0


def _spec(source: Path) -> DataSpec:
    try:
        return DataSpec.load(source / "spec.json")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{OPTION} {source}: no directory of a prepared data set ({error})"
        ) from None


def _kind(source: Path, column) -> str:
    """The Field.kind of a prepared column: the vocabulary of a quantile column holds edges."""
    if column.kind == "dense":
        return "standard"
    is_edges = pa.types.is_floating(_value_type(_file(source, column.vocabulary)))
    return "quantile" if is_edges else "id"


def _value_type(path: Path) -> pa.DataType:
    return pq.read_schema(path).field("value").type


def _file(source: Path, name: str) -> Path:
    path = source / "vocabularies" / f"{name}.parquet"
    if not path.exists():
        raise DataError(f"{OPTION} {source}: {path} is missing")
    return path
