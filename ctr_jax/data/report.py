"""What a preparation saw: counts, distributions, and the small tables it prints."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

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
