"""The sparse branches against dense masked attention in float64, forward and every gradient."""

import functools
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from kernels.evo_attention import RelTemporal
from kernels.evo_attention.layout import choose_tiling
from sparsectr_jax import evo_attention as evo
from sparsectr_jax.chunking import time_chunks
from tests.compiling import compiled_as_usual
from tests.sparsectr_jax import dense_reference as ref

B, L, C, H, K = 3, 21, 2, 2, 4
NAMES = ("q", "k", "v", "chunk_k", "chunk_v", "user_k", "user_v", "slopes")
FIXED = {
    "random": [("random", 17), ("random", 9), ("random", 20)],
    "tied": [("tied", 21), ("tied", 12), ("tied", 3)],
    "full length": [("random", 21)] * 3,
    "one behaviour": [("random", 1)] * 3,
    "empty": [("random", 0)] * 3,
    "mixed": [("random", 0), ("tied", 21), ("random", 1)],
}


def case(seed, histories, num_chunks, m, w, length=L, inclusive=True, heads=H, width=K):
    """Inputs in float64, integer arrays and the rules' masks."""
    rng = np.random.default_rng(seed)
    drawn = [ref.random_history(rng, length, valid, kind) for kind, valid in histories]
    times, mask = (np.stack(x) for x in zip(*drawn, strict=True))
    request = (times.max(1) + rng.integers(1, 10**6, len(times))).astype(np.int32)
    size = len(histories)
    shapes = {
        "q": (size, length + C, heads, width),
        "k": (size, length, heads, width),
        "v": (size, length, heads, width),
        "chunk_k": (size, num_chunks, heads, width),
        "chunk_v": (size, num_chunks, heads, width),
        "user_k": (size, heads, width),
        "user_v": (size, heads, width),
    }
    inputs = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    inputs["slopes"] = rng.normal(size=(3, heads)) * 0.3
    rules = [
        ref.visibility(t, k, r, C, num_chunks, m, w, inclusive)
        for t, k, r in zip(times, mask, request, strict=True)
    ]
    stacked = {
        branch: tuple(np.stack([r[branch][i] for r in rules]) for i in (0, 1))
        for branch in rules[0]
    }
    weights = [rng.normal(size=shapes["q"]) for _ in range(3)]
    return inputs, (times, mask, request), stacked, weights


@functools.partial(jax.jit, static_argnums=(3, 4))
def sparse_value_and_grad(inputs, integers, weights, num_chunks, spec):
    times, mask, request = integers

    def loss(inputs):
        chunks = time_chunks(times, mask, num_chunks)
        history = evo.History(chunks, times, mask, request)
        out = evo.evo_attention(*(inputs[n] for n in NAMES), history, spec)
        return sum(jnp.sum(w * x) for w, x in zip(weights, out, strict=True)), out

    return jax.value_and_grad(loss, has_aux=True)(inputs)


@functools.partial(jax.jit, static_argnums=3)
def dense_value_and_grad(inputs, rules, weights, scale=None):
    def loss(inputs):
        out = ref.dense_branches(*(inputs[n] for n in NAMES), rules, scale)
        return sum(jnp.sum(w * x) for w, x in zip(weights, out, strict=True)), out

    return jax.value_and_grad(loss, has_aux=True)(inputs)


@functools.partial(jax.jit, static_argnums=(1, 2))
def nonempty(integers, num_chunks, spec):
    times, mask, request = integers
    history = evo.History(time_chunks(times, mask, num_chunks), times, mask, request)
    return evo.branch_nonempty(history, spec)


def check(seed, histories, num_chunks, m, w, *, inclusive=True, scale=None, length=L, tile=0):
    """Values and gradients in float64 against the dense form; returns the case."""
    drawn = case(seed, histories, num_chunks, m, w, length, inclusive)
    inputs, integers, rules, weights = drawn
    spec = evo.EvoSpec(m, w, RelTemporal(), inclusive, scale, tile_logits=tile)
    with jax.enable_x64(True):
        (_, expected), expected_grads = dense_value_and_grad(inputs, rules, weights, scale)
        (_, got), grads = sparse_value_and_grad(inputs, integers, weights, num_chunks, spec)
        for branch, x, y in zip(evo.BRANCHES, got, expected, strict=True):
            assert x.dtype == jnp.float64
            np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-11, err_msg=branch)
        for name in NAMES:
            np.testing.assert_allclose(
                grads[name], expected_grads[name], rtol=1e-10, atol=1e-10, err_msg=name
            )
    # Whether a query sees anything agrees too.
    seen = nonempty(integers, num_chunks, spec)
    seen = np.concatenate([np.repeat(x, r, 1) for x, r in zip(seen, (1, C), strict=True)], 1)
    for r, branch in enumerate(("global", "transition")):
        np.testing.assert_array_equal(seen[..., r], rules[branch][0].any(-1))
    assert seen[..., 2].all()
    return inputs, integers, weights, spec, expected, expected_grads


