"""Metrics against scikit-learn and pure-Python loops."""

import math
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.metrics import log_loss, roc_auc_score

from ctr_jax import metrics, rank_sums
from ctr_jax.batch import RequestBatch

COMMON = settings(derandomize=True, deadline=None, max_examples=60)


@st.composite
def rows(draw, weighted=False):
    """labels, scores (few distinct ones: heavy ties), groups, weights (some zero)."""
    n = draw(st.integers(1, 60))
    seed = draw(st.integers(0, 2**32 - 1))
    distinct = draw(st.sampled_from([1, 2, 3, 10, 1000]))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    groups = draw(st.sampled_from([1, 2, 5, 60]))
    rng = np.random.default_rng(seed)
    values = np.append(rng.normal(size=distinct) * 10 ** rng.uniform(-3, 3), [0.0, -0.0])
    labels = (rng.random(n) < rng.choice([0.1, 0.5, 0.9])).astype(np.float32)
    scores = rng.choice(values, n).astype(dtype)
    ids = rng.choice(rng.integers(-(2**31), 2**31 - 1, groups), n).astype(np.int32)
    weights = rng.choice([0.0, 0.25, 1.0, 3.7, 1e3], n) if weighted else None
    return labels, scores, ids, weights


def pairwise_auc(labels, scores, weights=None):
    """The definition: share of (positive, negative) pairs in the right order, in fractions."""
    weights = [1] * len(labels) if weights is None else weights
    triples = list(zip(labels, scores, map(Fraction, weights), strict=True))
    won = total = Fraction(0)
    for y, s, w in triples:
        for y2, s2, w2 in triples:
            if y == 1 and y2 == 0:
                total += w * w2
                won += w * w2 * (Fraction(1, 2) if s == s2 else int(s > s2))
    return float(won / total) if total else None


def looped_gauc(labels, scores, groups, weights=None):
    """One scikit-learn call a group: (value, coverage, groups, groups left out, rows left out)."""
    weights = np.ones(len(labels)) if weights is None else weights
    kept = weights > 0
    labels, scores, groups, weights = labels[kept], scores[kept], groups[kept], weights[kept]
    total = weight = 0.0
    counted, left, left_rows = 0, 0, 0
    for group in np.unique(groups):
        of = groups == group
        if len(np.unique(labels[of])) < 2:
            left, left_rows = left + 1, left_rows + int(of.sum())
            continue
        counted += 1
        weight += weights[of].sum()
        total += weights[of].sum() * roc_auc_score(
            labels[of], scores[of], sample_weight=weights[of]
        )
    value = total / weight if counted else None
    coverage = weight / weights.sum() if len(labels) else 0.0
    return value, coverage, counted, left, left_rows


def close(a, b, tolerance=1e-12):
    if a is None or b is None:
        return a is None and b is None
    return abs(a - b) <= tolerance * max(1.0, abs(b))


@COMMON
@given(rows())
def test_auc_is_the_share_of_pairs(case):
    labels, scores, _, _ = case
    assert close(metrics.auc(labels, scores), pairwise_auc(labels, scores), 1e-15)
    if 0 < labels.sum() < len(labels):
        assert close(metrics.auc(labels, scores), roc_auc_score(labels, scores))


@COMMON
@given(rows(weighted=True))
def test_weighted_auc_is_the_share_of_weighted_pairs(case):
    labels, scores, _, weights = case
    assert close(metrics.auc(labels, scores, weights), pairwise_auc(labels, scores, weights))


@COMMON
@given(rows())
def test_gauc_equals_a_loop(case):
    labels, scores, groups, _ = case
    found, wanted = metrics.gauc(labels, scores, groups), looped_gauc(labels, scores, groups)
    assert all(close(a, b) for a, b in zip(found, wanted, strict=True)), (found, wanted)


