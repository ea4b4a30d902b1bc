"""The comparison's arithmetic, its generated batches, and what it says when FuxiCTR is absent."""

import sys

import numpy as np
import pytest

from benchmarks import fuxictr_speed, fuxictr_workers


def test_batches_are_right_aligned_with_ids_in_range():
    rows, length = 256, 50
    batch = fuxictr_workers.generated_batch(rows, length, zipf=1.0, seed=3)
    mask = batch["item_history"] != 0
    assert np.all(mask[:, 1:] >= mask[:, :-1])  # once a history has begun it does not stop
    assert mask.all(1).any() and not mask.all()
    for name, known in fuxictr_workers.KNOWN.items():
        for column in (name, f"{name}_history"):
            if column in batch:
                ids = batch[column][mask] if column.endswith("_history") else batch[column]
                assert ids.min() >= fuxictr_workers.RESERVED
                assert ids.max() < known + fuxictr_workers.RESERVED
    for name in fuxictr_workers.HISTORY:
        assert np.all((batch[f"{name}_history"] != 0) == mask)
    times = batch["time_history"]
    both = mask[:, 1:] & mask[:, :-1]
    assert np.all(times[:, 1:][both] >= times[:, :-1][both])
    assert np.all(times[:, -1] <= batch["request_time"])
    again = fuxictr_workers.generated_batch(rows, length, zipf=1.0, seed=3)
    assert all(np.array_equal(batch[name], again[name]) for name in batch)


def test_batches_by_length_hold_the_same_requests_cut_to_their_bucket():
    batches = [fuxictr_workers.generated_batch(64, 200, zipf=1.0, seed=s) for s in range(8)]
    cut = fuxictr_workers.by_length(batches, [100, 200])

    def requests(batches):  # the user's columns, and the history without its padding
        for batch in batches:
            for i in range(len(batch["label"])):
                history = batch["item_history"][i]
                yield batch["user_id"][i], batch["item"][i], tuple(history[history != 0])

    before = set(requests(batches))
    assert set(requests(cut)) <= before and len(before) - 64 * len(cut) < 2 * 64
    assert {len(batch["label"]) for batch in cut} == {64}
    assert {batch["time_history"].shape[1] for batch in cut} == {100, 200}
    for batch in cut:
        lengths = (batch["item_history"] != 0).sum(1)
        assert (lengths > 100).all() == (batch["item_history"].shape[1] == 200)


def test_ratios_are_medians_of_ratios_within_a_round():
    def result(rates, peak):
        phase = {"rates": rates, "cpu_rates": [r / 2 for r in rates]}
        return {
            "train": dict(phase),
            "infer": dict(phase),
            "peak_mb": peak,
            "parameters": 1,
            "table_parameters": 2,
        }

    # Round 2 is on a machine ten times slower; the ratio does not see it.
    results = {"base": result([10, 1, 12], 600.0), "ours": result([50, 5, 72], 150.0)}
    summary = fuxictr_speed.summarise(results, "base")
    assert summary["ours"]["train"]["rate"] == 50
    assert summary["ours"]["train"]["ratio"] == 5
    assert summary["ours"]["infer"]["cpu_ratio"] == 5
    assert summary["base"]["train"]["ratio"] == 1
    row = fuxictr_speed.table(summary, "base").splitlines()[-1]
    assert "| 5.00 (5.00) |" in row and "| 0.25 |" in row
    alone = fuxictr_speed.summarise({"ours": result([50], None)}, "base")
    assert "n/a" in fuxictr_speed.table(alone, "base")


def test_missing_fuxictr_is_one_line(tmp_path):
    with pytest.raises(fuxictr_speed.Missing, match="git clone .* --fuxictr_repo"):
        fuxictr_speed.check_fuxictr(sys.executable, None, ["BST"])
    with pytest.raises(fuxictr_speed.Missing, match="BST.py is missing"):
        fuxictr_speed.check_fuxictr(sys.executable, str(tmp_path), ["BST"])
    source = tmp_path / "model_zoo" / "BST" / "src" / "BST.py"
    source.parent.mkdir(parents=True)
    source.touch()
    with pytest.raises(fuxictr_speed.Missing, match="does not run"):
        fuxictr_speed.check_fuxictr(str(tmp_path / "python"), str(tmp_path), ["BST"])


def test_the_reported_command_holds_no_paths():
    arguments = ["--fuxictr_repo=/some/where", "--rounds", "3", "--fuxictr_python", "/p/python"]
    assert fuxictr_speed.command_line(arguments) == (
        "python -m benchmarks.fuxictr_speed --fuxictr_repo=PATH --rounds 3 --fuxictr_python=PATH"
    )
    assert fuxictr_speed.command_line([]) == "python -m benchmarks.fuxictr_speed"


@pytest.mark.slow
def test_our_side_trains_and_scores_in_its_own_process():
    shared = {"rows": 8, "length": 16, "width": 32, "zipf": 1.0, "batches": 2}
    shared |= {"threads": 2, "devices": 2}
    models = {"DIN": fuxictr_speed.MODELS["DIN"]}
    pythons = {"ours": sys.executable}
    results = fuxictr_speed.measure(models, pythons, shared, rounds=2, seconds=0.01)
    row = fuxictr_speed.summarise(results, fuxictr_speed.BST)["DIN"]
    assert len(row["train"]["rates"]) == len(row["infer"]["rates"]) == 2
    assert row["train"]["rate"] > 0 and row["parameters"] > 0
    assert row["temp_bytes"]["train"] > row["temp_bytes"]["infer"] > 0
