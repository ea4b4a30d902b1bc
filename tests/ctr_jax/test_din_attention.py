"""DIN's unit against one MLP per pair in float64; Dice's statistics; tiles; invariances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ctr_jax.din_attention import DINAttention
from kernels import dispatch

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


PAIR = L * 6 * 4  # bytes of a request's and a candidate's [L, h]
TILES = [1 << 20, 2 * C * PAIR, PAIR]  # all at once; two requests, so that B = 3 is ragged; a pair


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


def gradients(tile_bytes):
    unit, variables, query, keys = case("dice", tile_bytes=tile_bytes)

    def loss(params, query, keys):
        out, state = unit.apply(
            {**variables, "params": params}, query, keys, MASK, PAIRS, train=True,
            mutable=["batch_stats"],
        )  # fmt: skip
        return jnp.sum(jnp.sin(out)), state

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(
        variables["params"], query, keys
    )


def test_gradients_are_those_of_finite_differences():
    unit, variables, query, keys = case("dice", tile_bytes=2 * C * PAIR)
    rng = np.random.default_rng(1)
    (of_params, of_query, of_keys), _ = gradients(2 * C * PAIR)
    found, moved = 0.0, []
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), (variables["params"], query, keys))
    for x, y in zip(jax.tree.leaves((of_params, of_query, of_keys)), jax.tree.leaves(direction),
                    strict=True):  # fmt: skip
        found += float((np.asarray(x, np.float64) * y).sum())
    for step in (1e-6, -1e-6):
        at = jax.tree.map(lambda x, y: np.float64(x) + step * y,  # noqa: B023
                          (variables["params"], query, keys), direction)  # fmt: skip
        out, _ = reference({**variables, "params": at[0]}, *at[1:], MASK, "dice", PAIRS)
        moved.append(np.sin(out).sum())
    assert found == pytest.approx((moved[0] - moved[1]) / 2e-6, rel=2e-3)


def test_gradients_do_not_depend_on_the_tiles():
    whole = gradients(TILES[0])
    # Gradients are sums of terms of about 30 that partly cancel.
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=5e-5)
    for tile_bytes in TILES[1:]:
        jax.tree.map(close, gradients(tile_bytes), whole)


def test_on_a_mesh_dice_takes_the_moments_of_all_devices():
    rng = np.random.default_rng(2)
    query, keys = (rng.normal(size=s).astype(np.float32) for s in ((8, C, D), (8, L, D)))
    mask, pairs = rng.random((8, L)) < 0.6, rng.random((8, C)) < 0.7
    unit = DINAttention((6,), tile_bytes=C * PAIR)
    variables = unit.init(jax.random.key(0), query, keys, mask, pairs, train=False)

    def both(variables, *arguments):
        def loss(params, query, keys):
            out, state = unit.apply(
                {**variables, "params": params}, query, keys, *arguments[2:], train=True,
                mutable=["batch_stats"],
            )  # fmt: skip
            return jnp.sum(jnp.sin(out)), (out, state)

        return jax.grad(loss, (0, 1, 2), has_aux=True)(variables["params"], *arguments[:2])

    expected = jax.jit(both)(variables, query, keys, mask, pairs)
    mesh = jax.make_mesh((4, 2), ("data", "table"), (AxisType.Auto,) * 2)
    with jax.set_mesh(mesh), dispatch.scope("auto", ("data",)):
        by_data = jax.device_put((query, keys, mask, pairs), NamedSharding(mesh, P("data")))
        got = jax.jit(both)(jax.device_put(variables, NamedSharding(mesh, P())), *by_data)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, got, expected)


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
