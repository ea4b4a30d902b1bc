"""Published studies: rows of one log are of one data set; paired differences by hand."""

import json
from pathlib import Path

import pytest

from benchmarks import quality

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results"


@pytest.mark.parametrize("log", [("movielens", "figure_2_movielens", "laser_movielens",
    "baselines_movielens", "lrea_movielens", "lrea_movielens_500", "lrea_table_3"),
    ("movielens_v1",), ("kuairand",)])  # fmt: skip
def test_rows_of_a_log_are_of_one_data_set(log):
    hashes = {}
    for name in log:
        rows = json.loads((RESULTS / f"quality_{name}.json").read_text())["rows"]
        for row, seeds in rows.items():
            hashes |= {f"{name}: {row}, seed {s}": run["data_hash"] for s, run in seeds.items()}
    assert len(set(hashes.values())) == 1, hashes


def _study(folder, monkeypatch, rows):
    """A results file of `rows`, {row: {seed: (auc, gauc)}}, in place of the published one."""
    runs = {
        row: {seed: {"test": {"auc": a, "gauc_user": g}} for seed, (a, g) in seeds.items()}
        for row, seeds in rows.items()
    }
    (folder / "results.json").write_text(json.dumps({"rows": runs}))
    monkeypatch.setattr(quality, "_results_path", lambda study: folder / "results.json")


def test_paired_differences_and_their_interval(tmp_path, monkeypatch):
    # AUC +.01, +.02, +.06: mean .03, s = sqrt(.0014 / 2), so 4.303 s / sqrt(3) = .0657 (2 degrees
    # of freedom, though DIN has a fourth seed). GAUC -.03, -.01, +.01: mean -.01, s = .02, .0497.
    lower = {"0": (0.70, 0.65), "1": (0.71, 0.66), "2": (0.69, 0.64)}
    higher = {"0": (0.71, 0.62), "1": (0.73, 0.65), "2": (0.75, 0.65), "3": (0.99, 0.99)}
    rows = {"LASER": lower, "DIN": higher, "HSTU": {"2": (0.68, 0.66)}}
    _study(tmp_path, monkeypatch, rows)
    lines = quality.paired("laser_movielens", "LASER").splitlines()
    assert lines[0] == "| less LASER | seeds | AUC | GAUC |"
    assert lines[2:] == [
        "| DIN | 3 | +0.0300 ± 0.0657 | -0.0100 ± 0.0497 |",
        "| HSTU | 1 | -0.0100 | +0.0200 |",  # one seed has no interval
    ]
    swapped = quality.paired("laser_movielens", "DIN").splitlines()
    assert "| LASER | 3 | -0.0300 ± 0.0657 | +0.0100 ± 0.0497 |" in swapped


def test_student_is_the_two_sided_95_percent_quantile():
    stats = pytest.importorskip("scipy.stats")
    for degrees, quantile in enumerate(quality.STUDENT, start=1):
        assert quantile == pytest.approx(stats.t.ppf(0.975, degrees), abs=5e-4)
