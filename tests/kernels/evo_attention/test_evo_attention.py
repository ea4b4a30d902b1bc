"""Every implementation of the op against dense attention in float64: outputs, every gradient."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.experimental.pallas import tpu as pltpu

from kernels.evo_attention import RelTemporal, behaviour_branches, candidate_branches
from tests.kernels.evo_attention import dense_reference as dense

SIMULATOR = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
# Name: implementation, interpret, the block that lengths are counted in.
WAYS = {
    "xla": ("xla", False, 64),
    "pallas_tpu": ("pallas_tpu", True, 128),
    "pallas_gpu": ("pallas_gpu", True, 16),
    "tpu_simulator": ("pallas_tpu", SIMULATOR, 128),
}
ALL = RelTemporal()
BRANCHES = ("global", "transition", "local")
OUTPUTS = [f"{query} {branch}" for query in ("behaviour", "candidate") for branch in BRANCHES]
TOLERANCE = {"float32": 5e-5, "bfloat16": 2e-2}  # of the largest value


@functools.partial(jax.jit, static_argnums=(3, 4))
def op(floats, integers, cotangents, window, options):
    """The six outputs and the gradients of their product with the cotangents."""
    options = dict(options)
    tile_logits = options.pop("tile_logits", 0)

    def outputs(floats):
        behaviours, candidates = dense.arguments(floats, integers)
        out = behaviour_branches(*behaviours, window=window, tile_logits=tile_logits, **options)
        return out + candidate_branches(*candidates, **options)

    out, pull = jax.vjp(outputs, floats)
    return out, pull(tuple(c.astype(o.dtype) for c, o in zip(cotangents, out, strict=True)))[0]


@jax.jit
def expected_of(floats, rules, cotangents):
    out, pull = jax.vjp(lambda f: dense.branches(f, rules), floats)
    return out, pull(cotangents)[0]


def check(way, *, seed=0, valid=(30, 0, 1), length=30, candidates=3, heads=2, width=4,
          slots=(3, 6), window=3, block=None, dtype="float32", rel=ALL):  # fmt: skip
    """Outputs and gradients of an implementation against the dense form, twice."""
    implementation, interpret, unit = WAYS[way]
    floats, integers = dense.case(seed, valid, length, candidates, heads, width, slots, window)
    # What is compared is the arithmetic: the dense form sees the rounded inputs too.
    low = {n: jnp.asarray(x, "float32" if n == "slopes" else dtype) for n, x in floats.items()}
    rng = np.random.default_rng(seed + 1)
    queries = [floats["q"].shape] * 3 + [floats["candidate_q"].shape] * 3
    cotangents = [jnp.asarray(rng.normal(size=s), dtype) for s in queries]
    rules = dense.rules(integers, candidates, window)
    on = np.array([rel.time, rel.hour, rel.weekend])[:, None, None, None]
    rules = [[(visible, terms * on) for visible, terms in call] for call in rules]
    with jax.enable_x64(True):
        exact, exact_c = ({n: np.asarray(x, "float64") for n, x in low.items()},
                          [np.asarray(c, "float64") for c in cotangents])  # fmt: skip
        expected, expected_gradients = expected_of(exact, rules, exact_c)
    options = {"rel": rel, "implementation": implementation, "interpret": interpret}
    if implementation == "xla":
        options["tile_logits"] = (block or unit) * len(valid) * heads * (window + 1)
    else:
        options["block"] = block or unit
    arguments = (low, integers, cotangents, window, tuple(options.items()))
    got, gradients = op(*arguments)
    for name, x, y in zip(OUTPUTS, got, expected, strict=True):
        assert x.dtype == dtype, name
        close(x, y, dtype, name)
    for name in dense.FLOATS:
        assert gradients[name].dtype == low[name].dtype, name
        close(gradients[name], expected_gradients[name], dtype, f"gradient of {name}")
    again = op(*arguments)
    for x, y in zip(jax.tree.leaves((got, gradients)), jax.tree.leaves(again), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def close(got, expected, dtype, name):
    got, expected = np.asarray(got, "float64"), np.asarray(expected)
    size = max(np.abs(expected).max(initial=0), 1e-3)
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE[dtype] * size, err_msg=name)


KERNELS = ("pallas_tpu", "pallas_gpu")
slow = pytest.mark.slow


@pytest.mark.parametrize("way", ["xla", *KERNELS])
def test_a_ragged_last_block_padding_rows_and_one_behaviour(way):
    length = 2 * WAYS[way][2] + 1
    check(way, valid=(length, length // 2, 0, 1), length=length, window=5)


@slow
@pytest.mark.parametrize("way", ["xla", *KERNELS])
@pytest.mark.parametrize(
    "length, dtype", [("below", "float32"), ("equal", "float32"), ("above", "bfloat16")]
)
def test_lengths_around_the_block(way, length, dtype):
    unit = WAYS[way][2]
    n = {"below": unit // 2 + 3, "equal": unit, "above": 2 * unit + 1}[length]
    check(way, seed=1, valid=(n, n - 1, 0), length=n, candidates=1, dtype=dtype)


def test_the_simulated_tpu_sees_no_race_and_no_memory_that_was_not_written(capfd):
    check("tpu_simulator", valid=(257, 1), length=257, candidates=1, heads=1, window=3)
    assert "RACE" not in capfd.readouterr().out


@slow
@pytest.mark.parametrize("way", KERNELS)
@pytest.mark.parametrize(
    "heads, width, dtype",
    [(8, 4, "float32"), (1, 12, "bfloat16"), (3, 16, "float32"), (2, 64, "bfloat16")],
)
def test_heads(way, heads, width, dtype):
    check(way, seed=2, heads=heads, width=width, candidates=5, dtype=dtype)


@pytest.mark.parametrize("way", ["xla", *[pytest.param(w, marks=slow) for w in KERNELS]])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(slots=(1, 1), window=1, length=1, valid=(1, 0)),
        dict(slots=(17, 40), window=40, length=35, valid=(35, 20), candidates=17),
    ],
    ids=["everything is one", "a window beyond the history"],
)
def test_extremes(way, sizes):
    check(way, seed=3, **sizes)


@slow
def test_a_window_that_reaches_over_a_whole_block():
    check("pallas_gpu", seed=4, length=40, valid=(40, 9), window=20, block=16)


@slow
@pytest.mark.parametrize("way", KERNELS)
@pytest.mark.parametrize("on", [(False, True, True), (False,) * 3])
def test_parts_of_the_bias_can_be_dropped(way, on):
    check(way, seed=5, rel=RelTemporal(*on))


@slow
@pytest.mark.parametrize("way", KERNELS)
def test_other_forms_of_the_bias_are_those_of_xla(way):
    # The dense form knows the paper's alone; test_rel_temporal.py holds the others' terms.
    rel = RelTemporal(timezone_hours=5.5, hour_form="clock", bucket="suan")
    floats, integers = dense.case(6, (20, 3), 20, 2, 2, 4, (3, 6), 3)
    low = {n: jnp.asarray(x, "float32") for n, x in floats.items()}
    cotangents = [low["q"]] * 3 + [low["candidate_q"]] * 3
    results = []
    for implementation, interpret in (("xla", False), WAYS[way][:2]):
        options = dict(rel=rel, implementation=implementation, interpret=interpret)
        results.append(op(low, integers, cotangents, 3, tuple(options.items())))
    for x, y in zip(*map(jax.tree.leaves, results), strict=True):
        close(y, x, "float32", way)


@slow
@pytest.mark.parametrize("way", ["xla", *KERNELS])
@settings(max_examples=5, derandomize=True, deadline=None)
@given(data=st.data())
def test_any_shape(way, data):
    block = {"xla": [64], "pallas_tpu": [128], "pallas_gpu": [16, 32]}[way]
    block = data.draw(st.sampled_from(block))
    length = data.draw(st.integers(1, 2 * block + 5))
    check(
        way,
        dtype=data.draw(st.sampled_from(["float32", "bfloat16"])),
        seed=data.draw(st.integers(0, 2**31)),
        valid=data.draw(st.lists(st.integers(0, length), min_size=1, max_size=3)),
        length=length,
        candidates=data.draw(st.integers(1, 20)),
        heads=data.draw(st.integers(1, 4)),
        width=data.draw(st.sampled_from([4, 8, 16, 32])),
        slots=data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20))),
        window=data.draw(st.integers(1, 8)),
        block=block,
    )


def some(number=4):
    floats, integers = dense.case(0, (9,), 9, 2, 2, 4, (3, 3), number)
    return dense.arguments({n: x.astype("float32") for n, x in floats.items()}, integers)


LEFT_OUT = ((), (0,), (1,), (2,), (0, 1))


@pytest.mark.parametrize("way", ["xla", *[pytest.param(w, marks=slow) for w in KERNELS]])
def test_a_branch_that_is_left_out_leaves_the_others_alone(way):
    implementation, interpret, _ = WAYS[way]
    options = dict(rel=RelTemporal(), implementation=implementation, interpret=interpret)
    both = some()

    def cuts(behaviours, candidates):
        for without in LEFT_OUT:
            out = []
            for call, arguments, extra in (
                (behaviour_branches, behaviours, {"window": 4}),
                (candidate_branches, candidates, {}),
            ):
                kept = [None if i - 1 in without else x for i, x in enumerate(arguments)]
                out += call(*kept, **options, **extra)
            yield out

    full, *cut = jax.jit(lambda *a: list(cuts(*a)))(*both)
    for without, out in zip(LEFT_OUT[1:], cut, strict=True):
        for i, (x, y) in enumerate(zip(out, full, strict=True)):
            if i % 3 in without:
                assert x is None
            else:
                np.testing.assert_allclose(x, y, atol=2e-6)


@slow
@pytest.mark.parametrize("way", KERNELS)
def test_the_band_alone_has_gradients(way):
    q, _, _, band, *rest = some()[0]

    @functools.partial(jax.jit, static_argnums=(3, 4))
    def gradients(q, band, slopes, implementation, interpret):
        def loss(q, band, slopes):
            options = dict(implementation=implementation, interpret=interpret)
            out = behaviour_branches(
                q, None, None, band, slopes, *rest[1:], rel=ALL, window=4, **options
            )
            return jnp.sum(out[2] ** 2)

        return jax.grad(loss, (0, 1, 2))(q, band, slopes)

    expected = gradients(q, band, rest[0], "xla", False)
    got = gradients(q, band, rest[0], *WAYS[way][:2])
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6)


@pytest.mark.parametrize("way", ["xla", *KERNELS])
def test_no_candidates_and_no_behaviours_give_nothing(way):
    behaviours, candidates = some()
    implementation, interpret, _ = WAYS[way]
    how = dict(rel=ALL, implementation=implementation, interpret=interpret)
    out = candidate_branches(candidates[0][:, :0], *candidates[1:], **how)
    assert [x.shape for x in out] == [(1, 0, 2, 4)] * 3
    q, *prefixes, _, slopes, times, mask = behaviours
    out = behaviour_branches(
        q[:, :0], *prefixes, None, slopes, times[:, :0], mask[:, :0], window=4, **how
    )
    assert [x if x is None else x.shape for x in out] == [(1, 0, 2, 4)] * 2 + [None]


def test_refusals():
    behaviours, candidates = some()
    call = functools.partial(behaviour_branches, rel=RelTemporal(), window=4)
    with pytest.raises(ValueError, match="band: v must be"):
        call(*behaviours[:3], behaviours[3]._replace(v=behaviours[3].v[:, 1:]), *behaviours[4:])
    with pytest.raises(ValueError, match="mask must be"):
        call(*behaviours[:6], behaviours[6][:, 1:])
    for dtype in (np.uint32, np.int64, np.int16):  # the bias counts the zeros of 32 bits
        with pytest.raises(ValueError, match=f"times must be int32, got {np.dtype(dtype)}"):
            call(*behaviours[:5], np.asarray(behaviours[5], dtype), behaviours[6])
    with pytest.raises(ValueError, match="global_keys has no slot; None leaves the branch out"):
        empty = behaviours[1]._replace(**{n: x[:, :0] for n, x in behaviours[1]._asdict().items()})
        call(behaviours[0], empty, *behaviours[2:])
    with pytest.raises(ValueError, match="block must be 0 or more, got -16"):
        call(*behaviours, block=-16)
    with pytest.raises(ValueError, match="slopes must be"):
        call(*behaviours[:4], behaviours[4][:2], *behaviours[5:])
    with pytest.raises(ValueError, match="user_k must be float32 as q is, got bfloat16"):
        low = behaviours[3]._replace(user_k=behaviours[3].user_k.astype(jnp.bfloat16))
        call(*behaviours[:3], low, *behaviours[4:])
    with pytest.raises(ValueError, match="no branch"):
        call(behaviours[0], None, None, None, *behaviours[4:])
    with pytest.raises(ValueError, match="scale must be above 0"):
        behaviour_branches(*behaviours, rel=RelTemporal(), window=2, scale=0.0)
    with pytest.raises(ValueError, match="window"):
        behaviour_branches(*behaviours, rel=RelTemporal(), window=0)
    with pytest.raises(ValueError, match="request_time must be"):
        candidate_branches(*candidates[:5], behaviours[5], rel=RelTemporal())
    for name in KERNELS:
        with pytest.raises(ValueError, match="the target is a cpu"):
            call(*behaviours, implementation=name)
        with pytest.raises(ValueError, match="block must be"):
            call(*behaviours, implementation=name, interpret=True, block=24)
        with pytest.raises(ValueError, match="float32 and bfloat16"):
            half = jax.tree.map(
                lambda x: x.astype("float16") if x.dtype == "float32" else x, behaviours
            )
            call(*half, implementation=name, interpret=True)
    with pytest.raises(ValueError, match="to hold a window of 200"):
        behaviour_branches(*behaviours, rel=ALL, window=200, implementation="pallas_tpu",
                           interpret=True, block=128)  # fmt: skip
    with pytest.raises(ValueError, match="hold no window of 250"):
        behaviour_branches(*behaviours, rel=ALL, window=250, implementation="pallas_gpu",
                           interpret=True)  # fmt: skip
    # Nothing was measured on an accelerator: left open, XLA runs, whatever it is that is refused.
    assert jax.eval_shape(call, *behaviours)[0].shape == behaviours[0].shape
