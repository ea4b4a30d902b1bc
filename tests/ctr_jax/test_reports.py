"""Evaluation by slice against row-by-row selection; results.json, plots and tables."""

import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ctr_jax import metrics, reports
from ctr_jax.config import ConfigError


def make_scores(n=4000, seed=0, weighted=False):
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(size=n) - 1, 2).astype(np.float32)
    columns = {
        "logits": logits,
        "labels": (rng.random(n) < 1 / (1 + np.exp(-logits))).astype(np.uint8),
        "user_id": rng.integers(0, n // 20, n).astype(np.int32),
        "request_id": np.arange(n, dtype=np.int32) // 3,
        "history_length": np.minimum(rng.geometric(0.02, n) - 1, 200).astype(np.int32),
        "context/pid": rng.integers(3, 6, n).astype(np.int32),
        "candidate/brand": np.minimum(rng.geometric(0.05, n), 90).astype(np.int32),
        "candidate/price": rng.normal(size=n).astype(np.float32),
    }
    return columns | ({"weights": rng.choice([0.0, 1.0, 2.5], n)} if weighted else {})


def check_part(part, columns, rows):
    """`part` holds the metrics of the rows selected by a boolean mask."""
    weights = columns.get("weights")
    if weights is not None:
        rows = rows & (weights > 0)
    labels, logits = columns["labels"][rows], columns["logits"][rows].astype(np.float64)
    w = np.ones(len(labels)) if weights is None else weights[rows]
    p = 1 / (1 + np.exp(-logits))
    assert part["count"] == rows.sum() and part["positives"] == labels.sum()
    close = {"rel": 1e-12, "abs": 0}
    assert part["auc"] == pytest.approx(roc_auc_score(labels, logits, sample_weight=w), **close)
    assert part["calibration"] == pytest.approx((w * p).sum() / (w * labels).sum(), **close)
    loss = -(w * np.where(labels == 1, np.log(p), np.log1p(-p))).sum() / w.sum()
    assert part["logloss"] == pytest.approx(loss, **close)
    total = mass = left = 0
    users = columns["user_id"][rows]
    for user in np.unique(users):
        of = users == user
        if len(np.unique(labels[of])) == 2:
            mass += w[of].sum()
            total += w[of].sum() * roc_auc_score(labels[of], logits[of], sample_weight=w[of])
        else:
            left += 1
    assert part["gauc_user_coverage"] == pytest.approx(mass / w.sum(), **close)
    assert part["gauc_user_groups_left_out"] == left
    if mass / w.sum() >= reports.MIN_COVERAGE:
        assert part["gauc_user"] == pytest.approx(total / mass, **close)
    else:
        assert part["gauc_user"] is None


@pytest.mark.parametrize("weighted", [False, True])
def test_every_slice_equals_the_metrics_of_its_rows(weighted):
    columns = make_scores(weighted=weighted)
    results = reports.evaluate_scores(columns)
    check_part(results, columns, np.ones(4000, bool))
    lengths = columns["history_length"]
    slices = results["slices"]
    assert list(slices) == ["history_length", "context/pid", "candidate/brand", "candidate/price"]
    ends = {"0": (0, 0), "1-9": (1, 9), "10-19": (10, 19), "20-49": (20, 49), "50-99": (50, 99)}
    ends |= {"100-199": (100, 199), "200-499": (200, 499)}
    assert list(slices["history_length"]) == list(ends)
    for name, (low, high) in ends.items():
        rows = (lengths >= low) & (lengths <= high)
        check_part(slices["history_length"][name], columns, rows)
    assert slices["history_length"]["200-499"]["max"] == 200
    assert list(slices["context/pid"]) == ["3", "4", "5"]
    for value in (3, 4, 5):
        check_part(slices["context/pid"][str(value)], columns, columns["context/pid"] == value)
    kept = [int(v) for v in slices["candidate/brand"] if v != "other"]
    assert len(kept) == 20
    for value in kept:
        part = slices["candidate/brand"][str(value)]
        check_part(part, columns, columns["candidate/brand"] == value)
    rest = ~np.isin(columns["candidate/brand"], kept)
    check_part(slices["candidate/brand"]["other"], columns, rest)
    count = 4000 if not weighted else (columns["weights"] > 0).sum()
    for parts in slices.values():
        assert sum(part["count"] for part in parts.values()) == count
    assert len(slices["candidate/price"]) == 5
    json.dumps(results, allow_nan=False)


def test_slices_are_named_by_what_they_stand_for():
    class Raw:
        def names(self, name, ids):
            return [f"{name} {10 * i}" for i in ids]

        def decode(self, name, values):
            return values * 100.0 + 5

    columns = make_scores()
    plain = reports.evaluate_scores(columns)["slices"]
    named = reports.evaluate_scores(columns, raw=Raw())["slices"]
    assert list(named["context/pid"]) == [f"context/pid {10 * i}" for i in (3, 4, 5)]
    assert list(named["candidate/brand"])[-1] == "other"
    edges = np.quantile(columns["candidate/price"], 0.2, method="higher") * 100 + 5
    low, high = list(named["candidate/price"])[0].split("[")[1][:-1].split(", ")
    assert low == "-inf" and float(high) == pytest.approx(edges, rel=1e-2)
    assert named["history_length"] == plain["history_length"]
    rows = reports.slice_rows({"slices": named}, ("context/pid", "candidate/price"))
    assert [row["value"] for row in rows] == [*named["context/pid"], *named["candidate/price"]]
    assert rows[0]["slice"] == "context/pid" and rows[0]["auc"] == plain["context/pid"]["3"]["auc"]
    assert "context/pid 30" in reports.format_table(rows)
    for name in ("context/pid", "candidate/brand", "candidate/price"):
        assert list(named[name].values()) == list(plain[name].values())


def test_the_order_of_rows_and_the_float_width_do_not_matter():
    columns = make_scores()
    shuffle = np.random.default_rng(1).permutation(4000)
    first = reports.evaluate_scores(columns)
    second = reports.evaluate_scores({k: v[shuffle] for k, v in columns.items()})
    third = reports.evaluate_scores(columns | {"logits": columns["logits"].astype(np.float64)})
    flat = [
        json.loads(json.dumps(r), parse_float=lambda x: round(float(x), 11))
        for r in (first, second, third)
    ]
    assert flat[0] == flat[1] == flat[2]


def test_gauc_by_request_is_not_given_below_its_coverage():
    n = 3000
    labels, ids = np.zeros(n, np.uint8), np.arange(n)
    labels[::60] = 1
    scores = {"logits": np.sin(ids).astype(np.float32), "labels": labels}
    low = reports.evaluate_scores(scores | {"request_id": ids // 2})  # 50 of 1500 have a click
    assert low["gauc_request"] is None and low["gauc_request_coverage"] == pytest.approx(1 / 30)
    assert low["gauc_request_groups_left_out"] == 1450 and "gauc_user" not in low
    enough = reports.evaluate_scores(scores | {"request_id": ids // 5})
    assert 0 <= enough["gauc_request"] <= 1
    assert enough["gauc_request_coverage"] == pytest.approx(1 / 12)


@pytest.mark.parametrize("labels", [[], [0, 0], [1, 1]])
def test_one_class_and_empty_results_are_null(labels, tmp_path):
    n = len(labels)
    ids = np.zeros(n, np.int32)
    scores = {"logits": np.zeros(n, np.float32), "labels": np.array(labels, np.uint8)}
    scores |= {"user_id": ids, "request_id": ids, "history_length": ids}
    for log in (scores, metrics.ScoreLog()) if not n else (scores,):
        results = reports.evaluate_scores(log)
        assert results["auc"] is None and results["normalised_entropy"] is None
        assert results.get("gauc_user") is None and results.get("gauc_request") is None
        files = reports.write_report(tmp_path, results, run="one class", step=0)
        assert json.loads(files["results"].read_text())["auc"] is None
        assert "n/a" in reports.format_table(reports.summary_rows(results))


def test_a_score_that_is_not_finite_names_its_request():
    columns = make_scores(30)
    columns["logits"][[17, 20]] = np.nan
    with pytest.raises(ValueError, match="score nan of request id 5 is not finite .2 such rows"):
        reports.evaluate_scores(columns)
    with pytest.raises(ValueError, match="no slice column .'shoe'."):
        reports.evaluate_scores(make_scores(30), slices=["shoe"])
    with pytest.raises(ValueError, match="must start at 0 and increase"):
        reports.evaluate_scores(make_scores(30), history_edges=(0, 5, 5))
    with pytest.raises(ValueError, match="'user_id'.*differ in shape"):
        reports.evaluate_scores(make_scores(30) | {"user_id": np.zeros(29)})


def test_report_files_and_comparison(tmp_path):
    results = reports.evaluate_scores(make_scores())
    about = {"run": "din", "step": 10, "split": "test", "data_hash": "abc"}
    first = reports.write_report(tmp_path / "din", results, **about)
    assert set(first) == {"results", "reliability", "auc_by_history_length"}
    for name in ("reliability", "auc_by_history_length"):
        assert first[name].read_bytes().startswith(b"\x89PNG")
        assert first[name].stat().st_size > 10_000
    columns = make_scores()
    columns["logits"] = columns["logits"] + columns["labels"] * np.float32(0.2)
    better = reports.evaluate_scores(columns)
    second = reports.write_report(
        tmp_path / "ours", better, baseline=tmp_path / "din", **about | {"run": "ours"}
    )
    read = reports.read_results(second["results"])
    gain = ((better["auc"] - 0.5) / (results["auc"] - 0.5) - 1) * 100
    assert read["comparison"]["auc_rela_impr"] == pytest.approx(gain) and gain > 0
    assert read["comparison"]["baseline"] == "din" and read["run"] == "ours"
    assert read["comparison"]["logloss_difference"] < 0
    assert [p.name for p in (tmp_path / "ours").iterdir() if p.name.endswith("tmp")] == []
    with pytest.raises(FileNotFoundError, match="no results of the run"):
        reports.read_results(tmp_path / "nowhere")


OF_ONE_EVALUATION = {"data_hash": "abc", "split": "test", "count": 900, "positives": 90}


@pytest.mark.parametrize("key", OF_ONE_EVALUATION)
def test_results_of_other_rows_are_not_compared(key):
    reports.compare(OF_ONE_EVALUATION, dict(OF_ONE_EVALUATION))
    other = {"data_hash": "xyz", "split": "valid", "count": 901, "positives": 91}[key]
    for results in (OF_ONE_EVALUATION | {key: other}, OF_ONE_EVALUATION | {key: None}):
        with pytest.raises(ConfigError, match=f"cannot be compared: {key} is {results[key]!r}"):
            reports.compare(results, OF_ONE_EVALUATION)


def test_no_relative_improvement_over_a_guess():
    better = OF_ONE_EVALUATION | {"auc": 0.6, "gauc_user": 0.62}
    found = reports.compare(better, OF_ONE_EVALUATION | {"auc": 0.4, "gauc_user": 0.6})
    assert found["auc_rela_impr"] is None and found["auc_difference"] == pytest.approx(0.2)
    assert found["gauc_user_rela_impr"] == pytest.approx(20)
    lines = reports.format_table(reports.summary_rows({"comparison": found})).splitlines()
    printed = {line[:22].strip(): line.split()[-1] for line in lines}
    assert printed["auc rela impr"] == "n/a" and printed["auc difference"] == "0.20000"


def test_results_are_written_whole_or_not_at_all(tmp_path):
    path = reports.write_results(tmp_path / "results.json", {"auc": 0.7}, run="a")
    with pytest.raises(ValueError):
        reports.write_results(path, {"auc": float("nan")}, run="b")
    assert reports.read_results(tmp_path) == {"run": "a", "auc": 0.7}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_plots_of_awkward_results(tmp_path):
    # Probabilities that underflow to 0, one bin, a bucket without AUC, no step, weights.
    n = 40
    scores = {"logits": np.where(np.arange(n) < 20, -1000.0, 2.0), "labels": np.arange(n) % 2}
    scores |= {"history_length": np.where(np.arange(n) == 0, 0, 7), "user_id": np.zeros(n, int)}
    reports.write_report(tmp_path / "a", reports.evaluate_scores(scores), run="awkward")
    scores |= {"logits": np.zeros(n), "weights": np.full(n, 2.0)}
    files = reports.write_report(tmp_path / "b", reports.evaluate_scores(scores), step=3)
    assert len(files) == 3


def test_format_table():
    rows = [{"run": "a", "auc": 0.7512345, "n": 1234567}, {"run": "bc|d", "auc": None, "x": True}]
    assert reports.format_table(rows).splitlines() == [
        "run        auc          n     x",
        "-----  -------  ---------  ----",
        "a      0.75123  1,234,567   n/a",
        "bc\\|d      n/a        n/a  True",
    ]
    assert reports.format_table(rows[:1], markdown=True).splitlines() == [
        "| run |     auc |         n |",
        "| --- | ------: | --------: |",
        "| a   | 0.75123 | 1,234,567 |",
    ]
