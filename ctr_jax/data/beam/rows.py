"""Raw files -> rows by shard of users, each with its place in the log.

A raw file is parsed by one worker with the embedded engine's own reader, so a malformed row gives
the same message and the same count. Its rows go to the shard of their user's hash; tables that are
no user's go to every worker. A row carries its file and its position there: that is the `rowid`
that the builders' SQL orders by.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import apache_beam as beam
import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctr_jax.data import raw
from ctr_jax.data.builder import PreparedBuilder, Report, connect
from ctr_jax.data.errors import DataError
from ctr_jax.data.prepare import find_builder, make_builder
from ctr_jax.data.sql import from_parquet, own, sql_name

SIDE = -1  # the shard of the rows that every worker needs
_BATCH_ROWS = 1 << 16
_FILE, _FIRST, _SHARD = own("file"), own("first"), own("shard")


@dataclasses.dataclass(frozen=True)
class Table:
    """A raw table as the builder asks for it.

    Attributes:
      columns: {column: DuckDB type}; see raw.load where they are inferred.
      how: the other options of raw.load.
      user: SQL of the user that a row belongs to; "" = every worker needs the row.
      first: the rowid of each file's first row, once the files are parsed.
      rejected, misfits: as of RawTable, likewise.
    """

    name: str
    files: tuple[Path, ...]
    columns: Mapping[str, str]
    how: Mapping[str, Any]
    user: str
    first: tuple[int, ...] = ()
    rejected: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)
    misfits: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Job:
    """What every worker must know. `scratch` is a directory that all workers see."""

    options: Mapping[str, Any]
    files: tuple[Path, ...]
    scratch: Path
    shards: int
    tables: Mapping[str, Table]

    def rows(self, shard: int) -> Path:
        return self.scratch / f"rows-{shard}"

    def builder(self) -> PreparedBuilder:
        return make_builder(find_builder(self.options["builder"]), self.options, list(self.files))

    def result(self, name: str) -> Path:
        return self.scratch / f"{name}.json"


def describe(
    builder: PreparedBuilder, con: duckdb.DuckDBPyConnection, scratch: Path, shards: int
) -> Job:
    """The raw tables that `builder.load` reads; leaves its views, over tables without rows.

    Raises:
      DataError: the log cannot be cut by user.
    """
    options = builder.options
    keys = builder.shard_keys(options)
    if not keys:
        raise DataError(
            f"data.builder {options['builder']!r} does not go by single users, so it cannot be cut "
            "into shards; use python -m ctr_jax.data.prepare"
        )
    tables: dict[str, Table] = {}

    def read_table(con, name, files, report, *, on_bad_row, needed=None, **how) -> raw.RawTable:
        if on_bad_row not in ("raise", "skip"):
            raise DataError(f"on_bad_row is {on_bad_row!r}; use 'raise' or 'skip'")
        created = raw.create(con, name, files, **how)
        rest = {k: v for k, v in how.items() if k in ("nulls", "quote", "header")}
        rest["on_bad_row"], rest["needed"] = on_bad_row, needed
        tables[name] = Table(name, tuple(files), created.columns, rest, keys.get(name, ""))
        return created

    builder.read_table = read_table
    builder.load(con, {"rows": {}, "skipped": {}, "dropped": {}})
    types = {}
    for table in tables.values():
        if table.user:
            try:
                found = con.execute(f"DESCRIBE {_rows_of(table, f'({table.user}) AS user')}")
            except duckdb.Error as error:
                raise DataError(
                    f"data: the user {table.user!r} cannot be told from {table.name} alone, so the "
                    "log cannot be cut into shards; use python -m ctr_jax.data.prepare"
                ) from error
            types[table.name] = found.fetchone()[1]
    if len(set(types.values())) > 1:
        raise DataError(
            f"the users of the raw tables have different types ({types}), so they cannot be cut "
            "into the same shards; set data.types, or use python -m ctr_jax.data.prepare"
        )
    return Job(options, tuple(builder.builder_config.files), scratch, shards, tables)


def _rows_of(table: Table, select: str) -> str:
    return f"SELECT {select} FROM (SELECT rowid, * FROM {table.name}) e"


class ParseFile(beam.DoFn):
    """(table, file) -> (shard, (table, file, rows in Arrow's stream format)) in batches.

    Writes the result parse-<table>-<file>: the report of raw.load and its error.
    """

    def __init__(self, job: Job):
        self.job = job

    def process(self, element: tuple[str, int]) -> Iterator[tuple[int, tuple[str, int, bytes]]]:
        name, number = element
        table, report = self.job.tables[name], {"rows": {}, "skipped": {}}
        with local_database(self.job.options) as con:
            try:
                path = table.files[number]
                loaded = raw.load(con, name, [path], report, columns=table.columns, **table.how)
            except DataError as error:
                report["error"] = str(error)
            else:
                report["rejected"] = loaded.rejected.get(0, np.empty(0)).tolist()
                report["misfits"] = loaded.misfits.get(0, np.empty(0)).tolist()
                yield from self._batches(con, table, number)
        write_result(self.job.result(f"parse-{name}-{number}"), report)

    def _batches(self, con, table: Table, number: int) -> Iterator:
        shard = str(SIDE)
        if table.user:
            share = f"md5_number_lower(CAST(({table.user}) AS VARCHAR)) % {self.job.shards}"
            shard = f"coalesce(CAST({share} AS INTEGER), 0)"
        select = f"* EXCLUDE (rowid), {number} AS {_FILE}, rowid AS rowid, {shard} AS {_SHARD}"
        query = f"SELECT * FROM ({_rows_of(table, select)}) ORDER BY {_SHARD}, rowid"
        for batch in con.cursor().sql(query).to_arrow_reader(_BATCH_ROWS):
            *_, shard_column = batch.schema.names
            shards = batch[shard_column].to_numpy()
            for shard in sorted(set(shards.tolist())):
                first, last = shards.searchsorted([shard, shard + 1])
                rows = batch.slice(first, last - first).drop_columns([shard_column])
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, rows.schema) as writer:
                    writer.write_batch(rows)
                yield shard, (table.name, number, sink.getvalue().to_pybytes())


class WriteRows(beam.DoFn):
    """The rows of one shard -> parquet files in its directory, which appears when it is whole."""

    def __init__(self, job: Job):
        self.job = job

    def process(self, element: tuple[int, Iterable[tuple[str, int, bytes]]]) -> None:
        shard, batches = element
        with appearing(self.job.rows(shard)) as directory, contextlib.ExitStack() as stack:
            writers: dict[str, pq.ParquetWriter] = {}
            for name, _, data in batches:
                with pa.ipc.open_stream(data) as reader:
                    rows = reader.read_all()
                if name not in writers:
                    path = directory / f"{name}.parquet"
                    writers[name] = stack.enter_context(pq.ParquetWriter(path, rows.schema))
                writers[name].write_table(rows)


def open_shard(job: Job, shard: int, con: duckdb.DuckDBPyConnection, report: Report):
    """The builder, its views loaded over the rows of one shard.

    Raises:
      DataError: a row of the shard is bad.
    """
    builder = job.builder()

    def read_table(con, name, files, report, **how) -> raw.RawTable:
        del how
        table = job.tables[name]
        path = job.rows(shard if table.user else SIDE) / f"{name}.parquet"
        columns = ", ".join(map(sql_name, table.columns))
        if path.exists():
            places = ", ".join(f"({i}, {first})" for i, first in enumerate(table.first))
            con.execute(
                f"""
                CREATE VIEW {name} AS SELECT {columns}, filename, rowid + o.{_FIRST} AS rowid
                FROM {from_parquet(path)}
                JOIN (VALUES {places}) o({_FILE}, {_FIRST}) USING ({_FILE})"""
            )
        else:
            types = ", ".join(f"{sql_name(c)} {t}" for c, t in table.columns.items())
            con.execute(f"CREATE TABLE {name} ({types}, filename VARCHAR, rowid BIGINT)")
        header = table.how.get("header", True)
        return raw.RawTable(
            name, list(files), list(table.first), dict(table.columns), header,
            dict(table.rejected), dict(table.misfits),
        )  # fmt: skip

    builder.read_table = read_table
    builder.load(con, report)
    return builder


@contextlib.contextmanager
def local_database(options: Mapping[str, Any]) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB database on the worker's own disk."""
    with tempfile.TemporaryDirectory() as directory:
        con = connect(Path(directory), options)
        try:
            yield con
        finally:
            con.close()


@contextlib.contextmanager
def appearing(directory: Path) -> Iterator[Path]:
    """A directory that gets its name when the block is through.

    A runner may repeat work, even at the same time; equal work gives equal files: the first wins.
    """
    partial = directory.with_name(f"{directory.name}.{uuid.uuid4().hex}")
    partial.mkdir(parents=True)
    yield partial
    try:
        os.rename(partial, directory)
    except OSError:
        if not directory.is_dir():
            raise
        shutil.rmtree(partial)


@contextlib.contextmanager
def appearing_file(path: Path) -> Iterator[Path]:
    """A file that gets its name when the block is through."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    yield partial
    os.replace(partial, path)


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a small result of a worker."""
    with appearing_file(path) as partial:
        partial.write_text(json.dumps(result))
