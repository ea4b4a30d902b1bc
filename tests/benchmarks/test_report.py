"""Tables from the benchmarks' files: what they say, and where they are put."""

import copy
import json
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).parent.parent.parent


def entry(op, way, ratio, name="wide", **more):
    kernel = {"name": "pallas_gpu", "role": "kernel", "note": "", "ms": 1.5, "compile_s": 2.0}
    other = {"name": "xla", "role": "xla", "note": "", "ms": 1.5 * ratio, "compile_s": 2.0}
    found = {"xla": {"against": "xla", "ratio": ratio}}
    return {"name": f"speed {op} {name} bfloat16 {way}", "kind": "speed", "status": "ok", "op": op,
            "dtype": "bfloat16", "pass": way, "is_goal": False, "rows": [kernel, other],
            "shape": {"candidates": 16},
            "ratios": found, "agrees": True} | more  # fmt: skip


@pytest.fixture
def record():
    """A run of evo_attention's kernel that is faster than XLA, of STA's that is not always."""
    evo, sta, absorbed = report.OPS
    goal = {"xla": {"against": "xla", "ratio": 2.5, "goal": 2.0, "met": True},
            "same bias": {"against": "tiled, same bias", "ratio": 8.04, "goal": 10.0, "met": False},
            "no bias": {"against": "jax.nn cudnn, no bias", "ratio": 3.0, "goal": 2.0,
                        "met": True}}  # fmt: skip
    torch = {"name": "torch SDPA, same bias", "role": "same bias", "note": "", "error": "no torch"}
    first = entry(evo, "forward", 2.5, is_goal=True, ratios=goal)
    first["rows"].append(torch)
    return {
        "device": "NVIDIA H200", "platform": "gpu", "measures": "NVIDIA H200", "driver": "580",
        "date": "2026-01-01", "commands": ["python -m benchmarks.gpu_suite"],
        "versions": {"jax": "0.11.2", "jaxlib": "0.11.2"},
        "entries": [
            {"name": f"check {evo} wide", "kind": "check", "status": "ok", "ok": True},
            {"name": f"check {absorbed} ragged", "kind": "check", "status": "ok", "ok": False},
            {"name": f"check {sta} late", "status": "left out", "error": "the time was up"},
            first,
            entry(evo, "forward+backward", 1.25),
            entry(sta, "forward", 3.0),
            entry(sta, "forward+backward", 0.9, name="paper"),
            entry(absorbed, "forward", 5.0),
            {"name": f"speed {evo} late bfloat16 forward", "status": "left out",
             "error": "the time was up"},
            {"name": f"blocks {evo} wide bfloat16", "kind": "sweep", "status": "ok",
             "rows": [{"name": "32", "ms": 3.0}, {"name": "64", "ms": 2.0}]},
        ],
    }  # fmt: skip


def test_nothing_is_claimed_without_a_device(record, monkeypatch):
    for op in report.OPS:
        monkeypatch.setattr(f"kernels.{op}.api.PREFERRED", {})
    small = copy.deepcopy(record) | {"measures": None}
    for records in ([], [small]):
        tables = report.tables(records)
        assert report.NOT_MEASURED in tables["gpu"] and tables["headline"] == report.NOT_MEASURED
        assert tables["blocks"] == report.NOT_MEASURED
        lines = tables["preferred"].splitlines()[2:]
        assert len(lines) == 3 and all("xla (not measured) | xla |" in line for line in lines)


def test_a_devices_table_says_what_was_met_missed_and_not_reached(record):
    table = report.tables([record])["gpu"]
    assert "**NVIDIA H200**, driver 580, jax 0.11.2" in table
    says = "Checks: 1 of 2 that ran passed; not absorbed_target_attention ragged; not run: "
    assert f"{says}segmented_target_attention late." in table
    line = next(x for x in table.splitlines() if "wide bfloat16 forward |" in x)
    assert "| 1.5 | 2.0 | **2.5** (goal 2) | 8.04 (goal 10: missed), tiled |" in line
    assert "**3** (goal 2), jax.nn cudnn |" in line
    assert "Without a figure: evo_attention late (the time was up)" in table
    assert "Not compared with: torch SDPA, same bias (no torch)" in table
    assert "†" not in table
    of_old_kernels = record | {"changed": {"wide bfloat16 forward": "rewritten"}}
    table = report.tables([of_old_kernels])["gpu"]
    assert "wide bfloat16 forward † | 1.5 |" in table
    assert "† Measured before the kernel changed: rewritten." in table
    of_old_checks = record | {"changed": {"absorbed_target_attention": "rewritten"}}
    table = report.tables([of_old_checks])["gpu"]
    assert "; 1 of them were of kernels that have changed since †; not run" in table
    headline = report.tables([record])["headline"]
    assert headline.startswith("NVIDIA H200: 2.5x XLA path, 8.04x full attention with the same")
    assert report.tables([record])["blocks"].startswith(
        "- NVIDIA H200, evo_attention wide bfloat16: 64"
    )


def test_the_default_is_a_kernel_that_is_faster_everywhere_and_right(record, monkeypatch):
    evo, sta, absorbed = report.OPS
    monkeypatch.setattr(f"kernels.{evo}.api.PREFERRED", {"NVIDIA T4": ("pallas_gpu",)})
    assert report.judged([record], evo, "NVIDIA H200")[0]
    assert report.judged([record], evo, "TPU v5e") == (False, report.NOT_MEASURED)
    is_kernel, why = report.judged([record], sta, "NVIDIA H200")
    assert not is_kernel and why.startswith("0.9x the XLA path at its worst: speed")
    is_kernel, why = report.judged([record], absorbed, "NVIDIA H200")
    assert not is_kernel and "is wrong: check absorbed" in why
    table = report.tables([record])["preferred"]
    line = "| evo_attention, up to 48 slots | {} (1.25x the XLA path at its worst: speed evo"
    assert line.format("NVIDIA H200 | pallas_gpu") in table
    assert "| xla: **to be changed** |" in table
    assert "| NVIDIA T4 | xla (not measured) | pallas_gpu: **to be changed** |" in table


