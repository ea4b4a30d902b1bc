"""LREA's scoring unit: every implementation, forward and each gradient, against float64 NumPy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import ahead_of_time
from kernels.absorbed_target_attention import (
    FORMS,
    Memory,
    Weights,
    absorbed_target_attention,
    shapes,
)
from kernels.absorbed_target_attention.blocks import Blocks
from tests.kernels.cases import (
    CHECKED,
    IMPLEMENTATIONS,
    TARGETS,
    needs_tpu_compiler,
    sizes,
)

NAMES = ("out", "dquery", "dkeys", "dvalues", "dtotal", "dW1", "dW2", "dW3", "dWo")
SLOPE = 0.2


class Case(NamedTuple):
    """Two requests; the second's rows, all but the last, are padding: zero."""

    candidates: int
    rows: int
    width: int = 4
    hidden: int = 5
    blocks: Blocks = Blocks(8, 128)


CASES = {
    "shorter_than_a_block": Case(3, 7),
    "one_block": Case(8, 128, hidden=3),
    "blocks_and_one_row": Case(13, 257, width=5),
    "one_row": Case(1, 1),
    "one_candidate": Case(1, 1100, hidden=20),
    "few_candidates": Case(5, 700, width=18),
    "wide": Case(17, 130, width=64, hidden=6),
    "many_units": Case(2, 40, width=3, hidden=70),
}
FAST = ("blocks_and_one_row", "one_row", "one_candidate")
# Programs of pallas_gpu: blocks of candidates, walks over rows, requests.
GRIDS = {
    "shorter_than_a_block": ((1, 1, 2), (1, 1, 2)),
    "blocks_and_one_row": ((2, 3, 2), (2, 3, 2)),
    "one_candidate": ((1, 3, 2), (1, 3, 2)),
    "few_candidates": ((1, 6, 2), (1, 6, 2)),
    "wide": ((3, 2, 2), (3, 2, 2)),
    "paper_serving": ((64, 1, 8), (64, 2, 8)),
    "paper_training": ((1, 16, 64), (1, 16, 64)),
    "movielens": ((1, 1, 256), (1, 1, 256)),
    "long_16k": ((4, 32, 8), (1, 128, 8)),
}


def draw(case, seed=0, dtype=np.float32):
    """query, memory, weights and the result's gradient."""
    rng = np.random.default_rng(seed)
    b, (c, k, d, h, _) = 2, case
    normal = lambda *s: jnp.asarray(rng.normal(size=s), dtype)  # noqa: E731
    behaviour = np.ones((b, k, 1))
    behaviour[1, :-1] = 0
    behaviour = jnp.asarray(behaviour, dtype)
    values = (normal(b, k, d) * behaviour).at[1, 0].set(1)  # phi's slope at 0 counts in this row
    memory = Memory(normal(b, k, d) * behaviour, values, normal(b, d))
    weights = Weights(
        *(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((d, h), (d, h), (d, h), (h,)))
    )
    return normal(b, c, d), memory, weights, normal(b, c, d)


def phi(x):
    return np.where(x > 0, x, SLOPE * x)


def derivative(x):
    return np.where(x > 0, 1, SLOPE)