@COMMON
@given(rows(weighted=True))
def test_weighted_gauc_equals_a_loop(case):
    labels, scores, groups, weights = case
    found = metrics.gauc(labels, scores, groups, weights)
    wanted = looped_gauc(labels, scores, groups, weights)
    assert all(close(a, b) for a, b in zip(found, wanted, strict=True)), (found, wanted)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ties_count_one_half(dtype):
    # Broken tie handling gives 0 or 1 (sort order) instead of one half.
    same = np.full(6, 0.3, dtype)
    for labels in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 0, 1]):
        assert metrics.auc(labels, same) == 0.5
        assert metrics.gauc(labels, same, [0, 0, 1, 1, 1, 1]).value in (0.5, None)
    zeros = np.array([0.0, -0.0, 0.0, -0.0], dtype)  # two zeros, one score
    assert metrics.auc([1, 0, 0, 1], zeros) == 0.5
    assert metrics.auc([1, 0, 1, 0], np.array([2, 1, 1, 1], dtype)) == 0.75
    tiny = np.array([1e-40, -1e-40, 0, 1], dtype)  # subnormal floats keep their order
    assert metrics.auc([0, 0, 1, 1], tiny) == 0.75


def test_large_inputs_and_huge_groups():
    rng = np.random.default_rng(0)
    n = 200_000
    labels = (rng.random(n) < 0.05).astype(np.int8)
    for scores in (
        rng.normal(size=n).astype(np.float32),
        np.round(rng.normal(size=n), 1),
        rng.normal(size=n) * 1e-300,
    ):
        assert close(metrics.auc(labels, scores), roc_auc_score(labels, scores))
    # One group of nearly everything beside hundreds of tiny ones, before and after it in order.
    groups = np.where(rng.random(n) < 0.98, 500, rng.integers(0, 1000, n))
    weights = rng.uniform(0.1, 2, n)
    for w in (None, weights):
        found = metrics.gauc(labels, scores, groups, w)
        wanted = looped_gauc(labels, scores, groups, w)
        assert all(close(a, b) for a, b in zip(found, wanted, strict=True))
    assert close(
        metrics.auc(labels, scores, weights), roc_auc_score(labels, scores, sample_weight=weights)
    )


def test_weighted_groups_round_at_their_own_scale():
    # A cumulative sum over everything would lose the small groups' weights beside the large one's.
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(500), 8)
    labels, scores = np.tile([0, 1], 2000), rng.normal(size=4000)
    weights = np.where(groups < 250, 1e12, 1.0) * rng.uniform(0.5, 2, 4000)
    small = groups >= 250
    aucs = [
        metrics.auc(labels[groups == g], scores[groups == g], weights[groups == g])
        for g in range(250, 500)
    ]
    mass = [weights[groups == g].sum() for g in range(250, 500)]
    value, pos, neg, _ = rank_sums.group_aucs(
        labels.astype(np.uint8), metrics.order_codes(scores), groups, weights
    )
    np.testing.assert_allclose(value[250:], aucs, rtol=0, atol=1e-12)
    assert close(
        metrics.gauc(labels[small], scores[small], groups[small], weights[small]).value,
        np.average(aucs, weights=mass),
    )


@pytest.mark.parametrize(
    "kind", [np.int8, np.uint8, np.int32, np.int64, np.uint64, np.float64, str, bool]
)
def test_groups_of_any_type(kind):
    rng = np.random.default_rng(2)
    plain = rng.integers(0, 2 if kind is bool else 9, 300)
    names = plain.astype(kind)
    if kind is np.int64:
        names = np.where(plain == 0, -(2**62), plain * 2**58)
    elif kind is np.uint64:
        names = plain.astype(np.uint64) + np.uint64(2**63 + 5)
    elif kind is np.int8:
        names = (plain * 31 - 124).astype(np.int8)
    labels, scores = rng.integers(0, 2, 300), rng.normal(size=300)
    assert metrics.gauc(labels, scores, names) == metrics.gauc(labels, scores, plain)


