"""No leak: with shuffled outcomes a strong simple learner finds nothing in a prepared data set.

The outcomes of a generated rating log are permuted before preparation, labels and behaviour types
together. What is left to find is only what preparation itself lets through. A mutant preparation
whose histories reach one behaviour too far hands the target to the learner and is caught.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.metrics import roc_auc_score

from ctr_jax.data import requests as requests_lib
from ctr_jax.data.prepare import prepare
from ctr_jax.data.records import PreparedData

USERS, ITEMS, EVENTS = 100, 50, 6000
START, END = 1_000_000, 1_000_000 + EVENTS * 10
TEST_FROM = START + int(0.75 * EVENTS) * 10
LENGTH = 50


def write_log(directory, shuffled: bool) -> None:
    """Ratings with user and item effects; hours hold many events, seconds at most one of a user."""
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, USERS, EVENTS), rng.integers(0, ITEMS, EVENTS)
    taste = 1.5 * rng.normal(size=USERS)[user] + 1.0 * rng.normal(size=ITEMS)[item]
    noisy = taste + 0.8 * rng.normal(size=EVENTS)
    rating = np.clip(np.round(3.5 + noisy), 1, 5).astype(np.int64)
    if shuffled:
        rating = rng.permutation(rating)
    directory.mkdir()
    table = {"user": user, "item": item, "rating": rating, "ts": START + 10 * np.arange(EVENTS)}
    pq.write_table(pa.table(table), directory / "events.parquet")


def prepared(tmp_path, shuffled: bool, ties: str) -> PreparedData:
    write_log(tmp_path / "raw", shuffled)
    options = {
        "builder": "events",
        "raw_dir": str(tmp_path / "raw"),
        "prepared_dir": str(tmp_path / "prepared"),
        "time": "ts",
        "label": "rating >= 4",
        "time_floor": 3600 if ties == "order" else 0,
        "ties": ties,
        "request": "event",
        "train": f"ts < {TEST_FROM}",
        "test": f"ts >= {TEST_FROM}",
        "candidate": {"item": "item"},
        "behaviour": {"item": "item", "rating": "rating"},
        "user_columns": {"user_id": '"user"'},
    }
    return PreparedData.open(prepare(options))


def probe(data: PreparedData) -> tuple[float, float]:
    """(test AUC, its standard error if nothing were to be found) of gradient boosting on the
    item's and the user's id, the share of each rating in the history, and the last behaviour."""
    ids = data.spec.vocabularies["rating"]

    def features(split: str) -> tuple[np.ndarray, np.ndarray]:
        requests = data.split(split)
        batch = requests.read(np.arange(len(requests)), LENGTH)
        rating = batch.behaviour["rating"]
        shares = [((rating == i) & batch.behaviour_mask).mean(1) for i in range(1, ids)]
        item = batch.candidate["item"][:, 0]
        last = [rating[:, -1], batch.behaviour["item"][:, -1] == item]
        seen = (batch.behaviour["item"] == item[:, None]) & batch.behaviour_mask
        means = np.array([np.mean(label[items == i]) for i in range(items.max() + 1)])
        return np.stack([means[item], *shares, *last, seen.sum(1)], 1), batch.label[:, 0]

    train = data.split("train").read(np.arange(len(data.split("train"))), 1)
    items, label = train.candidate["item"][:, 0], train.label[:, 0]
    items = np.concatenate([items, np.arange(data.spec.vocabularies["item"])])
    label = np.concatenate([label, np.full(data.spec.vocabularies["item"], label.mean())])
    model = GradientBoostingClassifier(n_estimators=40, random_state=0)
    model.fit(*features("train"))
    x, y = features("test")
    positive = int(y.sum())
    error = np.sqrt((len(y) + 1) / (12 * positive * (len(y) - positive)))
    return roc_auc_score(y, model.predict_proba(x)[:, 1]), float(error)


@pytest.mark.parametrize("ties", ["order", "strict"])
def test_shuffled_outcomes_leave_nothing_to_find(tmp_path, ties):
    auc, error = probe(prepared(tmp_path, shuffled=True, ties=ties))
    assert abs(auc - 0.5) < 2.5 * error


def test_the_probe_finds_what_is_there(tmp_path):
    auc, _ = probe(prepared(tmp_path, shuffled=False, ties="order"))
    assert auc > 0.75


@pytest.mark.parametrize("ties", ["order", "strict"])
def test_a_preparation_that_lets_the_target_in_is_caught(tmp_path, monkeypatch, ties):
    fill = requests_lib._fill

    def mutant(*arguments):
        records, raw_keys = fill(*arguments)
        records["end"] += 1
        return records, raw_keys

    monkeypatch.setattr(requests_lib, "_fill", mutant)
    auc, _ = probe(prepared(tmp_path, shuffled=True, ties=ties))
    assert auc > 0.9
