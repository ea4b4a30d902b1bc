"""The writer when something is wrong: long logs, lost files, damaged parts, failed checkpoints."""

import errno
import os
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest

import seqvault
from seqvault.files import KILL
from seqvault.index import offset_of, segment_of
from seqvault.manifest import COPY, MANIFEST
from seqvault.reclaiming import _chains
from seqvault.segments import segment_path
from tests.seqvault.failing_files import LossyFiles, UnsyncedFile, UnsyncedFiles
from tests.seqvault.oracle import SCHEMA, Oracle, draw

ITEM = seqvault.Schema({"item": np.int32})
FILES = UnsyncedFiles()


def append(vault, user, count, first=0, **options):
    times = np.arange(first, first + count)
    return vault.append(user, {"time": times, "item": times * 7919 % 100_003}, **options)


def items_of(vault, user):
    found = vault.last_n([user], 1000)
    return found["item"][found["mask"]].tolist()


def test_a_log_longer_than_one_read_brings_is_replayed_whole(tmp_path, monkeypatch):
    rng, oracle = np.random.default_rng(0), Oracle()
    vault = seqvault.Vault.create(tmp_path / "v", SCHEMA, files=FILES)
    for rows in (3, 40, 1, 150, 2, 30, 30):
        users, columns = draw(rng, rows)
        vault.append_many(users, columns)
        oracle.append(users, columns)
    vault.close()
    log = tmp_path / "v" / "log-000000.log"
    size = log.stat().st_size
    with open(log, "ab") as file:  # torn
        file.write(b"SQLG")
    pread = os.pread
    monkeypatch.setattr("seqvault.state._WINDOW", 300)
    monkeypatch.setattr(os, "pread", lambda fd, n, at: pread(fd, min(n, 1000), at))
    with seqvault.Vault.open(tmp_path / "v", write=True, files=FILES) as vault:
        oracle.check_scan(vault)
        assert vault.damages == [] and log.stat().st_size == size


def test_a_log_read_in_pieces_has_the_same_records_and_damages(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    with seqvault.Vault.create(tmp_path / "v", SCHEMA, files=FILES) as vault:
        for rows in (5, 40, 1, 8, 30, 2):
            vault.append_many(*draw(rng, rows))
    log = tmp_path / "v" / "log-000000.log"
    whole = log.read_bytes()
    zeros = whole[:500] + bytes(700) + whole[500:] + bytes(900)
    for data in (whole, whole[:-5], zeros, whole[:60] + whole[80:], whole[:1100] + whole[1300:]):
        log.write_bytes(data)
        found = []
        for window in (1 << 20, 64, 500):
            monkeypatch.setattr("seqvault.state._WINDOW", window)
            with seqvault.Vault.open(tmp_path / "v") as reader:
                columns = [c.tolist() for block in reader.scan() for c in block.values()]
                found.append((reader.damages, reader._state.log_end, columns))
        assert found[0] == found[1] == found[2]


def test_a_log_that_cannot_be_read_to_its_end_is_not_cut(tmp_path, monkeypatch):
    with seqvault.Vault.create(tmp_path / "v", ITEM, files=FILES) as vault:
        append(vault, 1, 300)
        append(vault, 1, 300, first=300)
    before = (tmp_path / "v" / "log-000000.log").read_bytes()
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: pread(fd, n, at) if at < 900 else b"")
    monkeypatch.setattr("seqvault.state._WINDOW", 900)
    with pytest.raises(seqvault.VaultError, match="bytes could be read"):
        seqvault.Vault.open(tmp_path / "v", write=True, files=FILES)
    monkeypatch.undo()
    assert (tmp_path / "v" / "log-000000.log").read_bytes() == before
    with seqvault.Vault.open(tmp_path / "v", write=True, files=FILES) as vault:
        assert vault.lengths([1]).tolist() == [600]


@pytest.mark.parametrize("lost", ["index", "carry", "nothing, but a stray file"])
def test_a_checkpoint_goes_on_without_what_was_lost(tmp_path, lost):
    path = tmp_path / "v"
    with seqvault.Vault.create(path, ITEM, files=FILES) as vault:
        append(vault, 1, 3)
        vault.merge()
        vault.checkpoint()
    for file in path.glob(f"{lost}-*"):
        file.unlink()
    with seqvault.Vault.open(path, write=True, files=FILES) as vault:
        (path / "blocks-000001-copy.sv").touch()
        vault.checkpoint()
        append(vault, 1, 1, first=3)
    assert (path / "blocks-000001-copy.sv").exists()
    with seqvault.Vault.open(path) as vault:
        assert vault.damages == [] and vault.lengths([1]).tolist() == [4]


