"""Times, names, types and byte orders at the edge of what a vault takes."""

import numpy as np
import pytest

import seqvault
from tests.seqvault.failing_files import UnsyncedFiles

FILES = UnsyncedFiles()


def test_before_may_be_any_time_between_two(tmp_path):
    vault = seqvault.Vault.create(tmp_path / "v", seqvault.Schema({}), files=FILES)
    vault.append(1, {"time": [100, 101]})
    for before, seen in ((100, 0), (100.5, 1), (101.0, 1), (-np.inf, 0), (np.inf, 2)):
        assert vault.last_n([1], 2, before=before)["mask"].sum() == seen
        assert vault.resolve([1], [before]).tolist() == [seen]
    vault.close()


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
