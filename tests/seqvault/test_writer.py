"""The one writer: forks and interrupts must not make two of it, nor half of one."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import seqvault
from seqvault.state import Stream
from tests.seqvault.failing_files import UnsyncedFiles
from tests.seqvault.test_following import StuckFiles
from tests.seqvault.test_housekeeping import ITEM, append, items_of

FILES = UnsyncedFiles()

FORKING = """
import os, sys, seqvault
vault = seqvault.Vault.create(sys.argv[1], seqvault.Schema({"item": "int32"}))
vault.append(1, {"time": 1, "item": 1}, sync=True)
go, gone = os.pipe()
if os.fork():
    assert vault.append(1, {"time": 2, "item": 2}, sync=True) == 1
    vault.checkpoint()
    vault.append(1, {"time": 3, "item": 3}, sync=True)
    os.write(gone, b"x")
    os._exit(0)  # before the child
os.read(go, 1)
for write in (lambda: vault.append(1, {"time": 4, "item": 4}), vault.merge, vault.checkpoint):
    try:
        write()
        print("written")
    except seqvault.VaultError as error:
        print(error)
print(vault.writable, vault.last_n([1], 4)["item"][0].tolist(), flush=True)
sys.stdin.read()
vault.close()
"""


def test_a_fork_of_the_writer_reads_and_neither_writes_nor_keeps_others_out(tmp_path):
    path = tmp_path / "v"
    command = [sys.executable, "-c", FORKING, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as parent:
        lines = [parent.stdout.readline() for _ in range(4)]
        assert all("this is a fork of it" in line for line in lines[:3]), lines
        assert lines[3] == "False [0, 1, 2, 3]\n"
        assert parent.wait() == 0  # the child lives on until its stdin ends
        with seqvault.Vault.open(path, write=True, files=FILES) as vault:
            assert vault.damages == [] and items_of(vault, 1) == [1, 2, 3]
            append(vault, 1, 1, first=9)


def interrupted(monkeypatch, part):
    """The next os.pwrite raises KeyboardInterrupt when it has written that much of its bytes."""
    pwrite = os.pwrite

    def write(fd, data, at):
        monkeypatch.setattr(os, "pwrite", pwrite)
        pwrite(fd, data[: int(part * len(data))], at)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", write)


@pytest.mark.parametrize("part", [0, 0.5, 1])
def test_an_append_that_is_interrupted_is_there_or_not_for_everybody(tmp_path, monkeypatch, part):
    path = tmp_path / "v"
    vault = seqvault.Vault.create(path, ITEM, files=FILES)
    append(vault, 1, 1)
    reader = seqvault.Vault.open(path)
    interrupted(monkeypatch, part)
    with pytest.raises(KeyboardInterrupt):
        append(vault, 1, 2, first=1, sync=True)
    seen = items_of(reader, 1)
    assert len(seen) == (3 if part == 1 else 1)
    for write in (lambda: append(vault, 1, 1, first=3), vault.merge, vault.checkpoint):
        with pytest.raises(seqvault.VaultError, match="half-way; close and open it again"):
            write()
    vault.close()
    with seqvault.Vault.open(path, write=True, files=FILES) as vault:
        assert items_of(vault, 1) == seen
        append(vault, 1, 2, first=3)
        for who in (vault, reader, seqvault.Vault.open(path)):
            assert items_of(who, 1) == [*seen, *(np.arange(3, 5) * 7919 % 100_003).tolist()]
            assert who.damages == []
    reader.close()


@pytest.mark.parametrize("step", ["add", "commit"])
def test_an_interrupt_behind_the_log_stops_the_writer(tmp_path, monkeypatch, step):
    vault = seqvault.Vault.create(tmp_path / "v", ITEM, files=FILES)
    append(vault, 1, 1)

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Stream, step, stop)
        with pytest.raises(KeyboardInterrupt):
            append(vault, 1, 1, first=1) if step == "add" else vault.merge()
    with pytest.raises(seqvault.VaultError, match="half-way; close and open it again"):
        append(vault, 1, 1, first=2)
    vault.close()
    with seqvault.Vault.open(tmp_path / "v", write=True, files=FILES) as vault:
        assert len(items_of(vault, 1)) == (2 if step == "add" else 1)
        assert vault.merge() > 0 if step == "add" else vault.merge() == 0
        assert vault.verify() == []


@pytest.mark.parametrize("part", [0, 0.5, 1])
@pytest.mark.parametrize("bulk", [False, True])
def test_an_interrupt_before_the_log_leaves_no_parts_behind(tmp_path, monkeypatch, part, bulk):
    """Who walked over them would count rows twice that are still fresh."""
    path = tmp_path / "v"
    vault = seqvault.Vault.create(path, ITEM, files=FILES)
    append(vault, 1, 10)
    vault.merge()
    append(vault, 1, 10, first=10)
    size = (path / "blocks-000001.sv").stat().st_size
    interrupted(monkeypatch, part)
    with pytest.raises(KeyboardInterrupt):
        if bulk:
            vault.bulk_load([{name: np.array([5]) for name in ("user", "time", "item")}])
        else:
            vault.merge()
    assert (path / "blocks-000001.sv").stat().st_size == size
    append(vault, 1, 10, first=20)  # and the writer goes on
    vault.merge()
    assert len(items_of(vault, 1)) == 30 and vault.verify() == []
    vault.checkpoint()
    vault.close()
    (path / "index-000001.sv").unlink()
    with seqvault.Vault.open(path) as rebuilt:
        assert len(items_of(rebuilt, 1)) == 30


def test_a_merge_that_is_interrupted_at_the_log_is_there_or_not(tmp_path, monkeypatch):
    path = tmp_path / "v"
    vault = seqvault.Vault.create(path, ITEM, files=FILES)
    append(vault, 1, 10)
    write = vault._log.write

    def late(data):
        write(data)
        raise KeyboardInterrupt

    vault._log.write = late
    with pytest.raises(KeyboardInterrupt):
        vault.merge()
    reader = seqvault.Vault.open(path)
    with pytest.raises(seqvault.VaultError, match="half-way"):
        vault.merge()
    vault.close()
    with seqvault.Vault.open(path, write=True, files=FILES) as vault:
        append(vault, 1, 1, first=10)
        vault.merge()
        for who in (vault, reader):
            assert len(items_of(who, 1)) == 11
        assert vault.verify() == []
    reader.close()


@pytest.mark.parametrize("dropped", [False, True])
def test_an_append_beside_an_evolve_has_the_columns_of_before_or_after(tmp_path, dropped):
    files = StuckFiles()
    one, two = {"item": np.int32}, {"item": np.int32, "shop": np.int32}
    older, newer = (two, one) if dropped else (one, two)
    vault = seqvault.Vault.create(tmp_path / "v", seqvault.Schema(older), files=files)
    files.go_on.clear()
    files.reached.clear()
    evolve = threading.Thread(target=vault.evolve, args=[seqvault.Schema(newer, version=2)])
    evolve.start()
    assert files.reached.wait(60)
    raised = []

    def append_older():
        try:
            vault.append(1, {"time": 1, **dict.fromkeys(older, 1)})
        except BaseException as error:
            raised.append(error)

    appending = threading.Thread(target=append_older)
    appending.start()
    appending.join(0.2)
    files.go_on.set()
    evolve.join(60)
    appending.join(60)
    assert [type(error) for error in raised] == [seqvault.VaultError]
    assert "the schema wants" in str(raised[0]) and vault.lengths([1]).tolist() == [0]
    vault.close()
