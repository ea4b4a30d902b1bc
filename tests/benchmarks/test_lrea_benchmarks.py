"""LREA's benchmark and studies at the smallest size: they run, and say what they counted."""

import json
import sys

import pytest

from benchmarks import lrea_gap, lrea_serving


def test_the_serving_benchmark_runs_and_judges(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lrea_serving, "LEAST_SECONDS", 0.0)
    out = tmp_path / "r.json"
    lrea_serving.main(["--lengths", "24", "48", "--candidates", "5", "--ranks", "4", "30",
                       "--decompressed_rank", "4", "--rounds", "1", "--out", str(out)])  # fmt: skip
    record = json.loads(out.read_text())
    found = {(r["side"], r["L"], r["r"]) for r in record["rows"]}
    assert found == {
        ("DIN-long", 24, 0), ("decompressed", 24, 4), ("absorbed", 24, 4),
        ("DIN-long", 48, 0), ("decompressed", 48, 4), ("absorbed", 48, 4), ("absorbed", 48, 30),
    }  # fmt: skip  # r = 30 does not fit L = 24
    assert list(record["goals"]) == ["absorbed L=48 : L=24, r=4, B=5"]
    counted = {(r["side"], r["L"]): r["mflop"] for r in record["rows"] if r["r"] != 30}
    assert counted["absorbed", 24] == counted["absorbed", 48] < counted["DIN-long", 24]
    printed = capsys.readouterr().out
    assert "Table 1" in printed and "FuxiCTR is not measured" in printed


WORKER = """
import json, sys
options = json.loads(sys.argv[1])
assert options["width"] == 16 and options["hidden"] == 64
print(json.dumps({"torch": "none"}), flush=True)
for line in sys.stdin:
    size = json.loads(line)
    print(json.dumps({"seconds": size["length"] * size["candidates"] / 1e3}), flush=True)
"""


def test_the_other_interpreter_is_asked_size_by_size(tmp_path, monkeypatch):
    (tmp_path / "lrea_torch_din.py").write_text(WORKER)
    monkeypatch.setattr(lrea_serving, "__file__", str(tmp_path / "lrea_serving.py"))
    rows = lrea_serving.torch_rows(sys.executable, (10, 20), (5, 50), rounds=2, most_pairs=500)
    assert [(r["L"], r["B"], round(r["ms"])) for r in rows] == [
        (10, 5, 50), (10, 50, 500), (20, 5, 100),
    ]  # fmt: skip


@pytest.fixture
def page(tmp_path):
    """A small page of the amazon demo."""
    path = tmp_path / "page.py"
    path.write_text(
        "from configs import lrea_amazon\n"
        "def get_config(variant=''):\n"
        "    config = lrea_amazon.get_config('demo')\n"
        "    config.data.generate.update(dict(users=150, behaviours=20.0))\n"
        "    config.batch_size = config.eval_batch_size = 16\n"
        "    config.model.update(dict(short_length=4, long_length=40, head_hidden=(8,)))\n"
        "    config.history_length = 44\n"
        "    return config\n"
    )
    return path


@pytest.mark.slow
def test_the_gap_study_measures_rounding_on_the_absorbed_path(page, tmp_path, monkeypatch):
    monkeypatch.setattr(lrea_gap, "FORMS", ("joint",))
    monkeypatch.setattr(lrea_gap.low_rank, "PARAMETRISATIONS", ("free",))
    lrea_gap.main([f"--config={page}", f"--raw_dir={tmp_path / 'raw'}",
                   f"--prepared_dir={tmp_path / 'prepared'}", f"--workdir={tmp_path / 'runs'}",
                   "--steps=3", "--seeds=1", f"--out={tmp_path / 'gap.json'}", "--cpu_devices=8",
                   "--starts", "normal"])  # fmt: skip
    rows = json.loads((tmp_path / "gap.json").read_text())
    gaps = {r["path"]: r["largest"] for r in rows}
    assert gaps["absorbed"] < 1e-5 < 1e-4 < gaps["decompressed"]
