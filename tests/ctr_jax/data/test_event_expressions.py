"""Expressions of the events builder: over other rows, over absent columns, over columns in part."""

from __future__ import annotations

import json
import re

import duckdb
import numpy as np
import pytest

from ctr_jax.data import expressions
from ctr_jax.data.errors import DataError
from ctr_jax.data.events import Events
from ctr_jax.data.prepare import prepare
from ctr_jax.data.records import PreparedData
from tests.ctr_jax.data import raw_logs
from tests.ctr_jax.data.test_events import TEST_FROM, config


def content_hash(options: dict) -> str:
    return PreparedData.open(prepare(options)).spec.content_hash


# Over other rows


def clicks_apart(directory) -> None:
    """Impressions and, as rows of their own, their clicks; `clicked` and `seen` are what SQL over
    the other rows should find."""
    rng = np.random.default_rng(0)
    log = raw_logs.draw(3)
    impressions = [
        {
            **event,
            "kind": "impression",
            "session": 1000 * event["user"] + event["session"],
            "item": 100 * number + event["item"],
            "clicked": int(rng.random() < 0.4),
        }
        for number, event in enumerate(log["events"])
    ]
    clicks = [
        {**event, "kind": "click", "ts": event["ts"] + 1}
        for event in impressions
        if event["clicked"]
    ]
    rows = impressions + clicks
    rng.shuffle(rows)
    for row in rows:
        row["seen"] = sum(other["user"] == row["user"] for other in rows)
    (directory / "raw").mkdir()
    raw_logs.write_rows(directory / "raw" / "events-0.parquet", rows)


SHOWN = {
    "label": "clicked",
    "is_behaviour": "kind = 'click'",
    "train": f"kind = 'impression' AND ts < {TEST_FROM}",
    "test": f"kind = 'impression' AND ts >= {TEST_FROM}",
}
CLICK = "SELECT 1 FROM raw_events c WHERE c.kind = 'click' AND c.session = e.session"


@pytest.mark.parametrize(
    "label",
    [
        "bool_or(kind = 'click') OVER (PARTITION BY session, e.item)",
        "max(CAST(kind = 'click' AS INTEGER)) OVER (PARTITION BY e.session, item)",
        f"EXISTS ({CLICK} AND c.item = e.item)",
    ],
)
def test_impressions_are_labelled_from_click_rows(tmp_path, label):
    clicks_apart(tmp_path)
    options = config(tmp_path, **SHOWN)
    assert content_hash({**options, "label": label}) == content_hash(options)


@pytest.mark.parametrize("option", ["train", "valid", "test", "request"])
def test_what_looks_at_other_rows_may_be_any_condition_or_the_request(tmp_path, option):
    clicks_apart(tmp_path)
    shown = {
        **SHOWN,
        "valid": f"kind = 'impression' AND ts BETWEEN {TEST_FROM - 99} AND {TEST_FROM}",
    }
    shown |= {"request": "seen", "max_candidates": 4}
    before, after = f"{shown[option]} AND seen > 40", f"{shown[option]} AND {{}} > 40"
    if option == "request":
        before, after = "seen", "{}"
    number = "count(*) OVER (PARTITION BY e.user)"
    found = [
        content_hash(config(tmp_path, **{**shown, option: sql}))
        for sql in (before, after.format(number))
    ]
    assert found[0] == found[1]


def test_a_bad_row_is_skipped_where_the_label_looks_at_other_rows(tmp_path):
    clicks_apart(tmp_path)
    options = config(tmp_path, **SHOWN, on_bad_row="skip")
    options["label"] = "CASE WHEN seen = max(seen) OVER () THEN 7 ELSE clicked END"
    report = json.loads((prepare(options) / "report.json").read_text())
    assert report["skipped"]["label not 0 or 1"] > 0


@pytest.mark.parametrize(
    ("label", "refused"),
    [
        ("max(clicked) OVER (PARTITION BY session, e.USER)", False),
        ("max(clicked) OVER (PARTITION BY session)", True),
        ("count(*) OVER () > 3 AND clicked = 1", True),
        ("max(clicked) OVER (PARTITION BY i.user)", True),
        (f"EXISTS ({CLICK})", True),
        (f"EXISTS ({CLICK.replace('raw_events', 'RAW_EVENTS')})", True),
        ("price > (SELECT avg(price) FROM raw_items)", False),
        ("clicked", False),
    ],
)
def test_shards_of_users_refuse_what_looks_at_other_users(tmp_path, label, refused):
    options = config(tmp_path, label=label, user='"user"')
    if refused:
        with pytest.raises(DataError, match=re.escape(f"data.label {label!r} may look at rows")):
            Events.shard_keys(options)
    else:
        assert Events.shard_keys(options)["raw_events"] == '"user"'


