"""Readers beside a writer at work: what they must see, and must not."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import seqvault
from seqvault import verification
from seqvault.manifest import read_manifest
from seqvault.state import State
from tests.seqvault.failing_files import UnsyncedFile, UnsyncedFiles
from tests.seqvault.oracle import SCHEMA
from tests.seqvault.test_vault import rows

ITEM = seqvault.Schema({"item": np.int32})
FILES = UnsyncedFiles()
OPTIONS = {"block_rows": 8, "segment_bytes": 4000}


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


@pytest.mark.parametrize("read", ["last_n", "scan", "snapshot"])
def test_a_read_from_segments_that_a_reclaim_took_meanwhile_starts_anew(
    tmp_path, monkeypatch, read
):
    """The reader has the manifest from before the reclaim, and finds its segments gone."""
    path, everyone = tmp_path / "v", np.arange(6)
    vault = seqvault.Vault.create(path, ITEM, segment_bytes=2000, files=FILES)
    for user in everyone.tolist():
        times = np.arange(200)
        vault.append(user, {"time": times, "item": times * 7919 % 100_003})
    vault.merge()
    vault.checkpoint()
    reader = seqvault.Vault.open(path)
    reader.lengths(everyone)
    vault.evolve(seqvault.Schema({"item": np.int32, "shop": np.int32}, 2))  # it must open anew
    open_segments, left = State.open_segments, [1]

    def overtaken(state):
        if left and state is not vault._state:
            left.clear()
            columns = {"time": [1000] * 6, "item": [1] * 6, "shop": [1] * 6}
            vault.append_many(everyone, columns)
            vault.merge()
            vault.checkpoint()
            vault.reclaim(dead=0.05)
            assert not (path / "blocks-000001.sv").exists()
        return open_segments(state)

    monkeypatch.setattr(State, "open_segments", overtaken)
    if read == "last_n":
        assert reader.last_n(everyone, 300)["mask"].sum() == 6 * 201
    elif read == "scan":
        found = reader._scan(everyone, None, "default", 500)
        assert [len(block["user"]) for block in found] == [402, 402, 402]
    else:
        reader.snapshot(tmp_path / "s")
        assert seqvault.Snapshot(tmp_path / "s").num_behaviours == 6 * 201
    assert not left
    reader.close()
    vault.close()


def test_rows_that_were_merged_leave_the_memory_of_writer_and_readers(tmp_path, monkeypatch):
    monkeypatch.setattr("seqvault.state._TAIL_ROWS", 300)
    with seqvault.Vault.create(tmp_path / "v", ITEM, files=FILES) as vault:
        reader = seqvault.Vault.open(tmp_path / "v")
        for i in range(30):
            users = np.arange(100)
            vault.append_many(users, {"time": [i] * 100, "item": users})
            vault.merge(min_rows=1 if i % 2 else 2)
            vault.append(7, {"time": i, "item": i})
            for who in (vault, reader):
                found = who.last_n([7], 100)
                assert found["mask"].sum() == 2 * i + 2
                assert (
                    found["time"][0, -2 * i - 2 :].tolist() == np.repeat(range(i + 1), 2).tolist()
                )
                assert who._state.streams[0].tail.count <= 600
                assert who.stats()["streams"]["default"]["tail_bytes"] < 20_000
        assert vault.stats()["generation"] == 0
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


READER = """
import sys, time, numpy as np, seqvault
vault = seqvault.Vault.open(sys.argv[1])
seen, reads = np.zeros(4, int), 0
print("open", flush=True)
stop = time.time() + float(sys.argv[2])
while time.time() < stop:
    found = vault.last_n(np.arange(4), 3000)
    counts = found["mask"].sum(1)
    for user in range(4):
        items = found["item"][user, 3000 - counts[user]:]
        assert (items == np.arange(counts[user])).all(), (user, items)
        assert counts[user] >= seen[user], (user, counts, seen)
    assert len(set(counts.tolist())) == 1, counts  # an append of four rows is seen whole
    seen, reads = counts, reads + 1
assert not vault.damages, vault.damages
print(reads, seen[0])
"""


def test_readers_in_other_processes_see_whole_states_only(tmp_path):
    vault = seqvault.Vault.create(tmp_path / "v", SCHEMA, **OPTIONS)
    command = [sys.executable, "-c", READER, str(tmp_path / "v"), "2.5"]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for reader in readers:
        assert reader.stdout.readline().strip() == "open"
    i = 0
    while any(reader.poll() is None for reader in readers):
        if i < 2900:
            columns = {"time": [i] * 4, "item": [i] * 4, "kind": [0] * 4, "seen": [1] * 4}
            vault.append_many(np.arange(4), {**columns, "weight": [0.0] * 4}, sync=i % 50 == 0)
            i += 1
        if i % 40 == 0:
            vault.merge(min_rows=1)
        if i % 150 == 0:
            vault.checkpoint()
        if i % 400 == 0:
            vault.reclaim(dead=0.2)
        time.sleep(0.0005)
    for reader in readers:
        out = reader.stdout.read().split()
        assert reader.wait() == 0 and int(out[0]) > 20 and int(out[1]) > 20
    vault.close()


def test_a_reader_that_finds_the_next_log_gone_goes_on(tmp_path):
    """Between a reader's look at a checkpoint and at its log, the writer may make another."""

    def append(i):
        vault.append_many(
            np.arange(4),
            {
                "time": [i] * 4,
                "item": [i] * 4,
                "kind": [0] * 4,
                "seen": [1] * 4,
                "weight": [0.0] * 4,
            },
        )

    vault = seqvault.Vault.create(tmp_path / "v", SCHEMA, **OPTIONS)
    append(0)
    reader = seqvault.Vault.open(tmp_path / "v")
    vault.checkpoint()
    between, _ = read_manifest(tmp_path / "v")
    append(1)
    vault.checkpoint()
    assert not (tmp_path / "v" / between["log"]).exists()
    with pytest.raises(FileNotFoundError):
        reader._state.switch_log(between)
    found = reader.last_n(np.arange(4), 3)
    assert found["item"].tolist() == [[0, 0, 1]] * 4
    assert found["mask"].tolist() == [[False, True, True]] * 4
    append(2)
    assert reader.last_n(np.arange(4), 1)["item"].tolist() == [[2]] * 4
    reader.close()
    vault.close()


class _StuckFile(UnsyncedFile):
    def sync(self):
        self.layer.reached.set()
        assert self.layer.go_on.wait(60)


class StuckFiles(UnsyncedFiles):
    """Fsyncs take as long as the test wants."""

    def __init__(self):
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def open(self, path):
        file = _StuckFile(path)
        file.layer = self
        return file


@pytest.mark.parametrize("step", ["append", "merge", "checkpoint"])
def test_reads_go_on_while_the_disk_works(tmp_path, step):
    files = StuckFiles()
    vault = seqvault.Vault.create(tmp_path / "v", SCHEMA, files=files)
    vault.append(1, rows([1]))
    steps = {
        "append": lambda: vault.append(1, rows([2]), sync=True),
        "merge": vault.merge,
        "checkpoint": vault.checkpoint,
    }
    files.go_on.clear()
    files.reached.clear()
    writer = threading.Thread(target=steps[step])
    writer.start()
    assert files.reached.wait(60)
    reads = []
    reader = threading.Thread(target=lambda: reads.append(vault.last_n([1], 2)["mask"].sum()))
    reader.start()
    reader.join(30)
    assert reads == [1] and writer.is_alive()
    files.go_on.set()
    writer.join(60)
    assert vault.lengths([1]).tolist() == [2 if step == "append" else 1]
    vault.close()
