"""The suite for a GPU, where there is none: order, time, failures, arithmetic, one small run."""

import json
import time

import pytest

from benchmarks import gpu_cases, gpu_checks, gpu_suite
from benchmarks.gpu_timing import TIME_UP, Bench, LeftOut, Way, measure
from kernels.segmented_target_attention.shapes import Shape
from tests.benchmarks.gpu_entries import FINE, RAISES, SLEEPS, WAYS


def run(entries, tmp_path, seconds, **options):
    path, record = tmp_path / "suite.json", {"minutes_used": [], "entries": []}
    options = {"small": False} | options
    worker = gpu_suite.Worker(options)
    began = time.time()
    gpu_suite.run_all(entries, record, path, seconds, options, worker)
    assert time.time() - began < seconds + 1
    assert json.loads(path.read_text()) == record
    return {entry["name"]: entry for entry in record["entries"]}


def test_what_fails_crashes_or_hangs_stops_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "WAY_SECONDS", 3)
    found = run([RAISES, WAYS, FINE], tmp_path, 300)
    assert found["raises"]["status"] == "failed"
    assert found["raises"]["error"] == "RuntimeError: INTERNAL: of the compiler with more lines"
    assert found["fine"]["status"] == found["ways"]["status"] == "ok"
    rows = {row["name"]: row for row in found["ways"]["rows"]}
    assert "the process ended with 3" in rows["crashes"]["error"]
    assert "nothing came for 3 s" in rows["hangs"]["error"]
    assert rows["raises"]["error"] == "ValueError: not with 8"
    assert rows["fine"]["ms"] > 0 and rows["fine"]["batch"] == 8
    assert len(rows["fine"]["seconds_per_behaviour"]) == Bench().rounds
    assert rows["is too large"]["batch"] == 2 and "do not fit" in rows["is too large"]["note"]


def test_what_the_time_does_not_reach_is_left_out(tmp_path):
    found = run([FINE, SLEEPS, FINE._replace(name="late")], tmp_path, 4)
    assert found["fine"]["status"] == "ok"
    assert found["sleeps"]["status"] == found["late"]["status"] == "left out"
    assert found["late"]["error"] == TIME_UP
    rows, runs = measure(Bench(deadline=0), [Way("late", "some", 1, 1, lambda batch: 1 / 0)])
    assert rows[0]["left out"] == TIME_UP and not runs


def test_a_worker_that_cannot_start_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "START_SECONDS", 0.01)
    record = {"minutes_used": [], "entries": []}
    gpu_suite.run_all([FINE], record, tmp_path / "suite.json", 60, {"small": False})
    assert record["entries"][0]["status"] == "failed"
    assert "at the start" in record["entries"][0]["error"]


def test_a_run_goes_on_where_its_file_ends(tmp_path):
    path = tmp_path / "gpu.json"
    rows = [{"name": "a", "ms": 1.0}, {"name": "b", "left out": TIME_UP}]
    entries = [
        {"name": "whole", "status": "ok", "rows": rows[:1]},
        {"name": "cut", "status": "ok", "rows": rows},
        {"name": "late", "status": "left out", "error": TIME_UP},
        {"name": "broken", "status": "failed", "error": "RuntimeError"},
        {"name": "speed of_old_kernel", "status": "ok", "rows": rows[:1]},
    ]
    old = {"commands": ["first"], "minutes_used": [8.0], "entries": entries}
    gpu_suite.write(old | {"changed": {"of_old_kernel": "rewritten"}}, path)
    device = {"device": "NVIDIA H200", "platform": "gpu"}
    record = gpu_suite.record_of(path, "second", False, device, resume=True)
    assert [entry["name"] for entry in record["entries"]] == ["whole"]
    assert record["commands"] == ["first", "second"] and record["measures"] == "NVIDIA H200"
    assert "changed" not in record
    anew = gpu_suite.record_of(path, "second", False, device, resume=False)
    assert anew["entries"] == [] and anew["commands"] == ["second"]


STA = Shape(4, 3, 12, 4, 2, 4, 8, False)


@pytest.mark.parametrize("exact", [True, False])
def test_a_wrong_gradient_is_found_and_named(exact, monkeypatch):
    call_of = gpu_checks.call_of

    def wrong(op, shape, implementation, dtype, both, **options):
        right = call_of(op, shape, implementation, dtype, both, **options)

        def call(*arguments):
            named = right(*arguments)
            if implementation == "pallas_gpu" and dtype == "float32":
                named["gradient of k"] = named["gradient of k"].at[0, -1].mul(1.01)
            return named

        return call

    monkeypatch.setattr(gpu_checks, "call_of", wrong)
    result = gpu_checks.check(gpu_checks.STA, STA, exact, Bench(small=True))
    assert not result["ok"] and result["dtypes"]["bfloat16"]["ok"]
    assert result["dtypes"]["float32"]["worst"] == "gradient of k"
    errors = result["dtypes"]["float32"]["errors"]
    assert set(errors) == {"z", *(f"gradient of {x}" for x in ("q", "k", "v", "bias"))}
    assert sum(error > 2e-4 for error in errors.values()) == 1


