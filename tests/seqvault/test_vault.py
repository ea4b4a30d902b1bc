"""Reads against a store of Python lists."""

import tempfile
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import seqvault

SCHEMA = seqvault.Schema({"item": np.int32, "kind": np.uint8, "seen": bool, "weight": np.float32})

# Times from a handful of values, so that most histories have ties.
BEHAVIOURS = st.tuples(
    st.integers(0, 6),
    st.integers(0, 70_000),
    st.integers(0, 255),
    st.booleans(),
    st.floats(-4, 4, width=32),
)
STORES = st.lists(st.lists(BEHAVIOURS, max_size=9), min_size=1, max_size=6)


def columns_of(store):
    """The store's rows as sorted columns, times put in order."""
    rows = [(user, *row) for user, h in enumerate(store) for row in sorted(h, key=lambda r: r[0])]
    names = ("user", "time", *SCHEMA.columns)
    dtypes = (np.int64, np.int64, *SCHEMA.columns.values())
    return {n: np.array([r[i] for r in rows], dtypes[i]) for i, n in enumerate(names)}


def write(directory, store, cuts=()):
    columns = columns_of(store)
    edges = [0, *sorted(cuts), len(columns["user"])]
    blocks = [
        {name: values[a:b] for name, values in columns.items()}
        for a, b in zip(edges, edges[1:], strict=False)
    ]
    seqvault.bulk_build(f"{directory}/v", SCHEMA, len(store), blocks)
    return seqvault.open(f"{directory}/v")


def reference_last_n(history, n):
    """What last_n must give of an already cut history: {column: list of n}."""
    seen = history[max(0, len(history) - n) :]
    pad = n - len(seen)
    out = {"mask": [False] * pad + [True] * len(seen)}
    for i, name in enumerate(("time", *SCHEMA.columns)):
        out[name] = [0] * pad + [row[i] for row in seen]
    return out


@settings(derandomize=True, deadline=None, max_examples=40)
@given(STORES, st.data())
def test_reads_equal_a_dict_of_lists(store, data):
    reference = {u: sorted(history, key=lambda row: row[0]) for u, history in enumerate(store)}
    users = data.draw(st.lists(st.sampled_from(list(reference)), max_size=8))
    n = data.draw(st.integers(0, 12))
    before = data.draw(st.lists(st.integers(-2, 8), min_size=len(users), max_size=len(users)))
    end = [data.draw(st.integers(0, len(reference[u]))) for u in users]
    users, before, end = (np.array(x, np.int32) for x in (users, before, end))

    with tempfile.TemporaryDirectory() as directory:
        vault = write(directory, store)
        assert vault.lengths(users).tolist() == [len(reference[u]) for u in users]
        earlier = [
            [r for r in reference[u] if r[0] < t] for u, t in zip(users, before, strict=True)
        ]
        assert vault.resolve(users, before).tolist() == [len(history) for history in earlier]
        first = [reference[u][:e] for u, e in zip(users, end, strict=True)]
        whole = [reference[u] for u in users]
        for arguments, histories in (
            ({"before": before}, earlier),
            ({"end": end}, first),
            ({}, whole),
        ):
            found = vault.last_n(users, n, **arguments)
            assert set(found) == {"mask", "time", *SCHEMA.columns}
            wanted = [reference_last_n(history, n) for history in histories]
            for name, values in found.items():
                assert values.shape == (len(users), n)
                assert values.tolist() == [row[name] for row in wanted], name
                if name != "mask":
                    assert values.dtype == SCHEMA.stored[name]


@settings(derandomize=True, deadline=None, max_examples=15)
@given(STORES, st.data())
def test_content_hash_does_not_depend_on_the_blocks(store, data):
    rows = sum(map(len, store))
    cuts = data.draw(st.lists(st.integers(0, rows), max_size=5))
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as many:
        assert write(one, store).content_hash == write(many, store, cuts).content_hash


def test_content_hash_sees_every_part(tmp_path):
    store = [[(1, 2, 3, True, 0.5)], [(1, 2, 3, True, 0.5)]]
    hashes = {write(tmp_path / "0", store).content_hash}
    for i in range(5):
        changed = [list(store[0][0]), list(store[1][0])]
        changed[1][i] = 0
        hashes.add(write(tmp_path / str(i + 1), [[tuple(row)] for row in changed]).content_hash)
    hashes.add(write(tmp_path / "moved", [[], store[0] + store[1]]).content_hash)
    hashes.add(write(tmp_path / "user", [*store, []]).content_hash)
    assert len(hashes) == 8


def test_nothing_at_or_after_the_request_is_seen(tmp_path):
    """Behaviours at the request's own second are the target's siblings: strictly earlier only."""
    times = [5, 7, 7, 7, 9]
    vault = write(tmp_path, [[(t, 10 + i, 0, False, 0) for i, t in enumerate(times)]])
    users = np.zeros(len(times), int)
    found = vault.last_n(users, 5, before=np.array(times))
    assert (found["time"] < np.array(times)[:, None]).all()
    assert found["mask"].sum(1).tolist() == [0, 1, 1, 1, 4]
    assert vault.resolve(users[:4], np.array([-1, 0, 5, 2**31 - 1])).tolist() == [0, 0, 0, 5]
    same = vault.last_n(users, 5, end=vault.resolve(users, np.array(times)))
    assert all((found[name] == same[name]).all() for name in found)


def test_only_the_columns_asked_for(tmp_path):
    vault = write(tmp_path, [[(1, 2, 3, True, 0.5)]])
    assert set(vault.last_n(np.array([0]), 1, columns=["kind"])) == {"kind", "time", "mask"}
    assert set(vault.last_n(np.array([0]), 1, columns=[])) == {"time", "mask"}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda v: v.lengths(np.array([0, 2])), "user 2 is not in the store"),
        (lambda v: v.lengths(np.array([-1])), "user -1 is not in the store"),
        (lambda v: v.last_n(np.array([0.5]), 1), "vector of integers"),
        (
            lambda v: v.last_n(np.array([0, 1]), 1, end=np.array([1, 1])),
            "end 1 .* user 1, who has 0",
        ),
        (lambda v: v.last_n(np.array([0]), 1, end=np.array([-1])), "end -1 is not a position"),
        (lambda v: v.last_n(np.array([0]), 1, end=[0], before=[0]), "not both"),
        (lambda v: v.last_n(np.array([0]), 1, columns=["shop"]), "no column .'shop'."),
        (lambda v: v.last_n(np.array([0]), -1), "n is -1"),
    ],
)
def test_wrong_questions_are_refused(tmp_path, call, message):
    vault = write(tmp_path, [[(1, 2, 3, True, 0.5)], []])
    with pytest.raises(seqvault.VaultError, match=message):
        call(vault)


def test_an_empty_store(tmp_path):
    vault = write(tmp_path, [[], []])
    assert (vault.num_users, vault.num_behaviours) == (2, 0)
    assert not vault.last_n(np.array([0, 1, 1]), 3, before=5)["mask"].any()


def test_threads_read_the_same(tmp_path):
    rng = np.random.default_rng(0)
    store = [
        [
            (int(t), int(rng.integers(99)), 1, True, 0.0)
            for t in rng.integers(0, 9, rng.integers(40))
        ]
        for _ in range(30)
    ]
    vault = write(tmp_path, store)
    users, before = rng.integers(0, 30, 200), rng.integers(0, 10, 200)
    wanted = vault.last_n(users, 20, before=before)
    wrong = []

    def read():
        for _ in range(30):
            found = vault.last_n(users, 20, before=before)
            wrong.extend(name for name in found if not (found[name] == wanted[name]).all())

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
