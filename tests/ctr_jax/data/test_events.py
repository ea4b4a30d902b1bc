"""The events builder against a pure-Python preparation, and what it refuses."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from ctr_jax.data.errors import DataError
from ctr_jax.data.prepare import prepare
from ctr_jax.data.records import PreparedData
from tests.ctr_jax.data import raw_logs, reference_preparation

TEST_FROM = raw_logs.TEST_FROM


def config(directory, **changes) -> dict:
    return {
        "builder": "events",
        "raw_dir": str(directory / "raw"),
        "prepared_dir": str(directory / "prepared"),
        "events": ("events-*.parquet",),
        "time": "ts",
        "label": "rating >= 4",
        "train": f"ts < {TEST_FROM}",
        "test": f"ts >= {TEST_FROM}",
        "valid_fraction": 0.15,
        "candidate": {"item": "e.item"},
        "behaviour": {"item": "e.item", "rating": "rating"},
        "user_columns": {"user_id": '"user"'},
        **changes,
    }


# Of that config, as reference_preparation takes them.
COLUMNS = {
    "user/user_id": ("id", "user_id"),
    "behaviour/item": ("id", "item"),
    "behaviour/rating": ("id", "rating"),
    "candidate/item": ("id", "item"),
}


def rows_of(log, *, request, unit=1, floor=0, is_behaviour=lambda e: True):
    """Reference rows of the events: targets are all of them."""
    items = {i["item"]: i for i in log["items"]}
    rows = []
    for seq, e in enumerate(log["events"]):
        seconds = e["ts"] // unit
        time = seconds // floor * floor if floor else seconds
        item = items.get(e["item"], {})
        rows.append(
            {
                "user": e["user"],
                "order": e["ts"],
                "time": time,
                "seq": seq,
                "range": "train" if seconds < TEST_FROM else "test",
                "label": int(e["rating"] >= 4),
                "keep": is_behaviour(e),
                "request": request(e, seq),
                "context/tab": e["tab"],
                "candidate/item": e["item"],
                "candidate/author": item.get("author"),
                "candidate/length": item.get("length"),
                "behaviour/item": e["item"],
                "behaviour/author": item.get("author"),
                "behaviour/rating": e["rating"],
                "behaviour/type": "click" if e["rating"] >= 4 else "no click",
            }
        )
    return rows


def users_of(log):
    table = {u["user"]: u for u in log["users"]}
    return {
        u: {
            "user/user_id": u,
            "user/age": table.get(u, {}).get("age"),
            "user/fans": table.get(u, {}).get("fans"),
        }
        for u in {e["user"] for e in log["events"]}
    }


def assert_equal(path, expected) -> None:
    """Everything in the prepared directory equals the reference's records and histories."""
    records, vocabularies, histories = expected
    data = PreparedData.open(path)
    for split, rows in records.items():
        requests = data.split(split)
        assert len(requests) == len(rows)
        found = requests.records(np.arange(len(rows)))
        for i, row in enumerate(rows):
            n = found["num_candidates"][i]
            assert n == len(row["label"])
            for key, value in row.items():
                value_found = found[key][i]
                if isinstance(value, list):
                    assert not value_found[n:].any()
                    value_found = value_found[:n]
                np.testing.assert_allclose(value_found, value, rtol=2e-6, atol=1e-6, err_msg=key)
    for name, ids in vocabularies.items():
        assert data.spec.vocabularies[name] == 3 + len(ids) + (
            "-inf" in str(pq.read_table(path / "vocabularies" / f"{name}.parquet")["value"][0])
        )
    lengths = data.histories.lengths(np.arange(data.histories.num_users))
    assert data.histories.num_behaviours == sum(len(h) for h in histories.values())
    for user, rows in histories.items():
        assert lengths[user] == len(rows)
        columns = data.histories.last_n(np.array([user]), len(rows))
        assert columns["time"][0].tolist() == [r["time"] for r in rows]
        for column in data.spec.group("behaviour"):
            assert columns[column.name][0].tolist() == [r[f"behaviour/{column.name}"] for r in rows]


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_order_ties_and_floored_times(tmp_path, kind):
    log = raw_logs.draw(0)
    raw_logs.write(tmp_path / "raw", log, kind)
    path = prepare(
        config(tmp_path, events=f"events-*.{kind}", ties="order", time_floor=100, max_candidates=1)
    )
    rows = rows_of(log, request=lambda e, seq: seq, floor=100)
    expected = reference_preparation.prepare(
        rows, rows, users_of(log), COLUMNS, candidates=1, ties="order", valid_fraction=0.15
    )
    assert_equal(path, expected)


