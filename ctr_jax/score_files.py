"""Scores of a split as a Parquet file that joins the raw log: one row per candidate."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctr_jax.data import keys
from ctr_jax.data.records import PreparedData
from ctr_jax.metrics import ScoreLog, sigmoid

_RECORDS_AT_ONCE = 1 << 14


def write_scores(
    path: str | Path, data: PreparedData, split: str, scores: ScoreLog, **about: object
) -> Path:
    """Writes the scores of a whole split, logged in stored order, whole or not at all.

    Columns: user and request (raw keys; a request's is NULL where the log gives none), request_time
    (seconds), record (number in the split), position (of the candidate in the record), row (of the
    candidate in the raw log, as ctr_jax.data.keys counts), label, probability and logit (float32).

    Args:
      about: what the scores are of; goes into the file's metadata.
    Raises:
      DataError: the data set was prepared without raw keys.
      ValueError: the scores are not those of the split.
    """
    requests, columns = data.split(split), scores.columns()
    users, raw = keys.user_keys(data.path), keys.record_keys(data.path, split)
    schema = pa.schema(
        [
            ("user", users.type), ("request", raw.schema_arrow.field("request").type),
            ("request_time", pa.int32()), ("record", pa.int64()), ("position", pa.int32()),
            ("row", pa.int64()), ("label", pa.uint8()), ("probability", pa.float32()),
            ("logit", pa.float32()),
        ],
        {name: str(value) for name, value in about.items()},
    )  # fmt: skip
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    first = 0
    try:
        with raw, pq.ParquetWriter(temporary, schema) as writer:
            for batch in raw.iter_batches(_RECORDS_AT_ONCE):
                numbers = batch["record"].to_numpy()
                records = requests.records(numbers)
                of = np.repeat(np.arange(len(records)), records["num_candidates"])
                position = np.arange(len(of)) - np.flatnonzero(np.diff(of, prepend=-1))[of]
                here = slice(first, first + len(of))
                first += len(of)
                labels, logits = columns["labels"][here], columns["logits"][here]
                if not np.array_equal(labels, records["label"][of, position]):
                    raise ValueError(f"scores from {here.start} on are not of {requests!r}")
                table = [
                    users.take(records["user"][of]), batch["request"].take(of),
                    records["request_time"][of], numbers[of], position.astype(np.int32),
                    batch["rows"].flatten(), labels, sigmoid(logits).astype(np.float32),
                    logits.astype(np.float32),
                ]  # fmt: skip
                writer.write_table(pa.table(table, schema=schema))
        if first != len(scores):
            raise ValueError(f"{len(scores)} scores, but {requests!r} has {first} candidates")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
