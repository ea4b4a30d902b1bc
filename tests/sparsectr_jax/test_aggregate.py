"""Chunk aggregation against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctr_jax import hlo
from sparsectr_jax.aggregate import AGGREGATES, MEAN_TYPE, Aggregate
from sparsectr_jax.chunking import time_chunks
from tests.sparsectr_jax.dense_reference import random_history

B, L, P, H, K = 4, 13, 3, 2, 5


def mlp(x, params):
    hidden = x @ params["dense_0"]["kernel"] + params["dense_0"]["bias"]
    hidden = hidden / (1 + np.exp(-hidden))
    return hidden @ params["dense_1"]["kernel"] + params["dense_1"]["bias"]


def reference(kind, params, k, v, chunk_id):
    """[B, P, H, K] keys and values, one chunk and head at a time."""
    out = np.zeros((2, B, P, H, K))
    for b in range(B):
        for p in range(P):
            members = np.flatnonzero(chunk_id[b] == p + 1)
            for h in range(H):
                for side, x, name in ((0, k, "mlp_k"), (1, v, "mlp_v")):
                    rows = x[b, members, h].astype(np.float64)
                    mean = rows.mean(0) if len(members) else np.zeros(K)
                    if kind == "attn_pool":
                        if len(members):
                            score = k[b, members, h].astype(np.float64) @ params["pool"][h]
                            weights = np.exp(score - score.max())
                            out[side, b, p, h] = weights @ rows / weights.sum()
                    elif kind == "mean":
                        out[side, b, p, h] = mean
                    elif kind == "mlp_mean":
                        if len(members):
                            out[side, b, p, h] = mlp(rows, params[name]).mean(0)
                    else:
                        residual = mean if kind == "mean_residual" else 0
                        out[side, b, p, h] = residual + mlp(mean, params[name])
    return out


@pytest.mark.parametrize("kind", AGGREGATES)
def test_every_kind_equals_the_loop(kind):
    rng = np.random.default_rng(0)
    drawn = [random_history(rng, L, n, "random") for n in (0, 1, 9, L)]
    times, mask = (np.stack(x) for x in zip(*drawn, strict=True))
    chunks = time_chunks(jnp.asarray(times), jnp.asarray(mask), P)
    k, v = (rng.normal(size=(B, L, H, K)).astype(np.float32) for _ in range(2))
    module = Aggregate(kind)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), k, v, chunks))
    variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    got = module.apply(variables, k, v, chunks)
    params = jax.tree.map(np.float64, variables.get("params", {}))
    expected = reference(kind, params, k, v, np.asarray(chunks.chunk_id))
    used = np.asarray(chunks.valid)  # what stands in unused slots is never read
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(g)[used], e[used], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", [k for k in AGGREGATES if k not in MEAN_TYPE])
def test_kinds_that_need_every_behaviour_refuse_means(kind):
    means = np.zeros((B, P, H, K), np.float32)
    times, mask = np.zeros((B, L), np.int32), np.zeros((B, L), bool)
    chunks = time_chunks(jnp.asarray(times), jnp.asarray(mask), P)
    with pytest.raises(ValueError, match="every behaviour"):
        jax.eval_shape(lambda: Aggregate(kind).init(jax.random.key(0), means, means, chunks, True))


def test_attn_pool_makes_no_array_of_every_behaviour_in_every_chunk():
    length, slots, heads = 96, 7, 5  # slots > K: smaller than what is looked for are keys
    rng = np.random.default_rng(0)
    drawn = [random_history(rng, length, n) for n in (0, 1, 50, length)]
    times, mask = (np.stack(x) for x in zip(*drawn, strict=True))
    chunks = time_chunks(jnp.asarray(times), jnp.asarray(mask), slots)
    k, v = (rng.normal(size=(B, length, heads, K)).astype(np.float32) for _ in range(2))
    pool = {"params": {"pool": rng.normal(size=(heads, K)).astype(np.float32)}}

    def total(pool, k, v, chunks):
        keys, values = Aggregate("attn_pool").apply(pool, k, v, chunks)
        return (jnp.sin(keys) * values).sum()

    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(pool, k, v, chunks).compile()
    assert hlo.largest(compiled.as_text(), 1)[0][0] < B * slots * length * heads * 4
    assert np.asarray(compiled(pool, k, v, chunks)[0]["params"]["pool"]).any()


def test_attn_pool_of_far_apart_scores_is_that_of_each_chunk_alone():
    """Chunks whose scores differ by more than float32's exponents: a peak of the whole history
    would leave nothing of the lower chunk."""
    times, mask = np.array([[1, 2, 9000, 9001]], np.int32), np.ones((1, 4), bool)
    chunks = time_chunks(jnp.asarray(times), jnp.asarray(mask), 2)
    k = np.array([-500, -501, 500, 502], np.float32).reshape(1, 4, 1, 1)
    pool = {"params": {"pool": np.ones((1, 1), np.float32)}}
    keys, _ = Aggregate("attn_pool").apply(pool, k, k, chunks)
    low, high = 1 / (1 + np.exp(-1.0)), 1 / (1 + np.exp(-2.0))
    expected = [-500 * low - 501 * (1 - low), 502 * high + 500 * (1 - high)]
    np.testing.assert_allclose(keys[0, :, 0, 0], expected, rtol=1e-6)
