"""The walk over tiles of queries: equal to all at once, and within its bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctr_jax import query_tiles
from ctr_jax.query_tiles import heads_last, over_tiles, tokens_last

WIDTH, FLOAT = 3, 4


def weighted(queries, keys, first):
    """Not an attention, but every pair, its order and `first` count."""
    q, k = queries["q"], keys["k"]
    at = first + jnp.arange(q.shape[-1])[None]
    place = jnp.arange(k.shape[-1])[:, None]
    weights = jnp.where(place <= at, jnp.sin(k.T @ q) * (1 + place + 2 * at), 0)
    return k @ weights


def dense(q, k):
    """The same in float64, all of it at once: [B, WIDTH, n]."""
    q, k = q.astype(np.float64), k.astype(np.float64)
    at, place = np.arange(q.shape[-1])[None], np.arange(k.shape[-1])[:, None]
    weights = np.sin(np.einsum("bws,bwt->bst", k, q)) * (1 + place + 2 * at) * (place <= at)
    return np.einsum("bws,bst->bwt", k, weights)


def arrays(size, n, s):
    rng = np.random.default_rng(0)
    return (rng.normal(size=(size, WIDTH, x)).astype(np.float32) for x in (n, s))


# B, n = S, tile_bytes: all at once; two requests of six together; a request in ragged tiles; one
# query at a time.
WALKS = [(3, 7, 10**6), (6, 7, 2 * 7 * 7 * FLOAT), (2, 11, 4 * 11 * FLOAT), (1, 5, 1)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size, n, tile_bytes", WALKS)
def test_equal_to_all_at_once(size, n, tile_bytes, causal, monkeypatch):
    monkeypatch.setattr(query_tiles, "CAUSAL_BLOCK", 2)
    q, k = arrays(size, n, n)

    def walk(q, k):
        return over_tiles(
            weighted, dict(q=q), dict(k=k), query_bytes=n * FLOAT, causal=causal,
            tile_bytes=tile_bytes,
        )  # fmt: skip

    np.testing.assert_allclose(jax.jit(walk)(q, k), dense(q, k), rtol=1e-4, atol=1e-4)


def test_other_numbers_of_queries_than_keys():
    q, k = arrays(2, 5, 3)
    out = over_tiles(weighted, dict(q=q), dict(k=k), query_bytes=3 * FLOAT, tile_bytes=24)
    np.testing.assert_allclose(out, dense(q, k), rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 40),
    n=st.integers(1, 2000),
    tile_bytes=st.integers(1, 10**7),
    causal=st.booleans(),
)
def test_tiles_stay_within_their_bytes_and_cover_every_query(size, n, tile_bytes, causal):
    seen = []

    def attend(q, keys, first):
        seen.append((q.shape[-1], keys.shape[-1]))
        return q

    x = jax.ShapeDtypeStruct((size, 1, n), jnp.float32)
    out = jax.eval_shape(
        lambda q: over_tiles(
            attend, q, q, query_bytes=n * FLOAT, causal=causal, tile_bytes=tile_bytes
        ),
        x,
    )
    assert out.shape == x.shape
    one_query = n * FLOAT  # the least a tile can be
    assert all(t * s * FLOAT <= max(tile_bytes, one_query) for t, s in seen)
    pairs = sum(s for _, s in seen) / len(seen) / n  # of the keys that a query gets, on average
    assert pairs <= (1 if not causal or n < 2 * query_tiles.CAUSAL_BLOCK else 0.76)


def test_heads_and_back():
    x = np.arange(2 * 3 * 8.0).reshape(2, 3, 8)
    heads = heads_last(x, 2)
    assert heads.shape == (2, 2, 4, 3) and heads[1, 1, 2, 0] == x[1, 0, 6]
    np.testing.assert_array_equal(tokens_last(heads), x)


@pytest.mark.parametrize(
    "size, n, tile_bytes, together",
    # All fit; three of six, as four do not divide them; one and a half fit; less than one does.
    [(6, 5, 10**6, 6), (6, 5, 4 * 5 * 5 * FLOAT, 3), (6, 5, 150, 1), (6, 5, 1, 1)],
)
def test_as_many_requests_together_as_fit(size, n, tile_bytes, together, monkeypatch):
    whole_map, seen = jax.lax.map, []

    def spy(f, xs, *, batch_size=None):
        seen.append(batch_size or 1)
        return whole_map(f, xs, batch_size=batch_size)

    monkeypatch.setattr(jax.lax, "map", spy)
    q, k = arrays(size, n, n)
    jax.eval_shape(
        lambda q, k: over_tiles(
            weighted, dict(q=q), dict(k=k), query_bytes=n * FLOAT, tile_bytes=tile_bytes
        ),
        q,
        k,
    )
    assert seen[0] == together


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size, n, heads", [(2, 0, 4), (2, 3, 0), (0, 3, 4)])
def test_no_queries_no_heads_or_no_requests_give_an_empty_result(size, n, heads, causal):
    queries, keys = jnp.zeros((size, heads, 2, n)), jnp.zeros((size, heads, 2, max(n, 1)))

    def attend(q, k, first):
        return jnp.einsum("hks,hst->hkt", k, query_tiles.logits(k, q))

    def total(q, k):
        found = over_tiles(attend, q, k, query_bytes=heads * k.shape[-1] * FLOAT, causal=causal)
        assert found.shape == q.shape
        return found.sum()

    gradients = jax.grad(total, (0, 1))(queries, keys)
    assert not any(g.any() for g in gradients)
