"""Scores of requests of several candidates, as rows that join the raw log."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from ctr_jax import score_files
from ctr_jax.data.prepare import prepare
from ctr_jax.data.records import PreparedData
from ctr_jax.metrics import ScoreLog
from ctr_jax.score_files import write_scores
from tests.ctr_jax.data import raw_logs
from tests.ctr_jax.data.test_events import config


@pytest.fixture
def log():
    return raw_logs.draw(3)


@pytest.fixture
def data(log, tmp_path):
    raw_logs.write(tmp_path / "raw", log, "parquet")
    how = dict(request="'s' || e.session", max_candidates=3, context={"tab": "tab"})
    return PreparedData.open(prepare(config(tmp_path, **how)))


def scored(data, split):
    """The split with drawn logits."""
    requests, scores, rng = data.split(split), ScoreLog(), np.random.default_rng(0)
    for first in range(0, len(requests), 7):
        batch = requests.read(np.arange(first, min(first + 7, len(requests))), 4)
        scores.add(batch, rng.normal(size=batch.candidate_mask.shape))
    return scores


def test_every_row_is_a_candidate_of_the_log(data, log, tmp_path, monkeypatch):
    monkeypatch.setattr(score_files, "_RECORDS_AT_ONCE", 5)
    scores = scored(data, "test")
    path = write_scores(tmp_path / "new" / "test.parquet", data, "test", scores, step=7)
    assert [p.name for p in path.parent.iterdir()] == ["test.parquet"]
    table = pq.read_table(path)
    assert table.schema.metadata == {b"step": b"7"}
    rows = table.to_pylist()
    records = data.split("test").records(np.arange(len(data.split("test"))))
    assert [r["record"] for r in rows] == np.repeat(
        np.arange(len(records)), records["num_candidates"]
    ).tolist()
    logits = scores.columns()["logits"].astype(np.float32)
    assert [r["logit"] for r in rows] == logits.tolist()
    place = {}
    for row in rows:
        event = log["events"][row["row"]]
        assert row["user"] == event["user"] and row["request"] == f"s{event['session']}"
        assert row["label"] == (event["rating"] >= 4)
        assert row["position"] == place.get(row["record"], 0)
        place[row["record"]] = row["position"] + 1
        assert row["request_time"] == records["request_time"][row["record"]]
        assert row["probability"] == pytest.approx(1 / (1 + np.exp(-row["logit"])), rel=1e-6)
    assert max(place.values()) == 3


def test_scores_of_something_else_are_refused(data, tmp_path):
    scores = scored(data, "test")
    with pytest.raises(ValueError, match="scores from 0 on are not of Requests"):
        write_scores(tmp_path / "valid.parquet", data, "valid", scores)
    batch = data.split("test").read(np.arange(1), 4)
    scores.add(batch, np.zeros(batch.candidate_mask.shape))
    with pytest.raises(ValueError, match=r"\d+ scores, but .* candidates"):
        write_scores(tmp_path / "test.parquet", data, "test", scores)
    assert not list(tmp_path.glob("*.parquet*"))
