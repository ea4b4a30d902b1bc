"""LASER against its definition in float64, and its invariants."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctr_jax.history_model import Tokens
from kernels.segmented_target_attention import segmented_target_attention
from laser_jax import model
from laser_jax.fusion import masked_max, per_token_product
from laser_jax.recency import age_buckets
from laser_jax.segmented import SegmentedTargetAttention
from tests.laser_jax import reference
from tests.lrea_jax.cases import SPEC, batch_of, changed

NOW = 1_500_000_000
D, LENGTHS = 8, (12, 0, 7, 2, 11)


def small(**changes):
    config = model.default_config()
    config.update(embedding_width=3, width=D, segment=4, key_width=3, head_hidden=(6,))
    config.update(changes)
    config.lock()
    return config


def tokens(length=12, lengths=LENGTHS, candidates=3, seed=0):
    rng = np.random.default_rng(seed)
    b = len(lengths)
    batch = batch_of((), length=length, lengths=lengths, candidates=candidates).batch
    # Ages from a second to years, some at exact powers of two.
    ages = 2 ** rng.integers(0, 28, (b, length)) + rng.integers(0, 3, (b, length)) - 1
    batch = batch.replace(
        request_time=np.full(b, NOW, np.int32),
        behaviour_time=np.sort(NOW - ages, 1).astype(np.int32),
    )
    x = rng.normal(size=(b, length, D)) * batch.behaviour_mask[..., None]
    return Tokens(
        *(a.astype(np.float32) for a in (rng.normal(size=(b, candidates, D)), x)),
        rng.normal(size=(b, 5)).astype(np.float32),
        batch,
    )


def weights(module, *args, method=None):
    """Variables away from their initial values, so that every one matters."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, method=method))
    rng = np.random.default_rng(3)

    def leaf(path, x):
        x = rng.normal(size=x.shape).astype(np.float32) * 0.6
        return np.abs(x) + 0.5 if "variance" in jax.tree_util.keystr(path) else x

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def double(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


CONFIGS = {
    "as it is": {},
    "shared order": {"order": "shared"},
    "per candidate": {"order": "per_candidate"},
    "softmax, shared": {"gate": "softmax", "order": "shared"},
    "softmax, per candidate": {"gate": "softmax", "order": "per_candidate"},
    "mean": {"pool": "mean"},
    "no recency": {"recency": False},
    "tokens as they are": {"token_norm": False},
    "no fusion": {"fusion": "none"},
    "mlp": {"fusion": "mlp"},
    "no norm": {"norm": False},
    "no ffn": {"ffn_multiplier": 0},
    "segment 5, ragged": {"segment": 5},
    "segment 1": {"segment": 1},
    "one segment": {"segment": 12},
    "segment above L": {"segment": 16},
    "one layer": {"num_layers": 1},
    "no layer": {"num_layers": 0},
    "four tokens": {"fusion_tokens": 4, "recent": 0},
    "more recent than segments": {"segment": 6},
    "one block, four heads": {"fusion_blocks": 1, "num_heads": 4, "key_width": 2},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_interest_equals_its_definition(name):
    config = small(**CONFIGS[name])
    module, given_tokens = model.LASER(config), tokens()
    variables = weights(module, given_tokens, False)
    out = jax.jit(lambda v, t: module.apply(v, t, False))(variables, given_tokens)
    params, t = double(variables["params"]), double(given_tokens.replace(batch=None))
    batch = given_tokens.batch
    expected = [
        [
            reference.interest(
                params, t.candidates[b, c], t.behaviours[b], batch.behaviour_mask[b],
                batch.behaviour_time[b], batch.request_time[b], t.profile[b], config,
            )
            for c in range(out.shape[1])
        ]
        for b in range(out.shape[0])
    ]  # fmt: skip
    np.testing.assert_allclose(out, expected, rtol=2e-4, atol=2e-4)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 5), st.integers(1, 3),
    st.sampled_from(["sigmoid", "softmax"]), st.integers(0, 2**31 - 1),
)  # fmt: skip
def test_pooled_sums_equal_the_loop_over_segments(s, w, c, gate, seed):
    rng = np.random.default_rng(seed)
    b, h, d, length = 2, 2, 3, s * w
    query, bias = rng.normal(size=(b, c, h, d)), rng.normal(size=h)
    x, mask = rng.normal(size=(b, length, d)), rng.random((b, length)) < 0.7
    expected = np.zeros((b, c, s, h, d))
    for i, j, m, head in np.ndindex(b, c, s, h):
        at = [t for t in range(m * w, (m + 1) * w) if mask[i, t]]
        scores = np.array([query[i, j, head] @ x[i, t] + bias[head] for t in at])
        if gate == "softmax":
            gates = reference.softmax(scores) if at else []
        else:
            gates = reference.sigmoid(scores)
        for g, t in zip(gates, at, strict=True):
            expected[i, j, m, head] += g * x[i, t]
    with jax.enable_x64(True):
        how = dict(segment=w, activation=gate, scale=1)
        pooled = segmented_target_attention(query, x[:, :, None], None, mask, bias, **how)
    np.testing.assert_allclose(pooled, expected, rtol=1e-12, atol=1e-12)


