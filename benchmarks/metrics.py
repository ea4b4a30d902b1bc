"""Time and memory of AUC and GAUC on one core, beside scikit-learn and a loop over groups.

    python -m benchmarks.metrics [--rows 1000000] [--groups 50000] [--repeats 5]

Writes benchmarks/results/metrics.json. The loop calls scikit-learn once a group and process, as
FuxiCTR's gAUC does in its worker pool; it runs on a subset of the groups, and its time for all of
them is that times the ratio. GAUC of both is compared on the subset.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from ctr_jax import metrics, reports

GOAL_SECONDS = 1.5  # AUC + GAUC of 1 M rows in 50 k groups on one core


def make_rows(rows: int, groups: int) -> dict[str, np.ndarray]:
    """Clicks at about 20 %, users of unequal activity, history lengths and an id column."""
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=rows) - 1.6).astype(np.float32)
    activity = rng.gamma(1.0, size=groups)
    users = rng.choice(groups, rows, p=activity / activity.sum()).astype(np.int32)
    return {
        "logits": logits,
        "labels": (rng.random(rows) < metrics.sigmoid(logits)).astype(np.uint8),
        "user_id": users,
        "request_id": (np.arange(rows) // 2).astype(np.int32),
        "history_length": (users % 400).astype(np.int32),
        "context/pid": rng.integers(2, 4, rows).astype(np.int32),
    }


def looped_gauc(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> float:
    """One scikit-learn call a two-class group."""
    order = np.argsort(groups, kind="stable")
    cuts = np.flatnonzero(np.diff(groups[order])) + 1
    total = weight = 0.0
    for part in np.split(order, cuts):
        if 0 < labels[part].sum() < len(part):
            total += len(part) * roc_auc_score(labels[part], scores[part])
            weight += len(part)
    return total / weight


def seconds(measured: Callable[[], object], repeats: int) -> dict[str, float]:
    """Wall time of `repeats` calls after one to warm up; `cpu` is the median processor time."""
    if repeats > 1:
        measured()
    times, cpu = [], []
    for _ in range(repeats):
        began, cpu_began = time.perf_counter(), time.process_time()
        measured()
        times.append(time.perf_counter() - began)
        cpu.append(time.process_time() - cpu_began)
    found = {"median": statistics.median(times), "min": min(times), "max": max(times)}
    return found | {"cpu": statistics.median(cpu)}


def peak_bytes(measured: Callable[[], object]) -> int:
    """The most that numpy held at once during the call, beyond its arguments."""
    tracemalloc.start()
    try:
        measured()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--groups", type=int, default=50_000)
    parser.add_argument("--subset", type=int, default=2_000, help="groups for the loop")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", default="benchmarks/results/metrics.json")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    columns = make_rows(args.rows, args.groups)
    y, x, g = (columns[name] for name in ("labels", "logits", "user_id"))
    x64, weights = x.astype(np.float64), np.random.default_rng(1).uniform(0.5, 2, args.rows)
    part = g < args.subset

    def both(scores, w=None):
        codes = metrics.order_codes(scores)
        return metrics.auc(y, codes, w), metrics.gauc(y, codes, g, w)

    cases = {
        "auc": lambda: metrics.auc(y, x),
        "gauc": lambda: metrics.gauc(y, x, g),
        "auc_and_gauc": lambda: both(x),
        "auc_and_gauc_float64": lambda: both(x64),
        "auc_and_gauc_weighted": lambda: both(x, weights),
        "auc_standard_error": lambda: metrics.auc_standard_error(y, x),
        "evaluate_scores": lambda: reports.evaluate_scores(columns),
        "evaluate_scores_without_slices": lambda: reports.evaluate_scores(columns, slices=()),
        "sklearn_auc": lambda: roc_auc_score(y, x),
    }
    found = {name: seconds(case, args.repeats) for name, case in cases.items()}
    loop = seconds(lambda: looped_gauc(y[part], x[part], g[part]), 1)
    found["sklearn_loop_on_subset"] = loop
    ratio = len(np.unique(g)) / len(np.unique(g[part]))
    value, grouped = both(x)
    results = {
        "rows": args.rows,
        "groups": len(np.unique(g)),
        "cores": 1,
        "repeats": args.repeats,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "goal_seconds": GOAL_SECONDS,
        "goal_met": found["auc_and_gauc"]["median"] <= GOAL_SECONDS,
        "seconds": found,
        "sklearn_loop_cpu_for_all_groups_extrapolated": loop["cpu"] * ratio,
        "subset_groups": len(np.unique(g[part])),
        "auc": value,
        "gauc": grouped._asdict(),
        "auc_minus_sklearn": value - roc_auc_score(y, x),
        "gauc_minus_loop_on_subset": metrics.gauc(y[part], x[part], g[part]).value
        - looped_gauc(y[part], x[part], g[part]),
        "peak_bytes_a_row_auc_and_gauc": peak_bytes(lambda: both(x)) / args.rows,
    }
    path = reports.write_results(args.output, results)
    rows = [{"what": name, **{f"{k} s": v for k, v in t.items()}} for name, t in found.items()]
    print(reports.format_table(rows))
    left_out = ("seconds", "gauc")
    print(json.dumps({k: v for k, v in results.items() if k not in left_out}, indent=1))
    print(f"written to {Path(path)}")


if __name__ == "__main__":
    main()
