import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baselines_jax import din


def reference(params, query, keys, mask):
    """The unit as the paper draws it: one MLP over [q, e, q - e, q * e] per pair, in float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    out = np.zeros_like(query, np.float64)
    for b in range(query.shape[0]):
        for c in range(query.shape[1]):
            for i in range(keys.shape[1]):
                if not mask[b, i]:
                    continue
                q, e = query[b, c].astype(np.float64), keys[b, i].astype(np.float64)
                hidden = np.concatenate([q, e, q - e, q * e]) @ p["kernel_0"] + p["bias_0"]
                hidden = np.maximum(hidden, 0)
                score = hidden @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
                out[b, c] += score[0] * e
    return out


def test_split_first_layer_equals_the_concatenated_one():
    rng = np.random.default_rng(0)
    query, keys = rng.normal(size=(3, 2, 4)), rng.normal(size=(3, 5, 4))
    query, keys = query.astype(np.float32), keys.astype(np.float32)
    mask = np.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
    unit = din.DINAttention((6,), "relu")
    variables = unit.init(jax.random.key(0), query, keys, mask, train=False)
    out = unit.apply(variables, query, keys, mask, train=False)
    np.testing.assert_allclose(out, reference(variables["params"], query, keys, mask), rtol=2e-5)
    assert (np.asarray(out[1]) == 0).all()


@pytest.mark.parametrize("activation", ["dice", "relu"])
def test_padding_and_other_candidates_change_nothing(activation):
    rng = np.random.default_rng(1)
    query = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    keys = jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32)
    mask = jnp.asarray([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], bool)
    unit = din.DINAttention((8, 4), activation)
    variables = unit.init(jax.random.key(0), query, keys, mask, train=False)
    out = unit.apply(variables, query, keys, mask, train=False)
    padded = jnp.pad(keys, ((0, 0), (3, 0), (0, 0)), constant_values=9.0)
    padded_mask = jnp.pad(mask, ((0, 0), (3, 0)))
    again = unit.apply(variables, query, padded, padded_mask, train=False)
    np.testing.assert_allclose(again, out, rtol=1e-5, atol=1e-6)
    alone = unit.apply(variables, query[:, 1:2], keys, mask, train=False)
    np.testing.assert_allclose(alone, out[:, 1:2], rtol=1e-5, atol=1e-6)
