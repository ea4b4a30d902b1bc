"""config.kernels: the whole step of every model with interpreted kernels equals that without, on a
mesh; with the TPU's it compiles for a slice; where there are none it is refused in one line."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ctr_jax.target_attention
import laser_jax.segmented
import sparsectr_jax.evo_attention
from baselines_jax import din, din_long
from ctr_jax import hlo, planner, sharding, steps
from ctr_jax.config import base_config, identity
from ctr_jax.data.expected import expected_spec
from kernels import ahead_of_time, dispatch
from tests.ctr_jax.test_planner import needs_tpu_compiler
from tests.kernels.cases import IMPLEMENTATIONS
from tests.laser_jax.test_model import small as small_laser
from tests.lrea_jax.cases import SPEC
from tests.lrea_jax.cases import small as small_lrea
from tests.sparsectr_jax.test_model import small as small_sparsectr

OPS = [
    (module, op, getattr(module, op))
    for module, op in (
        (sparsectr_jax.evo_attention.op, "behaviour_branches"),
        (sparsectr_jax.evo_attention.op, "candidate_branches"),
        (laser_jax.segmented, "segmented_target_attention"),
        (ctr_jax.target_attention, "absorbed_target_attention"),
    )
]
FEW = dict(width=4, num_heads=1, num_chunks=2, num_transition=1, local_window=2)
MODELS = {
    "SparseCTR": functools.partial(small_sparsectr, **FEW),
    "LASER, shared": functools.partial(small_laser, order="shared"),
    "LASER, per candidate": functools.partial(small_laser, order="per_candidate"),
    "LASER, softmax": functools.partial(small_laser, gate="softmax", order="per_candidate"),
    "LREA": small_lrea,
    "LREA, split": functools.partial(small_lrea, form="split"),
    "DIN-long": functools.partial(small_lrea, din_long),
}
FAST = tuple((name, "pallas_tpu") for name in ("LASER, per candidate", "LREA"))
BATCH, LENGTH = 32, 12


def config_of(model, **changes):
    """SGD, so that a parameter moves as its gradient says."""
    config = base_config()
    config.model = model
    config.update(batch_size=BATCH, eval_batch_size=BATCH, history_length=LENGTH, **changes)
    config.optimizer.name = config.table_optimizer.name = "sgd"
    config.optimizer.learning_rate = config.table_optimizer.learning_rate = 0.1
    config.table_optimizer.init_scale = 0.5
    if model.module == "lrea_jax.model":
        config.loss.weights.non_negativity = 0.3
    return config


def batch_of(mesh):
    rng = np.random.default_rng(0)
    batch = jax.tree.map(
        lambda x: (
            rng.integers(1, 9, x.shape) if x.dtype == np.int32 else rng.normal(size=x.shape)
        ).astype(x.dtype),
        steps.empty_batch(SPEC, BATCH, LENGTH),
    )
    lengths = rng.integers(0, LENGTH + 1, (BATCH, 1))
    ages = np.sort(rng.integers(1, 10**6, (BATCH, LENGTH)))[:, ::-1]
    batch = batch.replace(
        behaviour_mask=np.arange(LENGTH) >= LENGTH - lengths,
        behaviour_time=(1_500_000_000 - ages).astype(np.int32),
        request_time=np.full(BATCH, 1_500_000_000, np.int32),
        candidate_mask=rng.random(batch.candidate_mask.shape) < 0.8,
        label=rng.integers(0, 2, batch.label.shape).astype(np.float32),
    )
    return sharding.put_batch(batch, mesh)


@functools.cache
def start(name):
    """(experiment, state, batch) of a model on 4x2 devices."""
    mesh = sharding.make_mesh(data=4, table=2)
    with jax.set_mesh(mesh):
        experiment = steps.bind(config_of(MODELS[name]()), SPEC, mesh, total_steps=1)
        return experiment, steps.init_state(experiment, seed=0), batch_of(mesh)


def step(name):
    """(what the compiled step sends, state and scalars after it)."""
    experiment, state, batch = start(name)
    with jax.set_mesh(experiment.mesh):
        compiled = steps.train_step(experiment).lower(state, batch).compile()
        after = compiled(jax.tree.map(jnp.copy, state), batch)  # which is donated
        return hlo.traffic(compiled.as_text(), experiment.mesh.size), jax.device_get(after)


plain_step = functools.cache(step)


def interpret(monkeypatch, name):
    """Has models call the ops with interpreted kernels; returns the calls' names."""
    called = []
    for module, op, function in OPS:

        def run(*args, op=op, function=function, **kwargs):
            called.append(op)
            return function(*args, **kwargs, **IMPLEMENTATIONS[name])

        monkeypatch.setattr(module, op, run)
    return called


