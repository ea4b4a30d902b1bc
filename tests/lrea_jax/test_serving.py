"""Serving from caches: equal to the absorbed training path, refused when stale, kept by user."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctr_jax import embedding
from ctr_jax.features import table_shapes
from ctr_jax.steps import empty_batch
from kernels import dispatch
from lrea_jax import cache_store
from lrea_jax.cache_store import CacheFull, CacheStore
from lrea_jax.serving import ServedModel, StaleCache, long_interest, name_of, precompute, score
from tests.kernels.cases import sizes
from tests.lrea_jax import reference
from tests.lrea_jax.cases import SPEC, B, C, applied, batch_of, built, changed, double, small

ALL = {
    f"{path}, {form}, {kind}": {"training_path": path, "form": form, "parametrisation": kind}
    for path in ("absorbed", "decompressed")
    for form in ("joint", "split")
    for kind in ("free", "stochastic")
}


@pytest.fixture(scope="module")
def served():
    module, variables, embedded, columns = built(small())
    return ServedModel(module, variables, name_of("run", 7, "data", variables)), embedded, columns


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(c, id=name, marks=[pytest.mark.slow] * (i not in (0, 3, 5)))
        for i, (name, c) in enumerate(ALL.items())
    ],
)
def test_score_equals_the_absorbed_training_path(changes):
    """Whichever path was trained: to 1e-5 in float32, to 1e-12 in float64."""
    config = small(**changes)
    module, variables, embedded, columns = built(config)
    absorbed = module.clone(long=module.long.clone(path="absorbed"))
    model = ServedModel(module, variables, "w")
    got = score(model, precompute(model, embedded), embedded)
    want = applied(absorbed)(variables, embedded)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    with jax.enable_x64(True):
        model = ServedModel(module, double(variables), "w")
        embedded = double(embedded)
        got = score(model, precompute(model, embedded), embedded)
        assert got.dtype == np.float64
        want = applied(absorbed)(model.variables, embedded)
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12 * np.abs(want).max())
    loops = reference.model(variables, embedded, columns, config, "absorbed")
    np.testing.assert_allclose(got, loops, rtol=1e-11, atol=1e-12)


def test_a_cache_holds_the_paper_s_matrices(served):
    model, embedded, columns = served
    cache = precompute(model, embedded)
    p = model.variables["params"]
    comp, decomp = reference.matrices(p["long"], "free")
    b = 0  # a whole history: 9 + 3
    tokens = np.concatenate(
        [embedded.vectors[c.key][b] for c in columns if c.group == "behaviour"], -1
    ) @ np.asarray(p["behaviour_token"]["kernel"])
    older = tokens[:9].astype(np.float64)
    np.testing.assert_allclose(cache.compressed[b], comp.T @ older, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cache.auxiliary[b].T, older.T @ decomp.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cache.total[b], older.sum(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cache.recent[b], tokens[9:], rtol=1e-5, atol=1e-6)
    assert not np.asarray(cache.compressed[1]).any()  # no history


def test_a_batch_shorter_than_the_short_history_is_padded_on_the_left(served):
    model, _, columns = served
    short = batch_of(columns, length=2, lengths=(2, 1))
    padded = changed(short, padding=10)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        precompute(model, short),
        precompute(model, padded),
    )


def test_the_long_branch_alone(served):
    model, embedded, _ = served
    cache = precompute(model, embedded)
    query = np.random.default_rng(0).normal(size=(B, C, 4)).astype(np.float32)
    got = long_interest(model, cache, query)
    p = model.variables["params"]["long_attention"]
    f = lambda x: np.asarray(x, np.float64)  # noqa: E731
    for b in range(B):
        for c in range(C):
            memory = f(cache.compressed[b]), f(cache.auxiliary[b])
            want = reference.unit(
                f(query[b, c]), *memory, f(p["kernel"]), f(p["out"]), "joint", 0.2
            )
            np.testing.assert_allclose(got[b, c], want, rtol=1e-4, atol=1e-4)


def test_scoring_does_not_see_the_history_s_length(served):
    """The same arrays are made for L = 12 and L = 400, and none is C x r x h."""
    candidates, rank, hidden = 64, 4, 5
    seen = []
    for length in (12, 400):
        module, variables, _, columns = built(small(long_length=length - 3, hidden=hidden))
        model = ServedModel(module, variables, "w")
        history = batch_of(columns, length=length, lengths=(length,))
        request = batch_of(columns, length=0, lengths=(0,), candidates=candidates)
        cache = jax.eval_shape(lambda h, m=model: precompute(m, h), history)
        seen.append([x.shape for x in jax.tree.leaves(cache)])
        jaxpr = jax.make_jaxpr(lambda c, r, m=model: score(m, c, r))(cache, request)
        seen.append(sorted(sizes(jaxpr.jaxpr)))
    assert seen[0] == seen[2] and seen[1] == seen[3]
    query = jax.ShapeDtypeStruct((1, candidates, 4), np.float32)
    attention = jax.make_jaxpr(lambda c, q: long_interest(model, c, q))(cache, query)
    assert max(sizes(attention.jaxpr)) <= candidates * rank < candidates * rank * hidden


def test_histories_are_embedded_where_they_are_summarised():
    """To the same caches, with no vectors [U, L, width] of the behaviours on the way."""
    length, users = 600, 2  # a table is small for so many ids
    module, variables, _, columns = built(small(long_length=length - 3))
    tables = embedding.init_tables(jax.random.key(0), table_shapes(columns, SPEC), scale=1.0)
    model = ServedModel(module, variables, "w", tables=tables, columns=columns)
    batch = empty_batch(SPEC, users, length)
    rng, mask = np.random.default_rng(0), np.arange(length) >= np.array([[0], [250]])
    ids = {name: rng.integers(1, 9, (users, length)) * mask for name in ("item", "type")}
    batch = batch.replace(behaviour=ids, behaviour_mask=mask)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        precompute(model, batch),
        precompute(model, model.embed(batch)),
    )
    jaxpr = jax.make_jaxpr(lambda batch: precompute(model, batch))(batch)
    assert max(sizes(jaxpr.jaxpr)) <= users * length * 4 < users * length * 2 * 3
    store = CacheStore(model, users)
    store.insert("ab", precompute(model, batch.replace(behaviour_mask=mask & False)))
    store.refresh("ab", batch)
    jax.tree.map(np.testing.assert_array_equal, store.lookup("ab"), precompute(model, batch))
    with pytest.raises(ValueError, match="no tables"):
        precompute(ServedModel(module, variables, "w"), batch)


def test_kernels_are_those_that_are_named(served, monkeypatch):
    model, embedded, _ = served
    with pytest.raises(dispatch.CannotRun, match="pallas"):
        ServedModel(model.module, model.variables, "w", kernels="pallas")
    named, scope = [], dispatch.scope
    monkeypatch.setattr(dispatch, "scope", lambda *how: named.append(how[0]) or scope(*how))
    other = ServedModel(model.module, model.variables, model.name, kernels="xla")
    cache = jax.eval_shape(lambda x: precompute(other, x), embedded)
    jax.eval_shape(lambda c, x: score(other, c, x), cache, embedded)
    assert named == ["xla"]


def test_caches_of_other_weights_are_refused(served):
    model, embedded, _ = served
    cache = precompute(model, embedded)
    nudged = jax.tree.map(np.array, model.variables)
    nudged["params"]["long"]["w_comp"][0, 0] += 1e-3
    names = {
        model.name, name_of("run", 8, "data", model.variables),
        name_of("other", 7, "data", model.variables), name_of("run", 7, "more", model.variables),
        name_of("run", 7, "data", nudged),
    }  # fmt: skip
    assert len(names) == 5
    store = CacheStore(model, 4)
    for name in names - {model.name}:
        other = ServedModel(model.module, nudged, name)
        for use in (
            lambda m=other: score(m, cache, embedded),
            lambda m=other: long_interest(m, cache, embedded.vectors["candidate/item"]),
            lambda m=other: CacheStore(m, 4).insert(range(B), cache),
            lambda n=name: store.insert(range(B), cache.replace(weights=n)),
        ):
            with pytest.raises(StaleCache, match="precompute it again"):
                use()
    assert len(store) == 0


def rows(cache, index):
    return jax.tree.map(lambda x: x[np.asarray(index)], cache)


def test_refresh_equals_recompute(served):
    """One more behaviour moves all others: the refreshed cache is that of the new history."""
    model, embedded, columns = served
    store = CacheStore(model, 8)
    store.insert(list("abcde"), precompute(model, embedded))
    longer = batch_of(columns, seed=5, length=13, lengths=(13, 1, 8, 3, 12))
    for key in longer.vectors:
        if key.startswith("behaviour/"):
            longer.vectors[key][:, :-1] = embedded.vectors[key]
    before = store.lookup(list("abcde"))
    store.refresh(list("ab"), changed(longer, slice(0, 2)))
    after = store.lookup(list("abcde"))
    fresh = precompute(model, longer)
    for x, y, new in zip(*map(jax.tree.leaves, (before, after, fresh)), strict=True):
        np.testing.assert_allclose(y[:2], new[:2], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(y[2:], x[2:])
    assert not np.allclose(before.compressed[0], after.compressed[0], atol=1e-3)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["insert", "refresh", "evict"]), st.integers(0, 4),
                          st.integers(0, B - 1)), max_size=12))  # fmt: skip
def test_the_store_is_a_dictionary(served, operations):
    """Any sequence of inserts, refreshes and evictions of five users in three rows, beside a dict
    of which history each user has."""
    model, embedded, _ = served
    whole = precompute(model, embedded)
    store, known = CacheStore(model, 3), {}
    for what, user, history in operations:
        if what == "insert" and user in known:
            with pytest.raises(ValueError, match="already"):
                store.insert([user], rows(whole, [history]))
        elif what == "insert" and len(known) == 3:
            with pytest.raises(CacheFull):
                store.insert([user], rows(whole, [history]))
        elif what == "insert":
            store.insert([user], rows(whole, [history]))
            known[user] = history
        elif user not in known:
            act = {"evict": store.evict, "refresh": lambda u: store.refresh(u, None)}[what]
            with pytest.raises(KeyError, match="not in the store"):
                act([user])
        elif what == "evict":
            store.evict([user])
            del known[user]
        else:
            store.refresh([user], changed(embedded, [history]))
            known[user] = history
    assert len(store) == len(known) and all(u in store for u in known)
    for user, history in known.items():
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
            store.lookup([user]), rows(whole, [history]),
        )  # fmt: skip


def test_the_store_holds_one_array_per_field_and_scores(served):
    model, embedded, _ = served
    cache = precompute(model, embedded)
    store = CacheStore(model, 6)
    store.insert(range(10, 10 + B), cache)
    # r d twice, d, S d: 2 * 4 * 4 + 4 + 3 * 4 numbers.
    assert store.bytes_per_user == 4 * (32 + 4 + 12)
    order = [12, 10, 14]
    got = score(model, store.lookup(order), changed(embedded, [2, 0, 4]))
    want = np.asarray(score(model, cache, embedded))[[2, 0, 4]]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(CacheFull, match="2 users for 1 free"):
        store.insert([1, 2], rows(cache, [0, 1]))
    assert 1 not in store and len(store) == B
    for users in ([1, 1], [1, 2]):
        with pytest.raises(ValueError):
            store.insert(users, rows(cache, [0]))


def test_a_user_given_twice(served):
    model, embedded, _ = served
    store = CacheStore(model, 2)
    store.insert("ab", rows(precompute(model, embedded), [0, 1]))
    before = store.lookup("ab")
    with pytest.raises(ValueError, match="given twice"):
        store.refresh("aa", changed(embedded, [2, 3]))
    jax.tree.map(np.testing.assert_array_equal, store.lookup("ab"), before)
    store.evict("aa")  # forgets once: one row is free, not two
    store.insert("c", rows(precompute(model, embedded), [2]))
    with pytest.raises(CacheFull):
        store.insert("d", rows(precompute(model, embedded), [3]))
    jax.tree.map(np.testing.assert_array_equal, store.lookup("b"), rows(before, [1]))


def test_what_could_not_be_inserted_is_not_there(served, monkeypatch):
    """Else a user would have the cache of whoever had the row before."""
    model, embedded, _ = served
    alice = jax.tree.map(np.asarray, rows(precompute(model, embedded), [0]))
    store = CacheStore(model, 1)

    def no_room(*_):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(jnp, "zeros", no_room)
        store.insert(["alice"], alice)
    store.insert(["alice"], alice)
    store.evict(["alice"])
    for name, bad, match in (
        ("recent", alice.recent[:, :2], r"\.recent is float32\[2, 4\] for a user"),
        ("compressed", alice.compressed[[0, 0]], r"1 users for 2 rows of the cache's \.compressed"),
        ("total", alice.total.astype(np.float16), r"\.total is float16\[4\] for a user"),
    ):
        with pytest.raises(ValueError, match=match):
            store.insert(["bob"], alice.replace(**{name: bad}))
        assert "bob" not in store and len(store) == 0
        with pytest.raises(KeyError):
            store.lookup(["bob"])
    store.insert(["bob"], rows(precompute(model, embedded), [2]))


def test_users_are_looked_up_while_a_thread_writes(served, monkeypatch):
    """Between the donation of the arrays and their new ones in place nothing may read them."""
    model, embedded, _ = served
    store = CacheStore(model, B)
    store.insert(range(B), precompute(model, embedded))
    longer = batch_of(served[2], seed=5)
    fresh, write, writing = precompute(model, longer), cache_store._write, threading.Event()

    def slow(*arguments):
        new = write(*arguments)
        writing.set()
        looking.join(0.3)  # it must wait for the arrays: it cannot be done
        return new

    found = []
    monkeypatch.setattr(cache_store, "_write", slow)
    looking = threading.Thread(target=lambda: writing.wait() and found.append(store.lookup([1, 2])))
    looking.start()
    store.refresh([2], rows(longer, [2]))
    looking.join()
    (got,) = found
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        rows(got, [1]), rows(fresh, [2]),
    )  # fmt: skip


@pytest.mark.parametrize("what", ["insert", "refresh"])
def test_only_what_has_been_computed_is_written(served, monkeypatch, what):
    """Else a lookup would wait for it, and what fails in it would take all users' caches along."""
    model, embedded, _ = served
    cache = precompute(model, embedded)
    store, write, ready = CacheStore(model, B), cache_store._write, []
    if what == "refresh":
        store.insert(range(B), cache)

    @jax.jit
    def slow(x):
        square = jax.lax.fori_loop(0, 40, lambda _, y: y @ y * 1e-3, jnp.ones((800, 800)))
        return x + 0 * square[0, 0]

    def checked(fields, slots, rows):
        ready.append(rows.total.is_ready())
        return write(fields, slots, rows)

    monkeypatch.setattr(cache_store, "_write", checked)
    slow(cache.total).block_until_ready()  # compiles
    late = cache.replace(total=slow(cache.total))
    if what == "insert":
        store.insert(range(B), late)
    else:
        monkeypatch.setattr(cache_store, "precompute", lambda *_: late)
        store.refresh(range(B), embedded)
    assert ready == [True]
