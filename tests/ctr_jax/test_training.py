"""The whole loop on a small log: resume, refusal, meshes, evaluation."""

import json
import logging
import os
import shutil
import threading

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from ctr_jax import embedding, evaluation, manifests, sharding, steps
from ctr_jax.checkpoints import Checkpoints, ConfigMismatch
from ctr_jax.config import ConfigError, identity
from ctr_jax.data import open_data, pipeline
from ctr_jax.evaluation import evaluate
from ctr_jax.training import NonFiniteLoss, train
from ctr_jax.writers import write_json


def final_state(config, workdir, step=None):
    data = open_data(config)
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        experiment = steps.bind(config, data.spec, mesh, 1)
        checkpoints = Checkpoints(workdir, read_only=True)
        return jax.device_get(checkpoints.restore(steps.state_shapes(experiment), None, step=step))


def log_lines(workdir):
    return [json.loads(line) for line in (workdir / "train.jsonl").read_text().splitlines()]


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(small_config, tmp_path):
    done = train(small_config, tmp_path / "whole")
    assert done["step"] == 6 and 0 <= done["valid"]["auc"] <= 1
    small_config.total_steps = 3
    train(small_config, tmp_path / "parts")
    small_config.total_steps = 6
    train(small_config, tmp_path / "parts")
    whole, parts = (final_state(small_config, tmp_path / name) for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    logs = [
        [(r["step"], r["loss"]) for r in log_lines(tmp_path / name) if "loss" in r]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1] and [s for s, _ in logs[0]] == [2, 3, 4, 6]


def test_training_goes_on_while_a_save_is_written_and_the_save_is_of_its_step(
    small_config, tmp_path, monkeypatch
):
    # Nothing of the arrays of step 2 is written before the step after it has taken their place.
    small_config.checkpoint_steps, small_config.total_steps, small_config.keep_last = 2, 4, 6
    gone_on, waited = threading.Event(), []
    mkdir, train_step = os.mkdir, steps.train_step

    def late_mkdir(path, *args, **kwargs):
        if str(path).endswith(("weights.orbax-checkpoint-tmp", "optimizer.orbax-checkpoint-tmp")):
            waited.append(gone_on.wait(20))
        return mkdir(path, *args, **kwargs)

    def watched(experiment):
        step = train_step(experiment)

        def run(state, batch):
            third = int(state["step"]) == 2
            result = jax.block_until_ready(step(state, batch))
            if third:
                assert not waited and not (tmp_path / "often" / "checkpoints" / "2").exists()
                gone_on.set()
            return result

        return run

    monkeypatch.setattr(os, "mkdir", late_mkdir)
    monkeypatch.setattr(steps, "train_step", watched)
    train(small_config, tmp_path / "often")
    monkeypatch.undo()
    assert waited == [True] * 4
    for step in (2, 4):  # the last is waited for
        assert manifests.exists(tmp_path / "often" / "checkpoints" / str(step))
    for step in (2, 4):
        small_config.total_steps = small_config.checkpoint_steps = step
        train(small_config, tmp_path / f"once{step}")
        states = [final_state(small_config, tmp_path / d, step) for d in ("often", f"once{step}")]
        jax.tree.map(np.testing.assert_array_equal, *states)


def test_another_model_data_or_optimizer_is_refused(small_config, tmp_path):
    small_config.total_steps = 2
    train(small_config, tmp_path)
    small_config.model.width = 4
    with pytest.raises(ConfigMismatch, match="model.width: checkpoint 8, config 4"):
        train(small_config, tmp_path)
    small_config.model.width = 8
    small_config.optimizer.learning_rate = 0.5
    with pytest.raises(ConfigMismatch, match="optimizer.learning_rate"):
        train(small_config, tmp_path)
    small_config.optimizer.learning_rate = 1e-3
    small_config.data.time_floor = 3600
    with pytest.raises(ConfigMismatch, match="data: checkpoint"):
        train(small_config, tmp_path)


def test_a_non_finite_loss_names_step_and_requests_and_poisons_no_checkpoint(
    small_config, tmp_path
):
    small_config.total_steps = 3
    train(small_config, tmp_path)
    good = final_state(small_config, tmp_path)
    small_config.total_steps = 8

    def poison(state):
        return {**state, "model": jax.tree.map(lambda x: x + np.nan, state["model"])}

    original = Checkpoints.restore
    Checkpoints.restore = lambda *args, **kwargs: poison(original(*args, **kwargs))
    try:
        with pytest.raises(NonFiniteLoss) as error:
            train(small_config, tmp_path)
    finally:
        Checkpoints.restore = original
    requests = open_data(small_config).split("train")
    batch = next(
        pipeline.train_batches(requests, batch_size=64, history_length=12, seed=0, start_step=3)
    )
    assert "at step 4" in str(error.value)
    assert str(batch.request_id[:8].tolist()) in str(error.value)
    jax.tree.map(np.testing.assert_array_equal, final_state(small_config, tmp_path), good)


def test_parameters_that_leave_the_numbers_are_not_saved(small_config, tmp_path):
    small_config.optimizer.update(dict(name="sgd", learning_rate=1e30))
    small_config.checkpoint_steps = 1
    with pytest.raises(NonFiniteLoss, match="norm_[a-z]* is (inf|nan) at step 1"):
        train(small_config, tmp_path)
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.parametrize("table", [1, 2])
@pytest.mark.parametrize("dense", [True, False])
def test_tables_that_leave_the_numbers_are_not_saved(
    small_config, tmp_path, monkeypatch, dense, table
):
    # Loss and gradients are of before the update: only the rows themselves show it.
    small_config.table_optimizer.update(dict(name="sgd", learning_rate=3e38, weight_decay=1e4))
    small_config.checkpoint_steps, small_config.mesh.table = 1, table
    monkeypatch.setattr(embedding, "takes_dense_path", lambda rows, ids: dense)
    with pytest.raises(NonFiniteLoss, match="norm_rows is (inf|nan) at step 1"):
        train(small_config, tmp_path)
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.parametrize("data, table", [(8, 1), (4, 2), (2, 4)])
def test_meshes_agree_with_one_device(small_config, data, table):
    check_mesh(small_config, data, table)


@pytest.mark.slow
@pytest.mark.parametrize("data, table", [(8, 1), (2, 4)])
def test_meshes_agree_with_one_device_on_sparsectr(small_config, small_sparsectr, data, table):
    small_config.model = small_sparsectr
    check_mesh(small_config, data, table)


def check_mesh(small_config, data, table):
    loaded = open_data(small_config)
    batches = pipeline.train_batches(
        loaded.split("train"), batch_size=64, history_length=12, seed=0
    )
    batches = [next(batches) for _ in range(3)]
    small_config.clip_norm = 0.1

    def run(mesh):
        with jax.set_mesh(mesh):
            experiment = steps.bind(small_config, loaded.spec, mesh, 10)
            state, losses = steps.init_state(experiment, 0), []
            step = steps.train_step(experiment)
            for batch in batches:
                state, scalars = step(state, sharding.put_batch(batch, mesh))
                losses.append(float(scalars["loss"]))
            weights = {k: state[k] for k in ("tables", "model", "model_state")}
            logits = steps.score_step(experiment)(weights, sharding.put_batch(batches[0], mesh))
            return losses, np.asarray(logits), jax.device_get(state["tables"])

    one = run(sharding.make_mesh(1, 1))
    many = run(sharding.make_mesh(data, table))
    np.testing.assert_allclose(many[0], one[0], rtol=1e-5)
    np.testing.assert_allclose(many[1], one[1], rtol=1e-4, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), many[2], one[2]
    )


