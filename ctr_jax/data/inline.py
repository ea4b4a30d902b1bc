"""Records that carry their own histories: ';'-joined lists beside ages, as in the Ele.me log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ctr_jax.data.keys import RecordKeys
from ctr_jax.data.plan import Plan
from ctr_jax.data.requests import BATCH_ROWS
from ctr_jax.data.vocabulary import Encoder

DAY, HOUR, TIME_ZONE = 86400, 3600, 8 * 3600


def inline_records(
    con: duckdb.DuckDBPyConnection,
    plan: Plan,
    split: str,
    encoders: Mapping[str, Encoder],
    dtype: np.dtype,
    timediff: tuple[float, int],
    nulls: Sequence[str],
    first_request: int,
) -> Iterator[tuple[np.ndarray, RecordKeys]]:
    """Records of one split with their histories, in the order of (request time, user, row).

    `placed` has, beside its usual columns, timediff_list, hours_list and one "list/<name>" per
    behaviour field. A history is sorted by its times (equal ones stay in the list's order, which is
    turned round where it runs from new to old) and holds the latest L that lie strictly before the
    request.

    Args:
      timediff: (seconds per unit, sign): t_behaviour = t_request - sign * unit * timediff. A day
        has no hour of its own and takes it from hours_list.
      nulls: list elements that mean missing.
    """
    fields = plan.group("user", "context", "candidate")
    select = ", ".join(encoders[f.key].sql("i") for f in fields)
    lists = ", ".join(f'i."list/{f.name}"' for f in plan.group("behaviour"))
    query = f"""
        SELECT u."user", i.time, i.label, i.seq, i.timediff_list, i.hours_list, {lists}, {select}
        FROM placed i JOIN user_ids u USING (user_key)
        WHERE i.split = '{split}' ORDER BY i.order_time, u."user", i.seq"""
    for batch in con.cursor().sql(query).to_arrow_reader(BATCH_ROWS // 8):
        if not batch.num_rows:
            continue
        records = np.zeros(batch.num_rows, dtype)
        records["user"] = batch["user"].to_numpy()
        records["request_time"] = batch["time"].to_numpy()
        records["request_id"] = first_request + np.arange(batch.num_rows)
        first_request += batch.num_rows
        records["num_candidates"] = 1
        records["label"][:, 0] = batch["label"].to_numpy()
        for field in fields:
            values = encoders[field.key].encode(batch[field.key])
            if field.group == "candidate":
                records[field.key][:, 0] = values
            else:
                records[field.key] = values
        _fill_histories(records, batch, plan, encoders, timediff, nulls)
        yield records, RecordKeys(None, batch["seq"].to_numpy()[:, None])


def _fill_histories(
    records: np.ndarray,
    batch: pa.RecordBatch,
    plan: Plan,
    encoders: Mapping[str, Encoder],
    timediff: tuple[float, int],
    nulls: Sequence[str],
) -> None:
    difference, owner = flat_numbers(batch["timediff_list"])
    request = records["request_time"][owner].astype(np.int64)
    unit, sign = timediff
    if unit == DAY:
        hours = np.nan_to_num(flat_numbers(batch["hours_list"])[0])  # unknown: the day's start
        day = (request + TIME_ZONE) // DAY - np.round(sign * difference).astype(np.int64)
        time = day * DAY - TIME_ZONE + hours.astype(np.int64) * HOUR
    else:
        time = request - np.round(sign * unit * difference).astype(np.int64)
    inside = owner[1:] == owner[:-1]
    trend = np.bincount(owner[1:][inside], np.sign(np.diff(time))[inside], len(records))
    place = np.arange(len(owner)) * np.where(trend[owner] < 0, -1, 1)
    order = np.lexsort([place, time, owner])
    order = order[(time[order] < request[order]) & (time[order] >= 0)]
    owner, time = owner[order], time[order]
    length = np.bincount(owner, minlength=len(records))
    stop = np.cumsum(length)[owner]
    column = plan.inline_history - (stop - np.arange(len(owner)))  # right-aligned
    kept = column >= 0
    records["behaviour_time"][owner[kept], column[kept]] = time[kept]
    records["num_behaviours"] = np.minimum(length, plan.inline_history)
    records["end"] = records["num_behaviours"]
    for field in plan.group("behaviour"):
        texts = _flat_texts(batch[f"list/{field.name}"])[0]
        texts = pc.if_else(pc.is_in(texts, pa.array(nulls)), None, texts)
        found = encoders[field.key].encode(texts)[order]
        records[field.key][owner[kept], column[kept]] = found[kept]


def _flat_texts(column: Any) -> tuple[pa.StringArray, np.ndarray]:
    """Elements of a column of ';'-joined lists, and the row of each; NULL has none."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    lists = pc.split_pattern(column, ";")
    owner = pc.list_parent_indices(lists).to_numpy().astype(np.int64)
    return pc.list_flatten(lists), owner


def flat_numbers(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """The same as float64 numbers, NaN where an element is no number."""
    texts, owner = _flat_texts(column)
    texts = np.asarray(texts.to_pylist(), object)
    try:
        return texts.astype(np.float64), owner
    except ValueError:
        return np.array([_number(text) for text in texts]), owner


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
