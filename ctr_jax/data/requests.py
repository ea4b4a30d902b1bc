"""Impressions -> requests -> records: grouping, splitting over rows, and the histories' ends.

A record holds up to C candidates of one request that share their context values. A request with
more candidates, or with more than one context, fills several records of one request_id, and all of
them see the same history.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import duckdb
import numpy as np

import seqvault
from ctr_jax.data.errors import DataError
from ctr_jax.data.keys import NO_ROW, RecordKeys
from ctr_jax.data.plan import Plan
from ctr_jax.data.sql import from_parquet
from ctr_jax.data.vocabulary import Encoder

SPLITS = ("train", "valid", "test")
BATCH_ROWS = 1 << 16
# What makes rows one request, in the order in which requests are numbered within a split.
_GROUP = {
    "event": ("request_order", "user_key", "seq"),
    "time": ("request_order", "user_key"),
    "key": ("request_order", "user_key", "request_key"),
}


# The impressions by moment, and those of label 1: what the bounds of the splits are found from.
# Adds up over users.
MOMENTS = """
    SELECT "range", request_order, count(*) AS n, CAST(sum(label) AS BIGINT) AS clicks
    FROM ranged GROUP BY ALL"""


def split_impressions(con: duckdb.DuckDBPyConnection, plan: Plan) -> dict[str, float | None]:
    """Finds the bounds of the splits and creates what `place_impressions` does; returns them."""
    range_impressions(con, plan)
    con.execute(f"CREATE OR REPLACE TABLE moments AS {MOMENTS}")
    bounds = find_bounds(con, plan)
    place_impressions(con, plan, bounds)
    return bounds


def range_impressions(con: duckdb.DuckDBPyConnection, plan: Plan) -> None:
    """Creates the view `ranged`: impressions of a range, with request_order and request_time."""
    if plan.request == "key":
        con.execute(
            """
            CREATE OR REPLACE TABLE request_times AS
            SELECT "range", user_key, request_key, min(order_time) AS request_order,
                   min(time) AS request_time
            FROM impressions WHERE "range" IS NOT NULL GROUP BY ALL"""
        )
        source = 'impressions i JOIN request_times r USING ("range", user_key, request_key)'
        times = "r.request_order, r.request_time"
    else:
        source = "impressions i"
        times = "i.order_time AS request_order, i.time AS request_time"
    con.execute(
        f"""
        CREATE OR REPLACE VIEW ranged AS SELECT i.*, {times} FROM {source}
        WHERE i."range" IS NOT NULL"""
    )


def find_bounds(con: duckdb.DuckDBPyConnection, plan: Plan) -> dict[str, float | None]:
    """The bounds of the splits, from the table `moments` (MOMENTS).

    Returns:
      {"valid_from": first order_time of the valid tail (None if the log names its own valid
      range), "behaviours_before": the bound of behaviours_fit (None if the plan has its own)}.
    Raises:
      DataError: the impressions of train have one label.
    """
    named = con.execute("SELECT count(*) FROM moments WHERE \"range\" = 'valid'").fetchone()[0]
    valid_from = None if plan.own_valid or named else _tail_start(con, plan.valid_fraction)
    _check_labels(con, valid_from)
    bound = None
    if not plan.fit_behaviours:
        held_out = "\"range\" IN ('valid', 'test')"
        if valid_from is not None:
            held_out += f" OR request_order >= {valid_from!r}"
        bound = con.execute(f"SELECT min(request_order) FROM moments WHERE {held_out}").fetchone()[
            0
        ]
    return {"valid_from": valid_from, "behaviours_before": bound}


def place_impressions(
    con: duckdb.DuckDBPyConnection, plan: Plan, bounds: Mapping[str, float | None]
) -> None:
    """Creates the view `placed`: `ranged` with split.

    Also creates the tables user_ids (user_key, "user"), user_training (user_key, n: its training
    impressions) and the view behaviours_fit (behaviours that vocabularies may count).
    """
    valid_from, bound = bounds["valid_from"], bounds["behaviours_before"]
    split = '"range"'
    if valid_from is not None:
        split = f"CASE WHEN \"range\" = 'train' AND request_order >= {valid_from!r} THEN 'valid' "
        split += 'ELSE "range" END'
    con.execute(f"CREATE OR REPLACE VIEW placed AS SELECT *, {split} AS split FROM ranged")
    con.execute(
        """
        CREATE OR REPLACE TABLE user_ids AS
        SELECT user_key, CAST(row_number() OVER (ORDER BY user_key) - 1 AS INTEGER) AS "user"
        FROM (SELECT DISTINCT user_key FROM placed)"""
    )
    con.execute(
        """
        CREATE OR REPLACE TABLE user_training AS
        SELECT user_key, count(*) AS n FROM placed WHERE split = 'train' GROUP BY user_key"""
    )
    predicate = plan.fit_behaviours
    if not predicate:
        predicate = "TRUE" if bound is None else f"order_time < {bound!r}"
    con.execute(
        f"""
        CREATE OR REPLACE VIEW behaviours_fit AS
        SELECT * FROM behaviours SEMI JOIN user_ids USING (user_key) WHERE keep AND ({predicate})"""
    )


def _tail_start(con: duckdb.DuckDBPyConnection, fraction: float) -> float | None:
    """The request_order from which at most `fraction` of the training impressions lie.

    Impressions of one moment stay together, so the tail may be a little short of the fraction, or
    be a single moment that is longer. None when there are no training impressions.
    """
    total = con.execute(
        "SELECT coalesce(sum(n), 0) FROM moments WHERE \"range\" = 'train'"
    ).fetchone()[0]
    moments = con.cursor().sql(
        """
        SELECT request_order, n FROM moments WHERE "range" = 'train' ORDER BY 1 DESC"""
    )
    start, tail = None, 0
    for batch in moments.to_arrow_reader(BATCH_ROWS):
        if not batch.num_rows:
            continue
        counts = tail + np.cumsum(batch["n"].to_numpy())
        inside = int(np.searchsorted(counts, fraction * total, side="right"))
        if inside or start is None:
            start = batch["request_order"][max(inside - 1, 0)].as_py()
        if inside < batch.num_rows:
            break
        tail = int(counts[-1])
    return start


def _check_labels(con: duckdb.DuckDBPyConnection, valid_from: float | None) -> None:
    """Raises DataError if all impressions of train have one label."""
    train = "\"range\" = 'train'"
    if valid_from is not None:
        train += f" AND request_order < {valid_from!r}"
    number, clicks = con.execute(
        f"SELECT sum(n), sum(clicks) FROM moments WHERE {train}"
    ).fetchone()
    if number and clicks in (0, number):
        raise DataError(
            f"split 'train': the label of all {number:,} impressions is {int(clicks > 0)}: nothing "
            "to learn; check the label, and which rows the split options take; where clicks are "
            "rows of their own, docs/preparation.md tells how to label impressions"
        )


def known_behaviours(
    con: duckdb.DuckDBPyConnection,
) -> tuple[int, int | None, int | None]:
    """Number, first time and last time of the behaviours of the log that enter histories."""
    query = "SELECT count(*), min(time), max(time) FROM behaviours WHERE keep"
    return con.execute(query).fetchone()


def group_sizes(
    con: duckdb.DuckDBPyConnection, plan: Plan, by_context: bool = False
) -> dict[str, dict[int, int]]:
    """{split: {candidates in a request (of one context): number of such}}."""
    sizes: dict[str, dict[int, int]] = {split: {} for split in SPLITS}
    if plan.request == "event":
        query = "SELECT split, 1, count(*) FROM placed GROUP BY split"
    else:
        contexts = _contexts(plan, "placed") if by_context else []
        keys = ", ".join([*_GROUP[plan.request], *contexts])
        query = f"""
            SELECT split, n, count(*) FROM (
                SELECT split, count(*) AS n FROM placed GROUP BY split, {keys})
            GROUP BY split, n ORDER BY split, n"""
    for split, size, count in con.execute(query).fetchall():
        sizes[split][size] = count
    return sizes


def _contexts(plan: Plan, alias: str) -> list[str]:
    """SQL of the context values as texts; '' = missing."""
    return [f"coalesce(CAST({alias}.\"{f.key}\" AS VARCHAR), '')" for f in plan.group("context")]


def several_contexts(con: duckdb.DuckDBPyConnection, plan: Plan) -> dict[str, int]:
    """{context column: requests in which it has several values}, for those that do; "any" of them.

    Each context of a request fills records of its own.
    """
    fields = plan.group("context")
    differ = [f"min({c}) <> max({c})" for c in _contexts(plan, "placed")]
    flags = ", ".join(f"{sql} AS d{n}" for n, sql in enumerate([" OR ".join(differ), *differ]))
    counts = ", ".join(f"count_if(d{n})" for n in range(1 + len(fields)))
    numbers = con.execute(
        f"""
        SELECT {counts} FROM (
            SELECT {flags} FROM placed GROUP BY split, {", ".join(_GROUP[plan.request])})"""
    ).fetchone()
    names = ["any", *(f.key for f in fields)]
    return {name: number for name, number in zip(names, numbers, strict=True) if number}


def num_records(sizes: dict[int, int], max_candidates: int) -> int:
    """Records of groups of these sizes (by context), at most C candidates in each."""
    return sum(-(-size // max_candidates) * count for size, count in sizes.items())


def encode_users(
    con: duckdb.DuckDBPyConnection, encoders: Sequence[Encoder]
) -> dict[str, np.ndarray]:
    """{"user/<name>": [U] ids or values} of all users, in the order of their rows."""
    select = "".join(f", {e.sql('x')}" for e in encoders)
    rows = con.cursor().sql(
        f"""SELECT u."user" {select} FROM user_ids u LEFT JOIN users x USING (user_key)
        ORDER BY u."user\""""
    )
    parts: dict[str, list[np.ndarray]] = {e.field.key: [] for e in encoders}
    for batch in rows.to_arrow_reader(BATCH_ROWS):
        for encoder in encoders:
            parts[encoder.field.key].append(encoder.encode(batch[encoder.field.key]))
    return {key: np.concatenate(part) for key, part in parts.items()}