@pytest.mark.slow
def test_micro_batches_add_up_to_the_batch_on_sparsectr(small_config, small_sparsectr):
    small_config.model = small_sparsectr
    check_micro_batches(small_config, 4, 4)


@pytest.mark.parametrize("micro_batch, data", [(16, 1), (4, 4)])
def test_micro_batches_add_up_to_the_batch(small_config, micro_batch, data):
    check_micro_batches(small_config, micro_batch, data)


def check_micro_batches(small_config, micro_batch, data):
    loaded = open_data(small_config)
    batch = next(
        pipeline.train_batches(loaded.split("train"), batch_size=64, history_length=12, seed=0)
    )
    small_config.eval_batch_size = 64
    small_config.clip_norm = 0.1

    def run(config, mesh):
        with jax.set_mesh(mesh):
            experiment = steps.bind(config, loaded.spec, mesh, 10)
            state = steps.init_state(experiment, 0)
            device_batch = sharding.put_batch(batch, mesh)
            weights = {k: state[k] for k in ("tables", "model", "model_state")}
            logits = np.asarray(steps.score_step(experiment)(weights, device_batch))
            state, scalars = steps.train_step(experiment)(state, device_batch)
            return logits, jax.device_get(scalars), jax.device_get(state["tables"])

    whole = run(small_config, sharding.make_mesh(1, 1))
    small_config.micro_batch = micro_batch
    parts = run(small_config, sharding.make_mesh(data, 1))
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-4, atol=1e-6)
    for name in ("loss", "logloss", "norm_gradients"):
        np.testing.assert_allclose(parts[1][name], whole[1][name], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), parts[2], whole[2]
    )


