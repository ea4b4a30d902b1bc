"""The live vault against lists: any order of appends, merges, checkpoints and reopenings."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import seqvault
from tests.seqvault.failing_files import UnsyncedFiles
from tests.seqvault.oracle import NAMES, SCHEMA, Oracle, draw

FILES = UnsyncedFiles()

STEPS = st.lists(
    st.sampled_from(
        ["append", "append", "one", "merge", "some", "reclaim", "checkpoint", "reopen"]
    ),
    min_size=1,
    max_size=14,
)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(STEPS, st.integers(0, 2**32), st.sampled_from([2, 5, 300]), st.booleans())
def test_any_order_of_steps_equals_lists(tmp_path_factory, steps, seed, block_rows, late):
    """The writer, a reader that follows it and a fresh reader all see what the lists hold."""
    rng = np.random.default_rng(seed)
    path = tmp_path_factory.mktemp("vault") / "v"
    options = {"block_rows": block_rows, "segment_bytes": 3000, "files": FILES}
    vault = seqvault.Vault.create(path, SCHEMA, ("default", "ads"), **options)
    follower = seqvault.Vault.open(path)
    oracle, clock = Oracle(), 0
    everyone = np.arange(-1, 9)
    for step in steps:
        stream = str(rng.choice(["default", "ads"]))
        if step in ("append", "one"):
            users, columns = draw(rng, 1 if step == "one" else int(rng.integers(0, 60)), late=late)
            if not late:
                clock += 1
                columns["time"] = columns["time"] // 40 + clock
            assert vault.append_many(users, columns, stream=stream) == len(users)
            oracle.append(users, columns, stream)
        elif step == "merge":
            vault.merge()
        elif step == "some":
            vault.merge(int(rng.integers(1, 2000)), min_rows=int(rng.integers(1, 4)))
        elif step == "reclaim":
            vault.reclaim(dead=0.1)
        elif step == "checkpoint":
            vault.checkpoint()
        else:
            vault.close()
            vault = seqvault.Vault.open(path, write=True, files=FILES)
        oracle.check(vault, everyone, rng, stream, sizes=(4,))
        oracle.check(follower, everyone, rng, stream, sizes=(4,))
    for stream in ("default", "ads"):
        with seqvault.Vault.open(path) as fresh:
            oracle.check(fresh, everyone, rng, stream)
            oracle.check_scan(fresh, stream, block_rows=50)
    assert vault.verify() == []
    vault.close()
    follower.close()


@pytest.fixture
def vault(tmp_path):
    with seqvault.Vault.create(tmp_path / "v", SCHEMA, block_rows=4) as vault:
        yield vault


def rows(times, items=None):
    count = len(times)
    items = range(count) if items is None else items
    return {
        "time": list(times),
        "item": list(items),
        "kind": [1] * count,
        "seen": [True] * count,
        "weight": [0.5] * count,
    }


def test_an_append_can_be_read_at_once_by_everybody(vault):
    reader = seqvault.Vault.open(vault.path)
    for i in range(5):
        vault.append(2**64 - 1, rows([i]))
        for who in (vault, reader):
            found = who.last_n(np.array([2**64 - 1], np.uint64), 9)
            assert found["item"][0, -1] == 0 and found["mask"].sum() == i + 1


def test_a_read_too_long_for_one_record_is_the_same(vault, monkeypatch):
    vault.append(3, rows([5, 6]))
    vault.merge()
    found = vault.last_n([3, 4], 3)
    monkeypatch.setattr("seqvault.reading._RECORD_BYTES", 0)
    longer = vault.last_n([3, 4, 3], 3)
    assert found["item"].tolist() == [[0, 0, 1], [0] * 3]
    for name, values in found.items():
        assert longer[name].tolist() == [*values.tolist(), values[0].tolist()]
        assert longer[name].dtype == values.dtype


def test_one_behaviour_as_numbers(vault):
    vault.append(3, {"time": 5, "item": 6, "kind": 7, "seen": 1, "weight": 0.5}, sync=True)
    found = vault.last_n([3], 1)
    assert [found[name].item() for name in NAMES] == [5, 6, 7, True, 0.5]


@pytest.mark.parametrize("merged", [False, True])
def test_nothing_at_or_after_the_request_is_seen(vault, merged):
    """Behaviours at the request's own second are the target's siblings: strictly earlier only."""
    times = np.array([5, 7, 7, 7, 9])
    vault.append(0, rows(times))
    if merged:
        vault.merge()
    users = np.zeros(5, int)
    found = vault.last_n(users, 5, before=times)
    assert (found["time"] < times[:, None])[found["mask"]].all()
    assert found["mask"].sum(1).tolist() == [0, 1, 1, 1, 4]
    ends = np.arange(5)  # by position: exactly those before, ties included
    assert vault.last_n(users, 5, end=ends)["mask"].sum(1).tolist() == ends.tolist()
    assert vault.resolve(users, times).tolist() == [0, 1, 1, 1, 4]
    same = vault.last_n(users, 5, end=vault.resolve(users, times))
    assert all((found[name] == same[name]).all() for name in found)


def test_late_events_take_their_place_but_never_enter_a_snapshot(vault, tmp_path):
    vault.append(1, rows([10, 20, 30], [1, 2, 3]))
    vault.merge()
    content = vault.snapshot(tmp_path / "s")
    vault.append(1, rows([20, 15], [4, 5]))
    for _ in range(2):  # from the fresh tail, then merged
        assert vault.last_n([1], 5)["item"].tolist() == [[1, 5, 2, 4, 3]]
        assert vault.last_n([1], 5, before=20)["item"].tolist() == [[0, 0, 0, 1, 5]]
        vault.merge()
    snapshot = seqvault.Snapshot(tmp_path / "s")
    assert snapshot.content_hash == content
    assert snapshot.last_n(np.array([0]), 5)["item"].tolist() == [[0, 0, 1, 2, 3]]
    assert vault.snapshot(tmp_path / "s2") != content


def test_duplicates_are_kept_without_event_ids(vault):
    assert vault.append(1, rows([1], [7])) == vault.append(1, rows([1], [7])) == 1
    assert vault.lengths([1]).tolist() == [2]


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.integers(0, 2**32))
def test_event_ids_make_appends_idempotent(tmp_path_factory, seed):
    rng = np.random.default_rng(seed)
    schema = seqvault.Schema({"event": np.int64, "item": np.int32}, event_id="event")
    path = tmp_path_factory.mktemp("vault") / "v"
    vault = seqvault.Vault.create(path, schema, ("default", "ads"), block_rows=3, files=FILES)
    oracle = Oracle(("time", "event", "item"), "event")
    for _ in range(6):
        count = int(rng.integers(0, 12))
        users = rng.integers(0, 3, count)
        stream = str(rng.choice(["default", "ads"]))
        columns = {n: rng.integers(0, 15, count) for n in ("time", "event", "item")}
        for _ in range(int(rng.integers(1, 3))):  # the same append again changes nothing
            found = vault.append_many(users, columns, stream=stream)
            assert found == oracle.append(users, columns, stream)
        if rng.random() < 0.5:
            vault.merge()
        if rng.random() < 0.3:
            vault.close()
            vault = seqvault.Vault.open(path, write=True, files=FILES)
        oracle.check(vault, np.arange(3), rng, stream, sizes=(5,))
    vault.close()


def test_a_bulk_load_refuses_an_event_id_that_comes_twice(tmp_path):
    schema = seqvault.Schema({"event": np.int64}, event_id="event")
    with seqvault.Vault.create(tmp_path / "v", schema) as vault:
        twice = {"user": [1, 1, 2, 2], "time": [1, 2, 3, 4], "event": [5, 6, 5, 5]}
        with pytest.raises(seqvault.VaultError, match="user 2 has the event id 5 twice"):
            vault.bulk_load([twice])
        assert vault.users().size == 0
        vault.bulk_load([{name: values[:3] for name, values in twice.items()}])
        assert vault.append(1, {"time": [9, 9], "event": [6, 7]}) == 1


def test_streams_apart_and_merged_by_time(tmp_path):
    names = ("ads", "search", "feed")
    vault = seqvault.Vault.create(tmp_path / "v", SCHEMA, names)
    vault.append(1, rows([1, 5, 9], [10, 11, 12]), stream="ads")
    vault.append(1, rows([2, 5], [20, 21]), stream="search")
    assert vault.last_n([1], 2, stream="search")["item"].tolist() == [[20, 21]]
    found = vault.last_n([1, 2], 4)
    assert found["item"].tolist() == [[20, 11, 21, 12], [0] * 4]
    assert found["stream"].tolist() == [[1, 0, 1, 0], [0] * 4]
    assert found["mask"].tolist() == [[True] * 4, [False] * 4]
    found = vault.last_n([1], 9, before=5, stream=["search", "ads"])
    assert found["item"][0, -2:].tolist() == [10, 20] and found["mask"].sum() == 2
    assert found["stream"][0, -2:].tolist() == [1, 0]
    with pytest.raises(seqvault.VaultError, match="positions are those of one stream"):
        vault.last_n([1], 2, end=[1])
    with pytest.raises(seqvault.VaultError, match="no stream 'shop'"):
        vault.last_n([1], 2, stream="shop")


def test_a_newer_schema_reads_older_records(tmp_path):
    path = tmp_path / "v"
    vault = seqvault.Vault.create(path, seqvault.Schema({"a": np.int8, "gone": np.int32}))
    reader = seqvault.Vault.open(path)
    vault.append(1, {"time": [1, 2], "a": [-5, 100], "gone": [7, 8]})
    vault.merge()
    vault.append(1, {"time": [3], "a": [3], "gone": [9]})  # stays in the log and the tail
    vault.append(2, {"time": [3], "a": [4], "gone": [9]})
    newer = seqvault.Schema(
        {"new": np.float32, "a": np.int64, "flag": np.int16}, 2, defaults={"new": 1.5, "flag": -3}
    )
    vault.evolve(newer)
    vault.append(1, {"time": [4], "a": [2**40], "new": [0.25], "flag": [6]})
    for _ in range(2):
        for who in (vault, reader, seqvault.Vault.open(path)):
            found = who.last_n([1], 5)
            assert set(found) == {"time", "mask", "a", "new", "flag"}
            assert found["a"].tolist() == [[0, -5, 100, 3, 2**40]]
            assert found["new"].tolist() == [[0, 1.5, 1.5, 1.5, 0.25]]
            assert found["flag"].tolist() == [[0, -3, -3, -3, 6]]
            assert found["a"].dtype == np.int64
        vault.merge()
    for wrong, message in (
        (seqvault.Schema({"a": np.int64}, 2), "not above"),
        (seqvault.Schema({"a": np.int32}, 3), "cannot go from int64 to int32"),
        (seqvault.Schema({"new": np.float64}, 3), "cannot go from float32"),
        (seqvault.Schema({"a": np.int64}, 3, event_id="a"), "event_id"),
    ):
        with pytest.raises(seqvault.VaultError, match=message):
            vault.evolve(wrong)


def test_bulk_loads_are_read_like_appends(tmp_path):
    rng = np.random.default_rng(1)
    oracle = Oracle()
    vault = seqvault.Vault.create(tmp_path / "v", SCHEMA, block_rows=3)
    for first in (0, 10):
        users, columns = draw(rng, 300, users=9)
        users = users + first
        order = np.lexsort([columns["time"], users])
        block = {"user": users[order], **{n: c[order] for n, c in columns.items()}}
        cuts = [0, 7, 7, 120, 300]
        blocks = [
            {n: c[a:b] for n, c in block.items()} for a, b in zip(cuts, cuts[1:], strict=False)
        ]
        assert vault.bulk_load(blocks) == 300
        oracle.append(block["user"], block)
        oracle.check(vault, np.arange(20), rng)
        users, columns = draw(rng, 50, users=first + 9)
        vault.append_many(users, columns)
        oracle.append(users, columns)
        vault.merge(min_rows=3)
        oracle.check(vault, np.arange(20), rng)
    with pytest.raises(seqvault.VaultError, match="user 3 is in the stream already"):
        vault.bulk_load([{"user": np.array([3]), **{n: np.array(v) for n, v in rows([1]).items()}}])
    oracle.check(vault, np.arange(20), rng)
    assert vault.verify() == []


@pytest.mark.parametrize("largest", [64, 4])
def test_a_deep_read_takes_few_reads_however_the_history_grew(tmp_path, monkeypatch, largest):
    """One read for n up to a block, one more per doubling, then one per largest part."""
    monkeypatch.setattr("seqvault.writing.LARGEST", largest)
    rng = np.random.default_rng(0)
    options = {"block_rows": 4, "files": FILES}
    grown = seqvault.Vault.create(tmp_path / "grown", SCHEMA, **options)
    count, bulk = 0, 0
    while count < 400:
        step = int(rng.integers(1, 30))
        grown.append(1, rows(range(count, count + step)))
        grown.merge()
        count += step
        if count > 100 * bulk:
            bulk += 1
            loaded = seqvault.Vault.create(tmp_path / f"loaded{bulk}", SCHEMA, **options)
            whole = {n: np.array(c) for n, c in rows(range(count)).items()}
            loaded.bulk_load([{"user": np.ones(count, int), **whole}])
            for vault in (grown, loaded):
                for n in (1, 4, 5, 8, 9, 16, 17, 31, 100, count):
                    before = vault.stats()["preads"]
                    found = vault.last_n([1], n)["time"][0].tolist()
                    assert found == [0] * (n - count) + list(range(max(0, count - n), count))
                    doublings = min(max(n - 1, 0).bit_length() - 2, largest.bit_length())
                    most = 1 + max(doublings, 0) + n // (4 * largest)
                    assert vault.stats()["preads"] - before <= most, n
            loaded.close()
    assert bulk > 3
    assert grown.verify() == []
    grown.close()


def test_a_reclaim_moves_what_lies_in_dead_segments_and_nothing_older(tmp_path):
    """Long histories keep their old parts in place; what merges left behind is given back."""
    with seqvault.Vault.create(tmp_path / "v", SCHEMA, block_rows=4, segment_bytes=500) as vault:
        users, oracle, count = np.arange(3), Oracle(), 0
        for _ in range(120):
            at = np.repeat(users, 3)
            columns = rows(np.tile(range(count, count + 3), 3), np.arange(9) + count)
            vault.append_many(at, columns)
            oracle.append(at, columns)
            vault.merge()
            count += 3
        before = vault.stats()["block_bytes"]
        written = vault.reclaim(dead=0.5)
        left = vault.stats()["block_bytes"]
        assert 0 < written < 0.2 * left, "old parts in living segments were moved"
        assert left < before / 10
        assert vault.verify() == []
        oracle.check(vault, users, np.random.default_rng(0))
        with seqvault.Vault.open(tmp_path / "v") as fresh:
            oracle.check(fresh, users, np.random.default_rng(0))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda v: v.last_n(np.array([0.5]), 1), "vector of integers"),
        (lambda v: v.last_n([1], 1, end=[2]), "end 2 .* user 1, who has 1"),
        (lambda v: v.last_n([1], 1, end=[-1]), "end -1 is not a position"),
        (lambda v: v.last_n([0], 1, end=[0], before=[0]), "not both"),
        (lambda v: v.last_n([0], 1, columns=["shop"]), "no column .'shop'."),
        (lambda v: v.last_n([0], -1), "n is -1"),
        (lambda v: v.append(1, {"time": [1]}), "the schema wants"),
        (lambda v: v.append(1, rows([2**31])), "'time' has value 2147483648"),
        (lambda v: v.append(1, rows([1], [2.5])), "'item' is float64"),
        (lambda v: v.append(1, rows([1]) | {"kind": [-1]}), "'kind' has value -1"),
        (lambda v: v.append(1, rows([1]) | {"weight": [np.nan]}), "not finite"),
        (lambda v: v.append_many([1], rows([1, 2])), r"shape \(2,\)"),
        (lambda v: v.append(2**64, rows([1])), "no number of 64 bits"),
        (lambda v: v.append(1, rows([1]), stream="x"), "no stream 'x'"),
        (lambda v: v.append(3.7, rows([1])), "user 3.7 is not an integer"),
        (
            lambda v: v.append(1, rows([1]) | {"weight": [1e300]}),
            "1e.300, which is not finite as float32",
        ),
        (lambda v: v.last_n([1], 1, before=np.nan), "not a number"),
        (lambda v: v.resolve([1], None), "must be seconds"),
        (lambda v: v.last_n([1], 1, end=[0.9]), "must be positions"),
        (lambda v: v.last_n([1], 1.5), "n is 1.5"),
        (lambda v: v.last_n([1], 1, stream=[]), "no stream named"),
    ],
)
def test_wrong_calls_are_refused_and_change_nothing(vault, call, message):
    vault.append(1, rows([1]))
    with pytest.raises(seqvault.VaultError, match=message):
        call(vault)
    assert vault.lengths([1]).tolist() == [1]


@pytest.mark.parametrize(
    "columns", [{"time": int}, {"a/b": int}, {"item": "U3"}, {"": int}, {"a": "f2"}, {"a": "?3"}]
)
def test_impossible_schemas_are_refused(columns):
    with pytest.raises(seqvault.VaultError):
        seqvault.Schema(columns)


def test_one_writer_and_readers_that_cannot_write(vault):
    with pytest.raises(seqvault.VaultError, match="another process writes"):
        seqvault.Vault.open(vault.path, write=True)
    with pytest.raises(seqvault.VaultError, match="for reading only"):
        seqvault.Vault.open(vault.path).append(1, rows([1]))
    with pytest.raises(FileExistsError):
        seqvault.Vault.create(vault.path, SCHEMA)
    vault.close()
    seqvault.Vault.open(vault.path, write=True).close()


def test_threads_read_while_the_writer_appends_and_merges(vault):
    """Each read sees a prefix of what was appended to a user, in order, and never less again."""
    wrong, stop = [], threading.Event()

    def read():
        seen = np.zeros(4, int)
        while not stop.is_set():
            found = vault.last_n(np.arange(4), 500)
            counts = found["mask"].sum(1)
            for user in range(4):
                items = found["item"][user, 500 - counts[user] :].tolist()
                if items != list(range(counts[user])) or counts[user] < seen[user]:
                    wrong.append((user, items))
            seen = counts

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(400):
        vault.append_many(np.arange(4), rows([i] * 4, [i] * 4))
        if i % 20 == 0:
            vault.merge()
        if i % 90 == 0:
            vault.checkpoint()
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_empty_vault_and_nobody(vault):
    assert not vault.last_n([0, 1], 3, before=5)["mask"].any()
    assert vault.last_n(np.zeros(0, int), 3)["item"].shape == (0, 3)
    assert list(vault.scan()) == [] and vault.merge() == 0 and vault.verify() == []
    assert vault.append_many([], rows([])) == 0
