"""Snapshots: what is refused, what survives a kill, what reads and hashes are, against lists."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import seqvault
from tests.seqvault.oracle import NAMES, SCHEMA, Oracle, draw

ITEM = seqvault.Schema({"item": np.int32})


def block(user, times, item):
    return {"user": np.array(user), "time": np.array(times), "item": np.array(item)}


GOOD = block([0, 0, 2], [5, 6, 1], [7, 8, 9])


def write(path, rng, rows, users, cuts=()):
    """A snapshot of random behaviours, and the lists it must equal."""
    who, columns = draw(rng, rows, users=users)
    order = np.lexsort([columns["time"], who])
    whole = {"user": who[order], **{n: c[order] for n, c in columns.items()}}
    edges = [0, *sorted(cuts), rows]
    blocks = [{n: c[a:b] for n, c in whole.items()} for a, b in zip(edges, edges[1:], strict=False)]
    content = seqvault.bulk_build(path, SCHEMA, users, blocks)
    oracle = Oracle()
    oracle.append(whole["user"], whole)
    return content, oracle


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.integers(0, 700), st.integers(1, 6))
def test_reads_equal_lists_and_the_hash_does_not_depend_on_blocks(
    tmp_path_factory, seed, rows, users
):
    path = tmp_path_factory.mktemp("snapshot")
    rng = np.random.default_rng(seed)
    content, oracle = write(path / "one", rng, rows, users)
    snapshot = seqvault.Snapshot(path / "one")
    assert (snapshot.num_users, snapshot.num_behaviours) == (users, rows)
    assert snapshot.content_hash == content and snapshot.verify() == []
    oracle.check(snapshot, rng.integers(0, users, 9), rng, sizes=(0, 4, 300))
    found = [zip(*(b[n].tolist() for n in ("user", *NAMES)), strict=True) for b in snapshot.scan()]
    wanted = [(u, *row) for u in oracle.users() for row in oracle.history(u)]
    assert [row for rows in found for row in rows] == wanted
    again, cuts = np.random.default_rng(seed), rng.integers(0, rows + 1, 4)
    assert write(path / "many", again, rows, users, cuts)[0] == content


def test_content_hash_sees_every_part(tmp_path):
    def content(name, rows, users=2, schema=ITEM):
        columns = [np.array(c, np.int64) for c in zip(*rows, strict=True)]
        blocks = [dict(zip(("user", "time", "item"), columns, strict=True))]
        return seqvault.bulk_build(tmp_path / name, schema, users, blocks)

    rows = [(0, 1, 2), (1, 1, 2)]
    hashes = {
        content("a", rows),
        content("time", [(0, 1, 2), (1, 2, 2)]),
        content("item", [(0, 1, 2), (1, 1, 3)]),
        content("moved", [(1, 1, 2), (1, 1, 2)]),
        content("users", rows, 3),
        content("type", rows, 2, seqvault.Schema({"item": np.int64})),
    }
    assert len(hashes) == 6


def test_a_vaults_snapshot_has_its_users_in_order(tmp_path):
    rng = np.random.default_rng(0)
    with seqvault.Vault.create(tmp_path / "v", SCHEMA, block_rows=4) as vault:
        oracle = Oracle()
        ids = np.array([-5, 2**62, 17, 3])
        for _ in range(4):
            who, columns = draw(rng, 30, users=4)
            vault.append_many(ids[who], columns)
            oracle.append(ids[who], columns)
            vault.merge(400)
        vault.snapshot(tmp_path / "s")
    snapshot = seqvault.Snapshot(tmp_path / "s")
    assert snapshot.users.tolist() == sorted(ids.tolist())
    found = snapshot.last_n(np.arange(4), 99)
    for row, user in enumerate(snapshot.users.tolist()):
        wanted = oracle.history(user)
        for j, name in enumerate(NAMES):
            assert found[name][row, 99 - len(wanted) :].tolist() == [r[j] for r in wanted]


def test_nothing_at_or_after_the_request_is_seen(tmp_path):
    times = [5, 7, 7, 7, 9]
    seqvault.bulk_build(tmp_path / "s", ITEM, 1, [block([0] * 5, times, range(5))])
    snapshot, users = seqvault.Snapshot(tmp_path / "s"), np.zeros(5, int)
    found = snapshot.last_n(users, 5, before=np.array(times))
    assert (found["time"] < np.array(times)[:, None])[found["mask"]].all()
    assert found["mask"].sum(1).tolist() == [0, 1, 1, 1, 4]
    assert snapshot.last_n(users, 5, end=np.arange(5))["mask"].sum(1).tolist() == [0, 1, 2, 3, 4]
    assert snapshot.resolve(users[:4], np.array([-1, 0, 5, 2**31 - 1])).tolist() == [0, 0, 0, 5]
    same = snapshot.last_n(users, 5, end=snapshot.resolve(users, np.array(times)))
    assert all((found[name] == same[name]).all() for name in found)


@pytest.mark.parametrize(
    "blocks, message",
    [
        ([GOOD, block([2], [1], [2**31])], r"user 2, .*input row 3\): .*'item'.* 2147483648,"),
        ([block([0], [2**31], [1])], r"user 0, position 0 .*'time' has value 2147483648,"),
        ([block([0, 0], [3, 2], [1, 1])], r"user 0, position 1 .*time 2 comes after 3"),
        ([GOOD, block([2], [0], [1])], r"user 2, position 1 .*time 0 comes after 1"),
        ([block([1, 0], [1, 1], [1, 1])], r"user 0, .*sorted, but user 0 comes after user 1"),
        ([GOOD, block([1], [9], [1])], r"user 1, position 0 .*user 1 comes after user 2"),
        ([block([3], [1], [1])], r"user 3 is not one of the 3 users"),
        ([block([-1], [1], [1])], r"user -1 is not one of the 3 users"),
        ([{"user": np.array([0]), "time": np.array([1])}], r"has columns .*the schema wants"),
        ([block([0], [1], [1.5])], r"column 'item' is float64"),
        ([block([0], [1], [1, 2])], r"column 'item' has shape \(2,\)"),
    ],
)
def test_bad_input_is_named(tmp_path, blocks, message):
    with pytest.raises(seqvault.VaultError, match=message):
        seqvault.bulk_build(tmp_path / "v", ITEM, 3, blocks)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def snapshot(tmp_path):
    seqvault.bulk_build(tmp_path / "v", ITEM, 3, [GOOD])
    return tmp_path / "v"


def test_every_flipped_bit_is_named(snapshot):
    """By opening or by verify; and what a read gives is as written or an error."""
    wanted = seqvault.Snapshot(snapshot).last_n(np.arange(3), 4)
    for file in sorted(snapshot.iterdir()):
        whole = file.read_bytes()
        for bit in range(0, 8 * len(whole), 1 if file.suffix == ".sv" else 11):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            try:
                opened = seqvault.Snapshot(snapshot)
            except seqvault.VaultError as error:
                assert file.name in str(error)
                continue
            assert file.name in {d.file for d in opened.verify()}, (file.name, bit)
            assert opened.lengths(np.arange(3)).tolist() == [2, 0, 1]
            for user in range(3):
                try:
                    found = opened.last_n(np.array([user]), 4)
                except seqvault.DamagedError as error:
                    assert error.users == (user,)
                    continue
                assert all((found[n][0] == wanted[n][user]).all() for n in wanted)
        file.write_bytes(whole)
    assert seqvault.Snapshot(snapshot).verify() == []


def test_missing_and_cut_files_are_named(snapshot):
    for file in sorted(snapshot.glob("*.sv")):
        whole = file.read_bytes()
        for content in (whole[:-1], whole[: len(whole) // 2], b""):
            file.write_bytes(content)
            with pytest.raises(seqvault.VaultError, match=file.name):
                seqvault.Snapshot(snapshot)
        file.unlink()
        with pytest.raises(seqvault.VaultError, match=file.name):
            seqvault.Snapshot(snapshot)
        file.write_bytes(whole)
    assert seqvault.Snapshot(snapshot).verify() == []


def test_a_snapshot_is_never_changed(snapshot):
    with pytest.raises(FileExistsError, match="never changed"):
        seqvault.bulk_build(snapshot, ITEM, 3, [])
    assert seqvault.Snapshot(snapshot).num_behaviours == 3
    with pytest.raises(seqvault.VaultError, match="a snapshot, not a live vault"):
        seqvault.Vault.open(snapshot)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: s.lengths(np.array([0, 3])), "user 3 is not in the store"),
        (lambda s: s.lengths(np.array([-1])), "user -1 is not in the store"),
        (lambda s: s.last_n(np.array([0.5]), 1), "vector of integers"),
        (lambda s: s.last_n(np.array([0, 1]), 1, end=[1, 1]), "end 1 .* user 1, who has 0"),
        (lambda s: s.last_n(np.array([0]), 1, end=[0], before=[0]), "not both"),
        (lambda s: s.last_n(np.array([0]), 1, columns=["shop"]), "no column .'shop'."),
        (lambda s: s.last_n(np.array([0]), -1), "n is -1"),
    ],
)
def test_wrong_questions_are_refused(snapshot, call, message):
    with pytest.raises(seqvault.VaultError, match=message):
        call(seqvault.Snapshot(snapshot))


def test_only_the_columns_asked_for(snapshot):
    opened = seqvault.Snapshot(snapshot)
    assert set(opened.last_n(np.array([0]), 1, columns=[])) == {"time", "mask"}
    assert set(opened.last_n(np.array([0]), 1, columns=["item"])) == {"item", "time", "mask"}


def test_an_empty_snapshot(tmp_path):
    seqvault.bulk_build(tmp_path / "v", ITEM, 2, [])
    snapshot = seqvault.Snapshot(tmp_path / "v")
    assert not snapshot.last_n(np.array([0, 1, 1]), 3, before=5)["mask"].any()
    assert snapshot.verify() == [] and snapshot.num_behaviours == 0


def test_two_builds_of_one_path(tmp_path):
    (tmp_path / "v.building").mkdir()
    other = os.open(tmp_path / "v.building", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(seqvault.VaultError, match="another process is building"):
        seqvault.bulk_build(tmp_path / "v", ITEM, 3, [GOOD])
    os.close(other)
    seqvault.bulk_build(tmp_path / "v", ITEM, 3, [GOOD])


def test_a_killed_build_is_not_accepted_and_is_cleaned(tmp_path):
    program = f"""
