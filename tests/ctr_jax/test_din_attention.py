"""DIN's unit against one MLP per pair in float64; Dice's statistics; tiles; invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctr_jax.din_attention import DINAttention

B, C, L, D = 3, 2, 7, 4
MASK = np.array([[0, 0, 0, 0, 1, 1, 1], [0] * 7, [1] * 7], bool)
PAIRS = np.array([[1, 1], [1, 0], [0, 1]], bool)


def reference(variables, query, keys, mask, activation, pairs=None):
    """The unit as the paper draws it, a pair at a time, in float64.

    `pairs` gives Dice the moments of the batch (training), else the running ones are used.
    Returns (out, the moments of each layer).
    """
    p, state = (
        jax.tree.map(lambda x: np.asarray(x, np.float64), variables.get(k, {}))
        for k in ("params", "batch_stats")
    )
    (b, c, _), length = query.shape, keys.shape[1]
    where = [(i, j, t) for i in range(b) for j in range(c) for t in range(length)]
    x = {}
    for i, j, t in where:
        q, e = query[i, j].astype(np.float64), keys[i, t].astype(np.float64)
        x[i, j, t] = np.concatenate([q, e, q - e, q * e]) @ p["kernel_0"] + p["bias_0"]
    moments, layer = [], 0
    while f"kernel_{layer + 1}" in p:
        if activation == "dice":
            if pairs is None:
                mean, variance = state[f"mean_{layer}"], state[f"variance_{layer}"]
            else:
                seen = np.stack([x[i, j, t] for i, j, t in where if pairs[i, j] and mask[i, t]])
                mean, variance = seen.mean(0), seen.var(0)
            moments.append((mean, variance))
        for at in where:
            if activation == "dice":
                gate = 1 / (1 + np.exp(-(x[at] - mean) / np.sqrt(variance + 1e-9)))
                hidden = gate * x[at] + (1 - gate) * p[f"alpha_{layer}"] * x[at]
            else:
                hidden = np.maximum(x[at], 0)
            x[at] = hidden @ p[f"kernel_{layer + 1}"] + p[f"bias_{layer + 1}"]
        layer += 1
    out = np.zeros(query.shape)
    for i, j, t in where:
        out[i, j] += mask[i, t] * x[i, j, t][0] * keys[i, t]
    return out, moments


def case(activation, hidden=(6, 5), tile_bytes=1 << 20):
    rng = np.random.default_rng(0)
    query = rng.normal(size=(B, C, D)).astype(np.float32)
    keys = rng.normal(size=(B, L, D)).astype(np.float32)
    unit = DINAttention(hidden, activation, tile_bytes=tile_bytes)
    shapes = jax.eval_shape(
        lambda: unit.init(jax.random.key(0), query, keys, MASK, PAIRS, train=False)
    )
    leaves, tree = jax.tree.flatten(shapes)  # away from the initial values, so that all matter
    leaves = [np.abs(rng.normal(size=x.shape)).astype(np.float32) * 0.5 for x in leaves]
    return unit, jax.tree.unflatten(tree, leaves), query, keys


TILES = [1 << 20, B * C * 6 * 4 * 3]  # all at once; three rows at a time, so that L = 7 is ragged


@pytest.mark.parametrize("length", [L, D - 1])  # the two ways to the first layer
@pytest.mark.parametrize("tile_bytes", TILES)
@pytest.mark.parametrize("activation", ["dice", "relu"])
def test_the_unit_equals_one_mlp_per_pair(activation, tile_bytes, length):
    unit, variables, query, keys = case(activation, tile_bytes=tile_bytes)
    keys, mask = keys[:, -length:], MASK[:, -length:]
    out = unit.apply(variables, query, keys, mask, PAIRS, train=False)
    expected, _ = reference(variables, query, keys, mask, activation)
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=1e-5)
    assert (np.asarray(out[1]) == 0).all()


@pytest.mark.parametrize("tile_bytes", TILES)
def test_dice_in_training_uses_and_keeps_the_moments_of_valid_pairs(tile_bytes):
    unit, variables, query, keys = case("dice", tile_bytes=tile_bytes)
    out, state = unit.apply(
        variables, query, keys, MASK, PAIRS, train=True, mutable=["batch_stats"]
    )
    expected, moments = reference(variables, query, keys, MASK, "dice", PAIRS)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    for i, (mean, variance) in enumerate(moments):
        old = variables["batch_stats"]
        for name, new in (("mean", mean), ("variance", variance)):
            kept = 0.9 * old[f"{name}_{i}"] + 0.1 * new
            np.testing.assert_allclose(state["batch_stats"][f"{name}_{i}"], kept, rtol=1e-4)


def test_a_batch_without_valid_pairs_leaves_the_statistics():
    unit, variables, query, keys = case("dice")
    out, state = unit.apply(
        variables, query, keys, np.zeros_like(MASK), PAIRS, train=True, mutable=["batch_stats"]
    )
    jax.tree.map(np.testing.assert_array_equal, state["batch_stats"], variables["batch_stats"])
    assert np.isfinite(out).all() and (np.asarray(out) == 0).all()


def test_gradients_do_not_depend_on_the_tiles():
    grads = []
    for tile_bytes in TILES:
        unit, variables, query, keys = case("dice", tile_bytes=tile_bytes)

        def loss(params, query, keys, unit=unit, variables=variables):
            variables = {**variables, "params": params}
            out, _ = unit.apply(
                variables, query, keys, MASK, PAIRS, train=True, mutable=["batch_stats"]
            )
            return jnp.sum(jnp.sin(out))

        grads.append(jax.grad(loss, argnums=(0, 1, 2))(variables["params"], query, keys))
    # Gradients are sums of terms of about 30 that partly cancel.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=5e-5), *grads)


@pytest.mark.parametrize("activation", ["dice", "relu"])
def test_padding_and_other_candidates_change_nothing(activation):
    unit, variables, query, keys = case(activation)
    out = unit.apply(variables, query, keys, MASK, PAIRS, train=False)
    padded = np.pad(keys, ((0, 0), (3, 0), (0, 0)), constant_values=9.0)
    padded_mask = np.pad(MASK, ((0, 0), (3, 0)))
    again = unit.apply(variables, query, padded, padded_mask, PAIRS, train=False)
    np.testing.assert_allclose(again, out, rtol=1e-5, atol=1e-4)  # sums of about 30
    alone = unit.apply(variables, query[:, 1:2], keys, MASK, PAIRS[:, 1:2], train=False)
    np.testing.assert_allclose(alone, out[:, 1:2], rtol=1e-5, atol=1e-4)
