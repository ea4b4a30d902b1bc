"""Bulk build: what is refused, what survives a kill, and what open makes of damaged files."""

import fcntl
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import seqvault

SCHEMA = seqvault.Schema({"item": np.int32})


def block(user, times, item):
    return {"user": np.array(user), "time": np.array(times), "item": np.array(item)}


GOOD = block([0, 0, 2], [5, 6, 1], [7, 8, 9])


@pytest.fixture
def snapshot(tmp_path):
    seqvault.bulk_build(tmp_path / "v", SCHEMA, 3, [GOOD])
    return tmp_path / "v"


@pytest.mark.parametrize(
    "blocks, message",
    [
        ([block([0, 1], [1, 1], [1, -4])], r"user 1, position 0 \(input row 1\): .*'item'.* -4,"),
        ([GOOD, block([2], [1], [2**31])], r"user 2, position 1 \(input row 3\): .* 2147483648,"),
        ([block([0, 0], [3, -1], [1, 1])], r"user 0, position 1 .*'time' has value -1,"),
        ([block([0], [2**31], [1])], r"user 0, position 0 .*'time' has value 2147483648,"),
        ([block([0, 0], [3, 2], [1, 1])], r"user 0, position 1 .*time 2 comes after 3"),
        ([GOOD, block([2], [0], [1])], r"user 2, position 1 .*time 0 comes after 1"),
        (
            [block([1, 0], [1, 1], [1, 1])],
            r"user 0, position 0 .*sorted, but user 0 comes after .* 1",
        ),
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
        seqvault.bulk_build(tmp_path / "v", SCHEMA, 3, blocks)
    assert not list(tmp_path.iterdir())


def test_floats_must_be_finite(tmp_path):
    schema = seqvault.Schema({"weight": np.float32})
    rows = {"user": np.array([0]), "time": np.array([1]), "weight": np.array([np.nan])}
    with pytest.raises(seqvault.VaultError, match="user 0, position 0 .*nan, which is not finite"):
        seqvault.bulk_build(tmp_path / "v", schema, 1, [rows])


@pytest.mark.parametrize("columns", [{"time": int}, {"a/b": int}, {"item": "U3"}, {"": int}])
def test_impossible_schemas_are_refused(columns):
    with pytest.raises(seqvault.VaultError):
        seqvault.Schema(columns)


@pytest.mark.parametrize(
    "largest, width", [(0, 1), (255, 1), (256, 2), (65_535, 2), (65_536, 4), (2**32, 8)]
)
def test_integers_take_the_narrowest_type(tmp_path, largest, width):
    """The widest value comes last, so every earlier block is widened."""
    values = [v for v in (0, 1, 255, 256, 65_535, 65_536) if v < largest] + [largest]
    schema = seqvault.Schema({"item": np.int64})
    blocks = [block([0], [i], [value]) for i, value in enumerate(values)]
    seqvault.bulk_build(tmp_path / "v", schema, 1, blocks)
    assert (tmp_path / "v" / "item.bin").stat().st_size == width * len(values)
    found = seqvault.open(tmp_path / "v").last_n(np.array([0]), len(values))
    assert found["item"].tolist() == [values]


def test_flipped_bytes_are_found(snapshot):
    seqvault.open(snapshot).verify()
    for file in sorted(snapshot.glob("*.bin")):
        whole = file.read_bytes()
        for i in range(len(whole)):
            file.write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :])
            with pytest.raises(seqvault.VaultError, match=f"{file.stem}.*damaged"):
                seqvault.open(snapshot).verify()
        file.write_bytes(whole)
    manifest = snapshot / "manifest.json"
    whole = manifest.read_bytes()
    for i in range(0, len(whole), 5):
        manifest.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        try:  # white space may change; anything that is said may not
            assert seqvault.open(snapshot).verify() is None and whole[i] in b" \n\t"
        except seqvault.VaultError as error:
            assert "manifest.json" in str(error)


def test_files_of_the_wrong_size_are_named(snapshot):
    for file in sorted(snapshot.iterdir()):
        whole = file.read_bytes()
        for content in (whole[:-1], whole[: len(whole) // 2], b""):
            file.write_bytes(content)
            with pytest.raises(seqvault.VaultError, match=file.name):
                seqvault.open(snapshot)
        file.unlink()
        with pytest.raises(seqvault.VaultError, match=file.name):
            seqvault.open(snapshot)
        file.write_bytes(whole)
    seqvault.open(snapshot).verify()


def test_a_snapshot_is_never_changed(snapshot):
    with pytest.raises(FileExistsError, match="never changed"):
        seqvault.bulk_build(snapshot, SCHEMA, 3, [])
    assert seqvault.open(snapshot).num_behaviours == 3


def test_two_builds_of_one_path(tmp_path):
    (tmp_path / "v.building").mkdir()
    other = os.open(tmp_path / "v.building", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(seqvault.VaultError, match="another process is building"):
        seqvault.bulk_build(tmp_path / "v", SCHEMA, 3, [GOOD])
    os.close(other)
    seqvault.bulk_build(tmp_path / "v", SCHEMA, 3, [GOOD])


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
            seqvault.open(path)
    (left / "more.wide").write_bytes(b"left over")
    seqvault.bulk_build(tmp_path / "v", SCHEMA, 3, [GOOD])
    assert not left.exists()
    names = {"manifest.json", "offsets.bin", "time.bin", "item.bin"}
    assert {f.name for f in (tmp_path / "v").iterdir()} == names


def test_a_complete_but_unnamed_build_is_not_accepted(snapshot):
    """Killed between the manifest and the rename."""
    left = snapshot.rename(snapshot.with_name("v.building"))
    with pytest.raises(seqvault.VaultError, match="unfinished build"):
        seqvault.open(left)
    seqvault.bulk_build(snapshot, SCHEMA, 3, [GOOD])
    assert seqvault.open(snapshot).num_behaviours == 3


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
