"""Activations in bfloat16: which products are, what stays float32, and what it changes."""

import collections
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baselines_jax import hstu
from ctr_jax import embedding, flops, precision, query_tiles, sharding, steps
from ctr_jax.data.expected import expected_spec

PAGES = {
    "SparseCTR": ("sparsectr_alibaba", "demo"),
    "LREA, decompressed": ("lrea_amazon", ""),
    "DIN-long": ("din_amazon", ""),
    "DIN": ("din_alibaba", "demo"),
    "LASER without context columns": ("laser_movielens", "laser"),
    **{row: ("laser_alibaba", f"{row},demo") for row in ("laser", "twin", "hstu", "transformer")},
}


def experiment_of(page, variant, dtype):
    config = importlib.import_module(f"configs.{page}").get_config(variant)
    config.dtype, config.batch_size, config.eval_batch_size, config.history_length = dtype, 8, 8, 64
    if "length" in config.model:
        config.model.length = 64
    if "long_length" in config.model:
        config.model.short_length, config.model.long_length, config.model.rank = 8, 56, 8
    spec, _ = expected_spec(config, {})
    mesh = sharding.make_mesh(data=1, table=1, devices=jax.devices()[:1])
    return steps.bind(config, spec, mesh, total_steps=1), mesh


def products(jaxpr, times=1, totals=None):
    """{type of the first operand: multiply-adds} of every product of matrices."""
    totals = collections.Counter() if totals is None else totals
    for equation in jaxpr.eqns:
        rounds = times * equation.params.get("length", 1)
        for value in equation.params.values():
            for body in flops._bodies(value):
                products(body, rounds if equation.primitive.name == "scan" else times, totals)
        if equation.primitive.name == "dot_general":
            left = equation.invars[0].aval
            (contracted, _), _ = equation.params["dimension_numbers"]
            size = math.prod(equation.outvars[0].aval.shape)
            totals[str(left.dtype)] += times * size * math.prod(left.shape[i] for i in contracted)
    return totals


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES.keys())
def test_products_are_bfloat16_and_the_state_is_not(page):
    experiment, mesh = experiment_of(*page, "bfloat16")
    with jax.set_mesh(mesh):
        state = steps.state_shapes(experiment)
        batch = steps.empty_batch(experiment.spec, 8, 64)
        traced = steps.train_step(experiment).trace(state, batch)
    found = products(traced.jaxpr.jaxpr)
    least = 0.6 if page[0] in ("lrea_amazon", "din_amazon") else 0.9  # LREA's unit is float32
    assert found["bfloat16"] > least * sum(found.values()), found
    new_state, scalars = traced.out_info
    kinds = {str(x.dtype) for x in jax.tree.leaves((new_state, scalars))}
    assert kinds <= {"float32", "int32"}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES.keys())
def test_scores_differ_by_rounding_alone(page):
    logits = {}
    for dtype in ("float32", "bfloat16"):
        experiment, mesh = experiment_of(*page, dtype)
        with jax.set_mesh(mesh):
            state = steps.init_state(experiment, seed=0)
            draw = np.random.default_rng(0).integers
            batch = jax.tree.map(
                lambda x, draw=draw: draw(1, 5, x.shape).astype(x.dtype),
                steps.empty_batch(experiment.spec, 8, 64),
            )
            state["tables"] = jax.tree.map(lambda x: 20 * x, state["tables"])
            logits[dtype] = np.asarray(steps.score_step(experiment)(state, batch))
    assert logits["bfloat16"].dtype == np.float32
    spread = np.ptp(logits["float32"])
    assert spread > 0
    np.testing.assert_allclose(logits["bfloat16"], logits["float32"], atol=0.1 * spread + 1e-3)


def test_what_is_rounded():
    tree = {"block": {"slopes": jnp.ones(3), "kernel": jnp.full((2, 2), 1 / 3)},
            "logit": {"bias": jnp.ones(1)}, "ids": jnp.arange(3)}  # fmt: skip
    rounded = precision.rounded(tree, "bfloat16")
    assert rounded["block"]["kernel"].dtype == jnp.bfloat16
    assert rounded["block"]["slopes"].dtype == rounded["logit"]["bias"].dtype == jnp.float32
    assert rounded["ids"].dtype == jnp.int32
    gradient = jax.grad(
        lambda t: precision.rounded(t, "bfloat16")["kernel"].astype(jnp.float32).sum()
    )(tree["block"])
    assert gradient["kernel"].dtype == jnp.float32
    with pytest.raises(ValueError, match="choose one of float32, bfloat16"):
        precision.rounded(tree, "float16")


def test_logits_of_bfloat16_tokens_are_float32():
    rng = np.random.default_rng(0)
    k, q = (jnp.asarray(3 * rng.normal(size=(2, 16, n)), jnp.bfloat16) for n in (7, 4))
    expected = np.einsum("hks,hkt->hst", np.asarray(k, np.float64), np.asarray(q, np.float64))
    np.testing.assert_allclose(query_tiles.logits(k, q), expected, rtol=1e-5, atol=1e-5)
    found = hstu._weights(k, q, jnp.float32(1.0), True)
    expected = (expected + 1) / (1 + np.exp(-expected - 1))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_popular_row_of_bfloat16_takes_all_its_gradient():
    rows = {"kind": jnp.ones((3, 2), jnp.bfloat16)}
    slots = {"kind": jnp.ones((32, 100), jnp.int32)}
    total = lambda rows: jnp.sum(embedding.sum_of_rows(rows, slots).astype(jnp.float32))  # noqa: E731
    gradient = jax.grad(total)(rows)["kind"]
    np.testing.assert_array_equal(gradient, [[0, 0], [3200, 3200], [0, 0]])
