"""What a preparation reports: labels, times, requests of several contexts, unknown values."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ctr_jax.data.errors import DataError
from ctr_jax.data.prepare import prepare
from ctr_jax.data.records import PreparedData
from tests.ctr_jax.data import raw_logs
from tests.ctr_jax.data.test_events import TEST_FROM, config


def report(options: dict) -> dict:
    return json.loads((prepare(options) / "report.json").read_text())


def written(directory, change=lambda number, event: None) -> None:
    log = raw_logs.draw(3)
    for number, event in enumerate(log["events"]):
        change(number, event)
    raw_logs.write(directory / "raw", log, "parquet")


@pytest.mark.parametrize(("label", "value"), [("rating > 9", 0), ("rating < 9", 1)])
def test_a_train_split_of_one_class_is_refused(tmp_path, label, value):
    written(tmp_path)
    for mixed_from in (TEST_FROM + 10**6, TEST_FROM, TEST_FROM - 20):  # the last within valid
        training = f"CASE WHEN ts >= {mixed_from} THEN rating > 3 ELSE {label} END"
        with pytest.raises(DataError, match=f"'train': the label of all .* is {value}: nothing to"):
            prepare(config(tmp_path, label=training))
    in_tail = f"ts BETWEEN {TEST_FROM - 2} AND {TEST_FROM}"
    mixed_by_valid = f"CASE WHEN {in_tail} THEN rating > 3 ELSE {label} END"
    with pytest.raises(DataError, match=f"'train': the label of all .* is {value}: nothing to"):
        prepare(config(tmp_path, label=mixed_by_valid, valid=in_tail))


def test_a_test_split_of_one_class_is_told(tmp_path, capsys):
    written(tmp_path)
    found = report(config(tmp_path, label=f"rating >= 4 AND ts < {TEST_FROM}"))
    assert found["clicks"]["test"] == 0 < found["clicks"]["valid"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "AUC is not" in line]
    assert lines == ["test: every label is 0, so that AUC is not defined there"]


def test_clicks_and_times_by_split(tmp_path, capsys):
    written(tmp_path)
    options = config(tmp_path, request=10, max_candidates=3, is_behaviour="rating = 5")
    found, log = report(options), raw_logs.draw(3)["events"]
    assert found["clicks"]["test"] == sum(e["rating"] >= 4 for e in log if e["ts"] >= TEST_FROM)
    rate = found["clicks"]["test"] / found["impressions"]["test"]
    assert found["click_rate"]["test"] == round(rate, 4)
    behaviours = [e["ts"] for e in log if e["rating"] == 5]
    times = found["times"]["behaviours"], found["times"]["test"]
    test = [e["ts"] for e in log if e["ts"] >= TEST_FROM]
    expected = (min(behaviours), max(behaviours)), (min(test), None)
    for strings, bounds in zip(times, expected, strict=True):
        for text, seconds in zip(strings, bounds, strict=True):
            if seconds is not None:  # a request's time is its first event's
                assert np.datetime64(text, "s").astype(int) == seconds
    printed = capsys.readouterr().out
    assert "click_rate" in printed and found["times"]["test"][1] in printed


@pytest.mark.parametrize(
    ("shift", "unit", "warns"), [(0, "s", 1), (10**9, "s", 0), (10**9, "ms", 1)]
)
def test_times_before_2000_name_the_unit(tmp_path, capsys, shift, unit, warns):
    written(tmp_path, lambda _, event: event.update(ts=event["ts"] + shift))
    early = f"ts < {TEST_FROM + shift}"
    prepare(config(tmp_path, time_unit=unit, train=early, test=f"NOT ({early})"))
    printed = capsys.readouterr().out.splitlines()
    warnings = [line for line in printed if line.startswith("warning: every time lies before 2000")]
    assert len(warnings) == warns and all(f"in {unit}? See data.time_unit" in w for w in warnings)


def test_requests_of_several_contexts_are_counted_by_column(tmp_path, capsys):
    written(tmp_path, lambda n, event: event.update(place=n % 7, fixed=1))
    options = config(tmp_path, request="e.session", max_candidates=50)
    assert "several_contexts" not in report({**options, "context": {"fixed": "fixed"}})
    options["context"] = {"tab": "tab", "fixed": "fixed", "place": "CAST(place > 5 AS INTEGER)"}
    capsys.readouterr()
    found = report(options)
    values: dict[tuple, dict[str, set]] = {}
    bound = found["bounds"]["valid_from"]
    firsts: dict[tuple, int] = {}
    log = raw_logs.draw(3)["events"]
    for event in log:
        key = (event["ts"] >= TEST_FROM, event["user"], event["session"])
        firsts[key] = min(firsts.get(key, event["ts"]), event["ts"])
    for number, event in enumerate(log):
        key = (event["ts"] >= TEST_FROM, event["user"], event["session"])
        of = values.setdefault((*key, firsts[key] >= bound), {"tab": set(), "place": set()})
        of["tab"].add(event["tab"])
        of["place"].add(number % 7 > 5)
    expected = {
        "any": sum(any(len(v) > 1 for v in of.values()) for of in values.values()),
        **{f"context/{n}": sum(len(of[n]) > 1 for of in values.values()) for n in ("tab", "place")},
    }
    assert found["several_contexts"] == expected and expected["any"] > 10
    line = f"their rows differ in context/tab in {expected['context/tab']}, context/place in "
    assert line in capsys.readouterr().out


def test_unknown_values_are_shared_out_by_column_and_split(tmp_path, capsys):
    written(tmp_path)
    options = config(tmp_path, request=10, max_candidates=3, context={"tab": "tab"}, min_count=8)
    path = prepare(options)
    found = json.loads((path / "report.json").read_text())
    requests = PreparedData.open(path).split("valid")
    records = requests.records(np.arange(len(requests)))
    real = np.arange(3) < records["num_candidates"][:, None]
    oov = (records["candidate/item"] == 1)[real].mean()
    assert found["out_of_vocabulary"]["valid"]["candidate/item"] == round(float(oov), 4) > 0
    missing = (records["context/tab"] == 2).mean()
    assert found["missing"]["valid"]["context/tab"] == round(float(missing), 4) > 0
    printed = capsys.readouterr().out
    assert "oov valid" in printed and "context/tab" in printed and "user/user_id" not in printed


def test_what_given_vocabularies_lack_is_shown_from_one_percent_on(tmp_path, capsys):
    written(tmp_path / "old")
    written(
        tmp_path / "new", lambda n, event: event.update(item=event["item"] + 1000 * (n % 4 == 0))
    )
    source = prepare(config(tmp_path / "old", min_count=1))
    capsys.readouterr()
    known = report(config(tmp_path / "new", vocabularies_from=str(source)))["known"]
    tables = capsys.readouterr().out.strip().split("\n\n")
    [lacking] = [table for table in tables if "the given vocabulary lacks" in table]
    rows = [line.split() for line in lacking.splitlines()[1:] if "warning" not in line]
    assert known["user_id"] == 1 and 0.2 < 1 - known["item"] < 0.3
    assert rows == [["item", str(round(1 - known["item"], 4))]]
