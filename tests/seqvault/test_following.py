"""Readers beside a writer at work: what they must see, and must not."""

import threading
import time

import numpy as np
import pytest

import seqvault
from seqvault import verification
from seqvault.state import State
from tests.seqvault.failing_files import UnsyncedFiles

ITEM = seqvault.Schema({"item": np.int32})
FILES = UnsyncedFiles()


@pytest.fixture
def vault(tmp_path):
    with seqvault.Vault.create(tmp_path / "v", ITEM, files=FILES) as vault:
        vault.append_many([10, 20], {"time": [1, 1], "item": [10, 20]})
        yield vault


def test_an_open_reader_sees_a_bulk_load(vault):
    reader = seqvault.Vault.open(vault.path)
    assert reader.lengths([1]).tolist() == [0]
    vault.bulk_load([{name: np.array([1, 1]) for name in ("user", "time", "item")}])
    assert reader.lengths([1, 10]).tolist() == [2, 1]
    vault.append(1, {"time": 2, "item": 3})
    vault.merge()
    assert reader.last_n([1], 4)["item"].tolist() == [[0, 1, 1, 3]]
    vault.checkpoint()
    state = reader._state
    reader.refresh()
    assert reader._state is state, "after a plain checkpoint a reader goes on with what it has"
    reader.close()


def test_a_reader_sees_what_a_checkpoint_of_a_damaged_log_made_of_it(vault):
    """It has met the record before it was damaged; the writer that opens later has not."""
    path = vault.path
    reader = seqvault.Vault.open(path)
    vault.close()
    log = path / "log-000000.log"
    data = bytearray(log.read_bytes())
    data[-1] ^= 1
    log.write_bytes(data)
    with seqvault.Vault.open(path, write=True, files=FILES) as vault:
        assert vault.lengths([10]).tolist() == [0] and reader.lengths([10]).tolist() == [1]
        vault.checkpoint()
        assert reader.lengths([10]).tolist() == [0]
    reader.close()


def test_a_snapshot_holds_who_was_there_when_it_began(vault, tmp_path, monkeypatch):
    reader = seqvault.Vault.open(vault.path)
    build = seqvault.snapshot.bulk_build

    def building(*arguments, **options):
        vault.append_many([5, 15], {"time": [1, 1], "item": [5, 15]})
        return build(*arguments, **options)

    monkeypatch.setattr("seqvault.snapshot.bulk_build", building)
    reader.snapshot(tmp_path / "s")
    snapshot = seqvault.Snapshot(tmp_path / "s")
    assert snapshot.users.tolist() == [10, 20]
    assert snapshot.last_n([0, 1], 2)["item"].tolist() == [[0, 10], [0, 20]]
    reader.close()


def test_threads_that_refresh_a_reader_take_turns(vault, monkeypatch):
    reader = seqvault.Vault.open(vault.path)
    replay, inside, most = State.replay, [], []

    def slow(state):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        replay(state)
        inside.pop()

    monkeypatch.setattr(State, "replay", slow)
    vault.append(10, {"time": 2, "item": 1})
    threads = [threading.Thread(target=reader.refresh) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1] and reader.lengths([10]).tolist() == [2]
    reader.close()


@pytest.mark.parametrize("times", [2, 100])
def test_verify_takes_no_checkpoint_for_damage(vault, monkeypatch, times):
    vault.merge()
    left = [times]

    def overtaken(path):
        state = State(path)
        if left[0]:
            left[0] -= 1
            vault.checkpoint()
        return state

    monkeypatch.setattr(verification, "State", overtaken)
    assert verification.verify(vault.path) == []
    segment = vault.path / "blocks-000001.sv"
    data = bytearray(segment.read_bytes())
    data[20] ^= 1
    segment.write_bytes(data)
    left[0] = times
    assert [d.file for d in verification.verify(vault.path)] == [segment.name]


@pytest.mark.parametrize("write", [False, True])
def test_a_closed_vault_says_so(tmp_path, write):
    seqvault.Vault.create(tmp_path / "v", ITEM, files=FILES).close()
    vault = seqvault.Vault.open(tmp_path / "v", write=write, files=FILES)
    vault.close()
    for call in (
        lambda: vault.last_n([1], 2),
        lambda: vault.users(),
        lambda: vault.append(1, {"time": 1, "item": 1}),
        lambda: vault.merge(),
    ):
        with pytest.raises(seqvault.VaultError, match="v: closed"):
            call()
