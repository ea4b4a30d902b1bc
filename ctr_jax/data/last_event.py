"""Requests from a log of positive events only: each user's last one, and a drawn negative.

As the preprocessing of DIN, DIEN and SIM for Amazon and Taobao: the target is a user's last event;
beside it stands one item that it is not. Users are split into train, valid and test by a hash of
their id, and histories are what lies strictly before the target's time.

Options, for every builder on top of this:
  negatives: "catalogue" (default): every item of the log is as likely. "events": an item is drawn
    as often as it occurs, which is what DIEN's and SIM's code does and leaves popularity no edge.
  seed: of negatives and candidate order.
  test_users, valid_users: shares of users, .1 each.
  min_history: users with fewer events before their target are dropped and counted (default 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import duckdb

from ctr_jax.data.errors import DataError
from ctr_jax.data.options import with_defaults
from ctr_jax.data.plan import Field, Plan

DEFAULTS: dict[str, Any] = {
    "name": "",
    "max_candidates": 2,
    "min_count": 2,
    "on_bad_row": "raise",
    "negatives": "catalogue",
    "seed": 0,
    "test_users": 0.1,
    "valid_users": 0.1,
    "min_history": 1,
}
POOLS = {
    "catalogue": "SELECT item, row_number() OVER (ORDER BY item) - 1 AS at FROM catalogue",
    "events": "SELECT item, row_number() OVER (ORDER BY seq) - 1 AS at FROM events",
}
# A drawn item that is the target itself is drawn again; a user is dropped after so many.
DRAWS = 6
COLUMNS = ("item", "category")


def complete(builder: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with their defaults.

    Raises:
      DataError: an option is unknown or has no possible value.
    """
    full = with_defaults(builder, options, DEFAULTS)
    if full["negatives"] not in POOLS:
        raise DataError(f"data.negatives is {full['negatives']!r}; use one of {sorted(POOLS)}")
    test, valid = full["test_users"], full["valid_users"]
    if not (test > 0 and valid > 0 and test + valid < 1):
        raise DataError(
            f"data.test_users is {test} and data.valid_users {valid}; use shares of users above 0 "
            "that leave some for training"
        )
    if full["max_candidates"] not in (1, 2):
        raise DataError(f"data.max_candidates is {full['max_candidates']}; a request has 2")
    return full


def plan(options: Mapping[str, Any]) -> Plan:
    """Item and category of candidates and behaviours. No user id: every test user is a new one."""
    return Plan(
        fields=tuple(Field(g, name) for g in ("behaviour", "candidate") for name in COLUMNS),
        max_candidates=options["max_candidates"],
        request="time",
        fit_behaviours=f"{user_range(options)} = 'train'",
        min_count=options["min_count"],
    )


def create_views(
    con: duckdb.DuckDBPyConnection, options: Mapping[str, Any], report: dict[str, Any]
) -> None:
    """The views of plan.py, from two others.

    events: user_key, item, order_time (seconds), seq (file order): what enters histories.
    catalogue: item (unique), category.
    """
    n_draws = f"range({DRAWS})"
    con.execute(
        """
        CREATE OR REPLACE TABLE targets AS
        WITH last AS (
            SELECT user_key, max(struct_pack(t := order_time, s := seq)) AS last
            FROM events GROUP BY user_key)
        SELECT l.user_key, l.last.t AS order_time, l.last.s AS seq,
               max(e.item) FILTER (e.seq = l.last.s) AS item,
               count(*) FILTER (e.order_time < l.last.t) AS before
        FROM last l JOIN events e USING (user_key) GROUP BY ALL"""
    )
    con.execute(f"CREATE OR REPLACE TABLE pool AS {POOLS[options['negatives']]}")
    size = con.execute("SELECT count(*) FROM pool").fetchone()[0]
    con.execute(
        f"""
        CREATE OR REPLACE TABLE negatives AS
        SELECT d.user_key, arg_min(p.item, d.k) AS item
        FROM (
            SELECT user_key, item, unnest({n_draws}) AS k FROM targets
            WHERE before >= {int(options["min_history"])}) d
        JOIN pool p ON p.at = {_hash(options, "d.user_key", "d.k")} % {max(size, 1)}
        WHERE p.item <> d.item GROUP BY d.user_key"""
    )
    few, none = con.execute(
        f"""
        SELECT count(*) FILTER (before < {int(options["min_history"])}),
               count(*) FILTER (before >= {int(options["min_history"])} AND n.user_key IS NULL)
        FROM targets t LEFT JOIN negatives n USING (user_key)"""
    ).fetchone()
    report["dropped"][f"users with fewer than {options['min_history']} earlier events"] = few
    report["dropped"]["users for whom no negative was found"] = none
    # Which of the two comes first is drawn too: a candidate's place must not tell its label.
    coin = f"CAST({_hash(options, 'user_key', 'order')} % 2 AS BIGINT)"
    rows = " UNION ALL ".join(
        f"SELECT t.user_key, t.order_time, 2 * t.seq + {place} AS seq, {label} AS label, "
        f"{item} AS item FROM (SELECT *, {coin} AS coin FROM targets) t "
        "JOIN negatives n USING (user_key)"
        for label, place, item in ((1, "t.coin", "t.item"), (0, "1 - t.coin", "n.item"))
    )
    con.execute(
        f"""
        CREATE OR REPLACE VIEW impressions AS
        SELECT r.user_key, r.order_time, CAST(r.order_time AS INTEGER) AS time, r.seq,
               {user_range(options, "r.user_key")} AS "range",
               CAST(r.label AS UTINYINT) AS label, r.item AS "candidate/item",
               c.category AS "candidate/category"
        FROM ({rows}) r LEFT JOIN catalogue c USING (item)"""
    )
    con.execute(
        """
        CREATE OR REPLACE VIEW behaviours AS
        SELECT e.user_key, e.order_time, CAST(e.order_time AS INTEGER) AS time, e.seq,
               TRUE AS keep, e.item AS "behaviour/item", c.category AS "behaviour/category"
        FROM events e LEFT JOIN catalogue c USING (item)"""
    )
    con.execute("CREATE OR REPLACE VIEW users AS SELECT user_key FROM targets")


def _hash(options: Mapping[str, Any], user: str, what: str) -> str:
    """SQL of a number fixed by the user, the seed and what it is for."""
    what = what if what.startswith("d.") else f"'{what}'"
    return f"md5_number_lower(concat({user}, ':', {int(options['seed'])}, ':', {what}))"


def user_range(options: Mapping[str, Any], user: str = "user_key") -> str:
    """SQL of the range that a user belongs to, fixed by his id alone."""
    share = f"(md5_number_lower(CAST({user} AS VARCHAR)) % 1000000) / 1000000.0"
    test, valid = options["test_users"], options["test_users"] + options["valid_users"]
    return (
        f"CASE WHEN {share} < {test} THEN 'test' WHEN {share} < {valid} THEN 'valid' "
        "ELSE 'train' END"
    )
