"""The command line, called as the console script calls it."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import seqvault
from seqvault.cli import main

COLUMNS = {"user": [1, 1, 5], "time": [10, 20, 15], "item": [7, 8, 9], "action": [0, 1, 2]}


@pytest.fixture
def vault(tmp_path, capsys):
    pq.write_table(pa.table(COLUMNS), tmp_path / "rows.parquet")
    path = str(tmp_path / "v")
    columns = "item:int32,action:uint8"
    assert main(["load", path, str(tmp_path / "rows.parquet"), "--columns", columns]) == 0
    assert "3 behaviours" in capsys.readouterr().out
    return tmp_path / "v"


def test_load_inspect_verify_bench(vault, tmp_path, capsys):
    assert seqvault.Vault.open(vault).last_n([1, 5], 2)["item"].tolist() == [[7, 8], [0, 9]]
    np.savez(tmp_path / "more.npz", **{k: np.array(v) + (k == "time") for k, v in COLUMNS.items()})
    assert main(["load", str(vault), str(tmp_path / "more.npz"), "--append"]) == 0
    assert seqvault.Vault.open(vault).last_n([5], 3)["time"].tolist() == [[0, 15, 16]]
    capsys.readouterr()
    assert main(["inspect", str(vault)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "vault" and found["streams"]["default"]["behaviours"] == 6
    assert main(["verify", str(vault)]) == 0
    assert "whole" in capsys.readouterr().out
    assert main(["bench", str(vault), "--lookups", "10", "--batch", "3"]) == 0
    assert capsys.readouterr().out.count("P99") == 3


def test_snapshots_too(vault, tmp_path, capsys):
    content = seqvault.Vault.open(vault).snapshot(tmp_path / "s")
    assert main(["inspect", str(tmp_path / "s")]) == 0
    assert json.loads(capsys.readouterr().out)["content_hash"] == content
    assert main(["bench", str(tmp_path / "s"), "--lookups", "4"]) == 0
    assert main(["verify", str(tmp_path / "s")]) == 0


def test_damage_gives_status_1_and_names_the_file(vault, capsys):
    file = next(vault.glob("blocks-*"))
    data = bytearray(file.read_bytes())
    data[20] ^= 4
    file.write_bytes(data)
    assert main(["verify", str(vault)]) == 1
    assert f"{file.name}: damaged at byte" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["verify", "nowhere"], "no such file"),
        (["load", "nowhere", "rows.parquet"], "give --columns"),
        (["load", "v", "rows.parquet"], "is in the stream already"),
        (["load", "v", "bad.parquet"], "no columns"),
        (["load", "v", "bad.npz"], "no columns"),
    ],
)
def test_errors_are_one_line_and_status_2(vault, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"user": [1]}), "bad.parquet")
    np.savez("bad.npz", user=np.array([1]))
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["garbage", "empty", "cut", "objects", "numbers", "one array"])
def test_a_bad_npz_is_one_line_and_status_2(vault, tmp_path, capsys, kind):
    file = tmp_path / "bad.npz"
    columns = {name: np.array(values) + 100 for name, values in COLUMNS.items()}
    if kind == "objects":
        columns["item"] = np.array([None] * 3)
    if kind == "numbers":
        columns = {name: np.int64(1) for name in columns}
    np.savez(file, **columns)
    whole = file.read_bytes()
    if kind == "one array":
        with open(file, "wb") as out:
            np.save(out, np.arange(3))
    else:
        contents = {"garbage": b"garbage", "empty": b"", "cut": whole[:300]}
        file.write_bytes(contents.get(kind, whole))
    for options in ([], ["--append"]):
        assert main(["load", str(vault), str(file), *options]) == 2
        assert capsys.readouterr().err.startswith(f"seqvault: {file}: ")
    assert seqvault.Vault.open(vault).users().tolist() == [1, 5]


@pytest.mark.parametrize("option", [["--batch", "0"], ["--batch", "-1"], ["--n", "0"]])
def test_bench_takes_positive_numbers(vault, option):
    with pytest.raises(SystemExit):
        main(["bench", str(vault), *option])


def test_load_takes_the_columns_that_the_vault_has(vault, tmp_path, capsys):
    load = ["load", str(vault), str(tmp_path / "rows.parquet"), "--append", "--columns"]
    assert main([*load, "item:int32,action:uint8"]) == 0
    for wrong, message in (
        (["item:int64,action:uint8"], "has other columns"),
        (["item:int32"], "has other columns"),
        (["item:int32,action:uint8", "--event_id", "item"], "has another event id: None"),
    ):
        assert main([*load, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_import_needs_no_jax():
    import subprocess
    import sys

    program = "import sys, seqvault, seqvault.cli, seqvault.shards, seqvault.backends;"
    program += "print([m for m in ('jax', 'ctr_jax', 'pickle5', 'redis') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"
