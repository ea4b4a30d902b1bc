"""Weights of candidates, from a column of the log to the step and the metrics."""

import json

import jax
import numpy as np
import pytest

from ctr_jax import reports, sharding, steps
from ctr_jax.data import open_data, pipeline
from ctr_jax.data.errors import DataError
from ctr_jax.data.prepare import prepare
from ctr_jax.data.records import PreparedData
from ctr_jax.evaluation import evaluate, score_split
from ctr_jax.training import train
from tests.ctr_jax.data import raw_logs, reference_preparation
from tests.ctr_jax.data.test_events import COLUMNS, assert_equal, config, rows_of, users_of


@pytest.mark.parametrize(
    "sql", ["rating + 0.5", "count(*) OVER (PARTITION BY user, e.session) * 0 + rating + 0.5"]
)
def test_records_hold_the_weights_of_their_candidates(tmp_path, sql):
    log = raw_logs.draw(1)
    raw_logs.write(tmp_path / "raw", log, "parquet")
    path = prepare(config(tmp_path, request="time", max_candidates=3, weight=sql))
    rows = [
        row | {"weight": e["rating"] + 0.5}
        for row, e in zip(rows_of(log, request=lambda e, seq: e["ts"]), log["events"], strict=True)
    ]
    expected = reference_preparation.prepare(
        rows, rows, users_of(log), COLUMNS, candidates=3, ties="strict", valid_fraction=0.15
    )
    assert_equal(path, expected)
    data = PreparedData.open(path)
    batch = data.split("train").read(np.arange(4), 5)
    assert batch.weight.dtype == np.float32 and batch.weight.shape == batch.label.shape
    assert data.spec.weighted and (batch.weight > 0).sum() == batch.candidate_mask.sum()


@pytest.mark.parametrize("sql", ["rating - 4", "NULL", "'x'", "1e7", "rating / 0.0"])
def test_a_weight_that_cannot_be_is_named(tmp_path, sql):
    log = raw_logs.draw(1)
    raw_logs.write(tmp_path / "raw", log, "parquet")
    with pytest.raises(DataError, match=r"events-0.parquet: row .* weight not from 0 to 1,000,000"):
        prepare(config(tmp_path, weight=sql))


@pytest.mark.parametrize("mesh, micro_batch", [((1, 1), 0), ((2, 2), 8)])
def test_a_step_with_weights_is_that_with_candidates_again(small_config, mesh, micro_batch):
    loaded, rng = open_data(small_config), np.random.default_rng(0)
    batch = next(
        pipeline.train_batches(loaded.split("train"), batch_size=32, history_length=12, seed=0)
    )
    small_config.batch_size, small_config.clip_norm = 32, 0.1
    small_config.optimizer.name = small_config.table_optimizer.name = "sgd"

    def with_candidates(place, mask, weight):
        """The candidates of any request at `place`, [B, C]."""
        no = np.zeros_like(place)
        return batch.replace(
            candidate={
                name: np.where(mask, values[place, no], 0)
                for name, values in batch.candidate.items()
            },
            candidate_mask=mask,
            label=batch.label[place, no] * mask,
            weight=weight,
        )

    place = rng.integers(0, 32, (32, 3))
    times = rng.integers(0, 3, (32, 3))
    weighted = with_candidates(place, np.ones((32, 3), bool), times.astype(np.float32) * 7)
    again = np.zeros((32, 6), np.int64)
    for row, of_row, n in zip(again, place, times, strict=True):
        row[: n.sum()] = np.repeat(of_row, n)
    repeated = with_candidates(again, np.arange(6) < times.sum(1)[:, None], None)

    def run(batch, shape, micro_batch):
        small_config.micro_batch = micro_batch
        mesh = sharding.make_mesh(*shape)
        with jax.set_mesh(mesh):
            experiment = steps.bind(small_config, loaded.spec, mesh, 10)
            state = steps.init_state(experiment, 0)
            state, scalars = steps.train_step(experiment)(state, sharding.put_batch(batch, mesh))
            return jax.device_get((scalars, state["tables"], state["model"]))

    found, expected = run(weighted, mesh, micro_batch), run(repeated, (1, 1), 0)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-7), found, expected
    )


def test_training_and_metrics_of_a_weighted_log(small_config, tmp_path):
    small_config.data.weight = "0.5 + item % 3"
    small_config.total_steps = 2
    done = train(small_config, tmp_path)
    results = evaluate(small_config, tmp_path, splits=("valid",))["valid"]
    assert done["valid"]["auc"] == pytest.approx(results["auc"], abs=1e-6)
    assert results["auc_standard_error"] is None

    data, mesh = open_data(small_config), sharding.make_mesh(1, 1)
    with jax.set_mesh(mesh):
        experiment = steps.bind(small_config, data.spec, mesh, 2)
        state = steps.init_state(experiment, 0)
        weights = {k: state[k] for k in ("tables", "model", "model_state")}
        step = steps.score_step(experiment)
        log = score_split(small_config, data, "valid", mesh, step, weights).columns()
    stored = data.split("valid").records(np.arange(len(log["labels"])))
    np.testing.assert_array_equal(log["weights"], stored["weight"][:, 0])
    assert set(np.unique(log["weights"])) == {0.5, 1.5, 2.5}
    report = json.loads((data.path / "report.json").read_text())
    assert report["mean_weight"]["valid"] == round(log["weights"].mean(), 4)
    times = (2 * log["weights"]).astype(int)
    again = {name: np.repeat(log[name], times) for name in ("labels", "logits")}
    found = reports.evaluate_scores(log, slices=(), bins=0)
    for name, expected in reports.evaluate_scores(again, slices=(), bins=0).items():
        if name in ("auc", "logloss", "calibration", "normalised_entropy"):
            assert found[name] == pytest.approx(expected, rel=1e-9), name
