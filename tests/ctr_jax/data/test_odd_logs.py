"""Logs as others write them: zones, long ids, clashing names, gaps; read right or refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctr_jax.data import histories as histories_lib
from ctr_jax.data.errors import DataError
from ctr_jax.data.prepare import prepare
from ctr_jax.data.records import PreparedData
from tests.ctr_jax.data import raw_logs
from tests.ctr_jax.data.test_events import config

ROOT = Path(__file__).parents[3]


def content_hash(path: Path) -> str:
    return PreparedData.open(path).spec.content_hash


def report(path: Path) -> dict:
    return json.loads((path / "report.json").read_text())


def rewritten(directory: Path, change, kind: str = "parquet") -> Path:
    """A directory with the same log, of which `change` may alter every event."""
    log = raw_logs.draw(3)
    for number, event in enumerate(log["events"]):
        change(number, event)
    raw_logs.write(directory / "raw", log, kind)
    return directory


PREPARE = """
import sys
from ctr_jax.data.prepare import prepare
print(prepare(eval(sys.argv[1])))
"""


def test_a_time_with_a_zone_is_the_same_moment_on_every_machine(tmp_path):
    start, rows = 1_729_984_800, 1000  # around the hour that Berlin lives through twice
    moments = start + 30 * np.arange(rows)
    (tmp_path / "raw").mkdir()
    users = np.arange(rows) % 7
    table = {"user": users, "item": np.arange(rows), "rating": np.arange(rows) % 6}
    table["moment"] = pa.array(moments * 1_000_000, pa.timestamp("us", tz="UTC"))
    pq.write_table(pa.table(table), tmp_path / "raw" / "events-0.parquet")
    test_from = start + 20_000
    options = config(
        tmp_path,
        time="moment",
        train=f"epoch(moment) < {test_from}",
        test=f"epoch(moment) >= {test_from}",
        request="time",
        min_count=1,
    )
    path = prepare(options)
    there = {**options, "prepared_dir": str(tmp_path / "there")}
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, repr(there)],
        cwd=ROOT,
        env={**os.environ, "TZ": "Europe/Berlin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    in_berlin = Path(done.stdout.splitlines()[-1])
    assert content_hash(in_berlin) == content_hash(path)
    data = PreparedData.open(in_berlin)
    train = data.split("train").records(np.arange(len(data.split("train"))))
    assert train["request_time"][0] == start
    histories = data.histories.last_n(train["user"], 200, end=train["end"])
    assert (histories["time"].max(1) < train["request_time"]).all()


@pytest.mark.parametrize("first", [10**18, 2**63 - 1000, 2**64, 10**24])
def test_long_ids_of_a_csv_stay_apart(tmp_path, first):
    def lengthen(_, event):
        event["user"] += first
        event["item"] += first

    rewritten(tmp_path, lengthen, "csv")
    path = prepare(config(tmp_path, events="events-*.csv", min_count=1))
    rewritten(tmp_path / "short", lambda *_: None, "csv")
    short = prepare(config(tmp_path / "short", events="events-*.csv", min_count=1))
    assert report(path)["users"] == report(short)["users"]
    assert report(path)["vocabularies"] == report(short)["vocabularies"]


def test_a_time_that_is_too_long_is_a_bad_row(tmp_path):
    def lengthen(number, event):
        event["ts"] = 10**20 if number == 50 else event["ts"]

    rewritten(tmp_path, lengthen, "csv")
    with pytest.raises(DataError, match=r"events-0.csv: line 52: value of the wrong type.*'ts'"):
        prepare(config(tmp_path, events="events-*.csv"))


@pytest.mark.parametrize("value", [999_999, 3.5, "soon"])
@pytest.mark.parametrize("request_option", ["time", 20])
def test_a_column_named_as_our_own_changes_nothing(tmp_path, value, request_option):
    options = dict(request=request_option, max_candidates=2, time_floor=10)
    plain = prepare(config(rewritten(tmp_path / "a", lambda *_: None), **options))
    rewritten(tmp_path / "b", lambda _, event: event.update(order_time=value))
    assert content_hash(prepare(config(tmp_path / "b", **options))) == content_hash(plain)


def test_seconds_of_a_request_may_be_text(tmp_path):
    rewritten(tmp_path, lambda *_: None)
    number, text = (
        prepare(config(tmp_path, request=request, max_candidates=3)) for request in (60, "60")
    )
    assert content_hash(number) == content_hash(text)
    for request in (0, "0", -60, "1.5"):
        with pytest.raises(DataError, match=r"data.request is .*whole seconds, at least 1"):
            prepare(config(tmp_path, request=request))


def test_a_valid_range_is_taken_out_of_train_and_must_not_be_empty(tmp_path):
    rewritten(tmp_path, lambda *_: None)
    apart = config(tmp_path, train="ts < 1000400", valid="ts BETWEEN 1000400 AND 1000599")
    within = {**apart, "train": "ts < 1000600"}
    assert content_hash(prepare(within)) == content_hash(prepare(apart))
    with pytest.raises(DataError, match="split 'valid' has no impressions"):
        prepare({**within, "valid": "ts BETWEEN 100400 AND 100599"})


def test_an_event_of_which_nothing_says_that_it_is_a_behaviour_is_none(tmp_path):
    def forget(number, event):
        event["liked"] = None if number % 3 == 0 else int(event["rating"] > 2)

    rewritten(tmp_path, forget)
    for ties in ("strict", "order"):
        found, expected = (
            prepare(config(tmp_path, ties=ties, is_behaviour=sql))
            for sql in ("liked = 1", "liked IS NOT NULL AND liked = 1")
        )
        assert content_hash(found) == content_hash(expected)


def test_only_behaviours_are_sorted_where_no_other_event_is_needed(tmp_path, monkeypatch):
    rewritten(tmp_path, lambda *_: None)
    totals, tqdm = [], histories_lib.tqdm
    monkeypatch.setattr(
        histories_lib, "tqdm", lambda **how: (totals.append(how["total"]), tqdm(**how))[1]
    )
    for ties in ("strict", "order"):
        prepare(config(tmp_path, ties=ties, is_behaviour="rating >= 4"))
    log = raw_logs.draw(3)["events"]
    assert totals == [sum(event["rating"] >= 4 for event in log), len(log)]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("column", ["rowid", "filename", "RowID"])
def test_a_column_that_would_hide_a_rows_place_is_refused(tmp_path, column, kind):
    rewritten(tmp_path, lambda number, event: event.update({column: 1}), kind)
    with pytest.raises(DataError, match=rf"events-0.{kind}: a column cannot be called '{column}'"):
        prepare(config(tmp_path, events=f"events-*.{kind}"))


def test_partition_folders_may_hold_files_of_one_name(tmp_path):
    log = raw_logs.draw(3)
    for day, part in enumerate((log["events"][:150], log["events"][150:]), 1):
        folder = tmp_path / "raw" / f"date=2024-01-0{day}"
        folder.mkdir(parents=True)
        raw_logs.write_rows(folder / "part-0.parquet", part)
    path = prepare(config(tmp_path, events="date=*/part-*.parquet"))
    assert report(path)["rows"] == {
        "date=2024-01-01/part-0.parquet": 150,
        "date=2024-01-02/part-0.parquet": 250,
    }
    plain = prepare(config(rewritten(tmp_path / "plain", lambda *_: None)))
    assert content_hash(path) == content_hash(plain)


def test_an_infinite_value_is_a_missing_one(tmp_path):
    def price(number, event):
        event["price"] = {5: float("inf"), 6: float("-inf"), 7: float("nan")}.get(number, number)
        event["price"] = float(event["price"])

    rewritten(tmp_path, price)
    options = {"candidate": {"item": "e.item", "price": "price"}, "min_count": 1}
    path = prepare(config(tmp_path, kinds={"candidate/price": "standard"}, **options))
    requests = PreparedData.open(path).split("train")
    prices = requests.records(np.arange(len(requests)))["candidate/price"]
    assert np.isfinite(prices).all() and (prices == 0).sum() == 3


def test_a_prior_history_after_2038_is_a_bad_row(tmp_path):
    log = raw_logs.draw(3)
    row = next(n for n, p in enumerate(log["prior"]) if p["seen"])
    log["prior"][row]["last"] = 10**13
    raw_logs.write(tmp_path / "raw", log, "parquet")
    prior = {"file": "prior.parquet", "user": "user", "items": "seen", "time": "last"}
    prior["behaviour"] = {"item": "p.item", "rating": "NULL"}
    with pytest.raises(DataError, match=rf"prior.parquet: row group 0, row {row}: time after 2038"):
        prepare(config(tmp_path, prior=prior))


def test_a_line_is_named_right_behind_skipped_ones(tmp_path):
    raw_logs.write(tmp_path / "raw", raw_logs.draw(3), "csv")
    lines = ["user,age", *(f"{user},20" for user in range(100, 180))]
    lines[3:3] = ["x,y,z", "", '"1\n2",3,4']
    lines.append("150,30")
    (tmp_path / "raw" / "users.csv").write_text("\n".join(lines))
    place = sum(line.count("\n") + 1 for line in lines)
    options = {"events": "events-*.csv", "user_table": "users.csv", "on_bad_row": "skip"}
    with pytest.raises(DataError, match=rf"users.csv: line {place}: user 150 occurs twice"):
        prepare(config(tmp_path, **options))


def test_a_csv_of_a_header_alone(tmp_path):
    rewritten(tmp_path, lambda *_: None, "csv")
    (tmp_path / "raw" / "empty.csv").write_text(",".join(raw_logs.COLUMNS) + "\n")
    with pytest.raises(DataError, match="empty.csv: no rows"):
        prepare(config(tmp_path, events="empty.csv"))
    (tmp_path / "raw" / "wide.csv").write_text("user,item,ts,rating\n1,2,3,4,5\n")
    with pytest.raises(DataError, match="wide.csv: line 2: row of the wrong width"):
        prepare(config(tmp_path, events="wide.csv"))
    path, plain = (
        prepare(config(tmp_path, events=events))
        for events in (("empty.csv", "events-0.csv"), "events-0.csv")
    )
    assert content_hash(path) == content_hash(plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"types": {"itme": "VARCHAR"}}, r"data.types names \['itme'\]"),
        ({"vocabularies": {"candidate/item": "a/b"}}, "vocabulary 'a/b'"),
    ],
)
def test_a_name_that_cannot_be_meant_is_refused(tmp_path, changes, message):
    rewritten(tmp_path, lambda *_: None)
    with pytest.raises(DataError, match=message):
        prepare(config(tmp_path, **changes))
