"""The whole preparation: four Beam pipelines and, between them, what is of the whole log.

    parse    file -> rows by shard (a shuffle of the raw rows)
    moments  shard -> impressions by moment (CombinePerKey)   -> the bounds of the splits
    values   shard -> counts of values (CombinePerKey), users -> vocabularies, numbers of users
    encode   shard -> histories and records in order          -> merged into the data set

What stands on the right runs in the process that started the pipelines, in DuckDB or as a stream.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.options.pipeline_options import PipelineOptions

import seqvault
from ctr_jax.data import keys, vocabulary
from ctr_jax.data import requests as requests_lib
from ctr_jax.data.beam import rows, shards
from ctr_jax.data.beam.merging import merged
from ctr_jax.data.builder import SCRATCH, VOCABULARIES, PreparedBuilder, Report, check_splits
from ctr_jax.data.column_checks import check_columns
from ctr_jax.data.errors import DataError
from ctr_jax.data.plan import Plan
from ctr_jax.data.raw_files import distinct_names
from ctr_jax.data.records import HISTORIES, record_dtype
from ctr_jax.data.sql import from_parquet, plain_path, sql_text

_WRITE_ROWS = 1 << 16


def prepare_splits(
    builder: PreparedBuilder,
    con: duckdb.DuckDBPyConnection,
    directory: Path,
    *,
    shards_wanted: int,
    flags: Sequence[str],
) -> dict[str, tuple[int, Iterator[np.ndarray]]]:
    """PreparedBuilder.prepare_splits, by `shards_wanted` shards of users; same data set.

    Args:
      flags: Beam's pipeline flags, such as "--runner=...".
    Raises:
      DataError: the raw log is bad, or cannot be cut by user.
    """
    plan, report = builder.plan(builder.options), builder._report
    job = rows.describe(builder, con, directory / SCRATCH, shards_wanted)
    check_columns(con, plan)  # over no rows
    requests_lib.split_impressions(con, plan)  # over no rows: the types of the views
    job = _parse(job, report, flags)
    report["bounds"] = bounds = _find_bounds(job, con, plan, report, flags)

    sizes, groups, known, contexts = _count_values(job, con, plan, bounds, flags)
    if groups != sizes:
        report["several_contexts"] = contexts
    check_splits(sizes)
    _number_users(job, con)
    names = {id_fields(fields): name for name, fields in shards.fits(plan).items()}
    dense = builder.fit_vocabularies(
        con,
        plan,
        directory / VOCABULARIES,
        lambda fields: f"SELECT * FROM {from_parquet(_counts_file(job, names[id_fields(fields)]))}",
    )

    with beam.Pipeline(options=PipelineOptions(list(flags))) as pipeline:
        encode = shards.Encode(job, bounds, dense, directory / VOCABULARIES)
        _ = _shards(pipeline, job) | "encode" >> beam.ParDo(encode)
    history_hash = _merge_histories(job, con, plan, directory / HISTORIES)
    builder._digest.update(history_hash.encode())
    builder.report_counts(directory, known, sizes)
    keys.write_users(con, "all_users", directory)

    dtype = record_dtype(builder.spec())
    prepared, first = {}, 0
    for split in requests_lib.SPLITS:
        count = requests_lib.num_records(groups[split], plan.max_candidates)
        blocks = _merge_records(job, split, dtype, first)
        records = keys.written(directory, split, keys.request_type(con, plan), blocks)
        prepared[split] = (count, builder.watched(split, count, records))
        first += report["requests"][split]
    return prepared


def id_fields(fields: Sequence[Any]) -> tuple[str, ...]:
    """What tells fields that are fitted together from others."""
    return tuple(field.key for field in fields)


def _shards(pipeline: beam.Pipeline, job: rows.Job) -> Any:
    return pipeline | beam.Create(list(range(job.shards))) | beam.Reshuffle()


def _parse(job: rows.Job, report: Report, flags: Sequence[str]) -> rows.Job:
    """Parses the files and shuffles their rows; reports their counts, raises their first error."""
    files = [(t.name, i) for t in job.tables.values() for i in range(len(t.files))]
    with beam.Pipeline(options=PipelineOptions(list(flags))) as pipeline:
        _ = (
            pipeline
            | beam.Create(files)
            | beam.Reshuffle()
            | "parse" >> beam.ParDo(rows.ParseFile(job))
            | beam.GroupByKey()
            | "write rows" >> beam.ParDo(rows.WriteRows(job))
        )
    first: dict[str, list[int]] = {name: [] for name in job.tables}
    rejected: dict[str, dict[int, np.ndarray]] = {name: {} for name in job.tables}
    misfits: dict[str, dict[int, np.ndarray]] = {name: {} for name in job.tables}
    total = Counter()
    names = {t.name: distinct_names(t.files) for t in job.tables.values()}
    for name, i in files:
        result = json.loads(job.result(f"parse-{name}-{i}").read_text())
        if "error" in result:
            raise DataError(result["error"])
        first[name].append(total[name])
        rejected[name][i] = np.asarray(result["rejected"], np.int64)
        misfits[name][i] = np.asarray(result["misfits"], np.int64)
        rows_read = sum(result["rows"].values())
        total[name] += rows_read
        report["rows"][names[name][job.tables[name].files[i]]] = rows_read
        _add(report["skipped"], result["skipped"])
    tables = {
        name: dataclasses.replace(
            table, first=tuple(first[name]), rejected=rejected[name], misfits=misfits[name]
        )
        for name, table in job.tables.items()
    }
    return dataclasses.replace(job, tables=tables)


def _find_bounds(
    job: rows.Job, con: duckdb.DuckDBPyConnection, plan: Plan, report: Report, flags: Sequence[str]
) -> dict[str, float | None]:
    """The bounds of the splits; reports the row checks' counts, raises their first error."""
    schema = con.sql(requests_lib.MOMENTS).to_arrow_reader(1).schema
    path = job.scratch / "moments.parquet"
    with beam.Pipeline(options=PipelineOptions(list(flags))) as pipeline:
        _ = (
            _shards(pipeline, job)
            | "count moments" >> beam.ParDo(shards.CountMoments(job))
            | beam.CombinePerKey(_add_pairs)
            | beam.Map(lambda pair: (path.name, (*pair[0], *pair[1])))
            | beam.GroupByKey()
            | beam.ParDo(WriteTable(job.scratch, {path.name: schema}))
        )
    results = [
        json.loads(job.result(f"moments-{shard}").read_text()) for shard in range(job.shards)
    ]
    if errors := [result for result in results if "error" in result]:
        raise DataError(min(errors, key=lambda e: _place_of(job, e))["error"])
    for result in results:
        for kind in ("skipped", "dropped"):
            _add(report[kind], result[kind])
    source = from_parquet(_or_empty(path, schema))
    con.execute(f"CREATE OR REPLACE TABLE moments AS SELECT * FROM {source}")
    return requests_lib.find_bounds(con, plan)