@pytest.mark.parametrize(
    "name, kernel",
    [
        pytest.param(name, kernel, marks=() if (name, kernel) in FAST else pytest.mark.slow)
        for name in MODELS
        for kernel in ("pallas_tpu", "pallas_gpu")
    ],
)
def test_a_step_with_kernels_is_that_without(name, kernel, monkeypatch):
    sent, expected = plain_step(name)
    called = interpret(monkeypatch, kernel)
    kernels_sent, got = step(name)
    assert called
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        size = max(np.abs(y).max(initial=0), 1e-2)
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * size, err_msg=str(path))
    # Nothing more is gathered; sums for an op's weights may be apart from the others'.
    assert sent.get("all-gather") == kernels_sent.get("all-gather")
    for found in (sent, kernels_sent):
        assert found.keys() - {"all-gather"} == {"all-reduce"}
    assert kernels_sent["all-reduce"][1] <= 1.5 * sent["all-reduce"][1]


def test_micro_batches_tiles_of_requests_and_scores_too(monkeypatch):
    config = config_of(small_sparsectr(**FEW, rows_per_tile=4), micro_batch=8)
    mesh = sharding.make_mesh(data=2, table=1)
    results = []
    with jax.set_mesh(mesh):
        experiment = steps.bind(config, SPEC, mesh, total_steps=1)
        weights, batch = steps.init_state(experiment, seed=0), batch_of(mesh)
        for kernel in ("xla", "pallas_tpu"):
            interpret(monkeypatch, kernel)
            compiled = steps.score_step(experiment).lower(weights, batch).compile()
            results.append(compiled(weights, batch))
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-5)


def test_a_run_may_go_on_with_other_kernels():
    config = config_of(small_lrea())
    before = identity(config, "data")
    config.kernels = "pallas"
    assert identity(config, "data") == before


@pytest.mark.parametrize(
    "kernels, says",
    [
        ("pallas", "for TPUs and GPUs, the target is a cpu; choose 'xla' or 'auto'"),
        ("fast", "kernels must be one of auto, xla, pallas, got 'fast'"),
    ],
)
def test_kernels_that_are_not_here_are_refused(kernels, says):
    config = config_of(small_lrea(), kernels=kernels)
    mesh = sharding.make_mesh(data=1)
    with jax.set_mesh(mesh), pytest.raises(dispatch.CannotRun, match=says):
        steps.bind(config, SPEC, mesh, total_steps=1)
    with pytest.raises(planner.CannotPlan, match=says):
        planner.make_plan(config, SPEC, "cpu:2")


@needs_tpu_compiler
def test_a_plan_with_kernels_that_cannot_run_is_one_line():
    says = "what was called has no kernels; choose 'xla' or 'auto'"
    with pytest.raises(planner.CannotPlan, match=f"--plan=v5e:2x2: .*{says}"):
        planner.make_plan(config_of(din.default_config(), kernels="pallas"), SPEC, "v5e:2x2")


@needs_tpu_compiler
@pytest.mark.slow
def test_tiles_of_fewer_requests_than_devices_take_kernels_too():
    config = config_of(small_sparsectr(rows_per_tile=2), kernels="pallas")
    planner.make_plan(
        config, SPEC, "v5e:2x2", ahead_of_time.LEAST_EFFORT
    )  # had no kernel run, it would have been refused


@needs_tpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize("page", ["sparsectr_alibaba", "lrea_industrial", "laser_alibaba"])
def test_the_papers_settings_compile_for_a_slice_with_kernels(page):
    config = importlib.import_module(f"configs.{page}").get_config()
    config.kernels = "pallas"
    spec, _ = expected_spec(config, {})
    plan = planner.make_plan(config, spec, "v5e:2x2", ahead_of_time.LEAST_EFFORT)
    assert plan.fits, plan.held  # had no kernel run, it would have been refused