def test_micro_batches_that_do_not_fit_are_refused(small_config):
    loaded = open_data(small_config)
    mesh = sharding.make_mesh(1, 1)
    small_config.micro_batch = 5
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="micro-batches of 5 requests"):
        steps.train_step(steps.bind(small_config, loaded.spec, mesh, 1))
    small_config.micro_batch = 16
    small_config.model.activation = "dice"
    with jax.set_mesh(mesh):
        experiment = steps.bind(small_config, loaded.spec, mesh, 1)
        with pytest.raises(ConfigError, match="batch statistics"):
            steps.train_step(experiment)  # before a step is traced


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


def test_a_finished_run_given_again_keeps_what_it_took(small_config, tmp_path):
    small_config.validate = False
    done = train(small_config, tmp_path)
    path = tmp_path / "train_done.json"
    before = json.loads(path.read_text())
    assert done == before and done["seconds"] > 0
    assert train(small_config, tmp_path) == json.loads(path.read_text()) == before
    small_config.validate = True  # what was not measured is
    again = train(small_config, tmp_path)
    assert again.pop("valid")["auc"] > 0 and again.items() <= before.items()
    path.unlink()  # killed before it was written: an evaluator waits for it
    assert train(small_config, tmp_path)["step"] == json.loads(path.read_text())["step"] == 6
    small_config.total_steps = 7
    assert train(small_config, tmp_path)["step"] == json.loads(path.read_text())["step"] == 7