# Over nothing else


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("(SELECT size FROM read_text('{}')) > 0", r"it reads read_text\(\)"),
        ("(SELECT count(*) FROM '{}') > 0", "it reads '/.*secret.csv'"),
        ('(WITH "{0}" AS (SELECT 1) SELECT 1) + (SELECT 1 FROM "{0}")', "it reads '/.*secret.csv'"),
        ("(SELECT count(*) FROM duckdb_settings())", r"it reads duckdb_settings\(\)"),
        ("(SELECT count(*) FROM main.users)", "it reads 'main.users'"),
        ("(FROM (SHOW TABLES) SELECT count(*))", "it reads the catalogue"),
        ("1) FROM raw_events e; COPY (SELECT 1) TO '{}'; SELECT (1", 'Parser Error.*near "\\)"'),
        ("rating) + (1", 'Parser Error.*near "\\)"'),
        ("rating) AS a, (1", 'Parser Error.*near "\\)"'),
        ("rating;", "Parser Error"),
        ("", "Parser Error"),
        ("*", "several columns"),
        ("e.*", "several columns"),
        ("?", "parameter"),
        ("unnest([1, 2])", "several rows of one"),
        ("1 + generate_subscripts([1, 2], 1)", "several rows of one"),
        ("random() < .5", r"random\(\) does not give the same"),
        ("epoch(now()) > ts", r"now\(\) does not give the same"),
        ("age(to_timestamp(ts))", r"age\(\) does not give the same"),
        ("(SELECT max(ts) FROM raw_events TABLESAMPLE 10%)", "sample"),
        ("current_date", "no column 'current_date'; events-0.parquet has"),
        ("sum(rating)", "it adds up over rows"),
    ],
)
def test_what_is_no_expression_over_the_log_is_refused(tmp_path, sql, message):
    raw_logs.write(tmp_path / "raw", raw_logs.draw(3), "parquet")
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    sql = sql.format(secret)
    options = config(tmp_path, user_table="users.parquet", item_table="items.parquet")
    options |= {"context": {"c": sql}, "item": "e.item"}
    with pytest.raises(DataError, match=f"data.context.c {re.escape(repr(sql))}: .*{message}"):
        prepare(options)
    assert secret.read_text() == "a\n1\n"


@pytest.mark.parametrize(
    "sql",
    [
        "(SELECT max(x) FROM (SELECT unnest([e.item, 3]) AS x))",
        "(SELECT max(x) FROM unnest([e.item, 3]) t(x))",
        "(WITH r AS (SELECT max(e.item) OVER () AS x) SELECT greatest(x, 3) FROM r)",
        "list_max([greatest(x, 3) for x in [e.item]])",
        "greatest(e.item, 3) /* at least 3 */",
    ],
)
def test_expressions_may_have_lists_and_subqueries_of_their_own(tmp_path, sql):
    raw_logs.write(tmp_path / "raw", raw_logs.draw(3), "parquet")
    found, expected = (
        content_hash(config(tmp_path, context={"c": c})) for c in (sql, "greatest(item, 3)")
    )
    assert found == expected


def test_a_log_without_the_users_column_is_not_of_a_user_called_duckdb(tmp_path):
    log = raw_logs.draw(3)
    for event in log["events"]:
        event["who"] = event.pop("user")
    raw_logs.write(tmp_path / "raw", log, "parquet")
    with pytest.raises(DataError, match="data.user 'user': no column 'user'; events-0.parquet has"):
        prepare(config(tmp_path, user_columns={}))


def test_every_function_of_chance_is_known():
    volatile = "SELECT DISTINCT function_name FROM duckdb_functions() WHERE stability = 'VOLATILE'"
    found = {name for (name,) in duckdb.connect().execute(volatile).fetchall()}
    assert {"random", "uuid"} <= found <= expressions.UNSTABLE | {"error"}


# Absent columns


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user": "usr"}, r"data.user 'usr': no column 'usr'; events-0.parquet has \['user', 'it"),
        ({"time": "tss"}, "data.time 'tss': no column 'tss'.*did you mean 'ts'"),
        ({"label": "ratings >= 4"}, "data.label 'ratings >= 4': no column 'ratings'.*'rating'"),
        ({"request": "e.sesion", "max_candidates": 2}, "data.request 'e.sesion': no column 'ses"),
        ({"item": "itm"}, "data.item 'itm': no column 'itm'"),
        ({"context": {"tab": "tap"}}, "data.context.tab 'tap': no column 'tap'"),
        (
            {"behaviour": {"a": "i.autor"}, "prior": {"behaviour": {}}},
            r"data.behaviour.a 'i.autor': .*; items.parquet has \[",
        ),
        ({"candidate": {"item": "nothing"}}, r"data.candidate.item 'nothing': [^?]*$"),
        ({"users_key": "id"}, r"data.users_key 'id': no column 'id'; users.parquet has"),
        ({"items_key": "video"}, r"data.items_key 'video': no column 'video'; items.parquet has"),
        ({"user_columns": {"age": "agee"}}, "data.user_columns.age 'agee'.*did you mean 'age'"),
        ({"user_table": "", "user_columns": {"age": "agee"}}, "there is no data.user_table"),
        ({"prior": {"user": "u"}}, "data.prior.user 'u': no column 'u'; prior.parquet has"),
        ({"prior": {"behaviour": {"item": "e.item"}}}, "data.prior.behaviour.item 'e.item': Bin"),
        ({"train": "rating +"}, "data.train 'rating \\+': Parser Error: syntax error"),
        ({"test": "item > 3"}, "data.test 'item > 3': Binder Error: Ambiguous reference"),
    ],
)  # fmt: skip
def test_a_column_that_is_not_there_is_named_with_its_option(tmp_path, changes, message):
    raw_logs.write(tmp_path / "raw", raw_logs.draw(3), "parquet")
    prior = {"file": "prior.parquet", "user": "user", "items": "seen", "time": "last"}
    prior["behaviour"] = {"item": "p.item", "rating": "NULL"}
    options = {"item_table": "items.parquet", "user_table": "users.parquet", "item": "e.item"}
    options |= {"behaviour": {"item": "e.item", "rating": "rating"}, "prior": prior, **changes}
    if "prior" in changes:
        options["prior"] = {**prior, **changes["prior"]}
    with pytest.raises(DataError, match=message) as error:
        prepare(config(tmp_path, **options))
    assert "\n" not in str(error.value)


