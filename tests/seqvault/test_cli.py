"""The command line, called as the console script calls it."""

import json
import re

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


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize(
    "column, values, message",
    [
        ("item", [1, 2, 2**40], "b.npz, row 2: user 9.* 'item' has value"),
        ("user", [8.0, 8.0, 9.0], "b.npz, row 0: .*float64"),
        ("time", [1, 2], "b.npz: columns of different lengths"),
        ("time", [2, 1, 3], "b.npz, row 1: user 8.* time 1 comes after 2"),
        ("user", [8, 8, 7], "b.npz, row 2: user 7.* must be sorted"),
        ("user", [20, 20, 21], "b.npz, row 0: user 20 is in the stream already"),
    ],
)
def test_an_error_of_the_input_names_the_file_and_the_row(
    tmp_path, monkeypatch, capsys, append, column, values, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("seqvault.cli._BATCH_ROWS", 2)  # a file is several blocks
    np.savez("first.npz", user=[20], time=[1], item=[1])
    np.savez("a.npz", user=[5, 6, 7], time=[1, 2, 3], item=[1, 2, 3])
    columns = {"user": [8, 8, 9], "time": [1, 2, 3], "item": [1, 2, 3], column: values}
    np.savez("b.npz", **columns)
    np.savez("c.npz", user=[10], time=[1], item=[1])
    assert main(["load", "v", "first.npz", "--columns", "item:int32"]) == 0
    status = main(["load", "v", "a.npz", "b.npz", "c.npz", *(["--append"] if append else [])])
    error = capsys.readouterr().err
    if append and ("sorted" in message or "after" in message or "already" in message):
        assert status == 0
        return
    assert status == 2 and re.match(f"seqvault: {message}", error), error
    if append:  # what comes before is there, and the message says how far
        assert set(seqvault.Vault.open("v").users().tolist()) >= {20, 5, 6, 7}
    else:
        assert seqvault.Vault.open("v").users().tolist() == [20]


def test_an_event_id_that_comes_twice_names_its_row(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", user=[1, 1, 2], time=[1, 2, 3], item=[1, 2, 3])
    np.savez("b.npz", user=[2, 3, 3, 3], time=[4, 5, 6, 7], item=[4, 5, 6, 5])
    options = ["--columns", "item:int32", "--event_id", "item"]
    assert main(["load", "v", "a.npz", "b.npz", *options]) == 2
    assert "b.npz, row 3: user 3 has the event id 5 twice" in capsys.readouterr().err


def test_load_names_the_streams_that_there_are(vault, tmp_path, capsys):
    load = ["load", str(vault), str(tmp_path / "rows.parquet"), "--stream", "ads"]
    for options in ([], ["--append"]):
        assert main([*load, *options]) == 2
        assert "has other streams: ['default']" in capsys.readouterr().err


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
    program += "print([m for m in ('jax', 'ctr_jax', 'redis', 'pyarrow') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"
