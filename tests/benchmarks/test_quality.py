"""Published studies: what stands beside each other was trained on the same data."""

import json
import sys
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


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--study=baselines_demo", "--table"], "baselines_demo has no results yet: .*json"),
        (["--study=movielens", "--table", "--against=Nope"], "movielens has no row 'Nope'; there"),
        (["--study=movielens", "--rows", "Nope"], "movielens has no row 'Nope'; there are: Sparse"),
        (
            ["--study=movielens", "--table", "--against=DIN, L=200"],
            "movielens has no results of 'DIN, L=200' yet; there are: SparseCTR, L=20",
        ),
    ],
)
def test_what_is_not_there_is_one_line(monkeypatch, tmp_path, flags, says):
    monkeypatch.setattr(quality, "ROOT", tmp_path)
    if "--study=movielens" in flags:
        run = {"test": {}, "examples_per_second": 1.0}
        path = quality._results_path("movielens")
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"rows": {"SparseCTR, L=20": {"0": run}}}))
    monkeypatch.setattr(sys, "argv", ["quality", *flags])
    with pytest.raises(SystemExit, match=says):
        quality.main()