def test_another_end_of_a_decaying_schedule_is_said(small_config, tmp_path, caplog):
    small_config.validate, small_config.total_steps = False, 2
    small_config.optimizer.schedule = "cosine"
    train(small_config, tmp_path)
    small_config.total_steps = 4
    with caplog.at_level(logging.WARNING):
        train(small_config, tmp_path)
        (line,) = [r.getMessage() for r in caplog.records if "schedule" in r.getMessage()]
        assert "optimizer: schedule 'cosine' ends at step 4 now, at 2 before" in line
        caplog.clear()
        train(small_config, tmp_path)
    assert "schedule" not in caplog.text


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


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("best_metric", "valid/AUC", "choose one of valid/auc"),
        ("best_metric", "test/auc", "choose one of valid/auc"),
        ("best_metric", "valid/logloss", "choose one of .*-valid/logloss"),
        ("slices", ("candidate/nope",), "the columns are candidate/category"),
        ("dtype", "bf16", "choose one of float32"),
        ("keep_last", 0, "must be 1 or more"),
        ("batch_size", 0, "must be 1 or more"),
        ("micro_batch", -16, "must be 0 or more"),
        ("micro_batch", 5, "does not divide into micro-batches"),
        ("length_buckets", (6,), "the last of them history_length"),
        ("mesh.data", 9, "there are 8"),
        ("mesh.data", 0, "must be 1 or more, or -1"),
        ("mesh.table", 0, "mesh.table is 0; it must be 1 or more"),
        ("mesh.table", -1, "must be 1 or more"),
        ("model.base_rate", 0.0, "more than 0 and less than 1"),
        ("clip_norm", -1.0, "must be 0 or more"),
        ("clip_norm", float("nan"), "must be 0 or more"),
        ("optimizer.learning_rate", -1.0, "optimizer.learning_rate is -1.0; it must be 0 or more"),
        ("optimizer.b1", 1.5, "0 or more and less than 1"),
        ("table_optimizer.b2", 1.0, "0 or more and less than 1"),
        ("table_optimizer.eps", -1.0, "must be 0 or more"),
        ("table_optimizer.init_scale", -1.0, "must be 0 or more"),
        ("table_optimizer.final_fraction", 1.5, "from 0 to 1"),
        ("model.module", "ctr_jax.head", "is no model: it has no build"),
        ("model.module", "", "Empty module name"),
        ("model.module", "baselines_jax.dinn", "No module named"),
        ("model.module", "lrea_jax.model", "config.model has no field"),
        ("loss.weights", ConfigDict({"nothing": 1.0}), "has .'nothing'., the model the losses ..;"),
        ("learning_rate", 0.1, "config has no field 'learning_rate'"),
        ("optimizer.lr", 0.1, "config.optimizer has no field 'lr'"),
        ("model.embeding_width", 4, "did you mean embedding_width"),
    ],
)
def test_a_page_that_cannot_be_is_refused_before_anything_is_saved(
    small_config, tmp_path, field, value, says
):
    *groups, name = field.split(".")
    group = small_config
    for each in groups:
        group = group[each]
    group[name] = value
    with pytest.raises(ConfigError, match=says):
        train(small_config, tmp_path)
    assert not list(tmp_path.glob("checkpoints/*"))


def test_values_that_cannot_be_are_refused_before_data_are_read(small_config):
    small_config.data.builder = "none"
    for field, value in (("clip_norm", -1.0), ("best_metric", "test/auc")):
        config = small_config.copy_and_resolve_references()
        config[field] = value
        with pytest.raises(ConfigError, match=field):
            train(config, "nowhere")


@pytest.mark.slow
def test_bfloat16_activations_leave_tables_and_moments_float32(
    small_config, small_sparsectr, tmp_path
):
    small_config.model = small_sparsectr
    small_config.dtype = "bfloat16"
    small_config.total_steps = 2
    done = train(small_config, tmp_path)
    assert np.isfinite(done["valid"]["logloss"])
    state = final_state(small_config, tmp_path)
    kinds = {
        x.dtype for k in ("tables", "table_opt", "model", "opt") for x in jax.tree.leaves(state[k])
    }
    assert kinds <= {np.dtype("float32"), np.dtype("int32")}


def test_identity_covers_what_a_run_is(small_config):
    before = identity(small_config, "hash")
    small_config.total_steps = 1000
    small_config.mesh.data = 4
    small_config.data.raw_dir = "elsewhere"
    assert identity(small_config, "hash") == before
    small_config.batch_size = 32
    assert identity(small_config, "hash") != before
    assert identity(small_config, "other") != before


def test_what_only_speed_depends_on_is_no_part_of_a_run(small_config, tmp_path):
    """Nor is it where a checkpoint from before was saved with it."""
    small_config.total_steps, small_config.validate = 2, False
    train(small_config, tmp_path)
    for field in ("tile_bytes", "rows_per_tile"):
        small_config.model[field] = 1 << 20
    assert "tile_bytes" not in identity(small_config, "hash")["model"]
    (path,) = (tmp_path / "checkpoints" / "2" / "identity").glob("metadata*")
    saved = json.loads(path.read_text())
    saved["model"]["tile_bytes"] = 0
    path.write_text(json.dumps(saved))
    assert "tile_bytes" not in Checkpoints(tmp_path, read_only=True).identity(2)["model"]
