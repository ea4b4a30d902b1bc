import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctr_jax import steps
from ctr_jax.config import ConfigError, base_config
from ctr_jax.features import DataColumn, DataSpec
from ctr_jax.optimizers import decayed, dense_optimizer, resolve_steps, schedule
from ctr_jax.sharding import make_mesh, path_name

UNIT = dict(batch_size=100, examples=1050)


@pytest.mark.parametrize(
    "fields, number",
    [
        ({"total_steps": 7}, 7),
        ({"total_epochs": 2.0}, 21),
        ({"total_epochs": 1.0}, 11),  # the last, partial batch of the epoch is trained as well
        ({"total_examples": 950}, 10),
        ({"total_epochs": 0.1}, 2),
    ],
)
def test_durations(fields, number):
    assert resolve_steps("total", fields, **UNIT) == number


def test_durations_are_of_the_number_as_it_is_written():
    # In floating point .07 * 100 is a little more than 7, and 1.1 * 10 than 11.
    for epochs, number in ((0.07, 7), (1.1, 110), (0.071, 8)):
        fields = {"total_epochs": epochs}
        assert resolve_steps("total", fields, batch_size=10, examples=1000) == number


@pytest.mark.parametrize(
    "percent, total, number", [(25.0, 40, 10), (0.001, 40, 1), (7.0, 100, 7), (7.1, 100, 8)]
)
def test_durations_in_percent_of_the_total(percent, total, number):
    assert resolve_steps("log", {"log_percent": percent}, **UNIT, total=total) == number


@pytest.mark.parametrize("fields", [{"total_steps": -1}, {"total_epochs": -0.5}])
def test_a_duration_is_positive(fields):
    with pytest.raises(ConfigError, match="must be positive"):
        resolve_steps("total", fields, **UNIT)


@pytest.mark.parametrize("fields", [{}, {"total_steps": 1, "total_epochs": 1.0}])
def test_a_duration_is_given_exactly_once(fields):
    with pytest.raises(ValueError, match="exactly one of total_steps, total_epochs"):
        resolve_steps("total", fields, **UNIT)


@pytest.mark.parametrize("kind, last", [("constant", 2.0), ("cosine", 0.2), ("linear", 0.2)])
def test_schedules_warm_up_and_end_where_they_should(kind, last):
    rate = schedule(
        dict(learning_rate=2.0, schedule=kind, warmup_steps=10, final_fraction=0.1), 100
    )
    np.testing.assert_allclose(rate(0), 0.2, rtol=1e-6)
    np.testing.assert_allclose(rate(9), 2.0, rtol=1e-6)
    np.testing.assert_allclose(rate(100), last, rtol=1e-6)
    np.testing.assert_allclose(rate(5000), last, rtol=1e-6)


def test_cosine_is_half_way_down_in_the_middle():
    rate = schedule(dict(learning_rate=2.0, schedule="cosine"), 100)
    np.testing.assert_allclose(rate(50), 1.0, rtol=1e-6)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="schedule 'step'"):
        schedule(dict(learning_rate=1.0, schedule="step"), 1)
    with pytest.raises(ValueError, match="optimizer 'lion'"):
        dense_optimizer(dict(name="lion", learning_rate=1.0, schedule="constant"), 1)
    with pytest.raises(ValueError, match="weight_decay needs"):
        dense_optimizer(
            dict(name="adam", learning_rate=1.0, schedule="constant", weight_decay=0.1), 1
        )


def parameters_of(module, **changes):
    """{path: shape} of a model at its own size, and which of its parameters decay."""
    groups = [("user", "u"), ("context", "p"), ("behaviour", "i"), ("candidate", "i")]
    columns = tuple(DataColumn(group, name, "id", name) for group, name in groups)
    spec = DataSpec("data", columns, dict(u=1000, p=10, i=1000), 4)
    config = base_config()
    config.model = importlib.import_module(module).default_config()
    config.model.update(changes)
    config.history_length, config.batch_size, config.eval_batch_size = 40, 8, 8
    mesh = make_mesh(data=1, table=1)
    with jax.set_mesh(mesh):
        shapes = steps.state_shapes(steps.bind(config, spec, mesh, 1))["model"]
    leaves = jax.tree_util.tree_leaves_with_path
    names = {path_name(path): x.shape for path, x in leaves(shapes)}
    return names, {path_name(path): x for path, x in leaves(decayed(shapes))}


@pytest.mark.parametrize(
    "module, changes, spared",
    [
        ("sparsectr_jax.model", {}, ["requests/block_0/attention/slopes"]),
        ("sparsectr_jax.model", {"encoding": "hstu"}, ["requests/block_0/attention/position"]),
        ("sparsectr_jax.model", {"encoding": "t5"}, ["requests/block_0/attention/t5"]),
        ("laser_jax.model", {}, ["interest/candidates/fusion/block_0/in_bias",
                                 "interest/candidates/fusion/block_1/out_bias"]),
        ("lrea_jax.model", {}, []),
        ("baselines_jax.din", {}, ["interest/DINAttention_0/alpha_0"]),
        ("baselines_jax.bst", {}, []),
        ("baselines_jax.hstu", {}, ["interest/layer_0/position", "interest/layer_1/time"]),
        ("baselines_jax.suan", {}, ["interest/block_0/self/time"]),
        ("baselines_jax.longer", {}, ["interest/cls"]),
    ],
)  # fmt: skip
def test_weight_decay_takes_weights_whatever_their_shape(module, changes, spared):
    shapes, decays = parameters_of(module, **changes)
    added = [n for n in shapes if n.rpartition("/")[2].endswith(("bias", "scale"))]
    assert added and not any(decays[name] for name in (*added, *spared))
    weights = [n for n in shapes if n.rpartition("/")[2].endswith(("kernel", "out", "w_comp"))]
    assert weights and all(decays[name] for name in weights)
    # Beside biases, scales and what is named, nothing of several axes is spared.
    others = {n for n in shapes if not decays[n] and len(shapes[n]) > 1} - {*added}
    assert all(name.endswith(("slopes", "t5")) for name in others)


def test_weight_decay_moves_what_decays():
    config = dict(name="adamw", learning_rate=0.1, schedule="constant", b1=0.9, b2=0.999,
                  eps=1e-8, weight_decay=0.5)  # fmt: skip
    optimizer = dense_optimizer(config, 10)
    params = {"out": jnp.ones((2,)), "slopes": jnp.ones((2, 2)), "logit": {"bias": jnp.ones(1)}}
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    np.testing.assert_allclose(updates["out"], -0.05, rtol=1e-6)
    assert not updates["slopes"].any() and not updates["logit"]["bias"].any()


def test_adagrad_starts_from_what_the_page_says():
    for initial in (0.1, 4.0):
        config = base_config().optimizer.to_dict() | dict(name="adagrad", learning_rate=1.0)
        optimizer = dense_optimizer(config | dict(initial_accumulator=initial), 1)
        params = {"kernel": jnp.zeros(1)}
        updates, _ = optimizer.update({"kernel": jnp.ones(1)}, optimizer.init(params), params)
        np.testing.assert_allclose(updates["kernel"], -1 / np.sqrt(initial + 1), rtol=1e-5)