def test_other_devices_failures_and_half_measurements_keep_xla(record):
    evo = report.OPS[0]
    slower = copy.deepcopy(record) | {"device": "NVIDIA T4"}
    slower["entries"][3]["ratios"]["xla"]["ratio"] = 0.5
    assert not report.judged([record, slower], evo, "NVIDIA T4")[0]
    assert report.judged([record, slower], evo, "NVIDIA H200")[0]
    broken = copy.deepcopy(record)
    del broken["entries"][4]["rows"][0]["ms"]
    assert "does not run" in report.judged([broken], evo, "NVIDIA H200")[1]
    failed = copy.deepcopy(record)
    failed["entries"][4] = {"name": failed["entries"][4]["name"], "status": "failed", "error": "x"}
    assert "does not run" in report.judged([failed], evo, "NVIDIA H200")[1]
    differs = copy.deepcopy(record)
    differs["entries"][4]["agrees"] = False
    assert "is wrong" in report.judged([differs], evo, "NVIDIA H200")[1]
    few = copy.deepcopy(record)
    few["entries"][4] |= {"shape": {"candidates": 1}}
    few["entries"][4]["ratios"]["xla"]["ratio"] = 0.5
    assert not report.judged([few], evo, "NVIDIA H200")[0]
    assert report.judged([few], evo, "NVIDIA H200", 2) == (False, "measured forward only")
    many = copy.deepcopy(record)
    many["entries"][4] |= {"shape": {"candidates": 16, "chunks": 16, "transition": 3}}
    assert report.judged([many], evo, "NVIDIA H200", 1, 64)[0]
    assert report.judged([many], evo, "NVIDIA H200", 1, 48) == (False, "measured forward only")
    of_old_kernels = record | {"changed": {evo: "rewritten"}}
    why = "not measured since it changed"
    assert report.judged([of_old_kernels], evo, "NVIDIA H200") == (False, why)
    half = copy.deepcopy(record)
    del half["entries"][4]
    assert report.judged([half], evo, "NVIDIA H200") == (False, "measured forward only")


def test_blocks_are_replaced_in_place_and_the_rest_is_left(tmp_path, record, capsys):
    page = "a\n<!-- report:gpu -->\nold\n<!-- /report -->\n"
    page += "b <!-- report:headline -->x<!-- /report -->|\n"
    evo = "<!-- report:evo_attention -->\nkept\n<!-- /report -->\n"
    (tmp_path / "README.md").write_text(page + evo)
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(record))
    report.main([str(file), "--write", "--root", str(tmp_path)])
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("a\n<!-- report:gpu -->\n**NVIDIA H200**") and "old" not in text
    assert "b <!-- report:headline -->NVIDIA H200: 2.5x" in text and text.endswith(evo)
    report.main([str(file), "--write", "--root", str(tmp_path)])
    assert (tmp_path / "README.md").read_text() == text
    assert capsys.readouterr().out.count("wrote") == 1
    (tmp_path / "README.md").write_text("<!-- report:nothing --><!-- /report -->")
    with pytest.raises(SystemExit, match="there is no table 'nothing'"):
        report.main([str(file), "--write", "--root", str(tmp_path)])


def test_the_pages_hold_the_tables_of_the_files():
    files = sorted((ROOT / "benchmarks/results").glob("*.json"))
    records = [r for r in (json.loads(f.read_text()) for f in files) if isinstance(r, dict)]
    tables, found = report.tables(records), 0
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text()
        found += len(report.MARKED.findall(text))
        assert report.replaced(text, tables, set(tables)) == text, (
            f"{page.name}: run python -m benchmarks.report --write"
        )
    assert found == len(tables)
    # One row of each table of the CPU, from the file's milliseconds alone.
    cpu = next(r for r in records if "goal_at_1024" in r)
    times = {}
    for backward in (False, True):
        (rows,) = (
            {row["name"]: row["ms"] for row in result["rows"]}
            for result in cpu["results"]
            if (result["L"], result["d"], result["backward"]) == (1024, 32, backward)
        )
        best = min(ms for name, ms in rows.items() if name.startswith("dense: "))
        ms = rows["Sparsity-2"]
        plain = min(rows[f"dense: {form}"] for form in ("n x n", "skip 64", "skip 256"))
        times[backward] = (ms, best / ms, plain / ms)
    (ms, forward, plain), (_, both, plain_both) = times[False], times[True]
    goal = cpu["goal_at_1024"]["2"]
    forward_cell, both_cell = (f"**{x:.1f}**" if x >= goal else f"{x:.1f}" for x in (forward, both))
    assert tables["evo_attention"].splitlines()[3] == (
        f"| Sparsity-2 (16, 2, 5) | 14 | 5.2 | {forward_cell} | {both_cell} "
        f"| {plain:.0f}; {plain_both:.0f} |"
    )
    (line,) = (x for x in tables["evo_lengths"].splitlines() if "| 32 | forward | Sparsity-2" in x)
    assert f" {ms:.3g} ({forward:.3g}x) |" in line