import time, numpy as np, seqvault
def blocks():
    yield {{k: np.arange(10_000) for k in ("user", "time", "item")}}
    print("begun", flush=True)
    time.sleep(60)
schema = seqvault.Schema({{"item": np.int32}})
seqvault.bulk_build({str(tmp_path / "v")!r}, schema, 10_000, blocks())
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    left = tmp_path / "v.building"
    assert left.exists() and not (tmp_path / "v").exists()
    for path in (left, tmp_path / "v"):
        with pytest.raises(seqvault.VaultError):
            seqvault.Snapshot(path)
    (left / "more").write_bytes(b"left over")
    seqvault.bulk_build(tmp_path / "v", ITEM, 3, [GOOD])
    assert not left.exists()
    names = {"MANIFEST", "MANIFEST.copy", "index.sv", "blocks-000001.sv"}
    assert {f.name for f in (tmp_path / "v").iterdir()} == names


def test_a_complete_but_unnamed_build_is_not_accepted(snapshot):
    """Killed between the manifest and the rename."""
    left = snapshot.rename(snapshot.with_name("v.building"))
    with pytest.raises(seqvault.VaultError, match="unfinished build"):
        seqvault.Snapshot(left)
    seqvault.bulk_build(snapshot, ITEM, 3, [GOOD])
    assert seqvault.Snapshot(snapshot).num_behaviours == 3


