import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctr_jax.head import MLPHead, base_rate_logit
from ctr_jax.layers import MLP, RMSNorm, SwiGLU, check_dropout, dropped, token_dot_general
from kernels.softmax import masked_softmax

X = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)


def test_masked_softmax_against_a_loop_and_empty_rows_are_zero():
    mask = np.array([[1, 0, 1, 1, 0], [0] * 5, [0, 0, 0, 1, 0]], bool)
    expected = np.zeros((3, 5))
    for i in range(3):
        total = sum(math.exp(X[i, j]) for j in range(5) if mask[i, j])
        for j in range(5):
            expected[i, j] = math.exp(X[i, j]) / total if mask[i, j] else 0
    np.testing.assert_allclose(masked_softmax(X, mask), expected, rtol=1e-6)
    grad = jax.grad(lambda x: (masked_softmax(x, mask) ** 2).sum())(X)
    assert np.isfinite(grad).all() and not grad[1].any() and not np.asarray(grad)[~mask].any()
    assert masked_softmax(X.astype(jnp.bfloat16), mask).dtype == jnp.float32


def test_masked_softmax_of_extreme_logits():
    x = np.array([[3e38, -3e38, 0.0], [-3e38, -3e38, np.inf]], np.float32)
    mask = np.array([[1, 1, 1], [1, 1, 0]], bool)
    np.testing.assert_allclose(masked_softmax(x, mask), [[1, 0, 0], [0.5, 0.5, 0]])


@pytest.mark.parametrize("outside", [False, True])
def test_rms_norm(outside):
    norm = RMSNorm(1e-3, outside)
    params = {"params": {"scale": np.arange(1.0, 6, dtype=np.float32)}}
    square = (X.astype(np.float64) ** 2).mean(-1, keepdims=True)
    root = np.sqrt(square) + 1e-3 if outside else np.sqrt(square + 1e-3)
    np.testing.assert_allclose(norm.apply(params, X), X / root * np.arange(1, 6), rtol=1e-5)
    grad = jax.grad(lambda x: norm.apply(params, x).sum())(np.zeros((2, 5), np.float32))
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("bias", [False, True])
def test_swiglu(bias):
    layer = SwiGLU(7, bias)
    params = layer.init(jax.random.key(0), X)["params"]
    assert params["w1"]["kernel"].shape == (5, 7) and params["w3"]["kernel"].shape == (7, 5)
    assert ("bias" in params["w1"]) == bias
    w1, w2, w3 = (np.asarray(params[f"w{i}"]["kernel"], np.float64) for i in (1, 2, 3))
    h = X @ w1
    expected = (h / (1 + np.exp(-h)) * (X @ w2)) @ w3
    np.testing.assert_allclose(layer.apply({"params": params}, X), expected, rtol=1e-4, atol=1e-5)


def test_mlp_and_head():
    mlp = MLP((6, 2), "relu")
    params = mlp.init(jax.random.key(0), X)["params"]
    d0, d1 = params["dense_0"], params["dense_1"]
    hidden = np.maximum(X @ d0["kernel"] + d0["bias"], 0)
    expected = hidden @ d1["kernel"] + d1["bias"]
    np.testing.assert_allclose(mlp.apply({"params": params}, X), expected, rtol=1e-5, atol=1e-6)

    head = MLPHead((4,), base_rate=0.02, dtype=jnp.bfloat16)
    params = head.init(jax.random.key(0), X)
    assert head.apply(params, X).dtype == jnp.float32
    zero = head.apply(params, np.zeros((3, 5), np.float32))
    np.testing.assert_allclose(jax.nn.sigmoid(zero), 0.02, rtol=1e-5)
    for rate in (0, 1, -0.5):
        with pytest.raises(ValueError, match="base_rate"):
            base_rate_logit(rate)


def test_token_dot_general_equals_the_plain_product():
    rng = np.random.default_rng(1)
    for shape in ((4, 6, 5), (3, 5), (7, 3, 5)):  # 24 tokens split into parts; the others fall back
        x, w = rng.normal(size=shape).astype(np.float32), rng.normal(size=(5, 2)).astype(np.float32)
        g = rng.normal(size=shape[:-1] + (2,)).astype(np.float32)

        def product(x, w):
            return token_dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))

        value, pullback = jax.vjp(product, x, w)
        dx, dw = pullback(g)
        np.testing.assert_allclose(value, x @ w, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(dx, g @ w.T, rtol=1e-5, atol=1e-6)
        expected = x.reshape(-1, 5).T.astype(np.float64) @ g.reshape(-1, 2)
        np.testing.assert_allclose(dw, expected, rtol=1e-5, atol=1e-5)


def test_a_dropped_entry_is_zero_and_a_kept_one_is_enlarged():
    x = np.full((3, 40, 50), 2.0, np.float32)
    seeds = np.array([1, 2, 1], np.uint32)
    out = np.asarray(dropped(0.25, seeds, 0, x))
    np.testing.assert_allclose(np.unique(out), [0, 2 / 0.75])
    assert abs((out == 0).mean() - 0.25) < 0.02
    np.testing.assert_array_equal(out[0], out[2])  # of one seed
    assert (out[0] != out[1]).mean() > 0.2
    assert (dropped(0.25, seeds, 1, x) != out).mean() > 0.2
    assert dropped(0.25, None, 0, x) is x
    np.testing.assert_array_equal(dropped(0.25, seeds[1:], 0, x[1:]), out[1:])
    for rate in (-0.1, 1, 1.5, math.nan):
        with pytest.raises(ValueError, match="dropout"):
            check_dropout(rate)
