"""LayerNorm with recency added, against its definition in float64 and the gradients of that."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laser_jax.behaviour_norm import EPSILON, BehaviourNorm, normalised


def definition(x, scale, rows, index, mask):
    mean = x.sum(-1, keepdims=True) / x.shape[-1]
    variance = jnp.square(x - mean).sum(-1, keepdims=True) / x.shape[-1]
    y = (x - mean) * (variance + EPSILON) ** -0.5 * scale + rows[index]
    return y * mask[..., None]


def arguments(seed, b, length, d, rows, size=1.0):
    rng = np.random.default_rng(seed)
    mask = rng.random((b, length)) < 0.7
    return (
        rng.normal(size=(b, length, d)) * size * mask[..., None],
        rng.normal(size=d),
        rng.normal(size=(rows, d)),
        rng.integers(0, rows, (b, length)),
        mask,
    )


@pytest.mark.parametrize("shape", [(1, 1, 2, 1), (3, 9, 12, 5)])  # B, L, d, rows
def test_values_and_gradients_are_those_of_the_definition(shape):
    def both(f, *given_):
        def loss(x, scale, rows):
            return jnp.sum(jnp.sin(f(x, scale, rows, *given_[3:])))

        return f(*given_), jax.grad(loss, argnums=(0, 1, 2))(*given_[:3])

    with jax.enable_x64(True):
        ours, theirs = (jax.jit(functools.partial(both, f)) for f in (normalised, definition))
        for size in (0.01, 1.0, 100.0):  # a table's first rows; far from EPSILON
            for seed in range(5):
                given_ = arguments(seed, *shape, size)
                jax.tree.map(
                    functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9 / size),
                    ours(*given_),
                    theirs(*given_),
                )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_statistics_of_narrow_numbers_are_wide(dtype):
    x, scale, rows, index, mask = arguments(0, 2, 7, 64, 3)
    narrow = jnp.asarray(x + 30 * mask[..., None], dtype)  # bfloat16 keeps two digits of it
    y = normalised(narrow, *(jnp.asarray(a, dtype) for a in (scale, rows)), index, mask)
    assert y.dtype == dtype
    wide = (
        np.asarray(a, np.float64) for a in (narrow, *(jnp.asarray(a, dtype) for a in (scale, rows)))
    )
    # The variance is a difference of squares, some 900 - 899 here.
    tolerance = 2e-4 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(
        np.asarray(y, np.float64), definition(*wide, index, mask), rtol=tolerance, atol=tolerance
    )


def test_padding_is_zero_whatever_stands_there_and_gets_no_gradient():
    x, scale, rows, index, mask = (jnp.asarray(a) for a in arguments(1, 2, 8, 4, 3))
    x = x + ~mask[..., None] * 1e4
    assert (normalised(x, scale, rows, index, mask)[~mask] == 0).all()
    dx = jax.grad(lambda x: jnp.sum(jnp.square(normalised(x, scale, rows, index, mask))))(x)
    assert (dx[~mask] == 0).all() and (dx[mask] != 0).any()


def test_without_recency_it_is_a_layer_norm_with_a_bias():
    x, *_, mask = (jnp.asarray(a) for a in arguments(2, 2, 5, 8, 1))
    params = {"params": {"scale": jnp.arange(8.0), "bias": jnp.arange(8.0) - 3}}
    y = BehaviourNorm().apply(params, x, mask)
    expected = definition(x, params["params"]["scale"], params["params"]["bias"][None], 0, mask)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA does on a CPU")
def test_in_training_it_is_made_once_for_all_its_readers():
    args = arguments(0, 2, 8, 4, 3)
    weights = jnp.ones((4, 5))

    def loss(x, *rest):
        y = normalised(x, *rest)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(y.sum(1))) + jnp.sum(jnp.tanh(y @ weights))

    text = jax.jit(jax.value_and_grad(loss)).lower(*args).compile().as_text()
    divisions = re.findall(r"= f32\[2,8,4\]\S* divide\(", text)
    assert len(divisions) == 1
