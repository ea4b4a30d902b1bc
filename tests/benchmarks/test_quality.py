"""Published studies: what stands beside each other was trained on the same data."""

import json
from pathlib import Path

import pytest

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
