"""Every attention with its encodings against loops in float64: values, gradients, properties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctr_jax import query_tiles
from sparsectr_jax import model
from sparsectr_jax.block import EvoAttention
from sparsectr_jax.chunking import time_chunks
from sparsectr_jax.encodings import Places, layer_encoding
from sparsectr_jax.evo_attention import History
from tests.sparsectr_jax.attention_reference import TABLE_LENGTH, Request
from tests.sparsectr_jax.dense_reference import random_history
from tests.sparsectr_jax.test_model import built, changed, data_spec, logits_of, small

LENGTHS, L, C, D = (0, 1, 21, 13), 21, 2, 8  # empty, one behaviour, full, some padding
SIZES = dict(
    width=D, num_heads=2, num_chunks=4, local_window=4, aggregate="mean", dilated_stride=4,
    nsa_block=4, nsa_stride=2, nsa_top=4, kernel_rows=3, length=TABLE_LENGTH,
)  # fmt: skip
ENCODINGS = ("rel_temporal", "hstu", "t5", "alibi", "rope")
QUICK_CASES = {
    ("evo", "hstu"), ("evo", "rope"), ("full", "t5"), ("dilated", "rel_temporal"), ("nsa", "rope"),
    ("kernel", "none"),
}  # fmt: skip
ALL_CASES = [
    *((a, e) for a in ("evo", "full", "dilated", "nsa") for e in (*ENCODINGS, "none")),
    ("kernel", "none"),
]
CASES = [
    pytest.param(*c, id="-".join(c), marks=[] if c in QUICK_CASES else pytest.mark.slow)
    for c in ALL_CASES
]


def config_of(attention, encoding, **changes):
    config = model.default_config()
    config.update(SIZES | dict(attention=attention, encoding=encoding) | changes)
    return config


def inputs_of(seed=0):
    rng = np.random.default_rng(seed)
    drawn = [random_history(rng, L, n) for n in LENGTHS]
    times, mask = (np.stack(x) for x in zip(*drawn, strict=True))
    request = (times.max(1) + rng.integers(1, 10**6, len(times))).astype(np.int32)
    size = len(LENGTHS)
    streams = [rng.normal(size=s) for s in ((size, L, D), (size, C, D), (size, D))]
    return streams, (times, mask, request)


def history_of(config, integers):
    times, mask, request = map(jnp.asarray, integers)
    return History(time_chunks(times, mask, config.num_chunks), times, mask, request)


@functools.cache
def case(attention, encoding):
    """config, params in float64, and a jitted (params, streams, integers, weights) -> value,
    outputs, gradients by params and streams; in tiles of few queries."""
    config = config_of(attention, encoding)
    model.build(config, data_spec())  # accepted
    streams, integers = inputs_of()

    def apply(params, streams, integers):
        module = EvoAttention(config, jnp.float64)
        return module.apply({"params": params}, *streams, history_of(config, integers), False)

    def loss(params, streams, integers, weights):
        out = apply(params, streams, integers)
        return sum(jnp.sum(w * x) for w, x in zip(weights, out, strict=True)), out

    with jax.enable_x64(True):
        init = EvoAttention(config, jnp.float64).init
        shapes = jax.eval_shape(
            lambda: init(jax.random.key(0), *streams, history_of(config, integers), False)
        )["params"]
        rng = np.random.default_rng(1)
        params = jax.tree.map(lambda x: rng.normal(size=x.shape) * 0.5, shapes)
        grad = jax.value_and_grad(loss, (0, 1), has_aux=True)
        return config, params, jax.jit(grad)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles of queries, the last filled up."""
    monkeypatch.setattr(query_tiles, "TILE_BYTES", {"cpu": 2500})


def reference(config, params, streams, integers):
    """Outputs of behaviours and candidates; of padding 0."""
    x_b, x_c, x_u = streams
    times, mask, request = integers
    out = np.zeros_like(x_b), np.zeros_like(x_c)
    for b, n in enumerate(mask.sum(1)):
        start = L - n
        found = Request(
            config, params, x_b[b, start:], x_c[b], x_u[b], times[b, start:], request[b]
        ).output()
        out[0][b, start:], out[1][b] = found[:n], found[n:]
    return out


