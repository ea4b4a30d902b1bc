import jax.numpy as jnp
import numpy as np
import pytest

from ctr_jax.config import ConfigError
from ctr_jax.optimizers import dense_optimizer, resolve_steps, schedule

UNIT = dict(batch_size=100, examples=1050)


@pytest.mark.parametrize(
    "fields, steps",
    [
        ({"total_steps": 7}, 7),
        ({"total_epochs": 2.0}, 21),
        ({"total_epochs": 1.0}, 11),  # the last, partial batch of the epoch is trained as well
        ({"total_examples": 950}, 10),
    ],
)
def test_durations(fields, steps):
    assert resolve_steps("total", fields, **UNIT) == steps


@pytest.mark.parametrize(
    "percent, total, steps", [(25.0, 40, 10), (0.001, 40, 1), (7.0, 100, 7), (7.1, 100, 8)]
)
def test_durations_in_percent_of_the_total(percent, total, steps):
    assert resolve_steps("log", {"log_percent": percent}, **UNIT, total=total) == steps


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


def test_weight_decay_spares_vectors():
    config = dict(name="adamw", learning_rate=0.1, schedule="constant", b1=0.9, b2=0.999,
                  eps=1e-8, weight_decay=0.5)  # fmt: skip
    optimizer = dense_optimizer(config, 10)
    params = {"matrix": jnp.ones((2, 2)), "slopes": jnp.ones((2,))}
    zeros = {"matrix": jnp.zeros((2, 2)), "slopes": jnp.zeros((2,))}
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["matrix"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["slopes"], 0.0)