@pytest.mark.parametrize("histories", FIXED.values(), ids=FIXED.keys())
def test_equals_dense_attention(histories):
    inputs, integers, weights, spec, expected, expected_grads = check(0, histories, 4, 2, 5)
    # The same in float32.
    inputs = {n: x.astype(np.float32) for n, x in inputs.items()}
    weights = [x.astype(np.float32) for x in weights]
    (_, got), grads = sparse_value_and_grad(inputs, integers, weights, 4, spec)
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    for name in NAMES:
        size = np.abs(expected_grads[name]).max()
        np.testing.assert_allclose(grads[name], expected_grads[name], atol=2e-5 * max(size, 1))


@settings(max_examples=8, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    histories=st.lists(
        st.tuples(st.sampled_from(["random", "tied"]), st.integers(0, L)), min_size=B, max_size=B
    ),
)
def test_equals_dense_attention_on_any_history(seed, histories):
    check(seed, histories, 4, 2, 5)


@pytest.mark.parametrize(
    "num_chunks, m, w, kwargs",
    [
        pytest.param(25, 1, 1, {}, marks=pytest.mark.slow),  # P > L, a window of one
        (2, 23, 24, {"inclusive": False, "scale": 8**-0.5}),  # m and w beyond the history
        pytest.param(5, 2, 3, {"length": 1}, marks=pytest.mark.slow),
    ],
)
def test_other_sizes_and_switches(num_chunks, m, w, kwargs):
    length = kwargs.get("length", L)
    histories = [(kind, min(valid, length)) for kind, valid in FIXED["mixed"]]
    check(1, histories, num_chunks, m, w, **kwargs)


def test_tiles_of_several_blocks_and_groups():
    # 64 queries a tile: three blocks of a history, the band reaching over their borders, and
    # groups of requests walked one by one.
    histories = [("random", 150), ("tied", 170), ("random", 64), ("random", 0)] * 4
    check(7, histories, 3, 2, 6, length=170, tile=100)
    assert choose_tiling(16, 170, H, 7, 5, 100) == (8, 2, 64, 3)


def test_a_band_wider_than_the_smallest_tile():
    check(7, [("random", 170)], 3, 2, 70, length=170, tile=100)
    assert choose_tiling(1, 170, H, 71, 69, 100) == (1, 1, 128, 2)


def test_a_tile_holds_whole_histories_where_one_fits():
    assert choose_tiling(16, 200, 8, 32, 4, 400_000) == (4, 4, 200, 1)
    assert choose_tiling(16, 200, 8, 32, 4, 400_000, sharded=True) == (8, 2, 128, 2)


def test_tilings_cover_every_query_and_divide_the_batch():
    for batch in (1, 3, 7, 8, 24, 1024):
        for length in (1, 63, 200, 1000, 8192):
            for budget in (1, 50_000, 400_000, 10**8):
                for halo in (0, 4, 99):
                    tiling = choose_tiling(batch, length, 8, 54, halo, budget)
                    rows, groups, width, blocks = tiling
                    assert rows * groups == batch
                    assert length <= width * blocks < length + max(width, 64)
                    assert blocks == 1 or halo <= width


@functools.partial(jax.jit, static_argnums=(2, 3))
def run(inputs, integers, num_chunks, spec):
    times, mask, request = integers
    history = evo.History(time_chunks(times, mask, num_chunks), times, mask, request)
    return evo.evo_attention(*(inputs[n] for n in NAMES), history, spec)


@pytest.mark.parametrize(
    "on",
    [
        [False, True, True],
        pytest.param([True, False, False], marks=pytest.mark.slow),
        pytest.param([False] * 3, marks=pytest.mark.slow),
    ],
)
def test_parts_of_the_bias_can_be_dropped(on):
    inputs, integers, rules, weights = case(2, FIXED["random"], 4, 2, 5)
    cut = {
        b: (visible, terms * np.array(on)[:, None, None]) for b, (visible, terms) in rules.items()
    }
    with jax.enable_x64(True):
        (_, expected), _ = dense_value_and_grad(inputs, cut, weights)
        spec = evo.EvoSpec(2, 5, RelTemporal(*on))
        (_, got), grads = sparse_value_and_grad(inputs, integers, weights, 4, spec)
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-11)
        used = np.asarray(grads["slopes"]).any(1)
        assert used.tolist() == on


