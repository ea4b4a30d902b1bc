"""Merges whose log record is damaged: what they wrote is neither lost nor removed."""

import json
import struct
import zlib

import numpy as np
import pytest

import seqvault
from seqvault import log
from seqvault.index import offset_of, segment_of
from seqvault.manifest import COPY, MANIFEST
from tests.seqvault.failing_files import UnsyncedFiles
from tests.seqvault.oracle import SCHEMA, Oracle
from tests.seqvault.test_housekeeping import ITEM, flip
from tests.seqvault.test_vault import rows

FILES = UnsyncedFiles()
USERS = np.arange(6)


def grow(vault, oracle, count, first):
    """Appends rows first .. first + count - 1 of every user."""
    users = np.repeat(USERS, count)
    times = np.tile(np.arange(first, first + count), len(USERS))
    columns = rows(times, times * 7919 % 100_003)
    vault.append_many(users, columns)
    oracle.append(users, columns)


def merges(path):
    """The MERGE records of the vault's log."""
    file = path / "log-000000.log"
    return [r for r in log.read(file.read_bytes(), file.name)[0] if r.kind == log.MERGE]


def files_of(path):
    """{segment's file: its bytes}."""
    return {file.name: file.read_bytes() for file in path.glob("blocks-*")}


@pytest.fixture
def merged(tmp_path):
    """(a vault of three merges, each behind parts of those before; what it holds)."""
    oracle, path = Oracle(), tmp_path / "v"
    options = {"block_rows": 4, "segment_bytes": 700, "files": FILES}
    with seqvault.Vault.create(path, SCHEMA, **options) as vault:
        grow(vault, oracle, 60, 0)
        vault.merge()
        grow(vault, oracle, 3, 60)
        vault.merge()
        vault.append(0, rows([63], [7]))
        oracle.append([0], rows([63], [7]))
        vault.merge()
    first, second, third = [set(log.parse_merge(r.payload)[2]) for r in merges(path)]
    assert len(first) > 3 and len(first - second) > 2  # segments that the first alone names
    assert third <= second  # and a merge that made one longer
    return path, oracle


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_damaged_merge_costs_no_behaviour_and_no_segment(merged, which):
    path, oracle = merged
    before = files_of(path)
    flip(path / "log-000000.log", merges(path)[which].end - 1)
    with seqvault.Vault.open(path) as reader:
        assert [d.file for d in reader.damages] == ["log-000000.log"]
        oracle.check_scan(reader)
    with seqvault.Vault.open(path, write=True, files=FILES) as vault:
        oracle.check_scan(vault)
        with pytest.raises(seqvault.VaultError, match="log-000000.log: damaged"):
            vault.reclaim(dead=0.1)
        grow(vault, oracle, 1, 63)
        vault.merge()
        oracle.check_scan(vault)
        assert before.items() < files_of(path).items()
        vault.checkpoint()
        assert before.items() < files_of(path).items()
    with seqvault.Vault.open(path, write=True, files=FILES) as vault:
        assert vault.damages == [] and vault.verify() == []
        assert before.items() < files_of(path).items()
        oracle.check_scan(vault)
        vault.reclaim(dead=0.1)  # given up with the log: what is dead now is dead
        assert not before.keys() <= files_of(path).keys()
        oracle.check_scan(vault)
    with seqvault.Vault.open(path) as reader:
        oracle.check_scan(reader)


def as_version_2(path):
    """Makes the vault one of the older format: a record for each segment that a merge touched."""
    file = path / "log-000000.log"
    records, _, _ = log.read(file.read_bytes(), file.name)
    out, offsets = b"", []
    for record in records:
        if record.kind == log.MERGE:
            stream, entries, sizes = log.parse_merge(record.payload)
            pairs = sorted(sizes.items())
            for pair in pairs:
                mine = entries if pair == pairs[-1] else entries[:0]
                head = struct.pack("<HHIQQ", stream, 0, len(mine), *pair)
                offsets.append(len(out))
                out += log.frame(log.MERGE, head + mine.tobytes())
        else:
            out += log.frame(record.kind, record.payload)
    file.write_bytes(out)
    version(path, 2)
    return offsets


def version(path, number=None):
    """The format version in the manifest; `number` replaces it."""
    fields = json.loads((path / MANIFEST).read_bytes().partition(b"\n")[2])
    if number:
        body = json.dumps({**fields, "format_version": number}).encode()
        for name in (MANIFEST, COPY):
            (path / name).write_bytes(b"%08x\n" % zlib.crc32(body) + body)
    return fields["format_version"]


def test_a_vault_of_the_older_format_is_read_and_becomes_a_newer_one_when_written(merged):
    path, oracle = merged
    as_version_2(path)
    follower = seqvault.Vault.open(path)
    oracle.check_scan(follower)
    assert version(path) == 2 and follower.verify() == []
    with seqvault.Vault.open(path, write=True, files=FILES) as vault:
        assert version(path) == 3  # before anything that an older library would misread
        grow(vault, oracle, 20, 63)
        vault.merge()
        for who in (vault, follower):
            oracle.check_scan(who)
        vault.checkpoint()
    assert version(path) == 3 and follower.verify() == []
    follower.close()
    version(path, 4)
    with pytest.raises(seqvault.VaultError, match="format version 4; this library reads 2 and 3"):
        seqvault.Vault.open(path)


def test_a_lost_size_of_a_segment_is_made_good_by_the_entries_in_it(tmp_path):
    """In the older format a bit could cost a segment's size alone: what lies behind looks dead."""
    oracle, path = Oracle(), tmp_path / "v"
    with seqvault.Vault.create(path, SCHEMA, segment_bytes=4000, files=FILES) as vault:
        grow(vault, oracle, 1, 0)
        vault.merge()
        named = dict(vault._state.committed)
        for first in range(0, 300, 50):
            grow(vault, oracle, 50, first)
        vault.merge()
    offsets = as_version_2(path)
    before = files_of(path)
    assert len(offsets) == 1 + len(before) > 2
    for offset in offsets[1:-1]:
        flip(path / "log-000000.log", offset + 30)
        with seqvault.Vault.open(path, write=True, files=FILES) as vault:
            assert len(vault.damages) == 1 and vault._state.committed[1] > named[1]
            entries = vault._state.streams[0].index.entries
            for place, size in entries[["place", "bytes"]].tolist():
                assert offset_of(place) + size <= vault._state.committed[segment_of(place)]
            oracle.check_scan(vault)
        assert files_of(path) == before
        flip(path / "log-000000.log", offset + 30)


def test_a_reader_that_skipped_a_record_takes_it_from_the_next_checkpoint(tmp_path):
    """The writer had it in memory before it was damaged."""
    path = tmp_path / "v"
    with seqvault.Vault.create(path, ITEM, files=FILES) as vault:
        vault.append(1, {"time": 1, "item": 1})
        flip(path / "log-000000.log", 30)
        with seqvault.Vault.open(path) as reader:
            assert reader.lengths([1]).tolist() == [0]
            vault.checkpoint()
            assert reader.lengths([1]).tolist() == [1] and reader.damages == []