def test_nothing_that_is_no_number_passes():
    assert not gpu_checks._error([float("nan"), 1.0], [1.0, 1.0], 1e-3) <= 1


def row(role, ns, name=None, **more):
    """Two rounds, the second on a device half as fast."""
    rounds = [1e-9 * ns, 2e-9 * ns]
    return {"name": name or role, "role": role, "note": "", "ms": ns, "compile_s": 1.0,
            "ns_per_behaviour": ns, "seconds_per_behaviour": rounds, **more}  # fmt: skip


def test_ratios_are_per_behaviour_of_one_round_and_count_the_keys():
    failed = {"name": "torch", "role": "same bias", "note": "", "error": "RuntimeError"}
    rows = [row("kernel", 2.0), row("xla", 5.0), row("xla", 6.0, "other tiles"), row("keys", 0.5),
            failed, row("same bias", 40.0, "slow"), row("same bias", 20.0, "fast"),
            row("no bias", 10.0)]  # fmt: skip
    result = {"rows": rows, "is_goal": True, "dtype": "bfloat16"}
    found = gpu_suite.ratios(result, {})
    assert found["xla"] == {"against": "xla", "ratio": 2.5, "goal": 2.0, "met": True}
    assert found["same bias"] == {"against": "fast", "ratio": 8.0, "goal": 10.0, "met": False}
    assert found["no bias"]["ratio"] == 4.0
    assert gpu_suite.ratios({**result, "rows": rows[1:]}, {}) == {}


def test_the_goal_of_a_copy_is_of_ops_that_wait_for_bytes():
    device = {"kind": "device", "rows": [row("copy", 1000.0, bytes=10**12),
              row("product", 1000.0, "product, float32", operations=10**13)]}  # fmt: skip
    rates = gpu_suite.rates([device, {"kind": "check"}])
    assert rates == {"copy": 1e12, "product, float32": 1e13}
    for operations, waits_for in ((10**6, "bytes"), (10**9, "operations")):
        rows = [row("kernel", 0.002, bytes=10**6, operations=operations)]
        result = {"rows": rows, "is_goal": False, "dtype": "float32"}
        found = gpu_suite.ratios(result, rates)["copy"]
        assert found["ratio"] == 0.5 and found["waits_for"] == waits_for
        assert found.get("met") == (False if waits_for == "bytes" else None)


def test_the_most_important_comes_first():
    names = [entry.name for entry in gpu_cases.entries(small=False)]
    assert len(names) == len(set(names)) and names[0] == "device"
    first_speed = next(i for i, name in enumerate(names) if name.startswith("speed"))
    checked = {name.split()[1] for name in names[:first_speed] if name.startswith("check")}
    assert checked == set(gpu_cases.OPS)
    assert names[first_speed] == "speed evo_attention wide bfloat16 forward"
    assert all(name.startswith("blocks") for name in names[-6:])
    for op, shapes in gpu_cases.OPS.items():
        assert {f"check {op} {name}" for name in shapes.SHAPES} <= set(names)


def test_torch_is_left_out_with_its_reason_where_it_is_not(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\" >&2\nexit 1\n"
    )
    python.chmod(0o755)
    bench = Bench(small=True, torch_python=str(python))
    for _ in range(2):
        with pytest.raises(LeftOut, match="No module named 'torch'"):
            bench.torch()


@pytest.mark.slow
def test_the_small_suite_runs_everything_on_a_cpu(tmp_path, capsys):
    path = tmp_path / "small.json"
    gpu_suite.main(["--small", "--minutes", "10", "--out", str(path)])
    record = json.loads(path.read_text())
    assert record["measures"] is None and "not a device" in record["note"]
    assert record["versions"]["jax"] and record["commands"] and record["date"]
    assert [entry["status"] for entry in record["entries"]] == ["ok"] * len(record["entries"])
    assert [e["name"] for e in record["entries"]] == [e.name for e in gpu_cases.entries(True)]
    assert all(e["ok"] for e in record["entries"] if e["kind"] == "check")
    speeds = [e for e in record["entries"] if e["kind"] == "speed"]
    assert all(e["agrees"] and e["ratios"]["xla"]["ratio"] > 0 for e in speeds)
    rows = {row["name"]: row for row in speeds[0]["rows"]}
    assert "cuDNN" in rows["jax.nn cudnn, same bias"]["error"]
    assert all(rows[f"{name}, same bias"]["ms"] > 0 for name in ("jax.nn xla", "tiled"))
    printed = capsys.readouterr().out
    # What the op waits for, and so whether the goal against a copy is its, is this CPU's to say.
    assert all(x in printed for x in ("goal 10.0", "waits for", "not a device"))


def test_on_a_cpu_it_measures_nothing(tmp_path):
    with pytest.raises(SystemExit, match="no accelerator"):
        gpu_suite.main(["--out", str(tmp_path / "none.json")])
    assert not list(tmp_path.iterdir())