def test_a_long_segment_is_not_unrolled():
    """Its sums are one product, equal to the same behaviours' in short segments."""
    rng = np.random.default_rng(0)
    query, x = rng.normal(size=(2, 1, 2, 3)), rng.normal(size=(2, 400, 1, 3))
    mask, bias = rng.random((2, 400)) < 0.7, rng.normal(size=2)

    def sums(segment):
        how = dict(segment=segment, activation="sigmoid", scale=1)
        return lambda x: segmented_target_attention(query, x, None, mask, bias, **how).sum(2)

    with jax.enable_x64(True):
        np.testing.assert_allclose(sums(200)(x), sums(10)(x), rtol=1e-12, atol=1e-12)
        counts = [len(jax.make_jaxpr(sums(w))(x).pretty_print().splitlines()) for w in (200, 400)]
    assert max(counts) < 100


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**32))
def test_the_largest_segment_of_each_width_takes_the_gradient(c, s, seed):
    rng = np.random.default_rng(seed)
    segments, pull = rng.normal(size=(4, c, s, 3)), rng.normal(size=(4, c, 3))
    mask = rng.random((4, s)) < 0.6
    largest, gradient = np.zeros_like(pull), np.zeros_like(segments)
    for b, i, d in np.ndindex(pull.shape):
        seen = [j for j in range(s) if mask[b, j]]
        if seen:
            best = max(seen, key=lambda j: segments[b, i, j, d])
            largest[b, i, d] = segments[b, i, best, d]
            gradient[b, i, best, d] = pull[b, i, d]
    with jax.enable_x64(True):
        found, back = jax.vjp(lambda x: masked_max(x, jnp.asarray(mask)), jnp.asarray(segments))
        np.testing.assert_array_equal(found, largest)
        np.testing.assert_array_equal(back(jnp.asarray(pull))[0], gradient)


def test_a_matrix_for_each_token_and_both_its_gradients():
    rng = np.random.default_rng(0)
    x, kernel, pull = (rng.normal(size=s) for s in ((3, 4, 5), (3, 5, 2), (3, 4, 2)))
    with jax.enable_x64(True):
        found, back = jax.vjp(per_token_product, jnp.asarray(x), jnp.asarray(kernel))
        dx, dkernel = back(jnp.asarray(pull))
    for t in range(3):
        np.testing.assert_allclose(found[t], x[t] @ kernel[t], rtol=1e-12)
        np.testing.assert_allclose(dx[t], pull[t] @ kernel[t].T, rtol=1e-12)
        np.testing.assert_allclose(dkernel[t], x[t].T @ pull[t], rtol=1e-12)


def sta(order="auto", **fields):
    return SegmentedTargetAttention(
        width=D, num_heads=2, key_width=3, segment=4, order=order, **fields
    )


def segments(module, variables, x, mask, candidates):
    history = module.apply(variables, x, mask, candidates.shape[1], method="history")
    return module.apply(variables, candidates, history), history


