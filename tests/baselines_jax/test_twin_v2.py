"""TWIN-V2's clusters and its attention over them, against both written out in Python."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from baselines_jax import twin_v2
from baselines_jax.twin import TWIN
from baselines_jax.twin_v2 import TWINV2
from tests.baselines_jax.cases import tokens_of
from tests.baselines_jax.invariances import Checks
from tests.baselines_jax.references import softmax
from tests.lrea_jax.cases import SPEC

L, D, ITERATIONS = 12, 3, 2


@functools.cache
def clustered(most):
    return jax.jit(lambda x, mask: twin_v2.cluster(x, mask, most, ITERATIONS))


# ---- the clusters, a member at a time ----


def clusters_of(x, mask, most, iterations):
    """x [L, d], mask [L] -> lists of places, [(members, medoid)]."""
    length, d = x.shape
    bits = (30 - math.ceil(math.log2(d))) // 2 - 1
    valid = [i for i in range(length) if mask[i]]
    x = np.asarray(x, np.float32)
    peak = np.float32(max((np.abs(x[i]).max() for i in valid), default=0) or 1)
    points = {i: [int(v) for v in np.round(x[i] / peak * np.float32(1 << bits))] for i in valid}

    def mean(members):
        return [round(Fraction(sum(points[i][j] for i in members), len(members))) for j in range(d)]

    def squares(i, point):
        return sum((a - b) ** 2 for a, b in zip(points[i], point, strict=True))

    def halves(members, one, other):
        near = [i for i in members if squares(i, one) < squares(i, other)]
        return [i for i in members if i not in near], near

    clusters = [valid] if valid else []
    levels = max(0, math.ceil(math.log2(length / most))) + twin_v2.SPARE_LEVELS
    for _ in range(levels):
        found = []
        for members in clusters:
            parts = (members, [])
            if len(members) > most:
                centre = mean(members)
                first = max(members, key=lambda i: (squares(i, centre), i))
                second = max(members, key=lambda i: (squares(i, points[first]), i))
                parts = halves(members, points[second], points[first])
                for _ in range(iterations if parts[1] else 0):
                    moved = halves(members, mean(parts[1]), mean(parts[0]))
                    parts = moved if all(moved) else parts
            found += [part for part in parts if part]
        clusters = found
    out = []
    for members in clusters:
        runs = -(-len(members) // most)
        for run in range(runs):
            part = [i for rank, i in enumerate(members) if rank * runs // len(members) == run]
            centre = mean(part)
            out.append((part, min(part, key=lambda i: (squares(i, centre), -i))))
    return out


def as_arrays(clusters, length):
    medoids, counts = np.full(length, length), np.zeros(length, int)
    for members, medoid in clusters:
        medoids[members], counts[medoid] = medoid, len(members)
    return medoids, counts


@st.composite
def histories(draw):
    """x [2, L, d] of few different vectors, most of them close to others, and the mask."""
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    kinds = draw(st.integers(1, L))
    values = rng.integers(-2, 3, (kinds, D)) if draw(st.booleans()) else rng.normal(size=(kinds, D))
    x = values[rng.integers(0, kinds, (2, L))] * draw(st.sampled_from([1.0, 0.0, 1e-20, 1e20]))
    lengths = np.array(draw(st.lists(st.integers(0, L), min_size=2, max_size=2)))
    return x.astype(np.float32), np.arange(L) >= L - lengths[:, None]


EQUAL = np.ones((2, L, D), np.float32), np.arange(L) >= np.array([[0], [3]])


@pytest.mark.parametrize("most", [1, 2, 5])
@settings(max_examples=40, deadline=None)
@given(history=histories())
@example(history=EQUAL)
def test_the_clusters(most, history):
    x, mask = history
    medoids, counts = (np.asarray(a) for a in clustered(most)(x, mask))
    for b in range(2):
        valid = np.flatnonzero(mask[b])
        assert (medoids[b][~mask[b]] == L).all() and counts[b].sum() == len(valid)
        assert (counts[b] <= most).all()
        step = np.abs(x[b][valid]).max(initial=0) / 2**13  # of the grid: D = 3
        for medoid in set(medoids[b][valid]):
            members = np.flatnonzero(medoids[b] == medoid)
            assert medoid in members and counts[b, medoid] == len(members)
            points = x[b, members].astype(np.float64)
            away = np.linalg.norm(points - points.mean(0), axis=1)
            assert away[members == medoid] <= away.min() + 2 * D * step
        assert (counts[b] > 0).sum() == len(set(medoids[b][valid]))
        expected = as_arrays(clusters_of(x[b], mask[b], most, ITERATIONS), L)
        np.testing.assert_array_equal(medoids[b], expected[0])
        np.testing.assert_array_equal(counts[b], expected[1])


def test_more_padding_other_requests_and_what_stands_in_padding_change_nothing():
    rng, by = np.random.default_rng(0), 7
    x = rng.integers(-3, 4, (2, L, D)).astype(np.float32)
    mask = np.arange(L) >= L - np.array([12, 7])[:, None]
    medoids, counts = (np.asarray(a) for a in clustered(2)(x, mask))
    noisy = np.where(mask[..., None], x, 1e6).astype(np.float32)
    longer = np.pad(noisy, ((0, 0), (by, 0), (0, 0)), constant_values=np.nan)
    more, more_counts = clustered(2)(longer, np.pad(mask, ((0, 0), (by, 0))))
    np.testing.assert_array_equal(np.asarray(more)[:, by:] - by, medoids)
    np.testing.assert_array_equal(np.asarray(more_counts)[:, by:], counts)
    turned = clustered(2)(x[::-1], mask[::-1])
    np.testing.assert_array_equal(turned[0], medoids[::-1])


def test_groups_apart_are_clusters_whatever_their_order():
    rng = np.random.default_rng(0)
    group = np.array([0, 1, 0, 2, 1, 0, 2, 1, 0, 2, 1, 0])  # 5, 4 and 3 members
    x = np.array([[0, 0, 0], [9, 0, 0], [0, 20, 0]])[group] + 0.3 * rng.normal(size=(L, D))
    x, mask = np.array([x, x], np.float32), np.ones((2, L), bool)
    medoids, counts = (np.asarray(a)[0] for a in clustered(5)(x, mask))
    for g, size in enumerate([5, 4, 3]):
        (medoid,) = set(medoids[group == g])
        assert group[medoid] == g and counts[medoid] == size


def test_equal_behaviours_are_cut_by_time_into_equal_runs():
    x, mask = EQUAL
    medoids, counts = (np.asarray(a) for a in clustered(5)(x, mask))
    assert counts[0].tolist() == [0, 0, 0, 4] * 3  # the newest of each is its medoid
    np.testing.assert_array_equal(medoids[0], np.repeat([3, 7, 11], 4))
    assert counts[1][counts[1] > 0].tolist() == [5, 4]


# ---- the attention ----


def reference(p, tokens, heads=2, top_k=3, most=2, iterations=ITERATIONS):
    out = []
    for b, mask in enumerate(tokens.batch.behaviour_mask):
        x = np.asarray(tokens.behaviours[b], np.float64)
        clusters = clusters_of(x, mask, most, iterations)
        out.append([])
        for q in np.asarray(tokens.candidates[b], np.float64):
            found = []
            for h in range(heads):
                width = len(q) // heads
                part = slice(h * width, (h + 1) * width)
                query = q @ p["q"]["kernel"][:, part]
                scored = []
                for members, medoid in clusters:
                    score = query @ (x[medoid] @ p["k"]["kernel"][:, part]) / math.sqrt(width)
                    scored.append((score + math.log(len(members)), medoid))
                scored = sorted(scored, reverse=True)[:top_k]
                total = np.zeros(width)
                if scored:
                    for a, (_, medoid) in zip(softmax([s for s, _ in scored]), scored, strict=True):
                        total += a * (x[medoid] @ p["v"][h])
                found.append(total)
            out[-1].append(np.concatenate(found) @ p["out"]["kernel"])
    return out


def module(tile_bytes=0, most=2):
    return TWINV2(2, 3, most, ITERATIONS, tile_bytes)


@functools.cache
def checks():
    return Checks(module, reference, ())


SLOW = pytest.param("one_behaviour", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["values", "gradients", "isolation", "padding", SLOW])
def test_attention_over_the_clusters(name):
    getattr(checks(), name)()


def test_clusters_of_one_are_twin():
    tokens, variables = checks().tokens, checks().variables
    one = jax.jit(lambda v, t: module(most=1).apply(v, t, False))
    twin = jax.jit(lambda v, t: TWIN(2, 3).apply(v, t, False))
    out = np.asarray(one(variables, tokens))
    np.testing.assert_array_equal(out, twin(variables, tokens))
    assert np.abs(out - checks().applied(variables, tokens)).max() > 1e-2


@pytest.mark.slow
def test_halves():
    """bfloat16 in and out, near float32 of the same rounded tokens: the clusters are equal."""
    tokens = tokens_of((11, 0, 6, 1), 11, 3)
    halved = functools.partial(
        jax.tree.map, lambda x: x.astype(jnp.bfloat16) if x.dtype == np.float32 else x
    )
    back = functools.partial(
        jax.tree.map, lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
    )
    given = halved((checks().variables, tokens.candidates, tokens.behaviours, tokens.profile))

    def of(variables, *vectors):
        rounded = tokens.replace(
            **dict(zip(("candidates", "behaviours", "profile"), vectors, strict=True))
        )
        return checks().applied(variables, rounded)

    out = of(*given)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), of(*back(given)), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "change",
    [dict(top_k=0), dict(num_heads=3), dict(cluster_size=0), dict(iterations=0)],
)
def test_sizes_that_do_not_fit_are_refused(change):
    config = twin_v2.default_config()
    config.update(change)
    with pytest.raises(ValueError, match=next(iter(change))):
        twin_v2.build(config, SPEC)
