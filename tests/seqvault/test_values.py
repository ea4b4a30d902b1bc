"""Times, names, types and byte orders at the edge of what a vault takes."""

import os
from pathlib import Path

import numpy as np
import pytest

import seqvault
from seqvault.backend_vault import BackendVault
from seqvault.backends import DirectoryBackend
from seqvault.manifest import read_manifest, write_manifest
from seqvault.shards import Shards
from tests.seqvault.failing_files import UnsyncedFiles

FILES = UnsyncedFiles()


def test_before_may_be_any_time_between_two(tmp_path):
    vault = seqvault.Vault.create(tmp_path / "v", seqvault.Schema({}), files=FILES)
    vault.append(1, {"time": [100, 101]})
    for before, seen in ((100, 0), (100.5, 1), (101.0, 1), (-np.inf, 0), (np.inf, 2)):
        assert vault.last_n([1], 2, before=before)["mask"].sum() == seen
        assert vault.resolve([1], [before]).tolist() == [seen]
    vault.close()


def test_a_time_beyond_all_is_later_than_all(tmp_path):
    with seqvault.Vault.create(tmp_path / "v", seqvault.Schema({}), files=FILES) as vault:
        vault.append(1, {"time": [100, 101]})
        seqvault.bulk_build(tmp_path / "s", seqvault.Schema({}), 2, [{"user": [1], "time": [7]}])
        snapshot = seqvault.Snapshot(tmp_path / "s")
        for before in (np.uint64(2**64 - 1), np.uint64(2**63), np.uint8(255), 2**63 - 1):
            assert vault.last_n([1], 2, before=[before])["mask"].sum() == 2
            assert vault.resolve([1], before).tolist() == [2]
            assert snapshot.resolve([1], before).tolist() == [1]


@pytest.mark.parametrize("store", ["vault", "shards", "snapshot", "backend"])
def test_times_and_positions_are_one_for_each_user_or_one_for_all(tmp_path, store):
    schema, users = seqvault.Schema({}), [1, 2, 3]
    opened = {
        "vault": lambda: seqvault.Vault.create(tmp_path / "v", schema, files=FILES),
        "shards": lambda: Shards(
            [seqvault.Vault.create(tmp_path / str(i), schema, files=FILES) for i in range(3)]
        ),
        "snapshot": lambda: seqvault.Snapshot(tmp_path / "s"),
        "backend": lambda: BackendVault(DirectoryBackend(tmp_path / "b"), schema, "shop"),
    }
    seqvault.bulk_build(tmp_path / "s", schema, 4, [{"user": users, "time": users}])
    vault = opened[store]()
    if store != "snapshot":
        vault.append_many(users, {"time": users})
    for one in (3, [3], np.array([[3]])):
        assert vault.last_n(users, 1, before=one)["mask"].ravel().tolist() == [True, True, False]
        assert vault.resolve(users, one).tolist() == [1, 1, 0]
        assert vault.last_n([], 1, before=one)["mask"].shape == (0, 1)
    assert vault.last_n(users, 1, end=[1])["mask"].all()
    for many in ([3, 3], [3] * 4, [[3, 3, 3]]):
        with pytest.raises(seqvault.VaultError, match="`before` has shape"):
            vault.last_n(users, 1, before=many)
        with pytest.raises(seqvault.VaultError, match="` has shape"):
            vault.resolve(users, many)
        with pytest.raises(seqvault.VaultError, match="`end` has shape"):
            vault.last_n(users, 1, end=[[0] * len(many)] * 2)