def test_integer_weights_are_repetitions():
    rng = np.random.default_rng(3)
    labels, scores = rng.integers(0, 2, 80), rng.integers(-3, 4, 80).astype(np.float32)
    groups, times = rng.integers(0, 7, 80), rng.integers(0, 4, 80)
    many = [np.repeat(x, times) for x in (labels, scores, groups)]
    assert close(metrics.auc(labels, scores, times), metrics.auc(*many[:2]), 1e-15)
    assert close(metrics.gauc(labels, scores, groups, times).value, metrics.gauc(*many).value)
    for name in ("logloss", "normalised_entropy", "calibration"):
        measure = getattr(metrics, name)
        assert close(measure(labels, scores, times), measure(*many[:2]))


@pytest.mark.parametrize("labels", [[], [0], [1], [0, 0, 0], [1, 1, 1]])
def test_one_class_is_none_never_nan(labels):
    scores = np.arange(len(labels), dtype=np.float32)
    assert metrics.auc(labels, scores) is None
    assert metrics.auc_standard_error(labels, scores) is None
    assert metrics.normalised_entropy(labels, scores) is None
    found = metrics.gauc(labels, scores, np.zeros(len(labels), np.int32))
    assert found.value is None and found.coverage == 0 and found.groups == 0
    assert found.impressions_left_out == len(labels)
    if 1 not in labels:
        assert metrics.calibration(labels, scores) is None
    assert (metrics.logloss(labels, scores) is None) == (not labels)
    assert metrics.auc([0, 1], [1.0, 2.0], [1.0, 0.0]) is None


def test_gauc_below_its_coverage_is_none_but_counted():
    labels, scores = np.zeros(100), np.arange(100.0)
    labels[0] = 1
    groups = np.arange(100) // 2
    found = metrics.gauc(labels, scores, groups, min_coverage=0.05)
    assert found == metrics.GroupAUC(None, 0.02, 1, 49, 98)
    assert metrics.gauc(labels, scores, groups, min_coverage=0.02).value == 0.0


@COMMON
@given(rows())
def test_standard_error_equals_delong_by_definition(case):
    labels, scores, _, _ = case
    x, y = scores[labels == 1], scores[labels == 0]
    if len(x) < 2 or len(y) < 2:
        assert metrics.auc_standard_error(labels, scores) is None
        return
    kernel = (x[:, None] > y[None]) + 0.5 * (x[:, None] == y[None])
    variance = kernel.mean(1).var(ddof=1) / len(x) + kernel.mean(0).var(ddof=1) / len(y)
    assert close(metrics.auc_standard_error(labels, scores), math.sqrt(variance))


def test_standard_error_is_the_spread_of_the_auc():
    rng = np.random.default_rng(4)
    found, errors = [], []
    for _ in range(400):
        labels = (rng.random(600) < 0.2).astype(int)
        scores = rng.normal(size=600) + labels
        found.append(metrics.auc(labels, scores))
        errors.append(metrics.auc_standard_error(labels, scores))
    assert 0.88 < np.mean(errors) / np.std(found) < 1.12


def test_logloss_and_entropy():
    rng = np.random.default_rng(5)
    labels, logits = rng.integers(0, 2, 500), rng.normal(size=500) * 3
    p = 1 / (1 + np.exp(-logits))
    assert close(metrics.logloss(labels, logits), log_loss(labels, p))
    rate = labels.mean()
    base = log_loss(labels, np.full(500, rate))
    assert close(metrics.normalised_entropy(labels, logits), log_loss(labels, p) / base)
    constant = np.full(500, np.log(rate / (1 - rate)))
    assert close(metrics.normalised_entropy(labels, constant), 1.0)
    assert close(metrics.calibration(labels, logits), p.sum() / labels.sum())
    np.testing.assert_allclose(metrics.sigmoid(np.log(p / (1 - p))), p, rtol=1e-12)


def test_extreme_logits_stay_exact():
    assert metrics.logloss([1, 0], [1000.0, -1000.0]) == 0
    assert metrics.logloss([0, 1], [1000.0, -1000.0]) == 1000
    assert close(metrics.logloss([1], [40.0]) / math.exp(-40), 1.0)
    assert close(metrics.sigmoid([-700.0])[0] / math.exp(-700), 1.0)