class FailingOnce(UnsyncedFiles):
    """`remove` fails once `fail` is set."""

    fail = False

    def remove(self, path):
        if self.fail:
            self.fail = False
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().remove(path)


@pytest.mark.parametrize("step", ["remove", "open"])
def test_a_writer_that_cannot_follow_its_checkpoint_acknowledges_nothing(
    tmp_path, monkeypatch, step
):
    """What it would acknowledge would go to a log that nobody reads."""
    files = FailingOnce()
    vault = seqvault.Vault.create(tmp_path / "v", ITEM, files=files)
    append(vault, 1, 3)
    vault.merge()

    def broken(path):
        raise seqvault.VaultError("no state")

    with monkeypatch.context() as patched:
        if step == "open":
            patched.setattr("seqvault.merging.State", broken)
        else:
            files.fail = True
        block = {"user": [2], "time": [5], "item": [6]}
        with pytest.raises(seqvault.VaultError, match="the checkpoint is made|no state"):
            vault.bulk_load([{n: np.array(c) for n, c in block.items()}])
    with pytest.raises(seqvault.VaultError, match="half-way; close and open it again"):
        append(vault, 1, 1, first=3)
    if step == "open":
        assert vault._log is None
    assert vault.lengths([1]).tolist() == [3]
    vault.close()
    with seqvault.Vault.open(tmp_path / "v", write=True, files=files) as vault:
        append(vault, 1, 1, first=3)
        assert vault.lengths([1, 2]).tolist() == [4, 1]


@pytest.mark.parametrize("hard", [False, True])
def test_many_segments_raise_the_limit_of_open_files_or_name_it(tmp_path, monkeypatch, hard):
    vault = seqvault.Vault.create(tmp_path / "v", ITEM, segment_bytes=100, files=FILES)
    for user in range(40):
        append(vault, user, 30)
    vault.merge()
    vault.close()
    real, limits = os.open, [20, 20 if hard else 1000]
    opened = set()

    def limited(path, *arguments):
        if str(path).endswith(".sv"):
            if len(opened) >= limits[0]:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            opened.add(path)
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", limited)
    monkeypatch.setattr(resource, "getrlimit", lambda which: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda which, new: limits.__setitem__(0, new[0]))
    if hard:
        with pytest.raises(seqvault.VaultError, match="may open 20 files"):
            seqvault.Vault.open(tmp_path / "v")
    else:
        with seqvault.Vault.open(tmp_path / "v") as reader:
            assert len(items_of(reader, 39)) == 30 and len(opened) > 20


def test_a_retry_with_sync_makes_durable_what_an_append_without_it_left(tmp_path):
    schema = seqvault.Schema({"event": np.int64}, event_id="event")
    files = LossyFiles()
    vault = seqvault.Vault.create(tmp_path / "v", schema, files=files)
    event = {"time": 1, "event": 42}
    assert vault.append(1, event) == 1
    assert vault.append(1, event, sync=True) == 0
    files.lose_power(tmp_path / "v", tmp_path / "left")
    assert seqvault.Vault.open(tmp_path / "left").lengths([1]).tolist() == [1]
    vault._log.sync = UnreliableFile.sync
    with pytest.raises(seqvault.VaultError, match="not durable"):
        vault.append(1, event, sync=True)
    with pytest.raises(seqvault.VaultError, match="close and open it again"):
        vault.append(1, event)
    vault.close()


class UnreliableFile(UnsyncedFile):
    @staticmethod
    def sync():
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def flip(file, byte):
    data = bytearray(file.read_bytes())
    data[byte] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("byte", ["magic", "user", "stream", "values"])