@pytest.mark.parametrize("name", ["block_rows", "segment_bytes"])
@pytest.mark.parametrize("value", [0, -5, 2.5, 1 << 41, None, "8"])
def test_impossible_sizes_are_refused_when_a_vault_is_made_and_when_it_is_opened(
    tmp_path, name, value
):
    schema = seqvault.Schema({})
    with pytest.raises(seqvault.VaultError, match=f"{name} is"):
        seqvault.Vault.create(tmp_path / "v", schema, files=FILES, **{name: value})
    assert not (tmp_path / "v").exists()
    seqvault.Vault.create(tmp_path / "v", schema, files=FILES).close()
    fields, _ = read_manifest(tmp_path / "v")
    write_manifest(FILES, tmp_path / "v", {**fields, name: value})
    for write in (False, True):
        with pytest.raises(seqvault.VaultError, match=f"{name} is"):
            seqvault.Vault.open(tmp_path / "v", write=write)


def test_an_append_names_the_row_that_does_not_fit(tmp_path):
    schema = seqvault.Schema({"a": np.int32})
    with seqvault.Vault.create(tmp_path / "v", schema, files=FILES) as vault:
        with pytest.raises(seqvault.VaultError, match=r"row 1, user 8: column 'a' has value") as e:
            vault.append_many([7, 8, 9], {"time": [1, 2, 3], "a": [1, 2**40, 2**41]})
        assert e.value.row == 1 and vault.users().size == 0
        with pytest.raises(seqvault.VaultError, match="vector of integers"):
            vault.append_many(1, {"time": [1], "a": [1]})


def made_durable(monkeypatch, run):
    """The directories that run() fsyncs."""
    seen, fsync = set(), os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (seen.add(os.path.realpath(f"/proc/self/fd/{fd}")), fsync(fd))
    )
    run()
    monkeypatch.undo()
    return {Path(path) for path in seen if os.path.isdir(path)}


def test_every_directory_that_is_made_survives_a_power_loss(tmp_path, monkeypatch):
    schema, top = seqvault.Schema({}), tmp_path.resolve()
    for name, make in (
        ("a", lambda path: seqvault.Vault.create(path, schema).close()),
        ("b", lambda path: seqvault.bulk_build(path, schema, 0, [])),
        ("c", lambda path: DirectoryBackend(path)),
    ):
        durable = made_durable(monkeypatch, lambda: make(top / name / "above" / "it"))  # noqa: B023
        assert {top, top / name, top / name / "above"} <= durable, name


def test_a_string_is_no_list_of_streams(tmp_path):
    with pytest.raises(seqvault.VaultError, match="not 'ads'"):
        seqvault.Vault.create(tmp_path / "v", seqvault.Schema({}), "ads")


@pytest.mark.parametrize("dtype", [">i4", ">f4"])
def test_a_dtype_of_the_other_byte_order_is_that_of_the_machine(tmp_path, dtype):
    schema = seqvault.Schema({"a": dtype})
    seqvault.bulk_build(tmp_path / "s", schema, 1, [{"user": [0], "time": [1], "a": [7]}])
    assert seqvault.Snapshot(tmp_path / "s").last_n([0], 1)["a"].item() == 7
    with seqvault.Vault.create(tmp_path / "v", schema, files=FILES) as vault:
        vault.append(1, {"time": 1, "a": 7})
        for _ in range(2):
            assert vault.last_n([1], 1)["a"].item() == 7
            vault.merge()


@pytest.mark.parametrize("again", [np.float32, np.int8])
def test_a_dropped_column_comes_back_as_what_can_read_it(tmp_path, again):
    """Records of the first schema still have the column."""
    kept = {"k": np.int8}
    with seqvault.Vault.create(
        tmp_path / "v", seqvault.Schema({"a": np.int32, **kept}), files=FILES
    ) as vault:
        vault.append(1, {"time": 1, "a": 7, "k": 0})
        vault.merge()
        vault.evolve(seqvault.Schema(kept, 2))
        for change in (vault.evolve, vault.checkpoint):
            with pytest.raises(seqvault.VaultError, match="'a' cannot go from int32"):
                change(seqvault.Schema({**kept, "a": again}, 3))
        vault.evolve(seqvault.Schema({**kept, "a": np.int64}, 3))
        assert vault.last_n([1], 1)["a"].item() == 7
