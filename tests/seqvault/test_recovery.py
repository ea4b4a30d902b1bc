"""What survives: kills, power loss, a full disk, cut and flipped bytes."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import seqvault
from seqvault.files import KILL, KILL_POINTS
from tests.seqvault import operations
from tests.seqvault.failing_files import FailingSync, FullDisk, LossyFiles, UnsyncedFiles
from tests.seqvault.oracle import SCHEMA, Oracle, draw

OPTIONS = {"block_rows": 8, "segment_bytes": 4000}


def killed(path, seed, first, point=None, after=None):
    """Runs operations until the kill point, or for `after` seconds; how many were acknowledged."""
    environment = {**os.environ, **({KILL: point} if point else {})}
    command = [sys.executable, "-m", "tests.seqvault.operations", path, str(seed), str(first)]
    child = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, env=environment, text=True
    )
    acknowledged = first
    if after:
        acknowledged = int(child.stdout.readline()) + 1
        time.sleep(after)
        child.send_signal(signal.SIGKILL)
    for line in child.stdout:
        acknowledged = int(line) + 1
    child.stdout.close()
    assert child.wait() == -signal.SIGKILL
    return acknowledged


def recovered(path, seed, acknowledged):
    """How many operations the vault holds: all that were acknowledged, and at most one more."""
    with seqvault.Vault.open(path) as reader, seqvault.Vault.open(path, write=True) as vault:
        assert vault.damages == []
        for count in (acknowledged, acknowledged + 1):
            oracle = operations.oracle_after(seed, count)
            if operations.holds(vault, oracle):
                assert operations.holds(reader, oracle)
                oracle.check(vault, np.arange(9), np.random.default_rng(0), sizes=(7,))
                break
        else:
            raise AssertionError(f"not the state after {acknowledged} operations, nor one more")
        assert vault.verify() == []
    return count


@pytest.mark.parametrize("point", KILL_POINTS)
def test_kill_points(tmp_path, point):
    seqvault.Vault.create(tmp_path / "v", SCHEMA, **OPTIONS).close()
    done = recovered(tmp_path / "v", 1, killed(tmp_path / "v", 1, 0, f"{point}:3"))
    assert done > 2


@pytest.mark.slow
def test_kill_points_again_and_again(tmp_path):
    """Each passage number of each point, on a vault that lives on."""
    seqvault.Vault.create(tmp_path / "v", SCHEMA, **OPTIONS).close()
    done = 0
    for passage in (1, 2, 5, 9):
        for point in KILL_POINTS:
            done = recovered(
                tmp_path / "v", 2, killed(tmp_path / "v", 2, done, f"{point}:{passage}")
            )


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path):
    rng = np.random.default_rng(0)
    seqvault.Vault.create(tmp_path / "v", SCHEMA, **OPTIONS).close()
    done = 0
    for _ in range(20):
        after = float(rng.uniform(0.01, 0.15))
        done = recovered(tmp_path / "v", 3, killed(tmp_path / "v", 3, done, after=after))
    assert done > 100


def test_a_log_cut_at_every_byte_of_its_last_records(tmp_path):
    rng = np.random.default_rng(0)
    vault = seqvault.Vault.create(tmp_path / "v", SCHEMA, **OPTIONS)
    ends, states = [], []
    oracle = Oracle()
    for step in range(8):
        users, columns = draw(rng, 4, users=3)
        vault.append_many(users, columns)
        oracle.append(users, columns)
        if step == 3:
            vault.checkpoint()
        ends.append(vault.stats()["log_bytes"])
        if step == 5:
            vault.merge()
        states.append({key: list(rows) for key, rows in oracle.rows.items()})
    vault.close()
    log, files = "log-000001.log", UnsyncedFiles()
    whole = (tmp_path / "v" / log).read_bytes()
    assert len(whole) == ends[-1]
    for cut in range(ends[4], len(whole)):
        shutil.copytree(tmp_path / "v", tmp_path / "cut")
        (tmp_path / "cut" / log).write_bytes(whole[:cut])
        survived = Oracle()
        survived.rows = states[max(i for i in range(3, 8) if i == 3 or ends[i] <= cut)]
        with seqvault.Vault.open(tmp_path / "cut") as reader:
            assert reader.damages == [] and operations.holds(reader, survived)
        with seqvault.Vault.open(tmp_path / "cut", write=True, files=files) as writer:
            users, columns = draw(rng, 3, users=3)
            writer.append_many(users, columns)
        if cut % 10 == 0:
            expected = Oracle()
            expected.rows = {key: list(rows) for key, rows in survived.rows.items()}
            expected.append(users, columns)
            with seqvault.Vault.open(tmp_path / "cut") as reader:
                assert reader.damages == [] and operations.holds(reader, expected)
        shutil.rmtree(tmp_path / "cut")


@pytest.mark.parametrize("stride", [41, pytest.param(3, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_named_and_the_rest_stays_readable(tmp_path, stride):
    rng = np.random.default_rng(0)
    vault = seqvault.Vault.create(tmp_path / "v", SCHEMA, block_rows=8)
    oracle = Oracle()
    for step in range(4):
        users, columns = draw(rng, 14, users=3)
        vault.append_many(users, columns)
        oracle.append(users, columns)
        if step == 0:
            vault.merge()
        if step == 1:
            vault.checkpoint()
        if step == 2:
            vault.merge()
    vault.close()
    checked = 0
    for file in sorted((tmp_path / "v").iterdir()):
        whole = file.read_bytes()
        for bit in range(int(rng.integers(stride)), 8 * len(whole), stride):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            with seqvault.Vault.open(tmp_path / "v") as opened:
                found = {d.file for d in opened.verify()}
                assert file.name in found, (file.name, bit, found)
                lost = file.name.startswith(("log", "carry"))
                if lost or file.name.startswith("index"):  # met by opening alone
                    assert file.name in {d.file for d in opened.damages}
                for user in range(3):
                    length, whole_length = opened.lengths([user])[0], len(oracle.history(user))
                    assert length <= whole_length if lost else length == whole_length
                    try:
                        items = opened.last_n([user], 50)
                    except seqvault.DamagedError as error:
                        assert error.users == (user,) and file.name.startswith("blocks")
                        continue
                    rows = list(zip(*(items[n][0].tolist() for n in oracle.names), strict=True))
                    rows = rows[50 - items["mask"].sum() :]
                    wanted = oracle.history(user)
                    if lost:  # the rows of one record are missing, and none is made up
                        assert set(rows) <= set(wanted)
                    else:
                        assert rows == wanted, (file.name, bit)
            checked += 1
        file.write_bytes(whole)
    assert checked > 300
    with seqvault.Vault.open(tmp_path / "v") as opened:
        assert opened.verify() == []


def test_a_damaged_record_is_skipped_kept_and_written_behind(tmp_path):
    rng = np.random.default_rng(0)
    vault = seqvault.Vault.create(tmp_path / "v", SCHEMA)
    oracle, ends = Oracle(), [0]
    for step in range(4):
        users, columns = draw(rng, 5, users=3)
        vault.append_many(users, columns)
        ends.append(vault.stats()["log_bytes"])
        if step != 2:
            oracle.append(users, columns)
    vault.close()
    log = tmp_path / "v" / "log-000000.log"
    data = bytearray(log.read_bytes())
    data[ends[2] + 2] ^= 1  # the third record's magic
    log.write_bytes(data)
    with seqvault.Vault.open(tmp_path / "v", write=True) as vault:
        assert [(d.file, d.offset) for d in vault.damages] == [(log.name, ends[2])]
        users, columns = draw(rng, 5, users=3)
        vault.append_many(users, columns)
        oracle.append(users, columns)
        vault.merge()
        oracle.check_scan(vault)
        vault.checkpoint()
    assert (tmp_path / "v" / (log.name + ".damaged")).exists()
    with seqvault.Vault.open(tmp_path / "v", write=True) as vault:
        oracle.check_scan(vault)


@pytest.mark.parametrize("seed", range(12))
def test_power_loss(tmp_path, seed):
    """What was acknowledged with sync=True, and all before it, is there; and only whole appends."""
    rng = np.random.default_rng(seed)
    files = LossyFiles()
    vault = seqvault.Vault.create(tmp_path / "v", SCHEMA, files=files, **OPTIONS)
    synced, count = 0, 0
    for number in range(40):
        kind, arguments = operations.operation(seed, number)
        operations.run(vault, seed, number)
        count = number + 1
        if kind == "checkpoint" or (kind == "append" and arguments[2]):
            synced = count
        if rng.random() < 0.3:
            for i, chance in enumerate((None, rng)):
                left = tmp_path / f"left-{number}-{i}"
                files.lose_power(tmp_path / "v", left, chance)
                with seqvault.Vault.open(left, write=True, files=UnsyncedFiles()) as after:
                    assert any(
                        operations.holds(after, operations.oracle_after(seed, k))
                        for k in range(count, synced - 1, -1)
                    ), (number, synced)
                    operations.run(after, seed, 0)
                    after.merge()
                    assert after.verify() == []
                shutil.rmtree(left)
    vault.close()


@pytest.mark.parametrize("room", range(1200, 9000, 700))
def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path, room):
    files = FullDisk(10**9)
    vault = seqvault.Vault.create(tmp_path / "v", SCHEMA, files=files, **OPTIONS)
    files.room = room
    oracle = Oracle()
    failures = 0
    for number in range(60):
        kind, arguments = operations.operation(7, number)
        try:
            operations.run(vault, 7, number)
        except seqvault.VaultError as error:
            failures += 1
            assert "No space left" in str(error) or "close and open it again" in str(error)
            continue
        if kind == "append":
            oracle.append(*arguments[:2])
        oracle.check_scan(vault)
    assert failures
    vault.close()
    files.room = 10**9
    with seqvault.Vault.open(tmp_path / "v", write=True, files=files) as vault:
        oracle.check_scan(vault)
        assert vault.damages == []
        users, columns = draw(np.random.default_rng(0), 5)
        vault.append_many(users, columns)
        oracle.append(users, columns)
        vault.merge()
        oracle.check_scan(vault)
        assert vault.verify() == []


def test_a_vault_goes_on_once_there_is_room_again(tmp_path):
    files = FullDisk(10**9)
    with seqvault.Vault.create(tmp_path / "v", SCHEMA, files=files) as vault:
        users, columns = draw(np.random.default_rng(0), 5)
        files.room = 20
        with pytest.raises(seqvault.VaultError, match="No space left.*nothing appended"):
            vault.append_many(users, columns)
        files.room = 10**9
        vault.append_many(users, columns)
        assert vault.lengths(np.unique(users)).sum() == 5


def test_after_a_failed_fsync_nothing_is_acknowledged_until_a_reopen(tmp_path):
    files = FailingSync()
    vault = seqvault.Vault.create(tmp_path / "v", SCHEMA, files=files)
    users, columns = draw(np.random.default_rng(0), 5)
    vault.append_many(users, columns, sync=True)
    files.fail = True
    with pytest.raises(seqvault.VaultError, match="not durable"):
        vault.append_many(users, columns, sync=True)
    files.fail = False
    with pytest.raises(seqvault.VaultError, match="close and open it again"):
        vault.append_many(users, columns, sync=True)
    vault.close()
    with seqvault.Vault.open(tmp_path / "v", write=True) as vault:
        vault.append_many(users, columns, sync=True)


@pytest.mark.parametrize("segment_bytes", [200, 10**9])
@pytest.mark.parametrize("fails", ["fsync", "log"])
def test_a_failed_merge_leaves_no_bytes_behind(tmp_path, fails, segment_bytes):
    """Its parts hold rows that are still fresh: who walked over them would count these twice."""
    rng = np.random.default_rng(0)
    files = FailingSync() if fails == "fsync" else FullDisk(10**9, "log")
    vault = seqvault.Vault.create(
        tmp_path / "v", SCHEMA, files=files, block_rows=4, segment_bytes=segment_bytes
    )
    oracle = Oracle()

    def append(users=5):
        users, columns = draw(rng, 30, users=users)
        vault.append_many(users, columns)
        oracle.append(users, columns)

    append()
    vault.merge()
    append()
    files.fail, files.room = True, 0
    with pytest.raises(seqvault.VaultError, match="nothing was merged|No space left"):
        vault.merge()
    files.fail, files.room = False, 10**9
    oracle.check_scan(vault)
    append(users=1)
    vault.merge(min_rows=30)  # writes behind where the failed one wrote; all others stay fresh
    assert vault.stats()["streams"]["default"]["fresh_behaviours"] > 10
    oracle.check_scan(vault)
    assert vault.verify() == []
    vault.checkpoint()
    vault.close()
    (index,) = (tmp_path / "v").glob("index-*.sv")
    index.write_bytes(b"")  # what follows walks over every byte of the segments
    with seqvault.Vault.open(tmp_path / "v") as rebuilt:
        assert [d.file for d in rebuilt.damages] == [index.name]
        oracle.check_scan(rebuilt)


def test_a_hostile_vault_gets_no_memory_and_runs_nothing(tmp_path):
    """Files that name other files, or claim more than they hold, are refused."""
    import json
    import zlib

    from seqvault import log
    from seqvault.manifest import COPY, MANIFEST

    seqvault.Vault.create(tmp_path / "v", SCHEMA).close()
    fields = json.loads((tmp_path / "v" / MANIFEST).read_bytes().partition(b"\n")[2])

    def rewrite(**changes):
        body = json.dumps({**fields, **changes}).encode()
        for name in (MANIFEST, COPY):
            (tmp_path / "v" / name).write_bytes(b"%08x\n" % zlib.crc32(body) + body)

    for changes in (
        {"log": "../../etc/passwd"},
        {"log": "/etc/passwd"},
        {"index": {"file": "../x", "bytes": 0, "crc32": 0}},
        {"schemas": [{"version": 1, "columns": [["a", "O"]], "event_id": None, "defaults": {}}]},
        {"schemas": []},
        {"segments": {"x": 1}},
        {"segments": {str(1 << 23): 8}},
        {"segments": {"1": -8}},
        {"streams": None},
    ):
        rewrite(**changes)
        with pytest.raises(seqvault.VaultError):
            seqvault.Vault.open(tmp_path / "v")
    rewrite()
    import struct

    import zstandard

    bomb = zstandard.compress(bytes(1 << 28), 1)
    head = struct.pack("<4sBBHIII", b"SQLG", 1, 1, 0, len(bomb), 1 << 28, zlib.crc32(bomb))
    record = head + struct.pack("<I", zlib.crc32(head)) + bomb
    (tmp_path / "v" / "log-000000.log").write_bytes(record)
    records, damages, end = log.read(record, "x")
    assert records == [] and len(damages) == 1 and end == len(record)
    with seqvault.Vault.open(tmp_path / "v") as vault:
        assert len(vault.damages) == 1
