"""CAN's co-action unit against loops over every number, and what it asks of the data."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from baselines_jax import can
from baselines_jax.can import CAN
from ctr_jax import embedding
from ctr_jax.features import DataColumn, DataSpec, table_scales, table_shapes
from tests.baselines_jax.cases import IN_TILES, padded, tokens_of
from tests.lrea_jax.cases import SPEC, batch_of, changed

WIDTHS, ORDERS, L, C = (4, 3, 2), 3, 9, 3
LENGTHS = (9, 0, 4, 1)
PAIRS = (("p", "e"), ("p2", "e"), ("p", "e2"))  # two share P, two share e


def number(bias):
    return (4 + bias) * 3 + (3 + bias) * 2


def case(bias, lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed + 10)
    tokens = tokens_of(lengths, L, C, seed)
    size = len(lengths)
    own = {key: rng.normal(size=(size, C, number(bias))) for key in ("p", "p2")}
    mask = tokens.batch.behaviour_mask[..., None]
    own |= {key: rng.normal(size=(size, L, WIDTHS[0])) * mask for key in ("e", "e2")}
    return tokens.replace(own=jax.tree.map(np.float32, own))


def reference(own, mask, bias):
    """[B, C, outputs] in float64, a number at a time."""
    out = np.zeros((len(mask), C, len(PAIRS) * ORDERS * sum(WIDTHS[1:])))
    for b in range(len(mask)):
        for c in range(C):
            place = 0
            for of_p, of_e in PAIRS:
                p = [float(x) for x in own[of_p][b, c]]
                for k in range(1, ORDERS + 1):
                    for at in np.flatnonzero(mask[b]):
                        h, start, layer_place = [float(x) ** k for x in own[of_e][b, at]], 0, place
                        for width in WIDTHS[1:]:
                            z = [
                                sum(h[i] * p[start + i * width + o] for i in range(len(h)))
                                for o in range(width)
                            ]
                            start += len(h) * width
                            if bias:
                                z = [z[o] + p[start + o] for o in range(width)]
                                start += width
                            h = z if width == WIDTHS[-1] else [math.tanh(x) for x in z]
                            out[b, c, layer_place : layer_place + width] += h
                            layer_place += width
                    place += sum(WIDTHS[1:])
    return out


def module(bias, tiles=False, hidden=()):
    tile_bytes = IN_TILES["tile_bytes"] if tiles else 0
    return CAN(PAIRS, WIDTHS, bias, ORDERS, hidden, "relu", tile_bytes)


@functools.cache
def applied(bias):
    return jax.jit(lambda t: module(bias).apply({}, t, False))


@pytest.mark.parametrize("bias", [False, True])
def test_equal_to_the_loops(bias):
    for seed in (0, 1):
        tokens = case(bias, LENGTHS[::-1] if seed else LENGTHS, seed)
        expected = reference(tokens.own, tokens.batch.behaviour_mask, bias)
        np.testing.assert_allclose(applied(bias)(tokens), expected, rtol=1e-4, atol=1e-4)
        assert (expected[LENGTHS[::-1].index(0) if seed else 1] == 0).all()


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_in_tiles_equal_differences_of_the_loops(bias):
    tokens, rng = case(bias), np.random.default_rng(3)

    def loss(own):
        out = module(bias, tiles=True).apply({}, tokens.replace(own=own), False)
        return jnp.sum(jnp.sin(out)), out

    mask = tokens.batch.behaviour_mask
    noisy = dict(tokens.own)
    for key in ("e", "e2"):
        noisy[key] = np.where(mask[..., None], noisy[key], np.nan).astype(np.float32)
    grads, out = jax.jit(jax.grad(loss, has_aux=True))(noisy)
    np.testing.assert_allclose(out, reference(tokens.own, mask, bias), rtol=1e-4, atol=1e-4)
    assert all((np.asarray(grads[key])[~mask] == 0).all() for key in ("e", "e2"))
    assert all(np.abs(x).max() > 0 for x in grads.values())
    to = {key: rng.normal(size=x.shape) for key, x in tokens.own.items()}

    def moved(by):
        own = {key: x.astype(np.float64) + by * to[key] for key, x in tokens.own.items()}
        return np.sum(np.sin(reference(own, mask, bias)))

    expected = (moved(1e-6) - moved(-1e-6)) / 2e-6
    found = sum(np.sum(grads[key] * to[key]) for key in to)
    np.testing.assert_allclose(found, expected, rtol=2e-3)


def test_candidates_are_isolated_and_padding_changes_nothing():
    tokens = case(True)
    out = np.asarray(applied(True)(tokens))
    turned = {k: x[:, [2, 0, 1]] if k.startswith("p") else x for k, x in tokens.own.items()}
    again = applied(True)(tokens.replace(own=turned))
    np.testing.assert_allclose(again, out[:, [2, 0, 1]], rtol=1e-5, atol=1e-5)
    others = {k: x.copy() for k, x in tokens.own.items()}
    others["p"][:, [0, 2]] += 1.0
    again = np.asarray(applied(True)(tokens.replace(own=others)))
    np.testing.assert_allclose(again[:, 1], out[:, 1], rtol=1e-5, atol=1e-5)
    assert np.abs(again[0, 0] - out[0, 0]).max() > 1e-2
    left = ((0, 0), (4, 0), (0, 0))
    own = {
        k: x if k.startswith("p") else np.pad(x, left, constant_values=5.0)
        for k, x in tokens.own.items()
    }
    again = applied(True)(padded(tokens, 4).replace(own=own))
    np.testing.assert_allclose(again, out, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_halves():
    tokens = case(False)
    halved = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.bfloat16))
    rounded = tokens.replace(own=halved(tokens.own))
    out = applied(False)(rounded)
    assert out.dtype == jnp.bfloat16
    back = rounded.replace(own=jax.tree.map(lambda x: x.astype(np.float32), rounded.own))
    np.testing.assert_allclose(out.astype(np.float32), applied(False)(back), rtol=0.02, atol=0.02)


def test_from_its_initial_values_it_learns_alone():
    """Which of the items the user has seen: 40 steps of Adam, only P, e and one linear layer."""
    rng, items = np.random.default_rng(0), 6
    seen = rng.integers(0, items, (32, 5))
    label = (np.arange(items) == seen[..., None]).any(1).astype(np.float32)
    config, n = can.default_config(), 16 * 8 + 8 * 4
    unit = CAN((("p", "e"),), hidden=())
    tokens = tokens_of((5,) * 32, 5, items)
    params = {
        "p": config.parameter_scale * rng.normal(size=(items, n)),
        "e": config.input_scale * rng.normal(size=(items, 16)),
        "w": 0.1 * rng.normal(size=36),
        "b": np.zeros(1),
    }
    params = jax.tree.map(np.float32, params)
    optimizer = optax.adam(0.02)

    def loss(params):
        p = jnp.broadcast_to(params["p"], (32, items, n))
        out = unit.apply({}, tokens.replace(own={"p": p, "e": params["e"][seen]}), True)
        logits = out @ params["w"] + params["b"]
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, label))

    def step(state, _):
        params, moments = state
        value, grads = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    run = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), None, 40)[1])
    losses = np.asarray(run(params))
    constant = -np.mean(label) * np.log(label.mean()) - np.mean(1 - label) * np.log(
        1 - label.mean()
    )
    assert losses[0] > 0.9 * constant and losses[-1] < 0.3 * constant


# ---- in the frame ----


def built(spec=SPEC, **changes):
    config = can.default_config()
    config.update(embedding_width=3, width=8, head_hidden=(6,), micro_widths=WIDTHS)
    config.update(changes)
    return can.build(config, spec)


def tables(columns):
    return {c.key: c.table for c in columns if ":can_" in c.key}


def test_its_columns_have_tables_of_their_own():
    _, columns = built()
    ours = {c.key: (c.table, c.source, c.width, c.init_scale) for c in columns if ":can_" in c.key}
    assert ours == {
        "candidate/item:can_parameters": ("item:can_parameters", "item", number(False), 1e-6),
        "behaviour/item:can_inputs": ("item:can_inputs", "item", 4, 0.1),
    }
    shapes = table_shapes(columns, SPEC)
    assert shapes["item"] == (9, 3) and shapes["item:can_inputs"] == (9, 4)
    scales = table_scales(columns, 2.0)
    assert scales["item"] == 2.0 and scales["item:can_inputs"] == 0.1
    values = embedding.init_tables(jax.random.key(0), shapes, scales)
    for name, scale in scales.items():
        known = values[name][1 : shapes[name][0]]
        assert 0.5 * scale < np.std(known) < 2 * scale, name


TWO = DataSpec(
    "two",
    tuple(
        DataColumn(group, name, "id", name)
        for group in ("behaviour", "candidate")
        for name in ("item", "cate")
    ),
    dict(item=9, cate=5),
    C,
)


def test_pairs():
    of = lambda **changes: built(TWO, **changes)[0].interest.pairs  # noqa: E731
    item, cate = (
        (f"candidate/{name}:can_parameters", f"behaviour/{name}:can_inputs")
        for name in ("item", "cate")
    )
    assert of() == (item, cate)
    assert of(exclude=("behaviour/item",)) == (cate,)
    assert of(pairs=("cate",)) == (cate,)
    crossed = ("item:cate", "item")
    assert of(pairs=crossed) == ((item[0], cate[1]), item)
    assert len(tables(built(TWO, pairs=crossed)[1])) == 3  # P is one column
    with pytest.raises(ValueError, match="pair"):
        of(exclude=("behaviour/item", "candidate/cate"))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(pairs=("price",)), "price"),  # not ids
        (dict(pairs=("item:item:item",)), "item:item:item"),
        (dict(micro_widths=(4,)), "micro_widths"),
        (dict(orders=0), "orders"),
        (dict(parameter_scale=0.0), "parameter_scale"),
        (dict(activation="gelu"), "activation"),
    ],
)
def test_what_cannot_be_built_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        built(**change)


def test_in_the_frame_beside_din():
    model, columns = built()
    embedded = batch_of(columns)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(1), embedded, False))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(2)
    leaves = [np.abs(rng.normal(size=x.shape)).astype(np.float32) * 0.3 for x in leaves]
    variables = jax.tree.unflatten(tree, leaves)
    run = jax.jit(lambda v, x: model.apply(v, x, False))
    logits, out = run(variables, embedded)
    interest = np.asarray(out["interest"])
    assert interest.shape[-1] == 8 + ORDERS * sum(WIDTHS[1:])
    # What DIN and the tokens read is not what CAN reads.
    for keys, ours in ((tables(columns), True), ({"behaviour/item": 0}, False)):
        vectors = {k: x * 2 if k in keys else x for k, x in embedded.vectors.items()}
        moved = np.abs(run(variables, embedded.replace(vectors=vectors))[1]["interest"] - interest)
        assert (moved[..., :8].max() > 1e-3) != ours and (moved[..., 8:].max() > 1e-3) == ours
    # Rows and slots, as a CPU gives small tables, are the vectors.
    key = "behaviour/item:can_inputs"
    slots = rng.integers(0, 6, (len(interest), embedded.batch.shape[1]))
    rows = rng.normal(size=(5, WIDTHS[0])).astype(np.float32)  # 5 is padding
    read = np.append(rows, np.zeros((1, WIDTHS[0]), np.float32), 0)[slots]
    vectors = dict(embedded.vectors)
    expected = run(variables, embedded.replace(vectors=vectors | {key: read}))[0]
    del vectors[key]
    given = embedded.replace(vectors=vectors, rows={key: rows}, slots={key: slots})
    np.testing.assert_allclose(run(variables, given)[0], expected, rtol=1e-5, atol=1e-5)
    more = run(variables, changed(embedded, padding=3, candidates=[2, 0, 1]))[0]
    np.testing.assert_allclose(more, logits[:, np.array([2, 0, 1])], rtol=1e-4, atol=1e-4)


def test_no_history_is_finite():
    model, columns = built()
    embedded = batch_of(columns, length=0, lengths=(0, 0))
    logits, _ = model.init_with_output(jax.random.key(1), embedded, False)[0]
    assert np.isfinite(logits).all()
