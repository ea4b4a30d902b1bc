"""What an evaluation leaves behind: every metric by slice, results.json, plots and text tables.

Plots and tables are made from the results alone, so they can be made again from results.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctr_jax import metrics
from ctr_jax.config import ConfigError
from ctr_jax.metrics import GroupAUC, ScoreLog
from ctr_jax.raw_values import RawValues
from ctr_jax.writers import write_json

# GAUC by request, and by user within a slice, is n/a where two-class groups hold less than this
# share of the impressions.
MIN_COVERAGE = 0.05
HISTORY_EDGES = (0, 1, 10, 20, 50, 100, 200, 500, 1000)  # the first length of each bucket
RESERVED = ("logits", "labels", "weights", "user_id", "request_id")
INK, BLUE, ORANGE, GREY = "#2b2b2b", "#2563a8", "#d1661f", "#c9ced6"


def evaluate_scores(
    scores: ScoreLog | Mapping[str, Any],
    slices: Iterable[str] | None = None,
    history_edges: Sequence[int] = HISTORY_EDGES,
    max_values: int = 20,
    bins: int = 20,
    raw: RawValues | None = None,
) -> dict[str, Any]:
    """Every metric of one evaluation, ready for JSON.

    Args:
      scores: a ScoreLog, or {"logits", "labels" [, "weights", "user_id", "request_id"]: [N]} in
        which any further column is one to slice by; "history_length" is bucketed.
      slices: the columns to slice by; None for every one there is, () for none.
      history_edges: the first length of each bucket of "history_length".
      max_values: a column with more values keeps its most frequent ones, the rest is "other".
        A float column is cut into five bins of equal size.
      bins: number of reliability bins; 0 for none.
      raw: names the values of slices by the raw log's; None leaves ids as they are.
    Returns:
      count, positives, auc, auc_standard_error (None if weighted), gauc_user and gauc_request
      (present where the ids are; each with _coverage, _groups, _groups_left_out and
      _impressions_left_out), logloss, normalised_entropy, calibration; reliability:
      `metrics.reliability_bins`; slices: {column: {value: count, positives, auc,
      auc_standard_error, gauc_user... (None below 5 % coverage), logloss, calibration; min and max
      of history_length}}. What is undefined is None.
    Raises:
      ValueError: as `metrics.checked`, the first request id named; an unknown slice column.
    """
    columns = scores.columns() if isinstance(scores, ScoreLog) else dict(scores)
    columns = {name: np.asarray(value) for name, value in columns.items() if value is not None}
    shape = columns["labels"].shape
    if odd := [name for name, value in columns.items() if value.shape != shape]:
        raise ValueError(f"{odd} and labels {shape} differ in shape")
    known = [name for name in columns if name not in RESERVED]
    wanted = known if slices is None else list(slices)
    if shape != (0,) and (missing := [name for name in wanted if name not in known]):
        raise ValueError(f"no slice column {missing}; there are {known}")
    weights = columns.get("weights")
    rows = columns if weights is None else {k: v[weights > 0] for k, v in columns.items()}
    rows["labels"], rows["logits"], weights = metrics.checked(
        columns["labels"], columns["logits"], weights, columns.get("request_id")
    )
    rows["codes"] = metrics.order_codes(rows["logits"])
    results = _part_metrics(rows, 0.0)
    results["normalised_entropy"] = metrics.normalised_entropy(
        rows["labels"], rows["logits"], weights
    )
    if "request_id" in rows:
        by_request = metrics.gauc(
            rows["labels"], rows["codes"], rows["request_id"], weights, MIN_COVERAGE
        )
        results |= _flat("gauc_request", by_request)
    results["reliability"] = metrics.reliability_bins(rows["labels"], rows["logits"], weights, bins)
    results["slices"] = {
        name: _slice_metrics(name, rows, history_edges, max_values, raw)
        for name in (wanted if len(rows["labels"]) else ())
    }
    return results


def _part_metrics(rows: Mapping[str, np.ndarray], min_coverage: float) -> dict[str, Any]:
    labels, logits, weights = rows["labels"], rows["logits"], rows.get("weights")
    error = metrics.auc_standard_error(labels, rows["codes"]) if weights is None else None
    results = {
        "count": len(labels),
        "positives": int(labels.sum()),
        "auc": metrics.auc(labels, rows["codes"], weights),
        "auc_standard_error": error,
    }
    if "user_id" in rows:
        by_user = metrics.gauc(labels, rows["codes"], rows["user_id"], weights, min_coverage)
        results |= _flat("gauc_user", by_user)
    results["logloss"] = metrics.logloss(labels, logits, weights)
    results["calibration"] = metrics.calibration(labels, logits, weights)
    return results


def _flat(name: str, grouped: GroupAUC) -> dict[str, Any]:
    fields = grouped._asdict()
    return {name: fields.pop("value")} | {f"{name}_{key}": value for key, value in fields.items()}


def _slice_metrics(
    name: str, rows: Mapping[str, np.ndarray], history_edges: Sequence[int], max_values: int, raw
) -> dict[str, dict[str, Any]]:
    values = rows[name]
    if name == "history_length":
        index, names = _history_buckets(values, history_edges)
    else:
        index, names = _value_buckets(name, values, max_values, raw)
    order = np.argsort(index, kind="stable")  # a radix sort: the index is 16 bits wide
    bounds = np.searchsorted(index[order], np.arange(len(names) + 1))
    results = {}
    for bucket, start, stop in zip(names, bounds[:-1], bounds[1:], strict=True):
        if start == stop:
            continue
        part = order[start:stop]
        kept = {k: rows[k][part] for k in (*RESERVED, "codes") if k in rows}
        results[bucket] = _part_metrics(kept, MIN_COVERAGE)
        if name == "history_length":
            lengths = values[part]
            results[bucket] |= {"min": int(lengths.min()), "max": int(lengths.max())}
    return results


def _history_buckets(lengths: np.ndarray, edges: Sequence[int]) -> tuple[np.ndarray, list[str]]:
    pairs = list(zip(edges, edges[1:], strict=False))
    if edges[0] != 0 or any(a >= b for a, b in pairs):
        raise ValueError(f"history_edges must start at 0 and increase, not {tuple(edges)}")
    names = [str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in pairs]
    index = np.searchsorted(np.asarray(edges), lengths, side="right") - 1
    return index.astype(np.uint16), [*names, f"{edges[-1]}+"]


def _value_buckets(
    name: str, values: np.ndarray, max_values: int, raw: RawValues | None
) -> tuple[np.ndarray, list[str]]:
    if values.dtype.kind == "f":
        edges = np.unique(np.sort(values)[np.arange(1, 5) * len(values) // 5])
        shown = edges if raw is None else raw.decode(name, edges)
        ends = ["-inf", *(f"{edge:.4g}" for edge in shown), "inf"]
        names = [f"{i}: [{a}, {b})" for i, (a, b) in enumerate(zip(ends, ends[1:], strict=False))]
        return np.searchsorted(edges, values, side="right").astype(np.uint16), names
    distinct, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
    top = np.sort(np.argsort(-count, kind="stable")[:max_values])
    place = np.full(len(distinct), len(top), np.uint16)
    place[top] = np.arange(len(top))
    names = map(str, distinct[top]) if raw is None else raw.names(name, distinct[top])
    return place[inverse], [*names, "other"]


def write_results(path: Path | str, results: Mapping[str, Any], **about: Any) -> Path:
    """Writes results.json whole or not at all.

    Args:
      path: the file.
      about: what identifies the run, put first: run, step, split, data_hash, ...
    Raises:
      ValueError: a value is NaN or infinite.
    """
    write_json(Path(path), {**about, **results})
    return Path(path)


def read_results(run: Path | str) -> dict[str, Any]:
    """The results of a named run: a results.json or the directory that holds one.

    Raises:
      FileNotFoundError: there is none; the message says where one was looked for.
    """
    path = Path(run)
    path = path if path.suffix == ".json" else path / "results.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no results of the run {str(run)!r}: {path} is not there; eval.py writes it"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def refuse_other_rows(
    results: Mapping[str, Any],
    baseline: Mapping[str, Any],
    keys: Iterable[str] = ("data_hash", "split", "count", "positives"),
) -> None:
    """Raises ConfigError naming the first of `keys` that says the two saw other rows."""
    for key in keys:
        if results.get(key) != baseline.get(key):
            raise ConfigError(
                f"the runs cannot be compared: {key} is {results.get(key)!r} here and "
                f"{baseline.get(key)!r} in the baseline"
            )


def compare(results: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """Differences to a baseline and RelaImpr (percent, AUC and GAUC by user) over it.

    RelaImpr is None, n/a in the table, over a baseline at or below .5; the difference stays.

    Raises:
      ConfigError: split, data_hash, count or positives differ: the runs saw other rows.
    """
    refuse_other_rows(results, baseline)
    found = {"baseline": baseline.get("run"), "baseline_step": baseline.get("step")}
    for key in ("auc", "gauc_user", "logloss"):
        a, b = results.get(key), baseline.get(key)
        found[f"{key}_difference"] = None if a is None or b is None else a - b
        if key != "logloss":
            found[f"{key}_rela_impr"] = metrics.rela_impr(a, b)
    return found


def write_report(
    directory: Path | str,
    results: Mapping[str, Any],
    *,
    baseline: Path | str | None = None,
    **about: Any,
) -> dict[str, Path]:
    """results.json, reliability.png and auc_by_history_length.png in `directory`.

    Args:
      baseline: a run to compare with (`read_results`); the outcome goes under "comparison".
      about: run, step, split, data_hash, ...: written to results.json, named on the plots.
    Returns:
      {what: path} of the files written; a plot without data is not written.
    """
    directory = Path(directory)
    results = {**about, **results}
    if baseline is not None:
        results["comparison"] = compare(results, read_results(baseline))
    files = {"results": write_results(directory / "results.json", results)}
    if results.get("reliability"):
        files["reliability"] = plot_reliability(results, directory / "reliability.png")
    by_length = results.get("slices", {}).get("history_length", {})
    if any(part["auc"] is not None for part in by_length.values()):
        path = directory / "auc_by_history_length.png"
        files["auc_by_history_length"] = plot_history(results, path)
    return files


def format_table(rows: Sequence[Mapping[str, Any]], markdown: bool = False) -> str:
    """Rows as an aligned table: columns in order of first appearance, None as n/a.

    Floats have five decimals, counts thousands separators; numbers are right-aligned. With
    `markdown`, a GitHub table.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    right = [all(not isinstance(row.get(name), str) for row in rows) for name in names]
    widths = [max(map(len, (n, *(c[i] for c in cells)))) for i, n in enumerate(names)]

    def line(values: Sequence[str]) -> str:
        padded = [
            v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True)
        ]
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip()

    rule = [
        "-" * (w - 1) + ":" if r and markdown else "-" * w
        for w, r in zip(widths, right, strict=True)
    ]
    return "\n".join(line(values) for values in (names, rule, *cells))