def expected(query, memory, weights, dout, form, rounding):
    """Name -> (value, sum of the sizes of its terms, those on phi's other side if x is rounded).

    All B C K h pre-activations at once; `rounding` is relative to the sizes of their terms.
    """
    cast = lambda x: np.asarray(x, np.float64)  # noqa: E731
    q, k, v, total, do = map(cast, (query, memory.keys, memory.values, memory.total, dout))
    w1, w2, w3, wo = map(cast, (weights.of_query, weights.of_key, weights.of_product, weights.out))
    joint = form == "joint"

    def terms(size):
        a = size(q @ w1) if size is not np.abs else np.abs(q) @ np.abs(w1)
        of_key = size(k) @ size(w2)
        product = np.einsum("bcd,bkd,dh->bckh", size(q), size(k), size(w3))
        return a, of_key, product

    of_query, of_key, product = terms(lambda x: x)
    query_size, key_size, product_size = terms(np.abs)
    if joint:
        product = product + of_query[:, :, None] + of_key[:, None]
        product_size = product_size + query_size[:, :, None] + key_size[:, None]
    near = (np.abs(product) <= rounding * product_size) & (product != 0)
    activated, activated_size = phi(product), product_size
    if not joint:
        activated = activated + phi(of_key)[:, None]
        activated_size = activated_size + key_size[:, None]
    results = []
    for kind in ("value", "size", "near"):
        size = np.abs if kind != "value" else lambda x: x
        scores = activated @ wo if kind == "value" else activated_size @ np.abs(wo)
        of_scores = np.einsum("bcd,bkd->bck", size(do), size(v))
        slope = {"value": derivative(product), "size": 1.0, "near": near * (1 - SLOPE)}[kind]
        g = of_scores[..., None] * size(wo) * slope
        g = np.broadcast_to(g, product.shape)
        of_keys = g.sum(1)  # [b, k, h]
        of_a = g.sum(2)  # [b, c, h]
        of_total = np.zeros_like(total)
        out = np.einsum("bck,bkd->bcd", scores, size(v))
        d_out = np.einsum(
            "bck,bckh->h", of_scores, activated if kind == "value" else activated_size
        )
        if not joint:
            slope = {"value": derivative(of_key), "size": 1.0, "near": 0.0}[kind]
            of_keys = of_scores.sum(1)[..., None] * size(wo) * slope
            of_query_score = phi(of_query) @ wo if kind == "value" else query_size @ np.abs(wo)
            out = out + of_query_score[..., None] * size(total)[:, None]
            of_total = np.einsum("bc,bcd->bd", of_query_score, size(do))
            of_first = np.einsum("bcd,bd->bc", size(do), size(total))
            slope = {"value": derivative(of_query), "size": 1.0, "near": 0.0}[kind]
            of_a = of_first[..., None] * size(wo) * slope
            d_out = d_out + np.einsum(
                "bc,bch->h", of_first, phi(of_query) if kind == "value" else query_size
            )
        results.append(
            dict(
                out=out,
                dquery=np.einsum("bckh,bkd,dh->bcd", g, size(k), size(w3)) + of_a @ size(w1).T,
                dkeys=np.einsum("bckh,bcd,dh->bkd", g, size(q), size(w3)) + of_keys @ size(w2).T,
                dvalues=np.einsum("bck,bcd->bkd", scores, size(do)),
                dtotal=of_total,
                dW1=np.einsum("bch,bcd->dh", of_a, size(q)),
                dW2=np.einsum("bkh,bkd->dh", of_keys, size(k)),
                dW3=np.einsum("bckh,bcd,bkd->dh", g, size(q), size(k)),
                dWo=d_out,
            )
        )
    for name in ("out", "dvalues", "dtotal", "dWo"):  # phi itself is continuous
        results[2][name] = np.zeros_like(results[2][name])
    return {name: tuple(result[name] for result in results) for name in NAMES}


def run(case, arguments, form, **how):
    """Name -> array."""
    if how.get("implementation", "xla") != "xla":
        how["blocks"] = case.blocks

    def both(*arguments):
        def op(query, memory, weights):
            return absorbed_target_attention(query, memory, weights, form=form, slope=SLOPE, **how)

        out, back = jax.vjp(op, *arguments[:-1])
        return out, *jax.tree.leaves(back(arguments[-1]))

    got = jax.jit(both)(*arguments)
    return dict(zip(NAMES, got, strict=True))


def check(arguments, got, form):
    """Float32: the order of sums. Bfloat16 (8 bits, half of 2**-8 lost per rounding): q * w3_j (of
    pallas_gpu two numbers), the gradient of x_j, what it or the scores meet and the result are
    rounded, so four halves of 2**-8; where x_j is within its own rounding of 0, phi's slope may be
    that of the other side."""
    narrow = arguments[0].dtype == jnp.bfloat16
    tolerance, rounding = (2.0**-7, 2.0**-8) if narrow else (2e-6, 1e-6)
    for name, (value, size, near) in expected(*arguments, form, rounding).items():
        error = np.abs(np.asarray(got[name], np.float64) - value)
        assert (error <= tolerance * size + near + 1e-7).all(), (name, (error / (size + 1)).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FAST)
def test_equals_the_float64_reference(name, form, implementation):
    arguments = draw(CASES[name])
    got = run(CASES[name], arguments, form, **IMPLEMENTATIONS[implementation])
    check(arguments, got, form)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [name for name in CASES if name not in FAST])
def test_equals_the_float64_reference_in_more_cases(name, form, implementation):
    arguments = draw(CASES[name])
    got = run(CASES[name], arguments, form, **IMPLEMENTATIONS[implementation])
    check(arguments, got, form)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", ["joint", pytest.param("split", marks=pytest.mark.slow)])
def test_bfloat16_is_rounded_and_no_more(form, implementation):
    case = CASES["blocks_and_one_row"]
    arguments = draw(case, dtype=jnp.bfloat16)
    got = run(case, arguments, form, **IMPLEMENTATIONS[implementation])
    assert [got[name].dtype for name in NAMES] == [jnp.bfloat16] * 5 + [jnp.float32] * 4
    check(arguments, got, form)


@pytest.mark.parametrize("form", ["joint", pytest.param("split", marks=pytest.mark.slow)])
def test_no_race_and_nothing_uninitialised_is_read(form, capfd):
    case = CASES["blocks_and_one_row"]
    arguments = draw(case)
    check(
        arguments, run(case, arguments, form, implementation="pallas_tpu", interpret=CHECKED), form
    )
    assert "race" not in "".join(capfd.readouterr()).lower()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_runs_give_equal_bits(implementation):
    case = CASES["blocks_and_one_row"]
    first, second = (
        run(case, draw(case), "joint", **IMPLEMENTATIONS[implementation]) for _ in range(2)
    )
    for name in NAMES:
        np.testing.assert_array_equal(first[name], second[name])


