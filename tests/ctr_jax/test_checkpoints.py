import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctr_jax.checkpoints import (
    MARKER_SECONDS,
    Checkpoints,
    ConfigMismatch,
    refuse_mismatch,
)
from ctr_jax.measures import best_step, steps_to_delete

IDENTITY = {"data": "abc", "model": {"width": 32, "branches": [1, 2]}}


def make_state(step: int) -> dict:
    value = jnp.full((4,), float(step))
    return {
        "tables": {"item": value},
        "table_opt": {"item": value + 1},
        "model": {"w": value + 2},
        "model_state": {},
        "opt": [value + 3, jnp.asarray(step)],
        "step": jnp.asarray(step, jnp.int32),
    }


def shapes(state) -> dict:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def test_saved_state_comes_back_and_weights_come_alone(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(3), IDENTITY)
    checkpoints.save(make_state(7), IDENTITY)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [3, 7]
    wanted = shapes(make_state(0))
    restored = checkpoints.restore(wanted, IDENTITY)
    jax.tree.map(np.testing.assert_array_equal, restored, make_state(7))
    weights = {k: wanted[k] for k in ("tables", "model", "model_state", "step")}
    restored = checkpoints.restore(weights, None, step=3)
    assert set(restored) == set(weights)
    np.testing.assert_array_equal(restored["model"]["w"], make_state(3)["model"]["w"])
    checkpoints.close()


def test_another_identity_is_refused_and_named(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(1), IDENTITY)
    changed = {"data": "abc", "model": {"width": 64, "branches": [1, 2]}}
    checkpoints.prune()
    with pytest.raises(ConfigMismatch, match=r"model.width: checkpoint 32, config 64"):
        checkpoints.restore(shapes(make_state(0)), changed)
    checkpoints.close()


def test_tuples_and_lists_are_one_identity(tmp_path):
    refuse_mismatch({"a": [1, 2], "b": 1.0}, {"a": (1, 2), "b": 1.0}, tmp_path)
    with pytest.raises(ConfigMismatch, match="b: checkpoint None, config 2"):
        refuse_mismatch({"a": 1}, {"a": 1, "b": 2}, tmp_path)


def test_a_step_being_evaluated_is_kept_until_its_marker_is_old(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    for step in (1, 2, 3):
        checkpoints.save(make_state(step), IDENTITY)
    marker = checkpoints.marker_path(1)
    marker.parent.mkdir(parents=True)
    marker.touch()
    assert checkpoints.prune() == [2]
    old = time.time() - MARKER_SECONDS - 1
    os.utime(marker, (old, old))
    assert checkpoints.prune() == [1]
    checkpoints.close()


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    st.sets(st.integers(1, 30), min_size=1),
    st.dictionaries(st.integers(1, 30), st.floats(0, 1)),
    st.sets(st.integers(1, 30)),
    st.integers(1, 4),
    st.booleans(),
)
def test_kept_steps_are_the_last_the_best_and_the_evaluated(steps, values, busy, keep, lowest):
    metrics = {s: {"valid": {"auc": v}} for s, v in values.items()}
    name = "-valid/auc" if lowest else "valid/auc"
    deleted = steps_to_delete(steps, metrics, busy, keep_last=keep, best_metric=name)
    kept = steps - set(deleted)
    assert set(sorted(steps)[-keep:]) <= kept
    assert busy & steps <= kept
    measured = {s: values[s] for s in steps if s in values}
    if measured:
        best = (min if lowest else max)(measured.values())
        assert any(measured.get(s) == best for s in kept)
        assert measured[best_step(steps, metrics, name)] == best
    assert len(kept) <= keep + len(busy & steps) + 1


def test_an_unmeasurable_metric_is_no_best():
    assert best_step([1, 2], {1: {"valid": {"auc": "n/a"}}}, "valid/auc") is None
