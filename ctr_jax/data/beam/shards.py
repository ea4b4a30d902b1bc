"""What a worker does with the users of one shard: the embedded preparation, over their rows.

Three passes, because some numbers are of the whole log: the split's bounds are needed before
anything is counted, the vocabularies and the numbers of the users before anything is encoded. Each
pass reads the shard's rows anew, so that a worker keeps nothing and any worker may repeat it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import apache_beam as beam
import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import seqvault
from ctr_jax.data import histories as histories_lib
from ctr_jax.data import keys, vocabulary
from ctr_jax.data import requests as requests_lib
from ctr_jax.data.beam.merging import Block
from ctr_jax.data.beam.rows import Job, appearing, local_database, open_shard, write_result
from ctr_jax.data.column_checks import check_columns
from ctr_jax.data.errors import DataError
from ctr_jax.data.plan import Field, Plan
from ctr_jax.data.records import HISTORIES, record_dtype
from ctr_jax.data.sql import from_parquet, sql_text

MOMENTS = "moments"
USERS = "users.parquet"
SCAN_ROWS = 1 << 16  # rows of each shard that the merge holds


def fits(plan: Plan) -> dict[str, list[Field]]:
    """{name of its file of counts: the fields fitted together}, for all that is fitted."""
    groups = [*plan.vocabularies("id").values(), *plan.vocabularies("quantile").values()]
    groups += [[field] for field in plan.fields if field.kind == "standard"]
    return {f"counts-{i}": fields for i, fields in enumerate(groups)}


def by_user(job: Job, pass_name: str, shard: int) -> Path:
    """The directory of what a pass leaves of one shard."""
    return job.scratch / f"{pass_name}-{shard}"


class CountMoments(beam.DoFn):
    """shard -> ((range, request_order), (impressions, those of label 1)).

    Writes the result moments-<shard>: the counts of the row checks, or their error.
    """

    def __init__(self, job: Job):
        self.job = job

    def process(self, shard: int) -> Iterator[tuple[tuple, tuple]]:
        report: dict[str, Any] = {"rows": {}, "skipped": {}, "dropped": {}}
        with local_database(self.job.options) as con:
            try:
                builder = open_shard(self.job, shard, con, report)
                check_columns(con, builder.plan(builder.options))
            except DataError as error:
                report["error"], report["order"] = str(error), error.order
            else:
                requests_lib.range_impressions(con, builder.plan(builder.options))
                for name, order, *counts in _rows(con, requests_lib.MOMENTS):
                    yield (name, order), tuple(counts)
        write_result(self.job.result(f"moments-{shard}"), report)


class CountValues(beam.DoFn):
    """shard -> ((name of fits(), value), (in impressions, in behaviours)).

    Writes the shard's users, and the result values-<shard>: the sizes of its requests, those of
    several contexts, and the number and times of its behaviours.
    """

    def __init__(self, job: Job, bounds: Mapping[str, float | None]):
        self.job, self.bounds = job, bounds

    def process(self, shard: int) -> Iterator[tuple[tuple, tuple]]:
        with local_database(self.job.options) as con:
            plan = _placed(self.job, shard, con, self.bounds).plan(self.job.options)
            for name, fields in fits(plan).items():
                for value, *rest in _rows(con, vocabulary.counts(con, plan, fields)):
                    behaviours = rest[0] == "behaviours"
                    yield (name, value), ((0, rest[-1]) if behaviours else (rest[-1], 0))
            with appearing(by_user(self.job, "users", shard)) as directory:
                con.execute(
                    f"COPY (SELECT user_key, {shard} AS shard FROM user_ids ORDER BY user_key) "
                    f"TO {sql_text(directory / USERS)}"
                )
            sizes = requests_lib.group_sizes(con, plan)
            groups = requests_lib.group_sizes(con, plan, by_context=True)
            result = {
                "sizes": sizes,
                "groups": groups,
                "several_contexts": requests_lib.several_contexts(con, plan)
                if groups != sizes
                else {},
                "behaviours": requests_lib.known_behaviours(con),
            }
        write_result(self.job.result(f"values-{shard}"), result)


class Encode(beam.DoFn):
    """shard -> nothing; writes its histories and, by split, its records in their order.

    Users are numbered within the shard in the same order as in the whole log; the files of records
    (order, user, new, record) carry their numbers in the log, `new` marking a request's first, and
    beside them stand the raw keys (rows, and request where requests have keys).
    """

    def __init__(
        self,
        job: Job,
        bounds: Mapping[str, float | None],
        dense: Mapping[str, vocabulary.Dense],
        vocabularies: Path,
    ):
        self.job, self.bounds, self.dense = job, bounds, dict(dense)
        self.vocabularies = vocabularies

    def process(self, shard: int) -> None:
        with (
            local_database(self.job.options) as con,
            appearing(by_user(self.job, "encoded", shard)) as directory,
        ):
            builder = _placed(self.job, shard, con, self.bounds)
            plan = builder.plan(builder.options)
            if not con.execute("SELECT count(*) FROM user_ids").fetchone()[0]:
                return
            for name in plan.vocabularies("id"):
                source = from_parquet(self.vocabularies / f"{name}.parquet")
                con.execute(f"CREATE TABLE {vocabulary.table_name(name)} AS SELECT * FROM {source}")
            ends = directory / "ends.parquet"
            histories_lib.build_histories(con, plan, self.dense, directory / HISTORIES, ends)
            encoders = builder.encoders(self.vocabularies, self.dense)
            users = requests_lib.encode_users(con, encoders["user"])
            numbers = user_numbers(self.job, shard)
            dtype = record_dtype(builder.spec())
            for split in requests_lib.SPLITS:
                records = requests_lib.split_records(
                    con, plan, split, encoders["row"], users, dtype, directory / HISTORIES, ends, 0
                )
                kind = keys.request_type(con, plan)
                _write_records(directory / f"{split}.parquet", records, numbers, kind)


def _write_records(
    path: Path,
    blocks: Iterator[tuple[np.ndarray, np.ndarray, keys.RecordKeys]],
    numbers: np.ndarray,
    request_type: pa.DataType,
) -> None:
    writer, last = None, -1  # the request before the block
    for order, records, raw_keys in blocks:
        ids = records["request_id"].copy()
        new = np.diff(ids, prepend=last) != 0
        last = int(ids[-1])
        records["user"] = numbers[records["user"]]
        records["request_id"] = 0
        size = records.dtype.itemsize
        data = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(size), len(records), [None, pa.py_buffer(records.tobytes())]
        )
        columns = {"order": order, "user": records["user"], "new": new, "record": data}
        candidates = raw_keys.rows.shape[1]
        columns["rows"] = pa.FixedSizeListArray.from_arrays(raw_keys.rows.reshape(-1), candidates)
        if raw_keys.request is not None:
            columns["request"] = pa.array(raw_keys.request, request_type)
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table, row_group_size=SCAN_ROWS)
    if writer is not None:
        writer.close()


def user_numbers(job: Job, shard: int) -> np.ndarray:
    """The numbers in the whole log of a shard's users: [U] int32, ascending."""
    path = job.scratch / f"numbers-{shard}.parquet"
    return pq.read_table(path)["user"].to_numpy().astype(np.int32)