@st.composite
def cases(draw):
    return Case(
        candidates=draw(st.integers(1, 20)),
        rows=draw(st.integers(1, 300)),
        width=draw(st.sampled_from([1, 4, 7, 16])),
        hidden=draw(st.integers(1, 6)),
        blocks=Blocks(draw(st.sampled_from([8, 16])), draw(st.sampled_from([16, 128, 256]))),
    )


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=12, deadline=None)
@given(
    case=cases(),
    seed=st.integers(0, 9),
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_equals_the_reference_whatever_the_shape(case, seed, form, dtype, implementation):
    arguments = draw(case, seed, dtype)
    check(arguments, run(case, arguments, form, **IMPLEMENTATIONS[implementation]), form)


@pytest.mark.parametrize("tiling", ["keys", "hidden"])
def test_both_tilings_of_xla(tiling):
    arguments = draw(CASES["wide"])
    got = run(CASES["wide"], arguments, "joint", tiling=tiling, tile_bytes=20_000)
    check(arguments, got, "joint")


def test_no_rows_no_candidates():
    query, memory, weights, _ = draw(CASES["one_row"])
    empty = Memory(memory.keys[:, :0], memory.values[:, :0], memory.total)
    assert not np.asarray(absorbed_target_attention(query, empty, weights, form="split")).any()
    assert absorbed_target_attention(query[:, :0], memory, weights).shape == (2, 0, 4)


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_no_array_over_candidates_rows_and_hidden_units(implementation):
    case = Case(32, 1024, 4, 16)
    query, memory, weights, _ = draw(case)

    def total(*arguments):
        how = IMPLEMENTATIONS[implementation] | dict(blocks=case.blocks)
        return absorbed_target_attention(*arguments, **how).sum()

    jaxpr = jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(query, memory, weights)
    parts = 4 if implementation == "pallas_gpu" else 1  # of the rows' gradients: 32 / 8 candidates
    assert max(sizes(jaxpr.jaxpr)) <= max(parts * memory.keys.size, 16 * 128)


@pytest.mark.parametrize("name", GRIDS)
def test_programs_of_a_gpu(name):
    if name in CASES:
        case = CASES[name]
        shape = shapes.Shape(2, *case[:4])
        calls = shapes.calls(shape, "pallas_gpu", interpret=True, blocks=case.blocks)
    else:
        shape = shapes.SHAPES[name]
        calls = shapes.calls(shape, "pallas_gpu", jnp.bfloat16, interpret=True)
    for (function, arguments), grid in zip(calls.values(), GRIDS[name], strict=True):
        text = str(jax.make_jaxpr(function)(*arguments))
        assert f"grid={grid}" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(form="both"), "must be one of"),
        (dict(tiling="rows"), "must be one of"),
        (dict(slope=-1.0), "slope must be 0 or more"),
        (dict(implementation="pallas_gpu", interpret=True, blocks=(0, 64)), "blocks must be 1 or"),
        (dict(query=np.zeros((2, 1, 5), np.float32)), "keys must be"),
        (dict(query=jnp.zeros((2, 1, 4), jnp.bfloat16)), "share a dtype"),
        (dict(implementation="pallas_gpu"), "cannot run: it runs on a gpu"),
        (dict(query=np.zeros((2, 4000, 4), np.float32), implementation="pallas_tpu",
              interpret=True), "2048 candidates at most"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change, message):
    arguments = dict(zip(("query", "memory", "weights"), draw(CASES["one_row"]), strict=False))
    with pytest.raises(ValueError, match=message):
        absorbed_target_attention(**(arguments | change))


@needs_tpu_compiler
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("tpu", "length", "dtype"), TARGETS)
def test_compiles_for_tpus(tpu, length, dtype, form):
    shape = shapes.of_length(length)
    topology = ahead_of_time.TPU_SLICES[tpu]
    # At most keys and values once more, with their axes in another order, and their gradients, and
    # of the split form what its first term has for each candidate: [B, C, h].
    rows = 2 * shape.batch * shape.rows * shape.width * jnp.dtype(dtype).itemsize
    first = 4 * shape.batch * shape.candidates * shape.hidden if form == "split" else 0
    allowed = {"forward": rows + first + (1 << 20), "backward": 2 * rows + first + (1 << 20)}
    for way, (function, arguments) in shapes.calls(shape, "pallas_tpu", dtype, form).items():
        needed = ahead_of_time.tpu_bytes(topology, function, *arguments)
        assert needed.temporaries <= allowed[way], (way, needed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", shapes.SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lowers_for_cuda(name, dtype, form):
    calls = shapes.calls(shapes.SHAPES[name], "pallas_gpu", dtype, form)
    for way in ("forward", "backward"):
        function, arguments = calls[way]
        text = ahead_of_time.cuda_text(function, *arguments)
        assert text.count("__gpu$xla.gpu.triton") == (1 if form == "joint" else 2)
