"""Scoring a file of requests with a trained model: the same rows, and a column `probability`.

    python -m examples.score_file --config=examples/own_log.py --requests=FILE --out=FILE \
        --user=user_id --time=timestamp [--workdir=DIR]

--requests is Parquet, or CSV with a header: a row per candidate, with the raw key of the user, the
time of the request in the log's unit (data.time_unit) or as a date-time, and a raw column for each
candidate, context and user column of the data set, of its name ("item", or "candidate/item" where
groups share a name). Other columns, such as a request's key, are handed through. Rows of one
request that stand together share the reading of its history. A CSV's cells are texts as they stand
wherever the log's values are, and only an empty one is missing; the share of values that no
vocabulary knows is printed by column: it tells "4" where the log has "4.0".

Histories are those of the prepared data set: what the user did strictly before the request's time
(a log with ties = "order" was trained on what its file had before). An unknown user has none. For
behaviours that are newer than the data set, read them from a live vault as examples/serve_laser.py
does.
"""

import os
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
from ctr_jax.features import OOV
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
    histories = serving.history_store(data)
    raw, users = RawValues(data), keys.user_keys(data.path)
    wanted = [f"{g}/{c.name}" for g in ("user", "context", "candidate") for c in data.spec.group(g)]
    source = opened(requests, {**{k: raw.type(k) for k in wanted}, user: users.type}, time)
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
    write, how = pq.ParquetWriter, {}
    if Path(out).suffix == ".csv":
        write, how = (
            pa.csv.CSVWriter,
            {"write_options": pa.csv.WriteOptions(quoting_style="needed")},
        )
    temporary = Path(out).with_name(f".{Path(out).name}.{os.getpid()}.tmp")
    count, unknown = 0, dict.fromkeys([user, *wanted], 0)
    try:
        with write(temporary, schema, **how) as writer:
            for rows in source.to_batches(batch_size=ROWS_AT_ONCE):
                if not rows.num_rows:
                    continue
                columns = raw.encode({k: values_of(rows[name]) for k, name in column_of.items()})
                users_of = rows_of_users(rows[user], users)
                times = seconds(rows[time], config.data)
                unknown[user] += (users_of < 0).sum()
                for key, values in columns.items():
                    unknown[key] += (values == OOV).sum() if values.dtype == np.int32 else 0
                with jax.set_mesh(experiment.mesh):
                    logits = scored(
                        config, data.spec, histories, score, weights, columns, users_of, times
                    )
                probability = pa.array(sigmoid(logits).astype(np.float32))
                writer.write_batch(
                    pa.RecordBatch.from_arrays([*rows.columns, probability], schema=schema)
                )
                count += rows.num_rows
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    shares = [f"{key} {number / count:.1%}" for key, number in unknown.items() if number]
    print(f"unknown values: {', '.join(shares) or 'none'}")
    return count


def opened(path, types, time: str) -> pyarrow.dataset.Dataset:
    """The file's rows in batches; a CSV's columns are of `types` or texts, but for the time's."""
    if Path(path).suffix != ".csv":
        return pa.dataset.dataset(path, format="parquet")
    parse = pa.csv.ParseOptions(newlines_in_values=True)

    def read(**how):
        convert = pa.csv.ConvertOptions(null_values=[""], strings_can_be_null=True, **how)
        csv = pa.dataset.CsvFileFormat(parse_options=parse, convert_options=convert)
        return pa.dataset.dataset(path, format=csv)

    # What the reader would take for numbers in columns that are handed through would come out as
    # others: 007 as 7.
    known = {key.partition("/")[2]: kind for key, kind in types.items()} | types
    names = [name for name in read().schema.names if name != time]
    return read(column_types={name: known.get(name, pa.string()) for name in names})


def values_of(column: pa.Array) -> np.ndarray:
    """Raw values as RawValues.encode takes them: NULL is None, and no integer becomes a float."""
    if pa.types.is_primitive(column.type) and not column.null_count:
        return column.to_numpy(zero_copy_only=False)
    return np.array([*column.to_pylist(), None], object)[:-1]  # one-dimensional, of lists too


def rows_of_users(column: pa.Array, users: pa.ChunkedArray) -> np.ndarray:
    """[N] rows of users in the history store; -1 = unknown."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if is_text(column.type) != is_text(users.type):
        raise DataError(f"user keys are {column.type}; those of the log are {users.type}")
    found = pc.index_in(column.cast(users.type), value_set=users)
    return found.fill_null(-1).to_numpy().astype(np.int64)


def is_text(kind: pa.DataType) -> bool:
    texts = pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view
    return any(is_one(kind) for is_one in texts)


def seconds(column: pa.Array, options) -> np.ndarray:
    """[N] int32 seconds as preparation stores them."""
    if column.null_count:
        raise DataError("a time is missing")
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        micros = column.cast(pa.timestamp("us"), safe=False)  # of nanoseconds the last digits go
        whole = micros.cast(pa.int64()).to_numpy() // 1_000_000
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


def scored(config, spec, histories, score, weights, columns, users, times) -> np.ndarray:
    """[N] logits of rows; `columns` are {"group/column": [N]}, encoded."""
    b, c, n = config.eval_batch_size, spec.max_candidates, len(users)
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
        rows = np.maximum(users[heads], 0)
        history = histories.last_n(rows, config.history_length, before=before)
        batch = serving.request_batch(
            spec,
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
    with command_line.one_line(pa.ArrowException):
        count = score_file(config, workdir, REQUESTS.value, OUT.value, USER.value, TIME.value)
    print(f"{count:,} rows scored: {OUT.value}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["requests", "out"])
    command_line.run(main)
