"""The whole loop on a small log: resume, refusal, meshes, micro-batches."""

import json
import logging
import os
import threading

import jax
import numpy as np
import pytest

from ctr_jax import embedding, manifests, sharding, steps
from ctr_jax.checkpoints import Checkpoints, ConfigMismatch
from ctr_jax.config import ConfigError
from ctr_jax.data import open_data, pipeline
from ctr_jax.training import NonFiniteLoss, last_words, train


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

    def watched(*arguments):
        step = train_step(*arguments)

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


@pytest.mark.parametrize("metric", ["valid/auc", "-valid/logloss"])
def test_patience_ends_a_run_and_a_resumed_one_at_the_same_step(
    small_config, tmp_path, monkeypatch, metric
):
    # By checkpoint: the second is the best, the third as good, the fourth and fifth are worse.
    script = {1: 0.6, 2: 0.7, 3: 0.7, 4: 0.65, 5: 0.5, 6: 0.9}
    step_of = lambda state: int(state["step"])  # noqa: E731
    monkeypatch.setattr(
        "ctr_jax.training._validate",
        lambda config, data, mesh, score_step, state: {
            "auc": script[step_of(state)], "logloss": 1 - script[step_of(state)]
        },
    )  # fmt: skip
    small_config.checkpoint_steps, small_config.keep_last = 1, 6
    small_config.best_metric, small_config.patience = metric, 3
    done = train(small_config, tmp_path / "whole")
    assert (done["step"], done["no_better_since"]) == (5, 2)
    assert "no checkpoint is better than that of step 2" in last_words(done, tmp_path)
    assert json.loads((tmp_path / "whole" / "train_done.json").read_text()) == done
    assert train(small_config, tmp_path / "whole") == done  # given again: over

    small_config.total_steps = 4
    assert "no_better_since" not in train(small_config, tmp_path / "parts")
    small_config.total_steps = 6
    assert train(small_config, tmp_path / "parts")["step"] == 5
    small_config.patience = 4
    done = train(small_config, tmp_path / "parts")
    assert done["step"] == 6 and "no_better_since" not in done
    small_config.validate = False
    with pytest.raises(ConfigError, match="patience needs config.validate"):
        train(small_config, tmp_path / "none")


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