@pytest.mark.parametrize(("attention", "encoding"), CASES)
def test_equals_loops_without_padding(attention, encoding):
    config, params, value_and_grad = case(attention, encoding)
    streams, integers = inputs_of()
    rng = np.random.default_rng(2)
    weights = [rng.normal(size=x.shape) for x in streams[:2]]
    weights[0] *= integers[1][..., None]  # rows of padding mean nothing
    with jax.enable_x64(True):
        (_, out), grads = value_and_grad(params, streams, integers, weights)
    out, grads = jax.tree.map(np.asarray, (out, grads))
    assert np.isfinite(out[0]).all()
    expected = reference(config, params, streams, integers)
    np.testing.assert_allclose(out[0][integers[1]], expected[0][integers[1]], atol=1e-10)
    np.testing.assert_allclose(out[1], expected[1], atol=1e-10)

    # Gradients of every parameter and input, along a random direction each.
    inputs, tree = jax.tree.flatten((params, list(streams)))
    for i, (x, g) in enumerate(zip(inputs, jax.tree.leaves(grads), strict=True)):
        assert np.isfinite(g).all()
        step = rng.normal(size=x.shape)

        def value(size, i=i, step=step):
            moved = [y + size * step if j == i else y for j, y in enumerate(inputs)]
            out = reference(config, *jax.tree.unflatten(tree, moved), integers)
            return sum(np.sum(w * y) for w, y in zip(weights, out, strict=True))

        eps = 1e-5
        slope = (value(eps) - value(-eps)) / (2 * eps)
        np.testing.assert_allclose(np.sum(g * step), slope, rtol=1e-6, atol=1e-6)
    assert not grads[1][0][~integers[1]].any()  # nothing reaches what stands in padding


@pytest.mark.parametrize(("attention", "encoding"), CASES)
def test_candidates_see_no_other_and_behaviours_none_and_nothing_later(attention, encoding):
    _, params, value_and_grad = case(attention, encoding)
    streams, integers = inputs_of()
    weights = [np.ones_like(x) for x in streams[:2]]

    def outputs(streams):
        with jax.enable_x64(True):
            out = value_and_grad(params, streams, integers, weights)[0][1]
        return [np.asarray(x) for x in out]

    before = outputs(streams)
    other = [x.copy() for x in streams]
    other[1][:, 1] += 1
    after = outputs(other)
    np.testing.assert_array_equal(after[0], before[0])
    np.testing.assert_array_equal(after[1][:, 0], before[1][:, 0])
    assert (after[1][2:, 1] != before[1][2:, 1]).any(-1).all()

    if attention != "kernel":  # Linformer's is not causal
        at = L - 4
        later = [streams[0].copy(), *streams[1:]]
        later[0][:, at:] += 1
        after = outputs(later)
        np.testing.assert_allclose(after[0][:, :at], before[0][:, :at], atol=1e-12)
        assert (after[1][1:] != before[1][1:]).any()


@pytest.mark.parametrize(
    ("attention", "encoding"),
    [
        ("dilated", "rel_temporal"),
        pytest.param("nsa", "rope", marks=pytest.mark.slow),
        pytest.param("evo", "hstu", marks=pytest.mark.slow),
    ],
)
def test_the_last_block_gives_the_candidates_of_any_block_in_float32_too(attention, encoding):
    config, params, value_and_grad = case(attention, encoding)
    streams, integers = inputs_of()
    expected = reference(config, params, streams, integers)[1]
    params, streams = jax.tree.map(np.float32, (params, streams))

    @jax.jit
    def last(params, streams):
        module = EvoAttention(config)
        return module.apply({"params": params}, *streams, history_of(config, integers), True)

    behaviours, candidates = last(params, streams)
    assert behaviours is None and candidates.dtype == jnp.float32
    np.testing.assert_allclose(candidates, expected, rtol=1e-4, atol=1e-4)


