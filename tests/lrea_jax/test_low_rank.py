"""W_comp, W_decomp: both paths against loops, the penalty, and when absorption is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrea_jax import low_rank
from tests.lrea_jax import reference

L, R, D, H, SLOPE = 9, 4, 3, 6, 0.1


def matrices(kind, rng, length=L, rank=R):
    """W_d [r, L] of each kind that the specification lists."""
    w = rng.normal(size=(rank, length))
    own = np.arange(length) % rank == np.arange(rank)[:, None]  # each behaviour uses one rank
    return {
        "signed": w,
        "non-negative": np.abs(w),
        "stochastic": np.abs(w) / np.abs(w).sum(0),
        "one-hot": own.astype(float),
        "scaled one-hot": own * rng.uniform(0.5, 2, length),
    }[kind]


def gap(kind, form, slope, seed=0, sign=None):
    """Largest |decompressed - absorbed| over largest |decompressed|, by the loops, in float64."""
    rng = np.random.default_rng(seed)
    comp, decomp = rng.normal(size=(L, R)), matrices(kind, rng)
    tokens, t = rng.normal(size=(L, D)), rng.normal(size=D)
    kernel, out = rng.normal(size=(3 * D, H)), rng.normal(size=H)
    if sign:  # every number that phi sees is positive
        comp, tokens, t, kernel = (np.abs(x) for x in (comp, tokens, t, kernel))
    results = []
    for path in low_rank.PATHS:
        keys, values, total = reference.long_history(tokens, comp, path, decomp)
        results.append(reference.unit(t, keys, values, kernel, out, form, slope, total))
    return np.abs(results[0] - results[1]).max() / np.abs(results[0]).max()


EXACT = {  # (kind, form, slope, positive): what the specification proves to be exact
    ("one-hot", "joint", SLOPE, False),
    ("one-hot", "split", SLOPE, False),
    ("scaled one-hot", "split", SLOPE, False),
    ("signed", "split", 1.0, False),
    ("non-negative", "split", 1.0, False),
    ("stochastic", "split", 1.0, False),
    ("stochastic", "joint", 1.0, False),
    ("scaled one-hot", "split", 1.0, False),
    ("one-hot", "joint", 1.0, False),
    ("one-hot", "split", 1.0, False),
    ("non-negative", "split", SLOPE, True),
    ("stochastic", "split", SLOPE, True),
    ("stochastic", "joint", SLOPE, True),
    ("one-hot", "joint", SLOPE, True),
    ("one-hot", "split", SLOPE, True),
    ("scaled one-hot", "split", SLOPE, True),
}


@pytest.mark.parametrize(("slope", "positive"), [(SLOPE, False), (SLOPE, True), (1.0, False)])
@pytest.mark.parametrize("form", ["joint", "split"])
@pytest.mark.parametrize(
    "kind", ["signed", "non-negative", "stochastic", "one-hot", "scaled one-hot"]
)
def test_absorption_is_exact_where_proved_and_nowhere_else(kind, form, slope, positive):
    worst = max(gap(kind, form, slope, seed, positive) for seed in range(5))
    assert (worst < 1e-13) == ((kind, form, slope, positive) in EXACT), worst


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.floats(0, 1), st.booleans(),
    st.integers(0, 10**6),
)  # fmt: skip
def test_the_error_formula(length, rank, hidden, slope, signed, seed):
    rng = np.random.default_rng(seed)
    a, x = rng.normal(size=(length, rank)), rng.normal(size=(rank, hidden))
    a = a if signed else np.abs(a)
    with jax.enable_x64(True):
        formula = np.asarray(low_rank.absorption_error(jnp.asarray(a), jnp.asarray(x), slope))
    want = np.zeros((length, hidden))
    for i in range(length):
        for j in range(hidden):
            inner = sum(a[i, k] * x[k, j] for k in range(rank))
            outer = sum(a[i, k] * reference.phi(x[k, j], slope) for k in range(rank))
            want[i, j] = reference.phi(inner, slope) - outer
    np.testing.assert_allclose(formula, want, atol=1e-12)
    if not signed:
        p, n = a @ np.maximum(x, 0), a @ np.maximum(-x, 0)
        np.testing.assert_allclose(formula, -(1 - slope) * np.minimum(p, n), atol=1e-12)


def test_signed_matrices_can_be_exact_by_luck():
    error = low_rank.absorption_error(jnp.asarray([[2.0, -1.0]]), jnp.asarray([[1.0], [1.0]]), 0.1)
    assert not np.asarray(error).any()


@pytest.mark.parametrize("parametrisation", low_rank.PARAMETRISATIONS)
def test_memory_equals_the_loops_for_shorter_and_longer_histories(parametrisation):
    rng = np.random.default_rng(0)
    params = {"w_comp": rng.normal(size=(L, R)), "w_decomp": rng.normal(size=(R, L))}
    comp, decomp = reference.matrices(params, parametrisation)
    with jax.enable_x64(True):
        for n in (0, 4, L, L + 5):
            tokens = rng.normal(size=(2, n, D))
            for path in low_rank.PATHS:
                module = low_rank.LowRank(L, R, path, parametrisation)
                got = module.apply({"params": params}, jnp.asarray(tokens), method="memory")
                for b in range(2):
                    want = reference.long_history(tokens[b], comp, path, decomp)
                    # On the decompressed path a short history has its own rows only.
                    want = [w[-x[b].shape[0] :] if w.ndim == 2 and x[b].shape[0] else w
                            for w, x in zip(want, jax.tree.leaves(got), strict=True)]  # fmt: skip
                    for name, w in zip(("keys", "values", "total"), want, strict=True):
                        x = np.asarray(getattr(got, name)[b])
                        if x.size:
                            np.testing.assert_allclose(x, w, rtol=1e-12, atol=1e-12)


def test_padding_equals_a_shorter_history():
    rng = np.random.default_rng(1)
    params = {"w_comp": rng.normal(size=(L, R)), "w_decomp": rng.normal(size=(R, L))}
    tokens = rng.normal(size=(2, 4, D)).astype(np.float32)
    padded = np.pad(tokens, ((0, 0), (L - 4 + 6, 0), (0, 0)))
    module = low_rank.LowRank(L, R, "absorbed")
    short, long = (module.apply({"params": params}, x, method="memory") for x in (tokens, padded))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), short, long)


@pytest.mark.parametrize("penalty", low_rank.PENALTIES)
def test_the_penalty_is_equation_10(penalty):
    rng = np.random.default_rng(2)
    params = {"w_comp": rng.normal(size=(L, R)), "w_decomp": rng.normal(size=(R, L))}
    tokens, rows = rng.normal(size=(4, 6, D)), np.array([True, False, True, True])
    module = low_rank.LowRank(L, R, penalty=penalty)
    with jax.enable_x64(True):
        got = module.apply({"params": params}, tokens, rows, method="losses")["non_negativity"]
    of_matrix = sum(w * w for w in params["w_decomp"].reshape(-1) if w < 0)
    of_rows = []
    for b in range(4):
        if rows[b]:
            c = params["w_comp"][-6:].T @ tokens[b]
            of_rows.append(sum(x * x for x in c.reshape(-1) if x < 0))
    scale = (1, 1) if penalty == "sum" else (R * L, R * D)
    assert float(got) == pytest.approx(of_matrix / scale[0] + np.mean(of_rows) / scale[1], rel=1e-9)


@pytest.mark.parametrize("start", low_rank.STARTS)
@pytest.mark.parametrize("parametrisation", low_rank.PARAMETRISATIONS)
def test_initial_matrices(parametrisation, start):
    module = low_rank.LowRank(20, 6, parametrisation=parametrisation, start=start)
    variables = module.init(jax.random.key(0), method="matrices")
    comp, decomp = (np.asarray(x) for x in module.apply(variables, method="matrices"))
    assert comp.shape == (20, 6) and decomp.shape == (6, 20)
    if parametrisation == "stochastic":
        for w in (comp, decomp):
            assert (w >= 0).all()
            np.testing.assert_allclose(w.sum(0), 1, rtol=1e-5)
    if start == "segments":  # each behaviour's strongest rank, and each rank's behaviours, agree
        assert (np.diff(decomp.argmax(0)) >= 0).all()
        assert sorted(set(decomp.argmax(0))) == list(range(6))
        assert (comp.argmax(1) == decomp.argmax(0)).all()


def test_counted_operations():
    # Spelled out for one candidate: t W1 and e W2 shared, one product, phi, W_o and the sum.
    full = low_rank.counted_flops(1000, 10, 16, 64, 100, "full")
    absorbed = low_rank.counted_flops(1000, 10, 16, 64, 100, "absorbed")
    assert full["per_candidate"] == 1000 * (2 * 16 * 64 + 5 * 64 + 2 * 16)
    assert full["per_candidate"] / absorbed["per_candidate"] == 100
    assert absorbed["per_history"] == 4 * 1000 * 10 * 16 and full["per_history"] == 0
    assert low_rank.cache_floats(128, 16, "joint") == 4096
    assert low_rank.table_1(10_000, 128, 16, 10) == {"DIN": 1_600_000, "LREA": 20_480}


def test_impossible_settings_are_refused():
    for arguments in (dict(path="both"), dict(parametrisation="sparse"), dict(start="x")):
        with pytest.raises(ValueError, match="must be one of"):
            low_rank.check(5, 2, **arguments)
    with pytest.raises(ValueError, match="rank must lie"):
        low_rank.check(5, 6)