def test_both_orders_agree_in_values_and_gradients():
    t = tokens()
    mask = t.batch.behaviour_mask
    results = []
    for order in ("shared", "per_candidate"):
        module = sta(order)
        variables = weights(
            module, t.behaviours, mask, t.candidates,
            method=lambda m, x, mask, q: m(q, m.history(x, mask, 3)),
        )  # fmt: skip

        def loss(variables, x, candidates, module=module):
            with_segments, _ = segments(module, variables, x, mask, candidates)
            return jnp.sum(jnp.sin(with_segments)), with_segments

        grad = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
        with jax.enable_x64(True):
            results.append(grad(*double((variables, t.behaviours, t.candidates))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), *results)


def test_gates_start_at_one_over_the_segment_and_the_ffn_at_zero():
    t = tokens()
    for pool, start in (("sum", -np.log(4)), ("mean", 0.0)):
        module = sta(pool=pool)

        def init(rng, module=module):
            both = lambda m, x, mask, q: m(q, m.history(x, mask, 3))  # noqa: E731
            return module.init(rng, t.behaviours, t.batch.behaviour_mask, t.candidates, method=both)

        params = jax.jit(init)(jax.random.key(0))["params"]
        np.testing.assert_allclose(params["bias"], [start, start], rtol=1e-6)
        assert not np.asarray(params["ffn_out"]["kernel"]).any()
        assert np.asarray(params["ffn_in"]["kernel"]).any()


def test_behaviours_at_and_after_the_request_have_the_first_bucket():
    ages = np.array([[-(2**20), -5, 0, 1, 2, 2**20 - 1, 2**20]], np.int32)
    buckets = age_buckets(np.array([NOW], np.int32), NOW - ages)
    assert buckets.tolist() == [[0, 0, 0, 0, 1, 19, 20]]


def test_the_cheaper_order_is_taken():
    module = SegmentedTargetAttention()  # the paper's size
    assert module.per_candidate(1000, 1)
    assert not module.per_candidate(1000, 100)


def test_w_of_one_is_a_gated_value_per_item_and_w_of_l_one_pooled_token():
    t = tokens(lengths=(12, 12, 12, 12, 12))
    mask = t.batch.behaviour_mask
    plain = dict(ffn_multiplier=0)
    per_item, pooled = (sta(**plain).clone(segment=w, parent=None) for w in (1, 12))
    variables = weights(
        pooled, t.behaviours, mask, t.candidates,
        method=lambda m, x, mask, q: m(q, m.history(x, mask, 3)),
    )  # fmt: skip
    items, _ = segments(per_item, variables, t.behaviours, mask, t.candidates)
    whole, _ = segments(pooled, variables, t.behaviours, mask, t.candidates)
    assert items.shape[2] == 12 and whole.shape[2] == 1
    np.testing.assert_allclose(items.sum(2), whole[:, :, 0], rtol=1e-4, atol=1e-5)
    # DIN's form: each behaviour's own value, weighed by a number that no other behaviour moves.
    other = t.behaviours.copy()
    other[:, 3] += 1.0
    moved, _ = segments(per_item, variables, other, mask, t.candidates)
    assert (np.asarray(moved) != np.asarray(items)).any((0, 1, 3)).tolist() == [
        i == 3 for i in range(12)
    ]


def test_a_segment_of_padding_is_exactly_zero_before_the_ffn():
    t = tokens(lengths=(4, 3, 0, 1, 8))
    module = sta(ffn_multiplier=0)
    mask = t.batch.behaviour_mask
    variables = weights(
        module, t.behaviours, mask, t.candidates,
        method=lambda m, x, mask, q: m(q, m.history(x, mask, 3)),
    )  # fmt: skip
    z, history = segments(module, variables, t.behaviours, mask, t.candidates)
    seen = np.asarray(history.segments(4))
    assert seen.tolist() == [[False, False, True], [False, False, True], [False] * 3,
                             [False, False, True], [False, True, True]]  # fmt: skip
    assert (np.moveaxis(np.asarray(z), 2, 1)[~seen] == 0).all()


def built(config, **kwargs):
    module, columns = model.build(config, SPEC)
    embedded = batch_of(columns, **kwargs)
    rng = np.random.default_rng(7)
    times = np.sort(NOW - rng.integers(1, 10**7, embedded.batch.behaviour_time.shape), 1)
    embedded = embedded.replace(
        batch=embedded.batch.replace(
            request_time=np.full(len(times), NOW, np.int32), behaviour_time=times.astype(np.int32)
        )
    )
    variables = weights(module, embedded, False)
    return module, variables, embedded


