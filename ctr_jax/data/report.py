"""What a preparation saw: counts, distributions, and the small tables it prints."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

import numpy as np

from ctr_jax.features import MISSING, OOV, DataSpec

SHOWN = 0.01  # columns of which a smaller share is unknown are in report.json alone
QUANTILES = (0.1, 0.5, 0.9, 0.99, 1.0)


class Histogram:
    """Counts of small non-negative integers, fed in batches."""

    def __init__(self, counts: Mapping[int, int] | None = None):
        self._counts = np.zeros(1, np.int64)
        for value, count in (counts or {}).items():
            self.add(np.asarray([value]), count)

    def add(self, values: np.ndarray, times: int = 1) -> None:
        counts = np.bincount(values, minlength=len(self._counts)) * times
        counts[: len(self._counts)] += self._counts
        self._counts = counts

    def summary(self) -> dict[str, float]:
        """Number, mean, share of zeros and quantiles (the smallest value with that share below)."""
        total = int(self._counts.sum())
        if not total:
            return {"number": 0}
        values = np.arange(len(self._counts))
        below = np.cumsum(self._counts)
        found = {
            "number": total,
            "mean": round(float((values * self._counts).sum() / total), 3),
            "zero": round(float(self._counts[0] / total), 4),
        }
        for q in QUANTILES:
            found[f"p{round(100 * q)}"] = int(np.searchsorted(below, q * total))
        return found


class RecordStatistics:
    """Clicks, times and unknown values of one split, from its records in blocks."""

    def __init__(self, spec: DataSpec):
        columns = (c for group in ("user", "context", "candidate") for c in spec.group(group))
        self._keys = [f"{c.group}/{c.name}" for c in columns if c.kind == "id"]
        self._counts = {id: dict.fromkeys(self._keys, 0) for id in (OOV, MISSING)}
        self._sizes = {"records": 0, "candidates": 0, "clicks": 0}
        self._weight = 0.0 if spec.weighted else None
        self._times: list[int] = []

    def add(self, block: np.ndarray) -> None:
        """Counts a block of records [N]; slots without a candidate hold id 0 and label 0."""
        self._sizes["records"] += len(block)
        self._sizes["candidates"] += int(block["num_candidates"].sum())
        self._sizes["clicks"] += int(block["label"].sum(dtype=np.int64))
        if self._weight is not None:
            self._weight += float(block["weight"].sum(dtype=np.float64))
        times = block["request_time"]
        self._times = [min([*self._times, int(times.min())]), max([*self._times, int(times.max())])]
        for key in self._keys:
            ids = block[key]
            for id, counts in self._counts.items():
                counts[key] += int(np.count_nonzero(ids == id))

    def report(self) -> dict[str, Any]:
        """Number and share of label 1, mean weight of candidates where they have one, first and
        last request, {column: share} of unknown values.

        Shares of user and context columns are of records, those of candidate columns of candidates.
        """
        sizes = self._sizes

        def shares(counts: Mapping[str, int]) -> dict[str, float]:
            of = {k: "candidates" if k.startswith("candidate/") else "records" for k in counts}
            return {k: round(n / max(1, sizes[of[k]]), 4) for k, n in counts.items()}

        candidates = max(1, sizes["candidates"])
        weight = self._weight
        return {
            "clicks": sizes["clicks"],
            "click_rate": round(sizes["clicks"] / candidates, 4),
            **({} if weight is None else {"mean_weight": round(weight / candidates, 4)}),
            "times": period(*self._times) if self._times else [],
            "out_of_vocabulary": shares(self._counts[OOV]),
            "missing": shares(self._counts[MISSING]),
        }


def period(first: int, last: int) -> list[str]:
    """Two times in seconds as ISO date-times, UTC."""
    return [
        datetime.datetime.fromtimestamp(t, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S")
        for t in (first, last)
    ]


def summary(spec: DataSpec, report: Mapping[str, Any]) -> str:
    """The tables that a preparation prints."""
    parts = [f"prepared {spec.name}: {report['users']:,} users, hash {spec.content_hash[:12]}"]
    names = ["impressions", "requests", "records", "clicks", "click_rate"]
    names += ["mean_weight"] if spec.weighted else []
    splits: dict[str, dict[str, Any]] = {s: {k: report[k][s] for k in names} for s in spec.splits}
    for name, times in report["times"].items():
        splits.setdefault(name, {}).update(zip(("first (UTC)", "last (UTC)"), times, strict=False))
    parts.append(table("split", splits))
    parts += [
        f"{split}: every label is {int(clicks > 0)}, so that AUC is not defined there"
        for split, clicks in report["clicks"].items()
        if clicks in (0, report["impressions"][split])
    ]
    groups = {s: Histogram(c).summary() for s, c in report["group_sizes"].items()}
    parts.append(table("candidates per request", groups))
    if several := dict(report.get("several_contexts", {})):
        number, total = several.pop("any"), sum(report["requests"].values())
        differ = ", ".join(f"{key} in {n:,}" for key, n in several.items())
        parts.append(
            f"{number:,} of {total:,} requests fill a record per context: their rows differ in "
            f"{differ}"
        )
    parts.append(table("history length", report["history_lengths"]))
    if unknown := _unknown(report):
        parts.append(table("unknown", unknown))
    given = {
        name: {"share": round(1 - known, 4)} for name, known in report.get("known", {}).items()
    }
    for name, number in report.get("added", {}).items():
        given[name]["added"] = number
    if lacking := {k: row for k, row in given.items() if max(row.values()) >= SHOWN}:
        parts.append(table("values for training that the given vocabulary lacks", lacking))
    for kind in ("skipped", "dropped"):
        if counts := {k: {"rows": n} for k, n in report[kind].items() if n}:
            parts.append(table(kind, counts))
    return "\n\n".join(parts)


def _unknown(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Rows of a table: columns whose values are out of vocabulary or missing often enough."""
    rows: dict[str, dict[str, float]] = {}
    for short, kind in (("oov", "out_of_vocabulary"), ("missing", "missing")):
        for split, shares in report[kind].items():
            for key, share in shares.items():
                rows.setdefault(key, {})[f"{short} {split}"] = share
    return {key: row for key, row in rows.items() if max(row.values()) >= SHOWN}


def table(title: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """A text table, one line per row; columns in order of their first appearance."""
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    cells = [[title, *columns]]
    cells += [[name, *(_text(row.get(c, "")) for c in columns)] for name, row in rows.items()]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = []
    for line in cells:
        padded = [
            line[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)),
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _text(value: object) -> str:
    return f"{value:,}" if isinstance(value, int | float) else str(value)