@pytest.mark.slow
@pytest.mark.parametrize("dropped", evo.BRANCHES)
def test_a_dropped_branch_leaves_the_others_alone(dropped):
    inputs, integers, _, _ = case(3, FIXED["mixed"], 4, 2, 5)
    inputs = {n: x.astype(np.float32) for n, x in inputs.items()}
    full = run(inputs, integers, 4, evo.EvoSpec(2, 5))
    kept = tuple(b for b in evo.BRANCHES if b != dropped)
    cut = run(inputs, integers, 4, evo.EvoSpec(2, 5, branches=kept))
    for branch, x, y in zip(evo.BRANCHES, full, cut, strict=True):
        if branch == dropped:
            assert y is None
        else:
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_large_logits_neither_overflow_nor_underflow():
    inputs, integers, rules, weights = case(4, FIXED["mixed"], 4, 2, 5)
    inputs["q"] *= 40
    inputs["slopes"] += 20
    low = {n: x.astype(np.float32) for n, x in inputs.items()}
    (_, got), grads = sparse_value_and_grad(
        low, integers, [w.astype(np.float32) for w in weights], 4, evo.EvoSpec(2, 5)
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((got, grads)))
    # An all-zero row means an empty set, nothing else.
    some = rules["global"][0].any(-1)
    assert (np.abs(got[0]).sum((2, 3)) > 0).tolist() == some.tolist()


@pytest.mark.slow
def test_bfloat16_stays_close():
    inputs, integers, _, _ = case(5, FIXED["random"], 4, 2, 5)
    low = {
        n: jnp.asarray(x, jnp.float32 if n == "slopes" else jnp.bfloat16) for n, x in inputs.items()
    }
    got = run(low, integers, 4, evo.EvoSpec(2, 5))
    expected = run(
        {n: x.astype(jnp.float32) for n, x in low.items()}, integers, 4, evo.EvoSpec(2, 5)
    )
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(x.astype(jnp.float32), y, atol=0.06)


def shapes_in(hlo):
    """Every array shape named in HLO text."""
    for dims in re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]*)\]", hlo):
        yield tuple(int(d) for d in dims.split(",") if d)


def test_no_square_tensor_and_no_gather_of_windows_in_the_compiled_code():
    length, num_chunks, m, w = 211, 6, 2, 5
    heads, width = 4, 16
    inputs, integers, _, weights = case(
        6, [("random", 150)], num_chunks, m, w, length, heads=heads, width=width
    )
    low = {n: x.astype(np.float32) for n, x in inputs.items()}
    low_weights = [x.astype(np.float32) for x in weights]
    spec = evo.EvoSpec(m, w)
    lowered = sparse_value_and_grad.lower(low, integers, low_weights, num_chunks, spec)
    shapes = set(shapes_in(lowered.compile(compiler_options={}).as_text()))
    assert any(length in s for s in shapes)
    for shape in shapes:
        assert sum(d >= length for d in shape) < 2, shape
        assert np.prod(shape) < length * min(length, w * heads * width), shape


def read_twice(loop, name):
    """Whether a fused loop reads %name, or what merely moves its elements, more than once."""
    users = re.findall(rf"(%\S+) = \S+ ([\w-]+)\([^\n]*{re.escape(name)}[,)]", loop)
    if len(users) == 1 and users[0][1] in ("bitcast", "copy", "reshape", "slice", "transpose"):
        return read_twice(loop, users[0][0])
    return len(users) > 1


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA does on a CPU")
def test_no_loop_reads_a_slice_at_a_place_known_at_run_time_twice():
    # Such a loop is no vector loop: it reads the place anew for every element.
    histories = [("random", 150), ("tied", 170)] * 8
    inputs, integers, _, weights = case(6, histories, 4, 2, 5, 170)
    low = {n: x.astype(np.float32) for n, x in inputs.items()}
    spec = evo.EvoSpec(2, 5, tile_logits=100)
    lowered = sparse_value_and_grad.lower(low, integers, weights, 4, spec)
    loops = re.findall(r"^%fused\S* .*?^}", compiled_as_usual(lowered).as_text(), re.M | re.S)
    slices = [(x, f) for f in loops for x in re.findall(r"(%\S+) = \S+ dynamic-slice\(", f)]
    assert slices and not any(read_twice(loop, name) for name, loop in slices)
