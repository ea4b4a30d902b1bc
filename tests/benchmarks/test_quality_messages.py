"""What a user may ask of benchmarks.quality that is not there."""

import json
import sys

import pytest

from benchmarks import quality


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