def test_a_reclaim_leaves_a_segment_with_a_damaged_part(tmp_path, byte):
    """A walk over its parts misses one, or takes it for somebody else's: it looks dead."""
    path = tmp_path / "v"
    with seqvault.Vault.create(path, ITEM, segment_bytes=3000, files=FILES) as vault:
        append(vault, 7, 5)
        vault.merge()
        size = (path / "blocks-000001.sv").stat().st_size
        for i in range(10):
            append(vault, 8, 200, first=200 * i)
            vault.merge()
        vault.checkpoint()
    segments = sorted(path.glob("blocks-*"))
    at = {"magic": 0, "user": size - 56, "stream": size - 14, "values": 12}[byte]
    flip(segments[0], at)
    with seqvault.Vault.open(path, write=True, files=FILES) as vault:
        before = vault.last_n([8], 2000)["item"].tolist()
        try:
            vault.reclaim(dead=0.1)
        except seqvault.DamagedError as error:
            assert error.users == (7,)
        assert segments[0].exists() and vault.verify()
        assert len(list(path.glob("blocks-*"))) < len(segments)
        assert vault.last_n([8], 2000)["item"].tolist() == before
    flip(segments[0], at)
    with seqvault.Vault.open(path) as reader:
        assert len(items_of(reader, 7)) == 5 and reader.verify() == []


@pytest.mark.parametrize("missing", [False, True])
def test_a_damaged_history_stops_nobody_elses_merge(tmp_path, monkeypatch, missing):
    path = tmp_path / "v"
    with seqvault.Vault.create(path, ITEM, segment_bytes=100, files=FILES) as vault:
        for user in range(4):
            append(vault, user, 30)
            vault.merge()
        vault.checkpoint()
    if missing:
        (path / "blocks-000001.sv").unlink()
    else:
        flip(path / "blocks-000001.sv", 12)
    with seqvault.Vault.open(path, write=True, files=FILES) as vault:
        for user in range(4):
            append(vault, user, 1, first=30)
        monkeypatch.setattr("seqvault.merging.checkpoint_is_due", lambda state: True)
        for _ in range(2):
            with pytest.raises(seqvault.DamagedError, match="user 0 is damaged") as raised:
                vault.merge()
            assert raised.value.users == (0,)
        assert vault.stats()["streams"]["default"]["fresh_behaviours"] == 1
        assert vault.stats()["generation"] == 3
        assert [len(items_of(vault, user)) for user in (1, 2, 3)] == [31] * 3
        segments = len(list(path.glob("blocks-*")))
        vault.reclaim(dead=0.5)
        assert len(list(path.glob("blocks-*"))) < segments
        assert [len(items_of(vault, user)) for user in (1, 2, 3)] == [31] * 3


@pytest.mark.parametrize("missing", [False, True])
def test_a_damaged_chain_keeps_its_segments_and_nobody_elses(tmp_path, missing):
    path = tmp_path / "v"
    options = {"block_rows": 4, "segment_bytes": 1000, "files": FILES}
    with seqvault.Vault.create(path, ITEM, **options) as vault:
        for user in (1, 0):
            for i in range(20):
                append(vault, user, 3, first=3 * i)
                vault.merge()
        vault.checkpoint()
        chain = [place for _, place, _ in _chains(vault._state, 0, np.array([0]), set())]
        before = {file.name for file in path.glob("blocks-*")}
    oldest = chain[-1]
    file = segment_path(path, segment_of(oldest))
    data = file.read_bytes()
    at = offset_of(oldest)
    at += int.from_bytes(data[at + 4 : at + 8], "little") - 2  # in the part's trailer

    file.rename(tmp_path / "away") if missing else flip(file, at)
    with seqvault.Vault.open(path, write=True, files=FILES) as vault:
        with pytest.raises(seqvault.DamagedError, match="user 0 is damaged") as raised:
            vault.reclaim(dead=0.1)
        assert raised.value.users == (0,)
        assert len(items_of(vault, 1)) == 60
    (tmp_path / "away").rename(file) if missing else flip(file, at)
    assert len(before - {file.name for file in path.glob("blocks-*")}) > 3
    with seqvault.Vault.open(path) as reader:
        assert len(items_of(reader, 0)) == len(items_of(reader, 1)) == 60
        assert reader.verify() == []