def test_threads_read_the_same(tmp_path):
    rng = np.random.default_rng(0)
    write(tmp_path / "v", rng, 900, 30)
    snapshot = seqvault.Snapshot(tmp_path / "v")
    users, before = rng.integers(0, 30, 200), rng.integers(0, 40, 200)
    wanted = snapshot.last_n(users, 20, before=before)
    wrong = []

    def read():
        for _ in range(30):
            found = snapshot.last_n(users, 20, before=before)
            wrong.extend(name for name in found if not (found[name] == wanted[name]).all())

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.slow
def test_memory_does_not_grow_with_rows_and_the_rate_is_enough(tmp_path):
    """Hundreds of thousands of behaviours per second and core, in bounded memory."""
    program = """
import resource, sys, time, numpy as np, seqvault
rows, step, users = int(sys.argv[2]), 1 << 18, 100_000
def blocks():
    for start in range(0, rows, step):
        at = np.arange(start, min(start + step, rows))
        yield {"user": at * users // rows, "time": 1_500_000_000 + at % (rows // users),
               "item": at % 70_001}
seqvault.bulk_build(sys.argv[1], seqvault.Schema({"item": np.int32}), users, blocks())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = []
    for rows in (2_000_000, 8_000_000):
        start = time.perf_counter()
        command = [sys.executable, "-c", program, str(tmp_path / str(rows)), str(rows)]
        peaks.append(int(subprocess.check_output(command)))
        assert rows / (time.perf_counter() - start) > 300_000
    assert peaks[1] < 1.1 * peaks[0]