def scan_histories(job: Job, shard: int) -> Iterator[Block]:
    """A shard's behaviours by user and position, users numbered as in the whole log."""
    path = by_user(job, "encoded", shard) / HISTORIES
    if path.is_dir():
        numbers = user_numbers(job, shard)
        for block in seqvault.Snapshot(path).scan(block_rows=SCAN_ROWS):
            yield {**block, "user": numbers[block["user"]].astype(np.int64)}


def scan_records(job: Job, shard: int, split: str, dtype: np.dtype) -> Iterator[Block]:
    """A shard's records of one split with order, user, raw keys and whether a request begins."""
    path = by_user(job, "encoded", shard) / f"{split}.parquet"
    if path.is_file():
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(SCAN_ROWS):
                data = batch["record"]
                start = data.offset * dtype.itemsize
                stop = start + len(data) * dtype.itemsize
                plain = {
                    name: batch[name].to_numpy(zero_copy_only=False)
                    for name in ("order", "user", "new", "request")
                    if name in batch.schema.names
                }
                yield plain | {
                    "rows": batch["rows"].flatten().to_numpy().reshape(len(batch), -1),
                    "record": np.frombuffer(data.buffers()[1], np.uint8)[start:stop].view(dtype),
                }


def _placed(job: Job, shard: int, con: duckdb.DuckDBPyConnection, bounds: Mapping) -> Any:
    builder = open_shard(job, shard, con, {"rows": {}, "skipped": {}, "dropped": {}})
    plan = builder.plan(builder.options)
    requests_lib.range_impressions(con, plan)
    requests_lib.place_impressions(con, plan, bounds)
    return builder


def _rows(con: duckdb.DuckDBPyConnection, query: str) -> Iterator[tuple]:
    for batch in con.cursor().sql(query).to_arrow_reader(requests_lib.BATCH_ROWS):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
