"""Raw keys beside the records: what joins a prepared data set to its raw log.

    keys/users.parquet    user (row in the history store), key (raw)
    keys/<split>.parquet  record (number in the split), request (raw key, NULL where the log gives
                          requests none), rows (of each candidate: its row in the raw log)

A row in the raw log is counted from 0 over its files, in their order, malformed lines left out.
(Logs of single events, whose negatives are drawn: twice that row, or one more.) Training reads none
of this, and the content hash does not cover it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctr_jax.data.errors import DataError
from ctr_jax.data.plan import Plan

KEYS = "keys"
NO_ROW = -1  # of a candidate slot that is empty
_BATCH_ROWS = 1 << 16


class RecordKeys(NamedTuple):
    """The raw keys of a block of records.

    Attributes:
      request: [N] raw request keys; None where requests have none.
      rows: [N, C] int64 rows of the candidates in the raw log, NO_ROW in empty slots.
    """

    request: np.ndarray | None
    rows: np.ndarray


def request_type(con: duckdb.DuckDBPyConnection, plan: Plan) -> pa.DataType:
    """The Arrow type of the raw request keys in the view `impressions`."""
    if plan.request != "key":
        return pa.null()
    query = "SELECT request_key FROM impressions LIMIT 0"
    return con.cursor().sql(query).to_arrow_reader(1).schema.field(0).type


def write_users(con: duckdb.DuckDBPyConnection, table: str, directory: Path) -> None:
    """Writes keys/users.parquet into `directory`, from a table with "user" and user_key."""
    query = f'SELECT "user", user_key AS key FROM {table} ORDER BY "user"'
    reader = con.cursor().sql(query).to_arrow_reader(_BATCH_ROWS)
    (directory / KEYS).mkdir()
    with pq.ParquetWriter(directory / KEYS / "users.parquet", reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch)


def written(
    directory: Path,
    split: str,
    request_type: pa.DataType,
    blocks: Iterable[tuple[np.ndarray, RecordKeys]],
) -> Iterator[np.ndarray]:
    """The records of `blocks`, whose keys go to keys/<split>.parquet in passing."""
    schema = pa.schema(
        [("record", pa.int64()), ("request", request_type), ("rows", pa.list_(pa.int64()))]
    )
    first = 0
    with pq.ParquetWriter(directory / KEYS / f"{split}.parquet", schema) as writer:
        for records, keys in blocks:
            count, there = len(records), keys.rows != NO_ROW
            request = [None] * count if keys.request is None else keys.request
            ends = np.concatenate([[0], np.cumsum(there.sum(1))]).astype(np.int32)
            columns = [
                np.arange(first, first + count),
                pa.array(request, request_type),
                pa.ListArray.from_arrays(ends, keys.rows[there]),
            ]
            writer.write_table(pa.table(columns, schema=schema))
            first += count
            yield records


def user_keys(path: Path) -> pa.ChunkedArray:
    """The raw keys of all users of the prepared data set in `path`, in the order of their rows.

    Raises:
      DataError: the data set has none.
    """
    return pq.read_table(file_of(path, "users"), columns=["key"])["key"]


def record_keys(path: Path, split: str) -> pq.ParquetFile:
    """keys/<split>.parquet of the prepared data set in `path`.

    Raises:
      DataError: the data set has none.
    """
    return pq.ParquetFile(file_of(path, split))


def file_of(path: Path, name: str) -> Path:
    """keys/<name>.parquet of the prepared data set in `path`.

    Raises:
      DataError: the data set has none.
    """
    file = Path(path) / KEYS / f"{name}.parquet"
    if not file.exists():
        raise DataError(
            f"{file}: no such file, as {path} was prepared before raw keys were kept; remove that "
            "directory and prepare it again, which gives the same data and content hash"
        )
    return file