def _place_of(job: rows.Job, error: dict[str, Any]) -> tuple[int, int, int]:
    if error["order"] is None:  # no row's: an option's, the same in every shard
        return (-1, 0, 0)
    kind, table, row = error["order"]
    return kind, list(job.tables).index(table), row


def _count_values(
    job: rows.Job, con: duckdb.DuckDBPyConnection, plan: Plan, bounds: dict, flags: Sequence[str]
) -> tuple[dict[str, dict[int, int]], dict[str, dict[int, int]], tuple, dict[str, int]]:
    """Writes the counts that vocabularies are fitted on.

    Returns:
      sizes and groups (group_sizes without and by context), known_behaviours, several_contexts.
    """
    fits = shards.fits(plan)
    schemas = {
        f"{name}.parquet": con.sql(vocabulary.counts(con, plan, fields)).to_arrow_reader(1).schema
        for name, fields in fits.items()
    }
    # Where vocabularies are given, rare values count among those that are known or not.
    least = 1 if job.options.get("vocabularies_from") else plan.min_count
    min_counts = {n: least if f[0].kind == "id" else 1 for n, f in fits.items()}
    joined = max if plan.impressions_are_behaviours else sum
    with beam.Pipeline(options=PipelineOptions(list(flags))) as pipeline:
        _ = (
            _shards(pipeline, job)
            | "count values" >> beam.ParDo(shards.CountValues(job, bounds))
            | beam.CombinePerKey(_add_pairs)
            | beam.Filter(lambda pair: joined(pair[1]) >= min_counts[pair[0][0]])
            | beam.FlatMap(_count_rows)
            | beam.GroupByKey()
            | beam.ParDo(WriteTable(job.scratch, schemas))
        )
    for name, schema in schemas.items():
        _or_empty(job.scratch / name, schema)
    totals = {"sizes": _no_sizes(), "groups": _no_sizes()}
    known, contexts = [], {}
    for shard in range(job.shards):
        result = json.loads(job.result(f"values-{shard}").read_text())
        known.append(result["behaviours"])
        _add(contexts, result["several_contexts"])
        for kind, splits in totals.items():
            for split, counts in splits.items():
                _add(counts, {int(k): n for k, n in result[kind][split].items()})
    sizes, groups = (
        {split: dict(sorted(counts.items())) for split, counts in splits.items()}
        for splits in totals.values()
    )
    numbers, *times = zip(*known, strict=True)
    first, last = ([t for t in of if t is not None] for of in times)
    behaviours = (sum(numbers), min(first, default=None), max(last, default=None))
    in_order = {k: contexts[k] for k in ("any", *(f.key for f in plan.fields)) if k in contexts}
    return sizes, groups, behaviours, in_order