def test_rela_impr():
    assert close(metrics.rela_impr(0.62, 0.6), 20.0)
    assert close(metrics.rela_impr(0.4, 0.6), -200.0)
    assert metrics.rela_impr(0.62, 0.5) is None
    assert metrics.rela_impr(0.6, 0.4) is None  # better than worse than a guess is no loss of 200 %
    assert metrics.rela_impr(None, 0.6) is None and metrics.rela_impr(0.6, None) is None


@COMMON
@given(rows(weighted=True))
def test_reliability_bins_add_up(case):
    labels, logits, _, weights = case
    bins = metrics.reliability_bins(labels, logits, weights, bins=7)
    assert sum(b["count"] for b in bins) == (weights > 0).sum() and len(bins) <= 7
    edges = [b["predicted"] for b in bins]
    assert (np.diff(edges) >= -1e-15).all()
    assert all(
        0 <= b["low"] <= b["observed"] + 1e-12 <= b["high"] + 2e-12 <= 1 + 3e-12 for b in bins
    )
    plain = metrics.reliability_bins(labels, logits, bins=7)
    p = expit(logits.astype(np.float64))
    assert close(sum(b["count"] * b["predicted"] for b in plain), p.sum())
    assert close(sum(b["count"] * b["observed"] for b in plain), labels.sum())


def test_reliability_bins_have_equal_mass_and_wilson_bars():
    logits = np.random.default_rng(6).permutation(1000).astype(np.float32) / 100 - 5
    labels = (np.arange(1000) % 4 == 0).astype(int)
    bins = metrics.reliability_bins(labels, logits, bins=10)
    assert [b["count"] for b in bins] == [100] * 10
    n, p, z = 100, bins[3]["observed"], 1.959963984540054
    for end in ("low", "high"):  # the interval's ends solve (p - x)^2 = z^2 x (1 - x) / n
        x = bins[3][end]
        assert close((p - x) ** 2, z * z * x * (1 - x) / n, 1e-10)
    # Weighted: the bars are those of the effective count (sum w)^2 / sum w^2.
    weights = np.where(np.arange(1000) % 2 == 0, 3.0, 1.0)
    found = metrics.reliability_bins(labels, logits, weights, bins=1)[0]
    n, p, x = weights.sum() ** 2 / (weights**2).sum(), found["observed"], found["low"]
    assert close(p, (weights * labels).sum() / weights.sum())
    assert close((p - x) ** 2, z * z * x * (1 - x) / n, 1e-10)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="score nan of row 1 is not finite .1 such rows"):
        metrics.auc([0, 1], [0.0, np.nan])
    with pytest.raises(ValueError, match="label 2 of row 0 is not 0 or 1"):
        metrics.auc([2, 1], [0.0, 1.0])
    with pytest.raises(ValueError, match="weights must be finite and not negative"):
        metrics.gauc([0, 1], [0.0, 1.0], [0, 0], [1.0, -1.0])
    with pytest.raises(ValueError, match="must be .N. alike"):
        metrics.logloss([0, 1], [0.0])
    with pytest.raises(ValueError, match="differ in shape"):
        metrics.gauc([0, 1], [0.0, 1.0], [0])