def test_a_log_that_cannot_be_cut_after_a_failed_write_takes_no_more(tmp_path, monkeypatch):
    vault = seqvault.Vault.create(tmp_path / "v", ITEM, files=FILES)
    append(vault, 1, 3)
    pwrite = os.pwrite

    def failing(fd, data, at):
        if at == 0 or len(data) < 10:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pwrite(fd, data[: len(data) - 5], at)

    def refuse(fd, size):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", failing)
        patched.setattr(os, "ftruncate", refuse)
        with pytest.raises(seqvault.VaultError, match="nothing appended"):
            append(vault, 1, 3, first=3)
    with pytest.raises(seqvault.VaultError, match="close and open it again"):
        append(vault, 1, 3, first=3)
    vault.close()
    with seqvault.Vault.open(tmp_path / "v", write=True, files=FILES) as vault:
        append(vault, 1, 1, first=3)
        assert vault.damages == [] and vault.lengths([1]).tolist() == [4]


def test_a_failed_open_lets_go_of_the_lock_and_nobody_elses_files_are_touched(tmp_path):
    path = tmp_path / "v"
    with seqvault.Vault.create(path, ITEM, files=FILES) as vault:
        append(vault, 1, 3)
        vault.merge()
    others = ["log-000000.log.bak", "blocks-000001.sv.bak", "blocks-old.sv", "notes.part", "log-7"]
    for name in others:
        (path / name).write_text("mine")
    os.rename(path / "log-000000.log", tmp_path / "log")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(seqvault.VaultError, match="log-000000.log: missing"):
        seqvault.Vault.open(path, write=True, files=FILES)
    assert len(os.listdir("/proc/self/fd")) == before
    os.rename(tmp_path / "log", path / "log-000000.log")
    (path / "log-000009.log").touch()  # what a writer that died left
    (path / "index-000009.sv.part").touch()
    with seqvault.Vault.open(path, write=True, files=FILES) as vault:
        assert len(items_of(vault, 1)) == 3
        vault.checkpoint()
    assert all((path / name).read_text() == "mine" for name in others)
    assert not (path / "log-000009.log").exists() and not (path / "index-000009.sv.part").exists()


def killed(program, point):
    command = [sys.executable, "-c", f"import sys, seqvault; {program}"]
    child = subprocess.run(command, env={**os.environ, KILL: point})
    assert child.returncode == -9


def test_a_creation_that_died_can_be_done_again(tmp_path):
    path = tmp_path / "v"
    killed(f"seqvault.Vault.create({str(path)!r}, seqvault.Schema({{}}))", "before_rename")
    assert path.exists() and not (path / MANIFEST).exists()
    with seqvault.Vault.create(path, ITEM, files=FILES) as vault:
        append(vault, 1, 3)
    for name in (MANIFEST, COPY):
        (path / name).unlink()
    with pytest.raises(FileExistsError, match="holds log-000000.log"):  # it has behaviours
        seqvault.Vault.create(path, ITEM)
    (path / "log-000000.log").write_bytes(b"")
    (path / "notes").touch()
    with pytest.raises(FileExistsError, match="holds notes"):
        seqvault.Vault.create(path, ITEM)


def test_a_writer_repairs_the_copy_of_the_manifest(tmp_path, monkeypatch):
    """A death between the two renames leaves a copy that names files soon to be removed."""
    monkeypatch.setattr("seqvault.verification._RENAMES", 0.05)
    path = tmp_path / "v"
    with seqvault.Vault.create(path, ITEM, files=FILES) as vault:
        append(vault, 1, 3)
    older = (path / MANIFEST).read_bytes()
    with seqvault.Vault.open(path, write=True, files=FILES) as vault:
        shutil.copytree(path, tmp_path / "old")
        vault.checkpoint()
    newer = (path / MANIFEST).read_bytes()
    old = tmp_path / "old"
    for file in path.glob("*-000001.*"):
        shutil.copy(file, old)
    (old / COPY).write_bytes(newer)
    with seqvault.Vault.open(old) as reader:
        assert [d.file for d in reader.verify()] == [COPY]
    with seqvault.Vault.open(old, write=True, files=FILES) as vault:
        assert vault.verify() == []
        append(vault, 1, 1, first=3)
    assert (old / COPY).read_bytes() == (old / MANIFEST).read_bytes() == older
    flip(old / MANIFEST, 30)
    with seqvault.Vault.open(old, write=True, files=FILES) as vault:
        assert [d.file for d in vault.damages] == [MANIFEST]
        assert vault.lengths([1]).tolist() == [4] and vault.verify() == []