def _no_sizes() -> dict[str, dict[int, int]]:
    return {split: {} for split in requests_lib.SPLITS}


def _add(total: dict, counts: dict) -> None:
    for key, count in counts.items():
        total[key] = total.get(key, 0) + count


def _add_pairs(values) -> tuple[int, int]:
    first = second = 0
    for of_first, of_second in values:
        first += of_first
        second += of_second
    return first, second


def _count_rows(pair: tuple[tuple[str, Any], tuple[int, int]]) -> Iterator[tuple[str, tuple]]:
    (name, value), counts = pair
    for source, count in zip(("impressions", "behaviours"), counts, strict=True):
        if count:
            yield f"{name}.parquet", (value, source, count)


class WriteTable(beam.DoFn):
    """(file, rows) -> the parquet file, in batches; a schema without `source` leaves it out."""

    def __init__(self, directory: Path, schemas: dict[str, pa.Schema]):
        self.directory, self.schemas = directory, schemas

    def process(self, element: tuple[str, Any]) -> None:
        name, found = element
        schema = self.schemas[name]
        with rows.appearing_file(self.directory / name) as path:
            with pq.ParquetWriter(path, schema) as writer:
                batch: list[tuple] = []
                for row in found:
                    batch.append(row if len(row) == len(schema) else (row[0], row[2]))
                    if len(batch) == _WRITE_ROWS:
                        writer.write_table(_table(batch, schema))
                        batch = []
                if batch:
                    writer.write_table(_table(batch, schema))


def _table(batch: list[tuple], schema: pa.Schema) -> pa.Table:
    columns = zip(*batch, strict=True)
    arrays = [pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def _counts_file(job: rows.Job, name: str) -> Path:
    return job.scratch / f"{name}.parquet"


def _or_empty(path: Path, schema: pa.Schema) -> Path:
    """The file, made without rows where nothing was counted."""
    if not path.exists():
        pq.write_table(schema.empty_table(), path)
    return path


def _number_users(job: rows.Job, con: duckdb.DuckDBPyConnection) -> None:
    """Numbers all users in the order of their keys and tells each shard the numbers of its own."""
    files = [
        plain_path(path)
        for shard in range(job.shards)
        if (path := shards.by_user(job, "users", shard) / shards.USERS).exists()
    ]
    con.execute(
        """
        CREATE OR REPLACE TABLE all_users AS
        SELECT shard, user_key,
               CAST(row_number() OVER (ORDER BY user_key) - 1 AS INTEGER) AS "user"
        FROM read_parquet(?)""",
        [files],
    )
    for shard in range(job.shards):
        path = sql_text(job.scratch / f"numbers-{shard}.parquet")
        con.execute(
            f'COPY (SELECT "user" FROM all_users WHERE shard = {shard} ORDER BY "user") TO {path}'
        )


def _merge_histories(job: rows.Job, con: duckdb.DuckDBPyConnection, plan: Plan, path: Path) -> str:
    """Writes the history store of all users; returns its content hash."""
    num_users = con.execute("SELECT count(*) FROM all_users").fetchone()[0]
    schema = seqvault.Schema({f.name: np.int32 for f in plan.group("behaviour")})
    streams = (shards.scan_histories(job, shard) for shard in range(job.shards))
    return seqvault.bulk_build(path, schema, num_users, merged(streams, ("user",)))


def _merge_records(
    job: rows.Job, split: str, dtype: np.dtype, first_request: int
) -> Iterator[tuple[np.ndarray, keys.RecordKeys]]:
    """The records of one split, in order, with the numbers of their requests; their raw keys."""
    streams = (shards.scan_records(job, shard, split, dtype) for shard in range(job.shards))
    last = first_request - 1
    for block in merged(streams, ("order", "user")):
        records = block["record"].copy()
        records["request_id"] = last + np.cumsum(block["new"])
        last = int(records["request_id"][-1])
        yield records, keys.RecordKeys(block.get("request"), block["rows"])
