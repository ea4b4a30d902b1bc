"""Exact ranking and calibration metrics, on the host, in integer counts and float64.

Scores are logits everywhere: the order is theirs (float32 sigmoids saturate and make ties that the
model did not make), and logloss comes from them without cancellation. `logit` converts
probabilities. A value that is not defined (AUC of one class) is None, never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from ctr_jax.batch import RequestBatch
from ctr_jax.rank_sums import below, group_aucs, tie_runs

NORMAL_95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


class GroupAUC(NamedTuple):
    """GAUC and what it covers.

    Attributes:
      value: sum of weight * AUC over two-class groups / their weight; None without such a group
        or below the coverage asked for. A group's weight is its impressions (or their weights).
      coverage: share of the impressions that lie in two-class groups.
      groups: number of two-class groups.
      groups_left_out: number of one-class groups, which have no AUC.
      impressions_left_out: rows in those groups.
    """

    value: float | None
    coverage: float
    groups: int
    groups_left_out: int
    impressions_left_out: int


class ScoreLog:
    """Logits, labels and ids of every valid candidate seen, batch by batch.

    About 17 bytes a candidate, plus 4 for each slice column. Padded candidates and padded rows are
    dropped on entry, so a partial last batch counts exactly and their logits may hold anything.

    Args:
      slices: columns to keep for slicing, as "candidate/<name>", "user/<name>" or "context/<name>".
        The history length is always kept.
    """

    def __init__(self, slices: Iterable[str] = ()):
        self.slices = tuple(slices)
        for name in self.slices:
            if name.split("/")[0] not in ("candidate", "user", "context") or "/" not in name:
                raise ValueError(
                    f"slice column {name!r} must be candidate/, user/ or context/<name>"
                )
        self._chunks: dict[str, list[np.ndarray]] = {}
        self._count = 0

    def __len__(self) -> int:
        """The number of candidates logged."""
        return self._count

    def add(
        self, batch: RequestBatch, logits: Any, weights: Any = None, history_length: Any = None
    ) -> None:
        """Logs one batch.

        Args:
          batch: arrays on the host or the device.
          logits: [B, C] of any float type; kept as float32, or float64 if they are.
          weights: [B, C] non-negative weights; on every call or on none.
          history_length: [B] behaviours that each request may see; None = the batch's, at most L.
        Raises:
          ValueError: a shape differs from candidate_mask's, a valid logit is not finite (the first
            request id is named), a label is not 0/1, or the batch lacks a slice column.
        """
        mask = np.asarray(batch.candidate_mask).astype(bool)
        rows = np.nonzero(mask)[0]
        logits = np.asarray(logits)
        if logits.dtype != np.float64:
            logits = logits.astype(np.float32)
        parts = {"logits": logits, "labels": np.asarray(batch.label)}
        if weights is not None:
            parts["weights"] = np.asarray(weights, np.float64)
        for name, value in parts.items():
            if value.shape != mask.shape:
                raise ValueError(
                    f"{name} {value.shape} and candidate_mask {mask.shape} differ in shape"
                )
        new = {name: value[mask] for name, value in parts.items()}
        new["user_id"] = np.asarray(batch.user_id)[rows]
        new["request_id"] = np.asarray(batch.request_id)[rows]
        if history_length is None:
            history_length = np.asarray(batch.behaviour_mask).sum(axis=1)
        new["history_length"] = np.asarray(history_length, np.int32)[rows]
        for key in self.slices:
            group, name = key.split("/", 1)
            if name not in getattr(batch, group):
                have = sorted(getattr(batch, group))
                raise ValueError(f"no slice column {key!r}: the {group} columns are {have}")
            value = np.asarray(getattr(batch, group)[name])
            new[key] = value[mask] if group == "candidate" else value[rows]
        checked(new["labels"], new["logits"], new.get("weights"), new["request_id"])
        new["labels"] = new["labels"].astype(np.uint8)
        if self._chunks and ("weights" in new) != ("weights" in self._chunks):
            raise ValueError("weights must be given for every batch or for none")
        for name, value in new.items():
            self._chunks.setdefault(name, []).append(value)
        self._count += len(rows)

    def reorder(self, order: np.ndarray) -> None:
        """Puts the candidates logged so far into `order` [N], a permutation of their numbers."""
        self._chunks = {name: [column[order]] for name, column in self.columns().items()}

    def columns(self) -> dict[str, np.ndarray]:
        """{name: [N]}: logits, labels, user_id, request_id, history_length, slices, any weights."""
        for name, chunks in self._chunks.items():  # joined in place, so that nothing is held twice
            self._chunks[name] = [np.concatenate(chunks)] if len(chunks) > 1 else chunks
        empty = {"logits": np.zeros(0, np.float32), "labels": np.zeros(0, np.uint8)}
        return {name: chunks[0] for name, chunks in self._chunks.items()} or empty


def order_codes(scores: Any) -> np.ndarray:
    """[N] uint32 in the order of the finite scores [N], equal where they are equal.

    Every metric of ranking takes them in place of scores, so that float64 scores are sorted once.
    """
    scores = np.asarray(scores)
    if scores.dtype == np.uint32:
        return scores
    if scores.dtype == np.float32:
        bits = (scores + np.float32(0)).view(np.uint32)  # the sum makes -0.0 and 0.0 one score
        return np.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))
    return np.unique(scores, return_inverse=True)[1].astype(np.uint32)


def auc(labels: Any, scores: Any, weights: Any = None) -> float | None:
    """Area under the ROC curve, ties counting one half (average ranks); None for one class.

    Args:
      labels: [N] of 0/1. scores: [N] floats or `order_codes`. weights: [N], not negative; rows of
        weight zero count nothing.
    Raises:
      ValueError: as `checked`.
    """
    labels, scores, weights = checked(labels, scores, weights)
    if not len(labels):
        return None
    value, pos, neg, _ = group_aucs(labels, order_codes(scores), None, weights)
    return float(value[0]) if pos[0] > 0 and neg[0] > 0 else None


def auc_standard_error(labels: Any, scores: Any) -> float | None:
    """Standard error of the AUC after DeLong et al. (1988), by the midranks of Sun & Xu (2014).

    Exact with ties, O(N log N). It takes rows as independent, which the impressions of one user
    are not quite. None with fewer than two rows of either class. Arguments and errors as `auc`.
    """
    labels, scores, _ = checked(labels, scores)
    positives = int(labels.sum(dtype=np.int64))
    negatives = len(labels) - positives
    if positives < 2 or negatives < 2:
        return None
    pos, neg, first, _ = tie_runs(labels, order_codes(scores), None, None)
    wins = (below(neg, first) + neg / 2) / negatives  # DeLong's V10: of a positive of this run
    losses = (positives - below(pos, first) - pos / 2) / positives  # V01: of a negative
    value = float((pos * wins).sum() / positives)
    v10 = (pos * (wins - value) ** 2).sum() / (positives - 1)
    v01 = (neg * (losses - value) ** 2).sum() / (negatives - 1)
    return math.sqrt(v10 / positives + v01 / negatives)


def gauc(
    labels: Any, scores: Any, groups: Any, weights: Any = None, min_coverage: float = 0.0
) -> GroupAUC:
    """AUC within groups, averaged by impressions over the groups that hold both classes.

    Args:
      groups: [N] ids of any type that sorts. min_coverage: below it, the value is None.
    Raises:
      ValueError: as `checked`.
    """
    groups = np.asarray(groups)
    if groups.shape != np.shape(labels):
        raise ValueError(f"groups {groups.shape} and labels {np.shape(labels)} differ in shape")
    if weights is not None:
        groups = groups[np.asarray(weights) > 0]
    labels, scores, weights = checked(labels, scores, weights)
    if not len(labels):
        return GroupAUC(None, 0.0, 0, 0, 0)
    value, pos, neg, rows = group_aucs(labels, order_codes(scores), groups, weights)
    counted = (pos > 0) & (neg > 0)
    weight = np.where(counted, pos + neg, 0)
    coverage = float(weight.sum() / (pos + neg).sum())
    defined = counted.any() and coverage >= min_coverage
    return GroupAUC(
        float((weight * value).sum() / weight.sum()) if defined else None,
        coverage,
        int(counted.sum()),
        int((~counted).sum()),
        int(rows[~counted].sum()),
    )


def logloss(labels: Any, logits: Any, weights: Any = None) -> float | None:
    """Mean of -log p(label), natural logarithm, p = sigmoid(logits); None without rows."""
    labels, logits, weights = checked(labels, logits, weights)
    x = logits.astype(np.float64)
    # log(1 + e^z) with z the logit against the label: no cancellation at either end.
    z = np.where(labels == 1, -x, x)
    return _mean(np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z))), weights)


def normalised_entropy(labels: Any, logits: Any, weights: Any = None) -> float | None:
    """logloss / entropy of the average label (He et al. 2014, eq. 1); None for one class."""
    labels, logits, weights = checked(labels, logits, weights)
    rate = _mean(labels, weights)
    if rate is None or not 0 < rate < 1:
        return None
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))
    return logloss(labels, logits, weights) / entropy


def calibration(labels: Any, logits: Any, weights: Any = None) -> float | None:
    """Sum of predicted probabilities / sum of labels: 1 is calibrated; None without positives."""
    labels, logits, weights = checked(labels, logits, weights)
    rate = _mean(labels, weights)
    return _mean(sigmoid(logits), weights) / rate if rate else None


def rela_impr(value: float | None, baseline: float | None) -> float | None:
    """RelaImpr in percent: ((AUC - .5) / (AUC_baseline - .5) - 1) * 100 (Yan et al. 2014).

    None where either is, and of a baseline at or below .5, the AUC of a guess: there is nothing to
    be relative to, and the formula would make a loss of every improvement on it.
    """
    if value is None or baseline is None or baseline <= 0.5:
        return None
    return ((value - 0.5) / (baseline - 0.5) - 1) * 100


def sigmoid(logits: Any) -> np.ndarray:
    """Probabilities [N] float64, accurate in relative terms for small ones, without overflow."""
    x = np.asarray(logits, np.float64)
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, e) / (1 + e)


def reliability_bins(
    labels: Any, logits: Any, weights: Any = None, bins: int = 20
) -> list[dict[str, float]]:
    """Bins of equal numbers of rows by predicted probability; equal predictions share a bin.

    Returns:
      One dict a bin, ascending: count, predicted (mean probability), observed (rate of positives),
      low and high (95 % Wilson interval of the observed rate; effective count where weighted).
    """
    labels, logits, weights = checked(labels, logits, weights)
    if not len(labels) or bins < 1:
        return []
    edges = np.unique(np.sort(logits)[np.arange(1, bins) * len(logits) // bins])
    index = np.searchsorted(edges, logits, side="right")
    size = len(edges) + 1
    w = np.ones(len(labels))
    if weights is not None:  # by the heaviest of their bin: a bin's figures do not depend on it
        heaviest = np.zeros(size)
        np.maximum.at(heaviest, index, weights)
        w = weights / heaviest[index]
    count = np.bincount(index, minlength=size)
    used = np.flatnonzero(count)
    total, squares, predicted, positive = (
        np.bincount(index, x, size)[used] for x in (w, w * w, w * sigmoid(logits), w * labels)
    )
    predicted, observed, n = predicted / total, positive / total, total * total / squares
    square = NORMAL_95**2
    centre = (observed + square / (2 * n)) / (1 + square / n)
    spread = observed * (1 - observed) / n + square / (4 * n * n)
    half = NORMAL_95 / (1 + square / n) * np.sqrt(spread)
    low, high = np.maximum(centre - half, 0), np.minimum(centre + half, 1)
    names = ("count", "predicted", "observed", "low", "high")
    table = [x.tolist() for x in (count[used], predicted, observed, low, high)]
    return [dict(zip(names, row, strict=True)) for row in zip(*table, strict=True)]


def checked(
    labels: Any, scores: Any, weights: Any = None, request_id: Any = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Validates rows and drops those of weight zero.

    Returns:
      labels [N] uint8, scores [N] float32, float64 or uint32, weights [N] float64 or None.
    Raises:
      ValueError: shapes differ, a score is not finite or a label not 0/1 (the first one's row is
        named, by its request id where given), a weight is negative or not finite.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(f"labels {labels.shape} and scores {scores.shape} must be [N] alike")
    if weights is not None:
        weights = np.asarray(weights, np.float64)
        if weights.shape != labels.shape:
            raise ValueError(f"weights {weights.shape} and labels {labels.shape} differ in shape")
        if not (np.isfinite(weights) & (weights >= 0)).all():
            raise ValueError("weights must be finite and not negative")
        kept = weights > 0
        labels, scores, weights = labels[kept], scores[kept], weights[kept]
        request_id = None if request_id is None else np.asarray(request_id)[kept]
    if scores.dtype not in (np.float32, np.uint32):
        scores = scores.astype(np.float32 if scores.dtype.itemsize < 4 else np.float64)
    for what, need, good, values in (
        ("score", "finite", np.isfinite(scores), scores),
        ("label", "0 or 1", (labels == 0) | (labels == 1), labels),
    ):
        if not good.all():
            row = int(np.argmin(good))
            where = f"row {row}" if request_id is None else f"request id {request_id[row]}"
            bad = len(good) - np.count_nonzero(good)
            raise ValueError(f"{what} {values[row]} of {where} is not {need} ({bad} such rows)")
    return labels.astype(np.uint8, copy=False), scores, weights


def _mean(values: np.ndarray, weights: np.ndarray | None) -> float | None:
    if not len(values):
        return None
    if weights is None:
        return float(np.sum(values, dtype=np.float64) / len(values))
    weights = weights / weights.max()  # whose own sum may overflow, or a product come to nothing
    return float(np.sum(values * weights) / np.sum(weights))