def split_records(
    con: duckdb.DuckDBPyConnection,
    plan: Plan,
    split: str,
    encoders: Sequence[Encoder],
    users: Mapping[str, np.ndarray],
    dtype: np.dtype,
    histories: Path,
    ends: Path,
    first_request: int,
) -> Iterator[tuple[np.ndarray, np.ndarray, RecordKeys]]:
    """Records of one split in the order of (request time, user, request), in structured arrays.

    Candidates are in file order. Requests are numbered from `first_request`.

    Yields:
      request_order [N], the records [N] and their raw keys.
    """
    select = "".join(f", {e.sql('i')}" for e in encoders)
    select += ", i.weight" if plan.weighted else ""
    end, join = "", ""
    if plan.ties == "order":
        end, join = ', e."end"', f"JOIN {from_parquet(ends)} e ON e.seq = i.seq"
    keys = ['u."user"' if k == "user_key" else f"i.{k}" for k in _GROUP[plan.request]]
    groups = keys + (_contexts(plan, "i") if plan.request != "event" else [])
    query = f"""
        SELECT u."user", i.request_time, i.label, i.seq {select} {end},
            {", ".join(f"{k} AS g{n}" for n, k in enumerate(groups))}
        FROM placed i JOIN user_ids u USING (user_key) {join}
        WHERE i.split = '{split}' ORDER BY {", ".join(groups)}, i.seq"""
    carry: dict[str, np.ndarray] = {}
    request = first_request
    for batch in con.cursor().sql(query).to_arrow_reader(BATCH_ROWS):
        if not batch.num_rows:
            continue
        known = {e.field.key: e.encode(batch[e.field.key]) for e in encoders}
        rows = {
            n: known[n] if n in known else batch[n].to_numpy(zero_copy_only=False)
            for n in batch.schema.names
        }
        if carry:
            rows = {n: np.concatenate([carry[n], c]) for n, c in rows.items()}
        new_request = _changes([rows[f"g{n}"] for n in range(len(keys))])
        last = np.flatnonzero(new_request)[-1]  # the last request may go on in the next batch
        carry = {n: c[last:] for n, c in rows.items()}
        if last:
            done = {n: c[:last] for n, c in rows.items()}
            numbers = request + np.cumsum(new_request[:last]) - 1
            records, raw_keys = _fill(done, numbers, len(groups), plan, users, dtype, histories)
            yield _order(done, numbers, records), records, raw_keys
            request = int(numbers[-1]) + 1
    if carry:
        numbers = np.full(len(carry["user"]), request)
        records, raw_keys = _fill(carry, numbers, len(groups), plan, users, dtype, histories)
        yield _order(carry, numbers, records), records, raw_keys


