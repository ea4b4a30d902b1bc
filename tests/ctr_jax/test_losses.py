"""The loss against a float64 loop over valid candidates."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from ctr_jax import losses


def looped(logits, labels, mask, per_request):
    rows = []
    for x, y, m in zip(logits.tolist(), labels.tolist(), mask.tolist(), strict=True):
        z = [-a if b == 1 else a for a, b, valid in zip(x, y, m, strict=True) if valid]
        rows.append([max(a, 0) + math.log1p(math.exp(-abs(a))) for a in z])
    if per_request:
        means = [sum(row) / len(row) for row in rows if row]
        return sum(means) / max(len(means), 1)
    return sum(map(sum, rows)) / max(sum(map(len, rows)), 1)


@st.composite
def batches(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.sampled_from([1, 4])), draw(st.sampled_from([1, 3])))
    logits = (rng.normal(size=shape) * draw(st.sampled_from([1, 30]))).astype(np.float32)
    mask = rng.random(shape) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return logits, rng.integers(0, 2, shape).astype(np.float32), mask


@settings(derandomize=True, deadline=None, max_examples=40)
@given(batches(), st.booleans())
def test_loss_equals_a_loop(batch, per_request):
    logits, labels, mask = batch
    found = losses.binary_cross_entropy(*batch, per_request=per_request)
    assert found.dtype == jnp.float32 and found.shape == ()
    np.testing.assert_allclose(found, looped(logits, labels, mask, per_request), rtol=2e-6)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(batches(), st.booleans(), st.integers(0, 2**32 - 1))
def test_a_weight_is_a_number_of_times(batch, per_request, seed):
    logits, labels, mask = batch
    weights = np.random.default_rng(seed).integers(0, 4, mask.shape)
    times = np.where(mask, weights, 0)
    width = max(times.sum(1).max(), 1)
    again = [np.zeros((len(mask), width), np.float32) for _ in range(3)]
    for repeated, values in zip(again, (logits, labels, mask), strict=True):
        for row, of_row, n in zip(repeated, values, times, strict=True):
            row[: n.sum()] = np.repeat(of_row, n)
    weights = np.where(mask, weights * 1.5, np.nan)  # of which the scale does not matter
    found = losses.binary_cross_entropy(*batch, weights=weights, per_request=per_request)
    expected = looped(again[0], again[1], again[2] > 0, per_request)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=2e-6)


@pytest.mark.parametrize("per_request", [False, True])
def test_gradient_and_padding(per_request):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 4)).astype(np.float32)
    labels = rng.integers(0, 2, (5, 4)).astype(np.float32)
    mask = np.arange(4)[None] < np.array([4, 0, 1, 3, 2])[:, None]
    dirty = np.where(mask, logits, np.nan), np.where(mask, labels, np.inf)
    loss = functools.partial(losses.binary_cross_entropy, mask=mask, per_request=per_request)
    value, grad = jax.value_and_grad(loss)(*dirty)
    np.testing.assert_allclose(value, looped(logits, labels, mask, per_request), rtol=1e-6)
    share = mask / (4 * np.maximum(mask.sum(1, keepdims=True), 1)) if per_request else mask / 10
    wanted = (1 / (1 + np.exp(-logits.astype(np.float64))) - labels) * share
    np.testing.assert_allclose(grad, wanted, rtol=1e-5, atol=1e-9)
    assert (np.asarray(grad)[~mask] == 0).all()


def test_large_logits_lose_no_digits():
    logits = jnp.array([[40.0, -40.0, 500.0, -500.0, 1e4]])
    labels = jnp.array([[1.0, 0.0, 0.0, 1.0, 1.0]])
    found = losses.candidate_losses(logits, labels)[0]
    np.testing.assert_allclose(found, [math.exp(-40), math.exp(-40), 500, 500, 0], rtol=1e-6)
    grad = jax.grad(lambda x: losses.candidate_losses(x, labels).sum())(logits)[0]
    np.testing.assert_allclose(grad, [-math.exp(-40), math.exp(-40), 1, -1, 0], rtol=1e-6)


def test_bfloat16_logits_are_summed_in_float32():
    logits = jnp.full((1024, 8), 0.3, jnp.bfloat16)
    found = losses.binary_cross_entropy(logits, jnp.ones((1024, 8)), jnp.ones((1024, 8), bool))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, math.log1p(math.exp(-float(logits[0, 0]))), rtol=1e-5)


@pytest.mark.parametrize("per_request", [False, True])
def test_parts_add_up_to_the_global_batch(per_request):
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(16, 3)), rng.integers(0, 2, (16, 3)).astype(np.float32)
    mask = rng.random((16, 3)) < np.linspace(0.1, 1, 16)[:, None]  # micro-batches of unequal mass
    loss = functools.partial(losses.binary_cross_entropy, per_request=per_request)
    denominator = losses.loss_denominator(jnp.asarray(mask), per_request)
    parts = [
        loss(logits[i : i + 4], labels[i : i + 4], mask[i : i + 4], denominator=denominator)
        for i in range(0, 16, 4)
    ]
    np.testing.assert_allclose(sum(parts), looped(logits, labels, mask, per_request), rtol=1e-6)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec("data"))
    sharded = jax.jit(loss)(*jax.device_put((logits.astype(np.float32), labels, mask), place))
    np.testing.assert_allclose(sharded, looped(logits, labels, mask, per_request), rtol=1e-6)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"need \[B, C\] alike"):
        losses.binary_cross_entropy(jnp.zeros((4, 1)), jnp.zeros((4,)), jnp.ones((4, 1), bool))