@pytest.mark.parametrize("rows", [False, True])
def test_no_history_is_a_history_of_padding(rows):
    """Of a model that has its parameters from longer ones, with vectors or rows and slots."""
    module, variables, embedded = built(small(short_length=3), lengths=(0, 0))
    none = batch_of(module.columns, length=0, lengths=(0, 0))
    none = none.replace(batch=none.batch.replace(request_time=embedded.batch.request_time))
    others = {k: x for k, x in embedded.vectors.items() if not k.startswith("behaviour/")}
    of_behaviours = {k: x for k, x in none.vectors.items() if k.startswith("behaviour/")}
    if rows:
        tables = {k: np.ones((9, x.shape[-1]), np.float32) for k, x in of_behaviours.items()}
        slots = {k: np.zeros((2, 0), np.int32) for k in of_behaviours}
        none = none.replace(vectors=others, rows=tables, slots=slots)
    else:
        none = none.replace(vectors=others | of_behaviours)
    apply = jax.jit(lambda v, x: module.apply(v, x, False)[0])
    expected = apply(variables, embedded)
    np.testing.assert_allclose(apply(variables, none), expected, rtol=1e-5, atol=1e-5)


CHANGES = {
    "a segment of padding": dict(padding=4),
    "padding that is no segment": dict(padding=3),
    "permuted candidates": dict(candidates=[2, 0, 1]),
    "fewer requests and candidates": dict(rows=slice(1, 4), candidates=[1]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_invariances_of_the_whole_model(change):
    module, variables, embedded = built(small(short_length=3))
    apply = jax.jit(lambda v, x: module.apply(v, x, False)[0])
    logits = np.asarray(apply(variables, embedded))
    assert np.abs(logits[:, 0] - logits[:, 1]).min() > 1e-3  # candidates differ at all
    what = CHANGES[change]
    expected = logits[what.get("rows", slice(None))][:, what.get("candidates", slice(None))]
    other = apply(variables, changed(embedded, **what))
    np.testing.assert_allclose(other, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("train", [False, True])
def test_candidates_in_tiles_give_the_same_values_and_gradients(train, monkeypatch):
    module, variables, embedded = built(small(), candidates=7)

    def loss(variables, vectors):
        logits, _ = module.apply(variables, dataclasses.replace(embedded, vectors=vectors), train)
        return jnp.sum(jnp.sin(logits)), logits

    results = []
    for tile in (1 << 20, 5 * 3 * D * 4 * 3):  # all at once; three candidates at a time
        monkeypatch.setitem(model.TILE_BYTES, "cpu", tile)
        grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        results.append(grad(variables, embedded.vectors))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), *results)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(results[0]))


def test_no_array_of_all_candidates_behaviours_and_widths_is_made():
    module, variables, embedded = built(small(order="per_candidate"), length=60, candidates=7)
    text = jax.jit(lambda v, x: module.apply(v, x, False)[0]).lower(variables, embedded).as_text()
    elements = [
        np.prod([int(n) for n in shape.split("x")[:-1]])
        for shape in {part.split(">")[0] for part in text.split("tensor<")[1:]}
        if "x" in shape
    ]
    assert max(elements) < 5 * 7 * 60 * D
    assert max(elements) >= 5 * 60 * D  # the scan sees the shapes


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gate": "relu"}, "gate"),
        ({"order": "best"}, "order"),
        ({"fusion": "sum"}, "fusion"),
        ({"pool": "max"}, "pool"),
        ({"width": 9}, "num_heads"),
        ({"width": 12}, "fusion_tokens"),
        ({"recent": 6}, "fusion_tokens"),
        ({"segment": 0}, "segment"),
        ({"ffn_multiplier": -1}, "ffn_multiplier"),
        ({"fusion_blocks": -1}, "fusion_blocks"),
        ({"head_hidden": (4, 0)}, "head_hidden"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        model.build(small(**change), SPEC)
