"""config.model.remat: the same step, with the activations of layers made anew."""

import importlib

import jax
import numpy as np
import pytest

from ctr_jax import flops, sharding, steps
from ctr_jax.data.expected import expected_spec

PAGES = {
    "SparseCTR": ("sparsectr_alibaba", "demo"),
    **{row: ("laser_alibaba", f"{row},demo") for row in ("laser", "hstu", "transformer")},
}


def bind(page, variant, remat):
    """The experiment at a small size, and its mesh."""
    config = importlib.import_module(f"configs.{page}").get_config(variant)
    config.batch_size, config.eval_batch_size, config.history_length = 8, 8, 48
    config.model.remat, config.model.num_layers = remat, 2
    if "length" in config.model:
        config.model.length = 48
    spec, _ = expected_spec(config, {})
    mesh = sharding.make_mesh(data=1, table=1, devices=jax.devices()[:1])
    return steps.bind(config, spec, mesh, total_steps=1), mesh


def checkpoints(jaxpr):
    """How many regions are made anew, none of them inside a scan (tiles always are)."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("checkpoint", "remat2"):
            total += 1
        elif equation.primitive.name != "scan":
            for value in equation.params.values():
                total += sum(checkpoints(body) for body in flops._bodies(value))
    return total


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES.keys())
def test_remat_makes_layers_anew(page):
    counts = []
    for remat in (False, True):
        experiment, mesh = bind(*page, remat)
        with jax.set_mesh(mesh):
            arguments = steps.state_shapes(experiment), steps.empty_batch(experiment.spec, 8, 48)
            counts.append(checkpoints(steps.train_step(experiment).trace(*arguments).jaxpr.jaxpr))
    assert counts[1] > counts[0]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES.keys())
def test_remat_changes_no_value(page):
    results = []
    for remat in (False, True):
        experiment, mesh = bind(*page, remat)
        with jax.set_mesh(mesh):
            state = steps.init_state(experiment, seed=0)
            draw = np.random.default_rng(0).integers
            batch = jax.tree.map(
                lambda x, draw=draw: draw(1, 5, x.shape).astype(x.dtype),
                steps.empty_batch(experiment.spec, 8, 48),
            )
            results.append(jax.device_get(steps.train_step(experiment)(state, batch)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), *results)
