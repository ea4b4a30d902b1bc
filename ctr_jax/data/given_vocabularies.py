"""Vocabularies that are given: those of another prepared data set (`data.vocabularies_from`).

Rows of a model's tables belong to ids, so a data set for a model that is there already, such as the
next day of its log, needs the encoding that the model was trained with. Vocabularies, quantile
edges, means and scales are taken as they are; values that they do not know are out-of-vocabulary.

With `data.grow_vocabularies` id vocabularies keep every value and id, and the values that the log's
training range has often enough, counted as in fitting, get the next ids: most frequent first and
equal counts in the order of their values. `count` is where a value got its id: known values keep
theirs, new ones have that of this log.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctr_jax.data import vocabulary, vocabulary_hash
from ctr_jax.data.errors import DataError
from ctr_jax.data.plan import Field, Plan
from ctr_jax.data.raw_types import FLOATS
from ctr_jax.data.sql import from_parquet
from ctr_jax.features import FIRST_KNOWN, DataSpec

OPTION = "data.vocabularies_from"


def content_of(source: Path) -> Any:
    """What stands for the vocabularies, and for what they grew from, in another data set's
    fingerprint.

    Raises:
      DataError: `source` is no prepared data set.
    """
    spec = _spec(source)
    meaning = spec.encoding_hash or spec.content_hash
    return [meaning, spec.grown_from] if spec.grown_from else meaning


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
    grow: bool,
) -> tuple[dict[str, int], dict[str, vocabulary.Dense], dict[str, dict[str, float]]]:
    """What vocabulary.fit gives, taken from `source`; and for the report "known", {id vocabulary:
    share of the values for training that it knows in `source`}, and where they grow "added", {id
    vocabulary: number of values}.

    Raises:
      DataError: a vocabulary is missing, or its values are written in another way than the log's.
    """
    sizes, dense, known, added = {}, {}, {}, {}
    for name, fields in plan.vocabularies("id").items():
        there, of_values = _file(source, name), counts(fields)
        known[name] = _take_ids(con, plan, name, fields, there, of_values)
        if grow:
            _append(con, plan, name, of_values)
        path = vocabulary.write_ids(con, name, directory)
        sizes[name] = vocabulary_rows(path)
        added[name] = sizes[name] - vocabulary_rows(there)
    for name in plan.vocabularies("quantile"):
        path = shutil.copyfile(_file(source, name), directory / f"{name}.parquet")
        lower = pq.read_table(path)["value"].to_numpy()
        dense[name] = vocabulary.Dense(lower[1:].astype(np.float64))
        sizes[name] = FIRST_KNOWN + len(lower)
    for key in (f.key for f in plan.fields if f.kind == "standard"):
        dense[key] = vocabulary.standard(source, key)
    return sizes, dense, {"known": known, **({"added": added} if grow else {})}


def grown_from(
    source: Path, directory: Path, hashes: Mapping[str, str]
) -> dict[str, dict[str, int]]:
    """DataSpec.grown_from of vocabularies that were taken from `source` into `directory`.

    Args:
      hashes: {vocabulary: its hash}, of `directory`.
    Raises:
      DataError: a vocabulary of `source` is not the one that its spec.json tells of.
    """
    spec, found = _spec(source), {}
    for name, now in hashes.items():
        rows = vocabulary_rows(_file(source, name))
        before = vocabulary_hash.hash_of(directory / f"{name}.parquet", rows - FIRST_KNOWN)
        if spec.encoding and spec.encoding["vocabularies"][name] != before:
            raise DataError(
                f"{OPTION} {source}: vocabulary {name!r} is not the one of its spec.json; prepare "
                "that data set again"
            )
        earlier = spec.grown_from.get(name, {}) | ({before: rows} if before != now else {})
        if earlier:
            found[name] = earlier
    return found


def vocabulary_rows(path: Path) -> int:
    """The rows of a vocabulary's file and the reserved ids: those of a table over it."""
    return FIRST_KNOWN + pq.read_metadata(path).num_rows


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
    here, keys = vocabulary.id_type(con, plan, fields), ", ".join(repr(f.key) for f in fields)
    there = "BIGINT" if pa.types.is_integer(_value_type(path)) else "VARCHAR"
    if not pq.read_metadata(path).num_rows:  # of no values, so of any type
        there = here
    both = there if there == here else "VARCHAR"
    types = {vocabulary.column_types(con, vocabulary.view_of(plan, f.group))[f.key] for f in fields}
    if here == "BIGINT" and both == "VARCHAR" and types & {*FLOATS}:
        raise DataError(
            f"{OPTION}: vocabulary {name!r} there is of texts, and of {keys} here some are whole "
            "numbers stored as fractions, which are written 7.0 as a text; cast them to BIGINT"
        )
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
        kinds = {"BIGINT": "whole numbers", "VARCHAR": "fractions or texts"}
        raise DataError(
            f"{OPTION}: vocabulary {name!r} there is of {kinds[there]}, {keys} here of "
            f"{kinds[here]}, and none is written as any there; cast the column"
        )
    return round(int(known) / int(total), 4) if total else 1.0


def _append(con: duckdb.DuckDBPyConnection, plan: Plan, name: str, counts: str) -> None:
    """Adds the log's values that the table of a vocabulary lacks, under the next ids."""
    table = vocabulary.table_name(name)
    value_type = vocabulary.column_types(con, table)["value"]
    last = FIRST_KNOWN - 1 + con.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
    con.execute(
        f"""
        INSERT INTO {table} BY NAME
        WITH new AS (
            SELECT CAST(value AS {value_type}) AS value, n
            FROM ({vocabulary.totals(plan, counts)}) WHERE n >= {plan.min_count})
        SELECT value, n AS count,
               CAST(row_number() OVER (ORDER BY n DESC, value) + {last} AS INTEGER) AS id
        FROM new ANTI JOIN {table} USING (value)"""
    )


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