def _cell(value: Any) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.5f}" if isinstance(value, float) else str(value).replace("|", "\\|")


def summary_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The whole evaluation as rows of metric and value, for `format_table`."""
    names = {
        "count": "candidates",
        "positives": "clicks",
        "auc": "AUC",
        "auc_standard_error": "AUC standard error",
        "oracle_auc": "oracle AUC",
        "gauc_user": "GAUC by user",
        "gauc_user_coverage": "  coverage",
        "gauc_user_groups": "  users counted",
        "gauc_user_groups_left_out": "  users left out (one class)",
        "gauc_request": "GAUC by request",
        "gauc_request_coverage": "  coverage",
        "gauc_request_groups": "  requests counted",
        "gauc_request_groups_left_out": "  requests left out (one class)",
        "logloss": "logloss",
        "normalised_entropy": "normalised entropy",
        "calibration": "calibration (predicted / observed)",
    }
    rows = [{"metric": n, "value": results[key]} for key, n in names.items() if key in results]
    for key, value in results.get("comparison", {}).items():
        rows.append({"metric": key.replace("_", " "), "value": value})
    return rows


def slice_rows(results: Mapping[str, Any], slices: Iterable[str]) -> list[dict[str, Any]]:
    """The results by slice, a row for each value, for `format_table`."""
    shown = ("count", "auc", "gauc_user", "logloss", "calibration")
    return [
        {"slice": key, "value": value} | {name: part.get(name) for name in shown}
        for key in slices
        for value, part in results["slices"].get(key, {}).items()
    ]


def _figure(results: Mapping[str, Any], title: str, **subplots: Any):
    """A figure on the Agg canvas (no pyplot, no global state), titled, and its axes."""
    # Imported here so that training, which only evaluates, does not pay for matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.6), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.1), **subplots)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color=GREY, linewidth=0.6, alpha=0.7)
        axis.set_axisbelow(True)
    about = [str(results[key]) for key in ("run", "split") if results.get(key)]
    if results.get("step") is not None:
        about.append(f"step {results['step']:,}")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    axes[0].set_title(" · ".join(about), loc="left", fontsize=10, color="#5a6270")
    return figure, axes


def plot_reliability(results: Mapping[str, Any], path: Path | str) -> Path:
    """Observed against predicted rate in bins of equal mass, 95 % bars; below, their ratio."""
    rows = results["reliability"]
    predicted, observed, low, high = (
        np.array([row[key] for row in rows]) for key in ("predicted", "observed", "low", "high")
    )
    bars = np.maximum([observed - low, high - observed], 0)
    base = np.maximum(predicted, 1e-12)  # a sigmoid may be exactly 0
    figure, (top, bottom) = _figure(results, "Reliability: observed against predicted click rate")
    end = 1.06 * max(predicted.max(), high.max())
    top.plot([0, end], [0, end], color=INK, linewidth=1, linestyle=(0, (4, 3)), label="calibrated")
    style = {"fmt": "o", "color": BLUE, "ecolor": BLUE, "markersize": 4.5, "elinewidth": 1.2}
    top.errorbar(
        predicted, observed, bars, capsize=2.5, label=f"{len(rows)} bins of equal mass", **style
    )
    top.set(xlim=(0, end), ylim=(0, end), ylabel="observed click rate (95 % interval)")
    parts = [f"{results['count']:,} candidates"] if "count" in results else []
    if results.get("calibration") is not None:
        parts.append(f"predicted / observed {results['calibration']:.4f}")
    if results.get("logloss") is not None:
        parts.append(f"logloss {results['logloss']:.4f}")
    top.text(0.98, 0.04, "\n".join(parts), transform=top.transAxes, ha="right", fontsize=9)
    top.legend(loc="upper left", frameon=False, fontsize=9)
    bottom.axhline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    bottom.errorbar(predicted, observed / base, bars / base, capsize=2.5, **style)
    limit = 1.25 * max(0.05, np.abs(observed / base - 1).max())
    bottom.set(xlabel="predicted click rate", ylabel="observed\n/ predicted")
    bottom.set_ylim(max(0, 1 - limit), 1 + limit)
    figure.savefig(path, format="png")
    return Path(path)


def plot_history(results: Mapping[str, Any], path: Path | str) -> Path:
    """AUC (95 % bars) and GAUC by user by history length; below, the candidates in each bucket."""
    parts = list(results["slices"]["history_length"].values())
    names = [str(p["min"]) if p["min"] == p["max"] else f"{p['min']}–{p['max']}" for p in parts]
    x = np.arange(len(parts))
    figure, (top, bottom) = _figure(results, "AUC by history length")
    series = (("auc", "AUC (95 % interval)", BLUE, "o"), ("gauc_user", "GAUC by user", ORANGE, "s"))
    for key, label, colour, marker in series:
        if all(part.get(key) is None for part in parts):
            continue
        y = np.array([np.nan if part.get(key) is None else part[key] for part in parts])
        errors = np.array([part.get("auc_standard_error") or 0 for part in parts])
        bars = metrics.NORMAL_95 * errors if key == "auc" else None
        if results.get(key) is not None:
            label += f", all: {results[key]:.4f}"
            top.axhline(results[key], color=colour, linewidth=0.9, linestyle=(0, (2, 3)))
        style = {"fmt": marker + "-", "color": colour, "linewidth": 1.4, "markersize": 5}
        top.errorbar(
            x + (0.05 if bars is None else -0.05), y, bars, capsize=3, label=label, **style
        )
    top.set_ylabel("area under the ROC curve")
    top.legend(loc="best", frameon=False, fontsize=9)
    counts = [part["count"] for part in parts]
    bars = bottom.bar(x, counts, width=0.6, color=GREY)
    bottom.bar_label(bars, [f"{count:,}" for count in counts], padding=2, fontsize=8)
    bottom.set(
        xlabel="behaviours that the request may see", ylabel="candidates", xlim=(-0.6, len(x) - 0.4)
    )
    bottom.set_ylim(0, 1.25 * max(counts))
    bottom.set_xticks(x, names)
    figure.savefig(path, format="png")
    return Path(path)