MODELS = {
    "dilated": {"attention": "dilated", "dilated_stride": 4},
    "nsa, hstu": {"attention": "nsa", "nsa_block": 4, "nsa_stride": 2, "encoding": "hstu"},
    "kernel": {"attention": "kernel", "kernel_rows": 3, "encoding": "none"},
    "full, rope": {"attention": "full", "encoding": "rope"},
    "evo, t5": {"encoding": "t5"},
}


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_models_trace_forward_and_backward_in_bfloat16(changes):
    module, variables, embedded = built(small(**changes))
    vectors = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), embedded.vectors)

    def loss(variables):
        return module.apply(variables, embedded.replace(vectors=vectors), True)[0].sum()

    grads = jax.eval_shape(jax.grad(loss), variables)
    assert jax.tree.structure(grads) == jax.tree.structure(variables)


@pytest.mark.slow
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_models_see_no_padding_other_candidates_or_other_requests(changes):
    module, variables, embedded = built(small(**changes))
    expected = logits_of(module, variables, embedded)
    other = changed(embedded, rows=slice(2, 5), candidates=[2, 0], padding=7)
    got = logits_of(module, variables, other)
    np.testing.assert_allclose(got, expected[2:5][:, [2, 0]], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_models_run_without_a_history(changes):
    module, variables, embedded = built(small(**changes), length=0, lengths=(0, 0))
    assert np.isfinite(logits_of(module, variables, embedded)).all()


def test_what_does_not_go_together_is_refused():
    for changes, match in [
        ({"attention": "kernel"}, "needs encoding='none'"),
        ({"attention": "kernel", "encoding": "none", "kernel_rows": 0}, "kernel_rows"),
        ({"attention": "dilated", "dilated_stride": 0}, "dilated_stride"),
        ({"attention": "nsa", "nsa_block": 6, "nsa_stride": 4}, "divide the block"),
        ({"attention": "nsa", "nsa_top": 2}, "three blocks"),
        ({"num_heads": 0}, "num_heads 0"),
        ({"aggregate": "sum"}, "aggregate must be"),
        ({"slope_init": "one"}, "slope_init must be"),
        ({"encoding": "time"}, "encoding must be one of"),
        ({"encoding": "hstu", "length": 0}, "longest history"),
        ({"encoding": "rope", "width": 6, "num_heads": 2}, "must be even"),
    ]:
        with pytest.raises(ValueError, match=match):
            model.build(small(**changes), data_spec())


@pytest.mark.parametrize(
    "changes", [{"attention": "kernel", "encoding": "none"}, {"encoding": "hstu"}]
)
def test_a_history_longer_than_its_table_is_refused(changes):
    with pytest.raises(ValueError, match="a history of 14 behaviours"):
        built(small(length=13, **changes))


@pytest.mark.parametrize("kind", ["t5", "hstu"])
def test_a_table_of_bfloat16_takes_all_its_gradient_from_a_loop(kind):
    config = small(encoding=kind, num_heads=2)
    shapes = dict(t5=(2, 32), position=(config.length + 1,), time=(129,))
    names = ("t5",) if kind == "t5" else ("position", "time")
    tables = {name: jnp.zeros(shapes[name], jnp.bfloat16) for name in names}
    one, two = (Places(jnp.full((1, 1, 1), x), jnp.full((1, 1, 1), x)) for x in (0, 1))

    def total(tables):
        encoding = layer_encoding(lambda name, *_: tables[name], config, None, 14)
        bias = lambda i: encoding.bias(two, one, jnp.float32) + 0 * i  # noqa: E731
        return jnp.sum(jax.lax.map(bias, jnp.arange(3200)))

    for gradient in jax.grad(total)(tables).values():
        values = np.unique(np.asarray(gradient, np.float32))
        np.testing.assert_array_equal(values, [0, 3200])
