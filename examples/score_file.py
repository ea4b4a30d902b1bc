"""Scoring a file of requests with a trained model: the same rows, and a column `probability`.

    python -m examples.score_file --config=examples/own_log.py --requests=FILE --out=FILE \
        --user=user_id --time=timestamp [--workdir=DIR]

--requests is Parquet, or CSV with a header: a row per candidate, with the raw key of the user, the
time of the request in the log's unit (data.time_unit) or as a date-time, and a raw column for each
candidate, context and user column of the data set, of its name ("item", or "candidate/item" where
groups share a name). Other columns, such as a request's key, are handed through. Rows of one
request that stand together share the reading of its history.

Histories are those of the prepared data set: what the user did strictly before the request's time
(a log with ties = "order" was trained on what its file had before). An unknown user has none. For
behaviours that are newer than the data set, read them from a live vault as examples/serve_laser.py
does.
"""

import os
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset
import pyarrow.parquet as pq
from absl import flags
from ml_collections import config_flags

from ctr_jax import command_line, serving, steps
from ctr_jax.data import keys, open_data
from ctr_jax.data.errors import DataError
from ctr_jax.data.event_times import UNITS
from ctr_jax.metrics import sigmoid
from ctr_jax.raw_values import RawValues
from ctr_jax.writers import quiet_checkpoint_logs

CONFIG = config_flags.DEFINE_config_file("config", None, "What was trained.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Of the training run (runs/<config name>).")
REQUESTS = flags.DEFINE_string("requests", None, "The file to score.")
OUT = flags.DEFINE_string("out", None, "The file to write; CSV if it is called so.")
USER = flags.DEFINE_string("user", "user", "Its column of raw user keys.")
TIME = flags.DEFINE_string("time", "time", "Its column of times.")
ROWS_AT_ONCE = 1 << 16


def score_file(config, workdir, requests, out, user: str, time: str) -> int:
    """Scores the rows of `requests` into `out`; returns their number.

    Raises:
      DataError: the file lacks a column, or a value is of another type than in the raw log.
    """
    data = open_data(config)
    if data.histories is None:
        raise DataError(f"{data.path}: histories lie in its records, so none is found by user")
    raw, users = RawValues(data), keys.user_keys(data.path)
    wanted = [f"{g}/{c.name}" for g in ("user", "context", "candidate") for c in data.spec.group(g)]
    source = opened(requests, {k: raw.type(k) for k in wanted}, {user: users.type})
    have = source.schema.names
    column_of = {key: key if key in have else key.partition("/")[2] for key in wanted}
    if missing := sorted({user, time, *column_of.values()} - set(have)):
        raise DataError(f"{requests}: no columns {missing}; it has {have}")
    if "probability" in have:
        raise DataError(f"{requests} has a column 'probability' already; rename it")

    experiment, weights, step = serving.restore(config, workdir)
    score = steps.score_step(experiment)
    print(f"step {step} of {workdir}", flush=True)
    schema = source.schema.append(pa.field("probability", pa.float32()))
    write = pa.csv.CSVWriter if Path(out).suffix == ".csv" else pq.ParquetWriter
    temporary = Path(out).with_name(f".{Path(out).name}.{os.getpid()}.tmp")
    count = 0
    try:
        with write(temporary, schema) as writer:
            for rows in source.to_batches(batch_size=ROWS_AT_ONCE):
                if not rows.num_rows:
                    continue
                columns = raw.encode({k: values_of(rows[name]) for k, name in column_of.items()})
                users_of = rows_of_users(rows[user], users)
                times = seconds(rows[time], config.data)
                with jax.set_mesh(experiment.mesh):
                    logits = scored(config, data, score, weights, columns, users_of, times)
                probability = pa.array(sigmoid(logits).astype(np.float32))
                writer.write_batch(
                    pa.RecordBatch.from_arrays([*rows.columns, probability], schema=schema)
                )
                count += rows.num_rows
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def opened(path, types, user_type) -> pyarrow.dataset.Dataset:
    """The file's rows in batches; numbers of a CSV are read as what the raw log's are."""
    if Path(path).suffix != ".csv":
        return pa.dataset.dataset(path, format="parquet")
    # Texts are left to the reader: what it takes for numbers is refused, not silently unknown.
    known = {k: t for k, t in types.items() if not pa.types.is_string(t)}
    known |= {key.partition("/")[2]: kind for key, kind in known.items()} | user_type
    convert = pa.csv.ConvertOptions(column_types=known, strings_can_be_null=True)
    return pa.dataset.dataset(path, format=pa.dataset.CsvFileFormat(convert_options=convert))


