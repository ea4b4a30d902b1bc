"""The front page's figure, of the benchmarks' JSON files.

    python -m benchmarks.figures            # writes docs/figures/results.svg

The file holds a digest of what it was drawn from, so that a test can tell when it is out of date.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS, FIGURE = ROOT / "benchmarks" / "results", ROOT / "docs" / "figures" / "results.svg"
INK, GREY, BLUE, ORANGE, GREEN = "#1f2430", "#8a93a3", "#2563a8", "#d9731a", "#2f8a57"
PEER = "best peer, FuxiCTR's DIN", 0.7983  # docs/peers.md, ML-1M-CTR v2
# (file, row) -> name, colour: what was trained, by whose frame, on one protocol.
MODELS = {
    ("quality_movielens", "DIN, L=200"): ("DIN", GREY),
    ("quality_movielens", "SparseCTR, L=20"): ("SparseCTR, last 20", BLUE),
    ("quality_movielens", "SparseCTR, L=200"): ("SparseCTR", BLUE),
    ("quality_figure_2_movielens", "attention: full"): ("the same, full attention", GREY),
    ("quality_lrea_movielens", "DIN-long"): ("DIN-long (LREA's frame)", GREY),
    ("quality_lrea_movielens", "LREA, decompressed"): ("LREA", ORANGE),
    ("quality_laser_movielens", "DIN"): ("DIN (LASER's frame)", GREY),
    ("quality_laser_movielens", "LASER"): ("LASER", GREEN),
    ("quality_laser_movielens", "Transformer"): ("Transformer (LASER's frame)", GREY),
}


def series(records: dict[str, dict]) -> dict:
    """What is drawn: {panel: {line: [[x, y], ...]}}.

    Args:
      records: {name: content} of RESULTS.
    """
    attention: dict[str, list] = {}
    for result in records["evo_attention"]["results"]:
        if (result["d"], result["backward"]) != (32, True):
            continue
        rows = {row["name"]: row["ms"] for row in result["rows"]}
        dense = min(ms for name, ms in rows.items() if name.startswith("dense:"))
        for name, ms in [("full attention", dense), *rows.items()]:
            if name == "full attention" or name.startswith("Sparsity"):
                attention.setdefault(name, []).append([result["L"], ms])
    serving: dict[str, list] = {}
    for row in records["lrea_serving"]["rows"]:
        if row["B"] == 1000 and row["side"] != "decompressed":
            name = f"LREA, r={row['r']}" if row["r"] else "DIN on the whole history"
            serving.setdefault(name, []).append([row["L"], row["ms"]])
    quality = {}
    for (file, row), (name, _) in MODELS.items():
        runs = sorted(records[file]["rows"][row].items())
        quality[name] = [[int(seed), run["test"]["auc"]] for seed, run in runs]
    return {"attention": attention, "serving": serving, "quality": quality}


def digest(drawn: dict) -> str:
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()[:16]


def digest_of(path: Path) -> str | None:
    """What a figure was drawn from, by itself."""
    found = re.search(r"drawn from ([0-9a-f]{16})", path.read_text())
    return found[1] if found else None


def load() -> dict[str, dict]:
    names = {"evo_attention", "lrea_serving", *(file for file, _ in MODELS)}
    return {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in names}


def draw(drawn: dict, path: Path) -> None:
    """Three panels: two of time by history length, one of AUC, a dot a seed."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "results", "font.size": 9}):
        figure = Figure(figsize=(13, 4.1), layout="constrained")
        FigureCanvasSVG(figure)
        left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.15))
        lines(
            left, drawn["attention"], "full attention",
            "SparseCTR's attention and back, d=32:\nms a request, 2-core CPU",
        )  # fmt: skip
        lines(
            middle, drawn["serving"], "DIN on the whole history",
            "LREA's serving, 1,000 candidates:\nms a request, 2-core CPU",
        )  # fmt: skip
        dots(right, drawn["quality"])
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"Date": None, "Description": f"drawn from {digest(drawn)}"}
        figure.savefig(path, format="svg", metadata=about)


def lines(axis, of: dict[str, list], rival: str, title: str) -> None:
    """Milliseconds by length of the history, both axes logarithmic."""
    ours = [name for name in of if name != rival]
    for name, points in of.items():
        x, y = np.array(points).T
        style = dict(color=GREY, linestyle=(0, (4, 2)))
        if name in ours:
            style = dict(color=BLUE, alpha=0.4 + 0.6 * ours.index(name) / (len(ours) - 1))
        axis.plot(x, y, marker="o", markersize=3.5, linewidth=1.6, label=name, **style)
    axis.set(xscale="log", yscale="log", xlabel="length of the history")
    axis.set_xticks(x[-4:], [f"{int(n):,}" for n in x[-4:]])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(loc="upper left", frameon=False, fontsize=8)
    axis.set_ylim(top=axis.get_ylim()[1] * 3)
    _plain(axis, title)


def dots(axis, of: dict[str, list]) -> None:
    """A row a model: its seeds, and a bar at their mean."""
    colours = dict(MODELS.values())
    for at, (name, runs) in enumerate(of.items()):
        auc = np.array(runs)[:, 1]
        axis.plot(auc, np.full(len(auc), at), "o", markersize=4.5, alpha=0.75, color=colours[name])
        axis.plot([auc.mean()] * 2, [at - 0.3, at + 0.3], linewidth=1.6, color=colours[name])
    name, auc = PEER
    axis.axvline(auc, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axis.text(auc, -0.75, f" {name}", fontsize=8, color=INK, va="center")
    axis.set_yticks(range(len(of)), list(of))
    axis.set_ylim(len(of) - 0.4, -1.1)
    axis.set_xticks([0.795, 0.8, 0.805, 0.81])
    axis.set_xlim(0.7925, 0.8125)
    axis.tick_params(axis="y", length=0)
    _plain(axis, "MovieLens 1M, 200 behaviours:\ntest AUC, a dot a seed, a bar their mean")


def _plain(axis, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color=GREY, linewidth=0.5, alpha=0.35)
    axis.set_axisbelow(True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    draw(series(load()), FIGURE)
    print(f"wrote {FIGURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