def make_batch(rng, b=6, c=4, length=5, request_start=100):
    """Random requests whose row 1 is padding and whose other rows have 0 to c valid candidates."""
    mask = np.arange(c)[None] < rng.integers(0, c + 1, (b, 1))
    mask[1] = False
    lengths = rng.integers(0, length + 1, (b, 1))
    return RequestBatch(
        user_id=rng.integers(0, 3, b).astype(np.int32),
        request_id=(request_start + np.arange(b)).astype(np.int32),
        request_time=np.zeros(b, np.int32),
        user={"age": rng.integers(0, 3, b).astype(np.int32)},
        context={"pid": rng.integers(0, 2, b).astype(np.int32)},
        behaviour={},
        behaviour_time=np.zeros((b, length), np.int32),
        behaviour_mask=np.arange(length)[None] >= length - lengths,
        candidate={"brand": rng.integers(0, 9, (b, c)).astype(np.int32)},
        candidate_mask=mask,
        label=np.where(mask, rng.integers(0, 2, (b, c)), 7).astype(np.float32),
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16])
def test_score_log_keeps_valid_candidates_only(dtype):
    rng = np.random.default_rng(7)
    log = metrics.ScoreLog(("candidate/brand", "user/age", "context/pid"))
    wanted = {name: [] for name in ("logits", "labels", "user_id", "request_id", "history_length")}
    wanted |= {name: [] for name in log.slices}
    for step in range(4):
        batch = make_batch(rng, b=6 if step < 3 else 2, request_start=100 * step)
        logits = rng.normal(size=batch.candidate_mask.shape).astype(dtype)
        logits = np.where(batch.candidate_mask, logits, np.array(np.nan, dtype))
        log.add(batch, jnp.asarray(logits) if dtype is jnp.bfloat16 else logits)
        for row, column in zip(*np.nonzero(batch.candidate_mask), strict=True):
            wanted["logits"].append(float(logits[row, column]))
            wanted["labels"].append(int(batch.label[row, column]))
            wanted["user_id"].append(int(batch.user_id[row]))
            wanted["request_id"].append(int(batch.request_id[row]))
            wanted["history_length"].append(int(batch.behaviour_mask[row].sum()))
            wanted["candidate/brand"].append(int(batch.candidate["brand"][row, column]))
            wanted["user/age"].append(int(batch.user["age"][row]))
            wanted["context/pid"].append(int(batch.context["pid"][row]))
        if step == 1:
            log.columns()  # reading in the middle changes nothing
    found = log.columns()
    assert {name: value.tolist() for name, value in found.items()} == wanted
    assert len(log) == len(wanted["labels"])
    assert found["logits"].dtype == (np.float64 if dtype is np.float64 else np.float32)


def test_score_log_takes_the_lengths_of_whole_histories():
    batch = make_batch(np.random.default_rng(9), b=6, c=4)
    batch = batch.replace(candidate_mask=batch.candidate_mask & (np.arange(6) < 5)[:, None])
    lengths = 1000 + np.arange(5)  # none of the last row, which is padding
    log = metrics.ScoreLog()
    log.add(batch, np.zeros((6, 4)), history_length=lengths)
    rows = np.nonzero(batch.candidate_mask)[0]
    assert log.columns()["history_length"].tolist() == (1000 + rows).tolist()


def test_score_log_refuses_what_it_cannot_count():
    rng = np.random.default_rng(8)
    batch = make_batch(rng).replace(candidate_mask=np.ones((6, 4), bool), label=np.ones((6, 4)))
    logits = np.zeros((6, 4), np.float32)
    logits[3, 2] = np.inf
    logits[4, 0] = np.nan
    with pytest.raises(ValueError, match="score inf of request id 103 is not finite .2 such rows"):
        metrics.ScoreLog().add(batch, logits)
    with pytest.raises(ValueError, match="differ in shape"):
        metrics.ScoreLog().add(batch, logits[:, :1])
    with pytest.raises(ValueError, match="no slice column 'user/shoe'.*'age'"):
        metrics.ScoreLog(["user/shoe"]).add(batch, np.zeros((6, 4)))
    with pytest.raises(ValueError, match="must be candidate/"):
        metrics.ScoreLog(["behaviour/cate"])
    log = metrics.ScoreLog()
    log.add(batch, np.zeros((6, 4)), weights=np.ones((6, 4)))
    with pytest.raises(ValueError, match="every batch or for none"):
        log.add(batch, np.zeros((6, 4)))
    assert len(log) == 24 and log.columns()["weights"].tolist() == [1.0] * 24