def _order(rows: dict[str, np.ndarray], numbers: np.ndarray, records: np.ndarray) -> np.ndarray:
    """The request_order of records, by which every grouping of _GROUP begins: [N]."""
    return rows["g0"][np.searchsorted(numbers, records["request_id"])]


def _changes(keys: list[np.ndarray]) -> np.ndarray:
    """[N] bool: whether a row differs from the one before in any key; the first does."""
    change = np.zeros(len(keys[0]), bool)
    change[0] = True
    for key in keys:
        change[1:] |= key[1:] != key[:-1]
    return change


def _fill(
    rows: dict[str, np.ndarray],
    numbers: np.ndarray,
    num_groups: int,
    plan: Plan,
    users: Mapping[str, np.ndarray],
    dtype: np.dtype,
    histories: Path,
) -> tuple[np.ndarray, RecordKeys]:
    """Structured records of whole requests; `numbers` [N] are the rows' request ids."""
    c, n = plan.max_candidates, len(numbers)
    start = np.flatnonzero(_changes([rows[f"g{g}"] for g in range(num_groups)]))
    sizes = np.diff(np.append(start, n))
    group = np.repeat(np.arange(len(start)), sizes)
    position = np.arange(n) - start[group]
    pieces = -(-sizes // c)  # records per group
    record = (np.cumsum(pieces) - pieces)[group] + position // c
    slot = position % c
    head = np.flatnonzero(slot == 0)  # the first row of each record

    records = np.zeros(len(head), dtype)
    records["user"] = rows["user"][head]
    records["request_id"] = numbers[head]
    records["request_time"] = rows["request_time"][head]
    if plan.ties == "order":
        records["end"] = rows["end"][head]
    else:  # opened here and dropped, so that mapped pages do not pile up over a long run
        snapshot = seqvault.Snapshot(histories)
        records["end"] = snapshot.resolve(records["user"], records["request_time"])
    for key, values in users.items():
        records[key] = values[records["user"]]
    for field in plan.group("context"):
        records[field.key] = rows[field.key][head]
    for field in plan.group("candidate"):
        records[field.key][record, slot] = rows[field.key]
    records["label"][record, slot] = rows["label"]
    if plan.weighted:
        records["weight"][record, slot] = rows["weight"]
    records["num_candidates"] = np.bincount(record, minlength=len(records))
    raw_rows = np.full((len(head), c), NO_ROW)
    raw_rows[record, slot] = rows["seq"]
    request = rows["g2"][head] if plan.request == "key" else None  # _GROUP["key"][2]
    return records, RecordKeys(request, raw_rows)
