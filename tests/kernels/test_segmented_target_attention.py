"""LASER's segment sums: every implementation, forward and each gradient, against float64 NumPy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import ahead_of_time
from kernels.segmented_target_attention import (
    api,
    pallas_gpu,
    segmented_target_attention,
    shapes,
)
from kernels.segmented_target_attention.blocks import Blocks, Static, tiling
from tests.kernels.cases import (
    CHECKED,
    IMPLEMENTATIONS,
    TARGETS,
    needs_tpu_compiler,
    sizes,
)

NAMES = ("z", "dq", "dk", "dv", "dbias")
CUDA_KERNEL = "__gpu$xla.gpu.triton"


class Case(NamedTuple):
    """Three requests: left-padded, all padding, one behaviour."""

    candidates: int
    length: int
    segment: int
    heads: int = 2
    key_width: int = 4
    value_width: int = 8
    shared: bool = False
    tied: bool = False  # keys are values of all heads
    softmax: bool = False
    # Of pallas_tpu; pallas_gpu takes no fewer than 16 candidates, and has kernels for fewer.
    blocks: Blocks = Blocks(8, 16)


CASES = {
    "shorter_than_a_block": Case(3, 12, 4),
    "one_block": Case(1, 16, 4, shared=True),
    "blocks_and_one_segment": Case(13, 36, 4, heads=3, key_width=5, value_width=64),
    "segments_of_blocks": Case(17, 40, 20, shared=True),
    "one_row_per_segment": Case(2, 17, 1, heads=1),
    "one_segment": Case(9, 33, 33, key_width=64),
    "one_behaviour": Case(1, 1, 1),
    "paper": Case(19, 130, 10, key_width=16, value_width=64, blocks=Blocks(16, 64)),
    "tied": Case(3, 36, 4, heads=3, key_width=5, tied=True),
    "tied_segments_of_blocks": Case(17, 40, 20, key_width=16, tied=True),
    "softmax": Case(13, 36, 4, heads=3, key_width=5, value_width=64, softmax=True),
    "softmax_of_long_segments": Case(17, 40, 20, shared=True, softmax=True),
    "softmax_of_one": Case(1, 1, 1, softmax=True),
    "softmax_tied": Case(9, 33, 11, key_width=16, tied=True, softmax=True),
    "few": Case(1, 130, 10, key_width=16, value_width=64, blocks=Blocks(16, 64)),
    "few_shared": Case(2, 65, 5, heads=3, shared=True, blocks=Blocks(16, 64)),
    "few_tied": Case(2, 60, 10, heads=3, key_width=9, tied=True, blocks=Blocks(16, 32)),
    "few_softmax": Case(2, 65, 5, shared=True, softmax=True, blocks=Blocks(16, 64)),
    "few_of_one_row": Case(1, 37, 1, softmax=True),
    "few_of_long_segments": Case(1, 300, 100, key_width=30, value_width=20),
    "few_of_segments_too_long": Case(2, 400, 200, key_width=30, value_width=70),
    "as_many_as_few_can_be": Case(2, 60, 10, shared=True, blocks=Blocks(16, 32)),
    "as_few_as_many_can_be": Case(3, 60, 10, shared=True, blocks=Blocks(16, 32)),
    "softmax_paper": Case(19, 130, 10, 2, 64, tied=True, softmax=True, blocks=Blocks(16, 64)),
}
FAST = ("blocks_and_one_segment", "segments_of_blocks", "one_behaviour", "tied", "softmax",
        "softmax_tied", "few", "few_shared", "few_tied")  # fmt: skip


def draw(case, seed=0, dtype=np.float32):
    """q, k, v, mask, bias and dz, as `dtype` holds them."""
    rng = np.random.default_rng(seed)
    b, (c, length, _, h, kq, kv, shared, tied, *_) = 3, case
    kv = kq if tied else kv
    normal = lambda *s: jnp.asarray(rng.normal(size=s), dtype)  # noqa: E731
    mask = np.arange(length) >= rng.integers(0, length, (b, 1))
    mask[1], mask[2] = False, np.arange(length) == length - 1
    q, k, v = (
        normal(b, c, h, kq),
        normal(b, length, 1 if tied else h, kq),
        None if tied else normal(b, length, 1 if shared else h, kv),
    )
    dz = normal(b, c, length // case.segment, h, kv)
    return q, k, v, jnp.asarray(mask), jnp.asarray(rng.normal(size=h), jnp.float32), dz


def expected(case, q, k, v, mask, bias, dz):
    """Name -> (value, sum of the sizes of its terms), one segment after the other."""
    if case.tied:
        k = np.broadcast_to(k, (*k.shape[:2], case.heads, k.shape[3]))
        values = expected(case._replace(tied=False), q, k, k, mask, bias, dz)
        of_both = zip(values["dk"], values.pop("dv"), strict=True)
        return values | {"dk": [(x + y).sum(2, keepdims=True) for x, y in of_both]}
    q, k, v, bias, dz = (np.asarray(x, np.float64) for x in (q, k, v, bias, dz))
    mask, w, scale = np.asarray(mask), case.segment, case.key_width**-0.5
    heads = np.arange(case.heads)
    shared = np.zeros_like(heads) if case.shared else heads
    z, dq, dk, dv, dbias = (np.zeros((2, *x.shape)) for x in (dz, q, k, v, bias))
    for s in range(case.length // w):
        rows = slice(s * w, (s + 1) * w)
        visible = mask[:, None, rows, None]
        logits = np.einsum("bchk,blhk->bclh", q, k[:, rows]) * scale + bias
        values = v[:, rows][:, :, shared]
        of_gates = np.einsum("bchv,blhv->bclh", dz[:, :, s], values)
        if not case.softmax:
            gates = visible / (1 + np.exp(-logits))
            of_logits = of_gates * gates * (1 - gates)
            # 1 - gate has no more digits than 1.
            sizes = np.abs(of_gates) * gates * np.maximum(1 - gates, 1 / 16)
        else:
            exp = np.where(visible, np.exp(logits), 0)
            gates = exp / np.maximum(exp.sum(2, keepdims=True), 1e-300)
            of_logits = gates * (of_gates - (gates * of_gates).sum(2, keepdims=True))
            sizes = np.abs(of_gates)
            sizes = gates * (sizes + (gates * sizes).sum(2, keepdims=True))
        for i, (size, each) in enumerate(((lambda x: x, of_logits), (np.abs, sizes))):
            z[i, :, :, s] = np.einsum("bclh,blhv->bchv", gates, size(values))
            dq[i] += np.einsum("bclh,blhk->bchk", each, size(k[:, rows])) * scale
            dk[i, :, rows] = np.einsum("bclh,bchk->blhk", each, size(q)) * scale
            of_values = np.einsum("bclh,bchv->blhv", gates, size(dz[:, :, s]))
            dv[i, :, rows] = of_values.sum(2, keepdims=True) if case.shared else of_values
            dbias[i] += each.sum((0, 1, 2))
    return dict(zip(NAMES, (z, dq, dk, dv, dbias), strict=True))


def run(case, arguments, **how):
    """Name -> array."""
    if how.get("implementation", "xla") != "xla":
        how["blocks"] = case.blocks
    how["activation"] = "softmax" if case.softmax else "sigmoid"

    def both(q, k, v, mask, bias, dz):
        def op(q, k, v, bias):
            return segmented_target_attention(q, k, v, mask, bias, segment=case.segment, **how)

        z, back = jax.vjp(op, q, k, v, bias)
        return z, *back(dz)

    results = zip(NAMES, jax.jit(both)(*arguments), strict=True)
    return {name: x for name, x in results if x is not None}


def check(case, arguments, got):
    """Float32: the order of sums. Bfloat16 (8 bits, half of 2**-8 lost per rounding): gates and
    gradients of gates, of logits and of the result are rounded, so four halves of 2**-8."""
    tolerance = 2e-6 if arguments[0].dtype == jnp.float32 else 2.0**-7
    for name, (value, size) in expected(case, *arguments).items():
        error = np.abs(np.asarray(got[name], np.float64) - value)
        assert (error <= tolerance * size + 1e-7).all(), (name, (error / (size + 1e-7)).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", FAST)
def test_equals_the_float64_reference(name, implementation):
    arguments = draw(CASES[name])
    got = run(CASES[name], arguments, **IMPLEMENTATIONS[implementation])
    check(CASES[name], arguments, got)
    assert not np.asarray(got["z"])[1].any()  # padding alone


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", [name for name in CASES if name not in FAST])
def test_equals_the_float64_reference_in_more_cases(name, implementation):
    arguments = draw(CASES[name])
    check(CASES[name], arguments, run(CASES[name], arguments, **IMPLEMENTATIONS[implementation]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["segments_of_blocks", "few_shared"])
def test_bfloat16_is_rounded_and_no_more(name, implementation):
    case = CASES[name]
    arguments = draw(case, dtype=jnp.bfloat16)
    got = run(case, arguments, **IMPLEMENTATIONS[implementation])
    assert [got[name].dtype for name in NAMES] == [jnp.bfloat16] * 4 + [jnp.float32]
    check(case, arguments, got)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["tied", "few_tied", "softmax_tied"])
def test_bfloat16_of_tied_rows_is_rounded_and_no_more(name, implementation):
    case = CASES[name]
    arguments = draw(case, dtype=jnp.bfloat16)
    check(case, arguments, run(case, arguments, **IMPLEMENTATIONS[implementation]))


@pytest.mark.parametrize(
    "name",
    ["segments_of_blocks", "softmax_tied", *(pytest.param(n, marks=pytest.mark.slow)
     for n in ("paper", "softmax", "tied_segments_of_blocks", "softmax_paper"))],
)  # fmt: skip
def test_no_race_and_nothing_uninitialised_is_read(name, capfd):
    arguments = draw(CASES[name])
    got = run(CASES[name], arguments, implementation="pallas_tpu", interpret=CHECKED)
    check(CASES[name], arguments, got)
    assert "race" not in "".join(capfd.readouterr()).lower()


@pytest.mark.parametrize("name", ["segments_of_blocks", "few_shared"])
def test_float16_on_a_gpu_is_rounded_and_no_more(name):
    arguments = draw(CASES[name], dtype=jnp.float16)
    check(CASES[name], arguments, run(CASES[name], arguments, **IMPLEMENTATIONS["pallas_gpu"]))


@pytest.mark.parametrize(
    ("name", "programs", "parts"),
    [
        ("paper", 30, (5, 3)),  # 13 segments, 3 requests, 2 heads of values
        ("paper", 60, (7, 2)),
        ("segments_of_blocks", 3, (1, 2)),  # of two blocks of rows each, heads share their values
        ("softmax_tied", 3, (1, 3)),
    ],
)
def test_a_program_of_several_segments_sums_their_gradients(name, programs, parts, monkeypatch):
    case = CASES[name]
    monkeypatch.setattr(pallas_gpu, "PROGRAMS", programs)
    arguments = draw(case)
    q, k, v, mask, bias, dz = arguments
    static = Static(case.segment, "sigmoid", case.key_width**-0.5, case.blocks, True)
    shape = pallas_gpu._shape(static, q, k, v)
    assert (shape.programs, shape.per_program) == parts
    check(case, arguments, run(case, arguments, **IMPLEMENTATIONS["pallas_gpu"]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["segments_of_blocks", "few_shared"])
def test_two_runs_give_equal_bits(name, implementation):
    case = CASES[name]
    first, second = (run(case, draw(case), **IMPLEMENTATIONS[implementation]) for _ in range(2))
    for name in NAMES:
        np.testing.assert_array_equal(first[name], second[name])


@st.composite
def cases(draw):
    segment = draw(st.integers(1, 24))
    tied = draw(st.booleans())
    return Case(
        candidates=draw(st.integers(1, 20)),
        length=segment * draw(st.integers(1, 60 // segment)),
        segment=segment,
        heads=draw(st.integers(1, 3)),
        key_width=draw(st.sampled_from([1, 4, 7, 16])),
        value_width=draw(st.sampled_from([1, 4, 9])),
        shared=not tied and draw(st.booleans()),
        tied=tied,
        softmax=draw(st.booleans()),
        blocks=Blocks(draw(st.sampled_from([8, 16])), draw(st.sampled_from([8, 16, 24, 64]))),
    )


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=12, deadline=None)
@given(case=cases(), seed=st.integers(0, 9), dtype=st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_equals_the_reference_whatever_the_shape(case, seed, dtype, implementation):
    arguments = draw(case, seed, dtype)
    check(case, arguments, run(case, arguments, **IMPLEMENTATIONS[implementation]))


@settings(max_examples=200, deadline=None)
@given(segment=st.integers(1, 300), count=st.integers(1, 40), most=st.sampled_from([8, 64, 256]))
def test_a_tiling_covers_the_history_once(segment, count, most):
    length = segment * count
    rows = tiling(length, segment, most)
    assert rows.groups * rows.group_rows == length and rows.rows <= max(most, length)
    assert rows.rows % 8 == 0 or rows.rows == rows.group_rows  # what a TPU's blocks have to be
    if rows.whole:
        assert rows.groups == 1 and rows.rows == rows.segments * segment
    else:
        assert rows.group_rows == segment and rows.segments == 1


@pytest.mark.parametrize("tile_bytes", [1, 2000, 10**6])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_xla_in_tiles_of_any_size(activation, tile_bytes):
    case = Case(3, 42, 6, shared=tile_bytes == 1, softmax=activation == "softmax")
    arguments = draw(case)
    check(case, arguments, run(case, arguments, tile_bytes=tile_bytes))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_array_over_candidates_rows_and_heads(implementation):
    case = Case(64, 2000, 20, blocks=Blocks(16, 64))
    arguments = draw(case)
    how = dict(IMPLEMENTATIONS[implementation])
    if implementation == "xla":
        how["tile_bytes"] = 4 * 64 * 200 * 2 * 3

    def total(q, k, v, bias):
        z = segmented_target_attention(q, k, v, arguments[3], bias, segment=20, **how)
        return z.sum()

    q, k, v, _, bias, dz = arguments
    jaxpr = jax.make_jaxpr(jax.grad(total, (0, 1, 2, 3)))(q, k, v, bias)
    assert max(sizes(jaxpr.jaxpr)) <= max(dz.size, v.size) < 3 * 64 * 2000 * 2 / 2


def _rows(n):
    """One segment of n rows."""
    arguments = draw(Case(3, n, n))
    return dict(k=arguments[1], v=arguments[2], mask=arguments[3], segment=n)


@pytest.mark.parametrize("name", ["tied", "softmax"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_scale_is_of_the_products(name, implementation):
    case = CASES[name]
    q, *rest = draw(case)
    how = IMPLEMENTATIONS[implementation]
    given = run(case, (q * 4, *rest), scale=case.key_width**-0.5 / 4, **how)
    own = run(case, (q, *rest), **how)
    given["dq"] *= 4
    for each, x in own.items():
        np.testing.assert_allclose(given[each], x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["tied", "softmax"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_candidates_give_no_sums(name, implementation):
    case = CASES[name]
    q, *rest, dz = draw(case)
    got = run(case, (q[:, :0], *rest, dz[:, :0]), **IMPLEMENTATIONS[implementation])
    assert got["z"].shape == (3, 0, *dz.shape[2:]) and got["dq"].shape == q[:, :0].shape
    assert not np.asarray(got["dk"]).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(segment=7), "no multiple of the segment size"),
        (dict(activation="relu"), "activation must be one of"),
        (dict(k=np.zeros((3, 12, 2, 5), np.float32)), "k must be"),
        (dict(v=np.zeros((3, 12, 4, 5), np.float32)), "v must be"),
        (dict(v=jnp.zeros((3, 12, 2, 8), jnp.bfloat16)), "share a dtype"),
        (dict(mask=np.ones((3, 12), np.float32)), "mask must be bool"),
        (
            dict(q=np.ones((3, 3, 2, 4), int), k=np.ones((3, 12, 2, 4), int), v=None),
            "k must be",
        ),
        (
            dict(q=np.ones((3, 3, 2, 4), int), k=np.ones((3, 12, 1, 4), int), v=None),
            "share a dtype, a float, got int64",
        ),
        (dict(bias=np.zeros(3, np.float32)), "bias must be"),
        (dict(implementation="pallas_tpu"), "cannot run: it runs on a tpu"),
        (dict(v=None), "k must be"),
        (dict(implementation="pallas_tpu", interpret=True, blocks=Blocks(8, 0)), "must be 1 or"),
        (
            dict(implementation="pallas_gpu", interpret=True, activation="softmax", **_rows(300)),
            "softmax takes segments of 128 rows at most, got 300",
        ),
        (
            dict(implementation="pallas_tpu", interpret=True, activation="softmax", **_rows(1100)),
            "softmax takes segments of 1024 rows at most, got 1100",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = dict(zip(("q", "k", "v", "mask", "bias"), draw(Case(3, 12, 4)), strict=False))
    with pytest.raises(ValueError, match=message):
        segmented_target_attention(**(arguments | dict(segment=4) | change))


@needs_tpu_compiler
@pytest.mark.parametrize(("tpu", "length", "dtype"), TARGETS)
def test_compiles_for_tpus(tpu, length, dtype):
    shape = shapes.of_length(length)
    # z once more with its axes in another order, its gradient twice: only at this boundary, as the
    # layout of arguments and results is not the kernels' to choose.
    z = shape.batch * shape.candidates * shape.segments * shape.heads * shape.value_width
    z *= jnp.dtype(dtype).itemsize
    allowed = {"forward": 1.1 * z + (1 << 20), "backward": 2.2 * z + (1 << 20)}
    for way, (function, arguments) in shapes.calls(shape, "pallas_tpu", dtype).items():
        needed = ahead_of_time.tpu_bytes(ahead_of_time.TPU_SLICES[tpu], function, *arguments)
        assert needed.temporaries <= allowed[way], (way, needed)


@needs_tpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["paper", "paper_tied", "paper_softmax", "paper_tied_softmax"])
def test_named_shapes_compile_for_tpu(name, dtype):
    shape = shapes.SHAPES[name]
    # Rows of heads of 16 and 64 lie in another order than the kernels'; whole ones do not.
    most = 0.01 if shape.tied else 1.6
    for function, arguments in shapes.calls(shape, "pallas_tpu", dtype).values():
        needed = ahead_of_time.tpu_bytes("v5e:2x2", function, *arguments)
        assert needed.temporaries <= most * (needed.arguments + needed.outputs), needed


@pytest.mark.parametrize("name", shapes.SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lowers_for_cuda(name, dtype):
    shape = shapes.SHAPES[name]
    assert all(text.count(CUDA_KERNEL) == 1 for text in _cuda_texts(shape, dtype).values())


@pytest.mark.parametrize(
    ("candidates", "kind", "kernels"),
    [(2, "NVIDIA H200", 0), (3, "NVIDIA H200", 1), (3, "a GPU of another kind", 0)],
)
def test_the_kernel_is_the_default_where_it_was_measured_to_be_faster(
    candidates, kind, kernels, monkeypatch
):
    monkeypatch.setattr(api, "PREFERRED", {"NVIDIA H200": ("pallas_gpu",)})
    shape = shapes.SHAPES["paper_serving"]._replace(candidates=candidates)
    function, arguments = shapes.calls(shape, None)["forward"]
    text = ahead_of_time.cuda_text(function, *arguments, device_kind=kind)
    assert text.count(CUDA_KERNEL) == kernels


def _cuda_texts(shape, dtype=jnp.float32):
    calls = shapes.calls(shape, "pallas_gpu", dtype).items()
    return {way: ahead_of_time.cuda_text(call, *arguments) for way, (call, arguments) in calls}


@pytest.mark.parametrize(
    ("change", "few"),
    [(dict(candidates=2), True), (dict(candidates=3), False), (dict(segment=100), True),
     (dict(segment=200), False)],
)  # fmt: skip
def test_few_candidates_have_kernels_of_their_own_if_a_segment_fits(change, few):
    shape = shapes.SHAPES["paper"]._replace(**change)
    for way, text in _cuda_texts(shape).items():
        assert (f"attention_few_{way}" in text) == few