# Columns in part


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_file_may_lack_a_column_that_nothing_refers_to(tmp_path, kind):
    log = raw_logs.draw(3)
    whole = config(tmp_path, events=f"events-*.{kind}", context={"tab": "e.tab"})
    raw_logs.write(tmp_path / "raw", log, kind, parts=2)
    expected = content_hash(whole)
    for event in log["events"][200:]:
        del event["session"]
    raw_logs.write(tmp_path / "raw", log, kind, parts=2)
    assert content_hash(whole) == expected
    for needing in (
        {"context": {"session": "e.session"}},
        {"request": "SESSION", "max_candidates": 9},
        {"label": "(SELECT count(*) FROM raw_events c JOIN raw_events USING (session)) > 3"},
        {"label": "len([COLUMNS(*)]) > 3"},
        {"label": "e IS NOT NULL"},
    ):
        with pytest.raises(DataError, match=rf"events-1.{kind}: no column 'session'; the file has"):
            prepare({**whole, **needing})


def test_a_misfit_is_named_in_a_file_that_lacks_a_column(tmp_path):
    log = raw_logs.draw(3)
    for number, event in enumerate(log["events"]):
        event["item"] = "x3" if number == 250 else event["item"]
        if number >= 200:
            del event["session"]
    raw_logs.write(tmp_path / "raw", log, "csv", parts=2)
    options = config(tmp_path, events="events-*.csv", types={"item": "BIGINT"})
    with pytest.raises(DataError, match="events-1.csv: line 52: value of the wrong type.*'x3'"):
        prepare(options)
    report = json.loads((prepare({**options, "on_bad_row": "skip"}) / "report.json").read_text())
    assert report["rows"] == {"events-0.csv": 200, "events-1.csv": 199}


def test_the_names_that_an_expression_mentions():
    con = duckdb.connect()
    found = expressions.mentioned(con, ['e."A b" + lower(C)', "x[1].y = 'w'"], aliases=("e",))
    assert {"a b", "c", "x", "y"} <= found
    for sql in ("E", "count(e.*)", "COLUMNS('a')", "(SELECT 1 FROM a NATURAL JOIN b)"):
        assert expressions.mentioned(con, ["a", sql], aliases=("e",)) is None
    assert expressions.mentioned(con, ["this is no SQL"], aliases=("e",)) is not None


# Options of another name


@pytest.mark.parametrize(("old", "new"), [("items", "item_table"), ("users", "user_table")])
def test_a_table_under_the_old_name_is_refused(tmp_path, old, new):
    with pytest.raises(DataError, match=f"data.{old} is data.{new}"):
        prepare(config(tmp_path, **{old: "table.parquet"}))


PRIOR = {"file": "prior.parquet", "user": "user", "items": "seen", "time": "last"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior": {"file": "prior.parquet", "user": "user"}}, r"data.prior lacks \['items', 'ti"),
        ({"prior": {**PRIOR, "behaviour": {"itme": "p.item"}}}, r"behaviour names \['itme'\]; the"),
        ({"prior": {**PRIOR, "item": "seen"}}, r"data.prior has no options \['item'\]; it knows"),
        ({"prior": None}, "data.prior is None; use a dict"),
        ({"candidate": "item"}, "data.candidate is 'item'; use a dict"),
        ({"types": []}, r"data.types is \[\]; use a dict"),
        ({"time_floor": -60}, "data.time_floor is -60; use whole seconds, at least 0"),
        ({"time_floor": 0.5}, "data.time_floor is 0.5; use whole seconds, at least 0"),
        ({"time_floor": "hour"}, "data.time_floor is 'hour'; use whole seconds, at least 0"),
    ],
)
def test_an_option_that_would_be_left_unread_is_refused(tmp_path, changes, message):
    raw_logs.write(tmp_path / "raw", raw_logs.draw(3), "parquet")
    with pytest.raises(DataError, match=message):
        prepare(config(tmp_path, **changes))


def test_every_option_can_be_given_by_flag():
    from ml_collections import ConfigDict

    from ctr_jax.data.event_options import DEFAULTS

    assert not [name for name in DEFAULTS if hasattr(ConfigDict, name)]
