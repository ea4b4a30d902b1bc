import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctr_jax.batch_norm import MaskedBatchNorm


def data(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(2.0, 3.0, (4, 5, 3)).astype(np.float32)
    return x, rng.random((4, 5)) < 0.6


@pytest.mark.parametrize("dtype, within", [(np.float32, 1e-5), (np.float64, 1e-12)])
def test_statistics_run_over_valid_positions_only(dtype, within):
    x, mask = data()
    x = x.astype(dtype)
    valid = x[mask].astype(np.float64)
    x[~mask] = np.nan  # whatever a masked position holds must not reach the statistics
    norm = MaskedBatchNorm(momentum=0.8, eps=1e-5)
    close = functools.partial(np.testing.assert_allclose, rtol=within, atol=within)
    with jax.enable_x64(dtype == np.float64):
        variables = norm.init(jax.random.key(0), x, mask, train=True)
        out, new = norm.apply(variables, x, mask, train=True, mutable=["batch_stats"])
        evaluated = norm.apply(new | {"params": variables["params"]}, x, mask, train=False)
    close(out[mask], (valid - valid.mean(0)) / np.sqrt(valid.var(0) + 1e-5))
    stats = jax.tree.map(np.asarray, new["batch_stats"])
    close(stats["mean"], 0.2 * valid.mean(0))
    close(stats["variance"], 0.8 + 0.2 * valid.var(0))
    close(evaluated[mask], (valid - stats["mean"]) / np.sqrt(stats["variance"] + 1e-5))


def test_an_empty_batch_moves_nothing():
    x, mask = data()
    norm = MaskedBatchNorm()
    variables = norm.init(jax.random.key(0), x, mask, train=True)
    out, new = norm.apply(variables, x, mask & False, train=True, mutable=["batch_stats"])
    assert np.isfinite(out).all()
    jax.tree.map(np.testing.assert_array_equal, new["batch_stats"], variables["batch_stats"])


def test_gradients_do_not_depend_on_masked_positions():
    x, mask = data()
    norm = MaskedBatchNorm()
    variables = norm.init(jax.random.key(0), x, mask, train=True)

    def loss(x):
        out, _ = norm.apply(variables, x, mask, train=True, mutable=["batch_stats"])
        return jnp.sum(jnp.where(mask[..., None], jnp.sin(out), 0))

    gradient = jax.grad(loss)(x)
    assert (np.asarray(gradient)[~mask] == 0).all()
    other = np.where(mask[..., None], x, 100.0)
    np.testing.assert_allclose(jax.grad(loss)(other), gradient, rtol=1e-5, atol=1e-6)
