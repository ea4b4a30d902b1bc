"""AUCs of counts and weights far from 1: no overflow, nothing lost beside heavier rows."""

from fractions import Fraction

import numpy as np
import pytest

from ctr_jax import metrics, rank_sums

MEASURES = ("auc", "logloss", "normalised_entropy", "calibration")
CLOSE = {"rel": 1e-12, "abs": 0}


def rows(n=300, seed=0):
    """labels, scores with ties, groups, weights of 1 to 4."""
    rng = np.random.default_rng(seed)
    scores = np.round(rng.normal(size=n), 1)
    return rng.integers(0, 2, n), scores, rng.integers(0, 9, n), rng.uniform(1, 4, n)


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1e-165, 1e160, 4e307])
def test_the_scale_of_weights_means_nothing(scale):
    labels, scores, groups, weights = rows()
    weights = np.round(weights)  # which even the smallest floats keep
    scaled = weights * scale
    for name in MEASURES:
        measure = getattr(metrics, name)
        assert measure(labels, scores, scaled) == pytest.approx(
            measure(labels, scores, weights), **CLOSE
        ), name
    found, wanted = (metrics.gauc(labels, scores, groups, w) for w in (scaled, weights))
    assert found == pytest.approx(wanted, **CLOSE)
    found, wanted = (metrics.reliability_bins(labels, scores, w, 5) for w in (scaled, weights))
    for a, b in zip(found, wanted, strict=True):
        assert a == pytest.approx(b, **CLOSE)


def test_light_rows_beside_heavy_ones():
    labels, scores, groups, weights = rows()
    # Each class at a scale of its own: the AUC does not depend on either.
    apart = np.where(labels == 1, 1e-165, 1e160)
    assert metrics.auc(labels, scores, apart) == pytest.approx(metrics.auc(labels, scores), **CLOSE)
    # Each group at a scale of its own, the light ones between heavy ones.
    apart = weights * 10.0 ** np.array([160, -160, 0])[groups % 3]
    found = rank_sums.group_aucs(
        labels.astype(np.uint8), metrics.order_codes(scores), groups, apart
    )[0]
    alone = [metrics.auc(*(x[groups == g] for x in (labels, scores, weights))) for g in range(9)]
    np.testing.assert_allclose(found, alone, rtol=1e-12)
    # A bin of light rows alone.
    low = scores < np.median(scores)
    bins = metrics.reliability_bins(labels, scores, np.where(low, 1e-200, 1.0), bins=2)
    assert all(np.isfinite(list(b.values())).all() for b in bins)
    plain = metrics.reliability_bins(labels, scores, bins=2)
    assert [b["low"] for b in bins] == pytest.approx([b["low"] for b in plain])


@pytest.mark.parametrize("exponent", [20, 29, 31, 32, 40])
def test_counts_whose_product_is_beyond_an_integer(exponent):
    many = 1 << exponent
    # Two groups, runs ascending: 3 many + 1 positives against 2 many negatives, and a small one.
    pos = np.array([many, 0, 2 * many + 1, 1, 1], np.int64)
    neg = np.array([0, 2 * many - 1, 1, 3, 0], np.int64)
    areas, positives, negatives = rank_sums.run_aucs(pos, neg, np.array([0, 3]))
    won = Fraction(2 * many + 1) * (2 * many - 1) + Fraction(2 * many + 1, 2)
    assert areas[0] == pytest.approx(float(won / (3 * many + 1) / (2 * many)), rel=1e-15)
    assert areas[1] == pytest.approx((1.5 + 3) / 6, rel=1e-15)
    assert positives.tolist() == [3 * many + 1, 2] and negatives.tolist() == [2 * many, 3]