def values_of(column: pa.Array) -> np.ndarray:
    """Raw values as RawValues.encode takes them: NULL is None, and no integer becomes a float."""
    if pa.types.is_primitive(column.type) and not column.null_count:
        return column.to_numpy(zero_copy_only=False)
    return np.array([*column.to_pylist(), None], object)[:-1]  # one-dimensional, of lists too


def rows_of_users(column: pa.Array, users: pa.ChunkedArray) -> np.ndarray:
    """[N] rows of users in the history store; -1 = unknown."""
    if is_text(column.type) != is_text(users.type):
        raise DataError(f"user keys are {column.type}; those of the log are {users.type}")
    found = pc.index_in(column.cast(users.type), value_set=users)
    return found.fill_null(-1).to_numpy().astype(np.int64)


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def seconds(column: pa.Array, options) -> np.ndarray:
    """[N] int32 seconds as preparation stores them."""
    if column.null_count:
        raise DataError("a time is missing")
    if pa.types.is_timestamp(column.type):
        micros = column.cast(pa.timestamp("us", column.type.tz)).cast(pa.int64()).to_numpy()
        whole = micros // 1_000_000
    elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        whole = np.floor_divide(column.to_numpy(), UNITS[options.get("time_unit", "s")])
    else:
        raise DataError(f"times are {column.type}; use numbers or date-times")
    if not ((whole >= 0) & (whole < 2**31)).all():
        raise DataError(
            f"times reach from {whole.min()} to {whole.max()} seconds; see data.time_unit"
        )
    whole = whole.astype(np.int32)
    floor = int(options.get("time_floor", 0))
    return whole // floor * floor if floor else whole


def scored(config, data, score, weights, columns, users, times) -> np.ndarray:
    """[N] logits of rows; `columns` are {"group/column": [N]}, encoded."""
    b, c, n = config.eval_batch_size, data.spec.max_candidates, len(users)
    # A record holds up to C neighbours that share all but the candidate.
    new = np.arange(n) == 0
    for key, values in {"user": users, "time": times, **columns}.items():
        if not key.startswith("candidate/"):
            new[1:] |= values[1:] != values[:-1]
    start = np.flatnonzero(new)
    position = np.arange(n) - start[np.cumsum(new) - 1]
    slot = position % c
    head = np.flatnonzero(slot == 0)
    record = np.cumsum(slot == 0) - 1

    def group(name: str) -> dict[str, np.ndarray]:
        return {k.partition("/")[2]: v for k, v in columns.items() if k.startswith(f"{name}/")}

    logits = np.empty(n, np.float32)
    for first in range(0, len(head), b):
        heads = head[first : first + b]
        here = slice(heads[0], head[first + b] if first + b < len(head) else n)
        place = record[here] - first, slot[here]
        heads = np.pad(heads, (0, b - len(heads)), mode="edge")  # one shape, compiled once
        candidate = {k: np.zeros((b, c), v.dtype) for k, v in group("candidate").items()}
        for name, values in group("candidate").items():
            candidate[name][place] = values[here]
        mask = np.zeros((b, c), bool)
        mask[place] = True
        # Nothing lies before second 0, and row 0 is somebody's.
        before = np.where(users[heads] < 0, 0, times[heads])
        history = data.histories.last_n(
            np.maximum(users[heads], 0), config.history_length, before=before
        )
        batch = serving.request_batch(
            data.spec,
            history,
            time=times[heads],
            user={k: v[heads] for k, v in group("user").items()},
            context={k: v[heads] for k, v in group("context").items()},
            candidate=candidate,
        ).replace(candidate_mask=mask)
        logits[here] = np.asarray(score(weights, batch))[place]
    return logits


def main(argv):
    del argv
    quiet_checkpoint_logs()
    config = CONFIG.value
    workdir = Path(WORKDIR.value or Path("runs") / config.name)
    try:
        count = score_file(config, workdir, REQUESTS.value, OUT.value, USER.value, TIME.value)
    except (*command_line.mendable(), FileNotFoundError, pa.ArrowInvalid) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"{count:,} rows scored: {OUT.value}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["requests", "out"])
    command_line.run(main)
