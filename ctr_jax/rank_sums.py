"""The Mann-Whitney statistic within groups, from one sort: what every AUC is made of.

How it is fast: a float32 has an order-preserving 32-bit integer code (`metrics.order_codes`), so
(group, code, label) fits one uint64 and a plain sort of those replaces every lexsort; float64
scores are first replaced by their dense ranks. Rows with equal (group, code) form a run, and the
AUC needs only each run's positives and negatives.
"""

from __future__ import annotations

import numpy as np

LARGEST = 400  # binary exponent that the largest weight is brought to


def tie_runs(
    labels: np.ndarray, codes: np.ndarray, groups: np.ndarray | None, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Runs of equal score within a group, ascending: the sufficient statistics of every AUC.

    Returns:
      positives [R], negatives [R] (int64, or float64 if weighted), first run [G] of each group,
      first row [R + 1] of each run.
    """
    key = codes.astype(np.uint64)
    key <<= np.uint64(1)
    key |= labels
    if groups is not None:
        key |= _dense(groups) << np.uint64(33)
    if weights is None:
        key.sort()
        positive = (key & np.uint64(1)).astype(np.uint8)
        weight = None
    else:
        order = np.argsort(key)
        key, weight = key[order], weights[order]
        positive = weight * (key & np.uint64(1))
    key >>= np.uint64(1)
    starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
    rows = np.append(starts, len(key))
    kind = np.int64 if weights is None else np.float64
    pos = np.add.reduceat(positive, starts, dtype=kind)
    if weight is None:
        neg = np.diff(rows) - pos
    else:
        neg = np.add.reduceat(weight - positive, starts)
    group = key[starts] >> np.uint64(32)
    first = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))
    return pos, neg, first, rows


def _dense(groups: np.ndarray) -> np.ndarray:
    """[N] uint64 below 2**31, one for each distinct group."""
    if groups.dtype.kind in "iu":
        low = groups.min()
        if int(groups.max()) - int(low) < 1 << 31:
            if groups.dtype.itemsize < 8:
                return (groups.astype(np.int64) - int(low)).astype(np.uint64)
            return (groups - low).astype(np.uint64)
    return np.unique(groups, return_inverse=True)[1].astype(np.uint64)


def below(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Sum of `values` [R] over the earlier runs of the same group, [R]; groups begin at `first`.

    One cumulative sum with a slot before each group that takes the group before it off again:
    float weights then round at the scale of their own group, not of everything that came before.
    """
    sizes = np.diff(np.append(first, len(values)))
    shift = np.repeat(np.arange(1, len(first) + 1), sizes)
    slot = first + np.arange(len(first))
    place = np.arange(len(values)) + shift
    spread = np.zeros(len(values) + len(first), values.dtype)
    spread[place] = values
    spread[slot[1:]] = -np.add.reduceat(values, first)[:-1]
    total = np.cumsum(spread)
    return total[place - 1] - np.repeat(total[slot], sizes)


def group_aucs(
    labels: np.ndarray, codes: np.ndarray, groups: np.ndarray | None, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """AUC, positives, negatives and rows of each group, [G]; the AUC is 0 for one class.

    Args:
      labels: [N] uint8, N > 0. codes: [N] uint32. groups: [N] or None for one. weights: [N] float64
        above 0, or None. Positives and negatives are their sums, on a scale of no meaning.
    """
    if weights is not None:  # so that no sum overflows and light rows do not come to nothing
        weights = np.ldexp(weights, LARGEST - np.frexp(weights.max())[1])
    pos, neg, first, rows = tie_runs(labels, codes, groups, weights)
    areas, positives, negatives = run_aucs(pos, neg, first)
    return areas, positives, negatives, np.diff(rows[np.append(first, -1)])


def run_aucs(
    pos: np.ndarray, neg: np.ndarray, first: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """AUC, positives and negatives [G] of groups of runs: what `tie_runs` returns."""
    positives, negatives = np.add.reduceat(pos, first), np.add.reduceat(neg, first)
    if pos.dtype.kind == "i" and (2.0 * positives * negatives).max() < 1 << 62:
        # Twice the Mann-Whitney count, so that a tie's half stays an integer.
        twice = np.add.reduceat(pos * (2 * below(neg, first) + neg), first)
        return twice / np.maximum(2 * positives * negatives, 1), positives, negatives
    # Shares of each group's own positives and negatives: a product of sums would overflow, or come
    # to nothing, and beside a group of heavy rows one of light ones would be lost to rounding.
    sizes = np.diff(np.append(first, len(pos)))
    won, lost = (
        runs / np.repeat(np.where(total > 0, total, 1), sizes)
        for runs, total in ((pos, positives), (neg, negatives))
    )
    return np.add.reduceat(won * (below(lost, first) + lost / 2), first), positives, negatives