@pytest.mark.parametrize(
    ("request_option", "key", "candidates", "kind"),
    [
        ("time", lambda e: e["ts"], 2, "csv"),
        (20, lambda e: e["ts"] // 20, 3, "parquet"),
        ("e.session", lambda e: e["session"], 1, "csv"),
        ("'s' || e.session", lambda e: f"s{e['session']}", 4, "parquet"),
    ],
)
def test_requests_contexts_items_users_and_prior_histories(
    tmp_path, request_option, key, candidates, kind
):
    log = raw_logs.draw(1)
    raw_logs.write(tmp_path / "raw", log, kind, parts=3)
    path = prepare(
        config(
            tmp_path,
            events=(f"events-*.{kind}",),
            request=request_option,
            max_candidates=candidates,
            item_table=f"items.{kind}",
            user_table=f"users.{kind}",
            candidate={"item": "e.item", "author": "author", "length": "length"},
            context={"tab": "tab"},
            behaviour={
                "item": "e.item",
                "author": "author",
                "type": "CASE WHEN rating >= 4 THEN 'click' ELSE 'no click' END",
            },
            user_columns={"user_id": '"user"', "age": "age", "fans": "fans"},
            kinds={"candidate/length": "quantile", "user/fans": "standard"},
            buckets=5,
            prior={
                "file": "prior.parquet",
                "user": "user",
                "items": "seen",
                "time": "last",
                "behaviour": {
                    "item": "p.item",
                    "type": "CASE WHEN list_contains(p.liked, p.item) THEN 'stored like' "
                    "ELSE 'stored' END",
                },
            },
        )
    )
    rows = rows_of(log, request=lambda e, seq: key(e))
    authors = {i["item"]: i["author"] for i in log["items"]}
    behaviours = list(rows)
    for number, p in enumerate(log["prior"]):
        for position, item in enumerate(p["seen"]):
            behaviours.append(
                {
                    "user": p["user"],
                    "order": p["last"],
                    "time": p["last"],
                    "seq": number * 1000 + position - 10**6,
                    "keep": True,
                    "behaviour/item": item,
                    "behaviour/author": authors.get(item),
                    "behaviour/type": "stored like" if item in p["liked"] else "stored",
                }
            )
    columns = {
        "user/user_id": ("id", "user_id"),
        "user/age": ("id", "age"),
        "user/fans": ("standard", "user/fans"),
        "context/tab": ("id", "tab"),
        "behaviour/item": ("id", "item"),
        "behaviour/author": ("id", "author"),
        "behaviour/type": ("id", "type"),
        "candidate/item": ("id", "item"),
        "candidate/author": ("id", "author"),
        "candidate/length": ("quantile", "length"),
    }
    expected = reference_preparation.prepare(
        rows,
        behaviours,
        users_of(log),
        columns,
        candidates=candidates,
        ties="strict",
        valid_fraction=0.15,
        buckets=5,
    )
    assert_equal(path, expected)


def test_only_some_events_are_behaviours_milliseconds_and_own_valid_range(tmp_path):
    log = raw_logs.draw(2)
    for e in log["events"]:
        e["ts"] = e["ts"] * 1000 + e["item"]
    log["events"].sort(key=lambda e: e["ts"])
    raw_logs.write(tmp_path / "raw", log, "parquet")
    path = prepare(
        config(
            tmp_path,
            ties="order",
            time_unit="ms",
            is_behaviour="rating >= 4",
            train="ts < 1000400000",
            valid="ts >= 1000400000 AND ts < 1000600000",
            test="ts >= 1000600000",
        )
    )
    rows = rows_of(
        log, request=lambda e, seq: seq, unit=1000, is_behaviour=lambda e: e["rating"] >= 4
    )
    for row in rows:
        if row["range"] == "train" and row["order"] >= 1000400000:
            row["range"] = "valid"
    columns = {
        "user/user_id": ("id", "user_id"),
        "behaviour/item": ("id", "item"),
        "behaviour/rating": ("id", "rating"),
        "candidate/item": ("id", "item"),
    }
    expected = reference_preparation.prepare(
        rows,
        rows,
        users_of(log),
        columns,
        candidates=1,
        ties="order",
        valid_fraction=0.15,
        own_valid=True,
    )
    assert_equal(path, expected)


CSV_LINES = raw_logs.COLUMNS


def bad_csv(tmp_path, line: int, text: str, **changes):
    """Options of a CSV log whose line `line` (1-based, the header is 1) is `text`."""
    raw_logs.write(tmp_path / "raw", raw_logs.draw(3), "csv")
    path = tmp_path / "raw" / "events-0.csv"
    lines = path.read_text().splitlines()
    lines[line - 1] = text
    path.write_text("\n".join(lines) + "\n")
    return config(tmp_path, events="events-0.csv", **changes)


BAD_ROWS = [
    ("7,3,soon,4,a,10000", "wrong type", "soon"),
    ("7,3,-5,4,a,10000", "negative time", "'-5'"),
    ("7,3,99999999999,4,a,10000", "after 2038", "'99999999999'"),
    (",3,1000005,4,a,10000", "missing user", "None"),
    ("7,3,1000005,,a,10000", "label not 0 or 1", "None"),
    ("7,3,1000005,4,a", "wrong width", "7,3,1000005,4,a"),
    ("7,3,1000005,4,a,10000,5", "wrong width", "7,3,1000005,4,a,10000,5"),
]


@pytest.mark.parametrize(("text", "problem", "value"), BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, text, problem, value):
    options = bad_csv(tmp_path, 37, text, ties="order")
    with pytest.raises(DataError) as error:
        prepare(options)
    message = str(error.value)
    assert "events-0.csv: line 37" in message and problem in message and value in message
    assert "\n" not in message
    assert not list((tmp_path / "prepared").rglob("spec.json"))


@pytest.mark.parametrize(("text", "problem", "value"), BAD_ROWS)
def test_a_bad_row_is_skipped_and_counted(tmp_path, text, problem, value):
    options = bad_csv(tmp_path, 37, text, on_bad_row="skip", ties="order")
    path = prepare(options)
    report = json.loads((path / "report.json").read_text())
    [(reason, count)] = report["skipped"].items()
    assert problem in reason and count == 1
    assert sum(report["impressions"].values()) == 399


def test_a_late_value_of_another_type_names_the_option(tmp_path):
    log = raw_logs.draw(3)
    log["events"] *= 60  # the bad row lies behind the rows that types are inferred from
    raw_logs.write(tmp_path / "raw", log, "csv")
    path = tmp_path / "raw" / "events-0.csv"
    lines = path.read_text().splitlines()
    lines[22_000] = "7,x3,1000005,4,a,10000"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"events-0.csv: line 22001.*item.*x3.*data.types"):
        prepare(config(tmp_path, events="events-0.csv"))


