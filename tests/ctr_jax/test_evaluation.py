"""Evaluation of a run's checkpoints: exact, of the step that is chosen, beside a trainer."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from ctr_jax import evaluation, metrics
from ctr_jax.checkpoints import Checkpoints, ConfigMismatch
from ctr_jax.config import ConfigError
from ctr_jax.data import keys, open_data
from ctr_jax.data.errors import DataError
from ctr_jax.evaluation import evaluate
from ctr_jax.training import train
from ctr_jax.writers import write_json


def test_evaluation_is_exact_whatever_the_batch(small_config, tmp_path):
    train(small_config, tmp_path)
    first = evaluate(small_config, tmp_path, step=6)
    requests = {s: len(open_data(small_config).split(s)) for s in ("valid", "test")}
    assert {s: first[s]["count"] for s in first} == requests
    assert first["test"]["slices"]["history_length"]
    metrics = Checkpoints(tmp_path, read_only=True).metrics(6)
    assert metrics["test"]["auc"] == first["test"]["auc"]
    assert (tmp_path / "evaluation" / "test" / "results.json").exists()
    assert (tmp_path / "evaluation" / "test" / "reliability.png").exists()
    assert not Checkpoints(tmp_path, read_only=True).is_being_evaluated(6)
    for size, mesh in ((7, (1, 1)), (64, (4, 2))):
        small_config.eval_batch_size = size
        small_config.mesh.data, small_config.mesh.table = mesh
        again = evaluate(small_config, tmp_path, step=6)
        for split in first:
            np.testing.assert_allclose(again[split]["logloss"], first[split]["logloss"], rtol=1e-6)
            np.testing.assert_allclose(again[split]["auc"], first[split]["auc"], atol=1e-4)


def test_slices_are_of_raw_values_and_of_all_that_a_request_may_see(small_config, tmp_path):
    small_config.slices, small_config.length_buckets = ("user/age", "candidate/category"), (4, 12)
    small_config.total_steps = small_config.checkpoint_steps = 1
    train(small_config, tmp_path)
    slices = evaluate(small_config, tmp_path, splits=("test",))["test"]["slices"]
    log = pq.read_table(Path(small_config.data.raw_dir) / "events.parquet").to_pandas()
    before = log.groupby("user").cumcount()  # the log is sorted by user and time
    of_test = log.ts >= 1_000_000_000 + 15 * 86400

    def counted(values):
        return {str(value): n for value, n in values[of_test].value_counts().sort_index().items()}

    def found(parts):
        return {value: part["count"] for value, part in sorted(parts.items())}

    assert found(slices["candidate/category"]) == counted(log.category)
    assert found(slices["user/age"]) == counted(log.user % 5)
    names = pd.cut(before, [-1, 0, 9, 19, 49], labels=["0", "1-9", "10-19", "20-49"])
    expected = {name: n for name, n in counted(names).items() if n}
    assert found(slices["history_length"]) == expected and expected["20-49"] > 12
    assert slices["history_length"]["20-49"]["max"] == 29 > small_config.history_length


def test_scores_are_written_beside_raw_keys(small_config, tmp_path, monkeypatch):
    small_config.total_steps = small_config.checkpoint_steps = 1
    train(small_config, tmp_path)
    log = pq.read_table(Path(small_config.data.raw_dir) / "events.parquet").to_pandas()
    tables = []
    for i, buckets in enumerate(((), (4, 12))):
        small_config.length_buckets = buckets
        directory = tmp_path / f"scores-{i}"
        results = evaluate(small_config, tmp_path, scores=directory)
        assert sorted(p.name for p in directory.iterdir()) == ["test.parquet", "valid.parquet"]
        tables.append(pq.read_table(directory / "test.parquet"))
    assert tables[0].schema.metadata[b"step"] == b"1"
    scores, again = (table.to_pandas() for table in tables)
    rows = log.loc[scores.row]
    assert scores.user.tolist() == rows.user.tolist()
    assert scores.request_time.tolist() == rows.ts.tolist() and scores.request.isna().all()
    assert scores.label.tolist() == (rows.rating >= 4).tolist()
    assert scores.record.tolist() == list(range(len(scores))) and not scores.position.any()
    auc = metrics.auc(scores.label, again.logit.to_numpy(np.float32))
    assert auc == results["test"]["auc"] and scores.probability.dtype == np.float32
    np.testing.assert_allclose(scores.logit, again.logit, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores.probability, 1 / (1 + np.exp(-scores.logit)), rtol=1e-6)

    monkeypatch.setattr(evaluation, "score_split", None)  # said before anything is scored
    with pytest.raises(FileExistsError):
        evaluate(small_config, tmp_path, scores=directory / "test.parquet")
    monkeypatch.setattr(keys, "KEYS", "none")
    with pytest.raises(DataError, match="prepare it again"):
        evaluate(small_config, tmp_path, scores=tmp_path / "scores")


def test_the_best_step_is_chosen_and_a_missing_one_named(small_config, tmp_path):
    with pytest.raises(FileNotFoundError, match="train it first"):
        evaluate(small_config, tmp_path)
    train(small_config, tmp_path)
    checkpoints = Checkpoints(tmp_path, read_only=True)
    for step, auc in ((3, 0.9), (6, 0.4)):
        checkpoints.metrics_path(step).write_text(json.dumps({"valid": {"auc": auc}}))
    evaluate(small_config, tmp_path, splits=("valid",))
    results = json.loads((tmp_path / "evaluation" / "valid" / "results.json").read_text())
    assert results["step"] == 3
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 4 .* \[3, 6\]"):
        evaluate(small_config, tmp_path, step=4)


def test_measures_of_an_earlier_run_are_not_taken_for_those_of_a_new_one(small_config, tmp_path):
    train(small_config, tmp_path)
    checkpoints = Checkpoints(tmp_path, read_only=True)
    evaluate(small_config, tmp_path, step=3)
    measured = {step: checkpoints.metrics(step) for step in (3, 6)}
    assert set(measured[3]) == {"valid", "test"}
    checkpoints.marker_path(6).touch()

    small_config.validate = False  # what is there already stays, as an evaluator left it
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    train(small_config, tmp_path)
    assert checkpoints.metrics(3) == measured[3] and checkpoints.metrics(6) == {}
    assert not checkpoints.marker_path(6).exists()
    shutil.rmtree(tmp_path / "checkpoints")
    small_config.seed = 5
    train(small_config, tmp_path)
    assert checkpoints.metrics(3) == checkpoints.metrics(6) == {}
    assert checkpoints.best("valid/auc") is None


def test_watching_sees_every_step_of_a_finished_run(small_config, tmp_path):
    small_config.validate = False
    train(small_config, tmp_path)
    evaluate(small_config, tmp_path, watch=True, splits=("valid",))
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert all("auc" in checkpoints.metrics(step)["valid"] for step in (3, 6))


def test_watching_goes_on_where_the_trainer_deletes(small_config, tmp_path, monkeypatch):
    small_config.validate, small_config.keep_last = False, 9
    small_config.checkpoint_steps = 2
    train(small_config, tmp_path)
    checkpoints = Checkpoints(tmp_path, read_only=True)
    score, scored = evaluation.score_split, []

    def prune(*arguments, **how):  # while the first step is read
        scored.append(max(s for s in checkpoints.steps() if checkpoints.is_being_evaluated(s)))
        shutil.rmtree(tmp_path / "checkpoints" / "4", ignore_errors=True)
        return score(*arguments, **how)

    monkeypatch.setattr(evaluation, "score_split", prune)
    evaluate(small_config, tmp_path, watch=True, splits=("valid",))
    assert scored == [2, 6]


def test_a_checkpoint_of_other_training_is_evaluated_and_of_another_model_not(
    small_config, tmp_path
):
    train(small_config, tmp_path)
    small_config.optimizer.learning_rate = 0.5  # no score depends on it
    evaluate(small_config, tmp_path, step=3, splits=("valid",))
    small_config.model.width = 16
    with pytest.raises(ConfigMismatch, match="model.width: checkpoint 8, config 16"):
        evaluate(small_config, tmp_path, step=3)


def test_a_baseline_of_other_rows_is_refused_before_scoring(small_config, tmp_path, monkeypatch):
    train(small_config, tmp_path / "run")
    monkeypatch.setattr(evaluation, "score_split", None)
    how = dict(splits=("valid",), relative_to=tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"results.json is not there; eval.py writes it"):
        evaluate(small_config, tmp_path / "run", **how)
    path = tmp_path / "other" / "evaluation" / "valid" / "results.json"
    write_json(path, {"split": "valid", "data_hash": "another"})
    with pytest.raises(ConfigError, match="cannot be compared: data_hash"):
        evaluate(small_config, tmp_path / "run", **how)