def test_bad_parquet_rows_name_the_row_group(tmp_path):
    log = raw_logs.draw(3)
    log["events"][123]["ts"] = -4
    raw_logs.write(tmp_path / "raw", log, "parquet")
    with pytest.raises(DataError, match=r"events-0.parquet: row group 2, row 23: negative time"):
        prepare(config(tmp_path))
    path = tmp_path / "raw" / "events-0.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"events-0.parquet.*truncated"):
        prepare(config(tmp_path))
    metadata = pq.ParquetFile(_rewritten(tmp_path)).metadata
    start = metadata.row_group(3).column(0).data_page_offset
    damaged = bytearray(path.read_bytes())
    damaged[start : start + 20] = b"\xff" * 20
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"events-0.parquet: row group 3"):
        prepare(config(tmp_path))


def _rewritten(tmp_path):
    raw_logs.write(tmp_path / "raw", raw_logs.draw(3), "parquet")
    return tmp_path / "raw" / "events-0.parquet"


def test_a_truncated_gzip_and_an_open_quote_are_named(tmp_path):
    raw_logs.write(tmp_path / "raw", raw_logs.draw(3, events=20_000), "csv")
    raw = tmp_path / "raw"
    content = gzip.compress((raw / "events-0.csv").read_bytes())
    (raw / "cut.csv.gz").write_bytes(content[: len(content) // 2])
    for on_bad_row in ("raise", "skip"):
        with pytest.raises(DataError, match=r"cut.csv.gz.*truncated"):
            prepare(config(tmp_path, events="cut.csv.gz", on_bad_row=on_bad_row))
    lines = (raw / "events-0.csv").read_text().splitlines()
    lines[50] = '7,"3,1000005,4,a,10000'
    (raw / "events-0.csv").write_text("\n".join(lines))
    for on_bad_row in ("raise", "skip"):
        with pytest.raises(DataError, match=r"events-0.csv: line 51.*quote"):
            prepare(config(tmp_path, events="events-0.csv", on_bad_row=on_bad_row))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time": "stamp"}, "stamp"),
        ({"candidate": {"item": "nothing"}}, "nothing"),
        ({"events": "absent.csv"}, "absent.csv: no such file"),
        ({"item_table": "items.parquet", "items_key": "video"}, "no column 'video'"),
        ({"labels": "rating"}, "no options"),
        ({"kinds": {"candidate/x": "quantile"}}, "no columns"),
        ({"ties": "order", "request": 60}, "request = 'event'"),
        ({"test": f"ts > {TEST_FROM * 2}"}, "split 'test' has no impressions"),
        ({"on_bad_row": "ignore"}, "'raise' or 'skip'"),
        ({"time_unit": "min"}, "time_unit"),
        ({"builder": "nothing"}, "data.builder"),
    ],
)
def test_wrong_options_are_refused(tmp_path, changes, message):
    raw_logs.write(tmp_path / "raw", raw_logs.draw(3), "parquet")
    with pytest.raises(DataError, match=message):
        prepare(config(tmp_path, **changes))


def test_an_item_that_occurs_twice_is_refused(tmp_path):
    log = raw_logs.draw(3)
    log["items"].append(dict(log["items"][4]))
    raw_logs.write(tmp_path / "raw", log, "csv")
    line = len(log["items"]) + 1
    with pytest.raises(DataError, match=rf"items.csv: line {line}: item .* twice"):
        prepare(config(tmp_path, events="events-*.csv", item_table="items.csv"))
