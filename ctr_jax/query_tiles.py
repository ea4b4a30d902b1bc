"""Attention of many queries to one history, a tile of queries at a time.

What weighs the keys is given as a function of one request and one run of its queries,

    attend(queries, keys, first) -> outputs

and everything in it has its sequence last: queries [..., T], keys [..., S], outputs [..., T], where
`first` is the index of the tile's first query. So logits are [H, S, T], a softmax reduces over a
major axis, and both products are plain ones. A tile's weights are made anew in the backward pass:
only tiles exist, never the weights of all queries.

Axis letters: B requests, H heads, n queries, T queries of a tile, S keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.softmax import accumulation_dtype

# Of a tile's weights: what a CPU's caches like; elsewhere what memory allows.
TILE_BYTES, LARGE_TILE_BYTES = {"cpu": 4 << 20}, 64 << 20
# Causal queries go in at most so many blocks, each with the keys up to its end: four leave out 3/8
# of the pairs, of the half that is hidden. More, or shorter ones, are not worth their compile.
CAUSAL_BLOCKS, CAUSAL_BLOCK = 4, 128


def over_tiles(
    attend: Callable[[Any, Any, Any], jax.Array],
    queries: Any,
    keys: Any,
    *,
    query_bytes: int,
    causal: bool = False,
    tile_bytes: int = 0,
) -> jax.Array:
    """`attend` over all queries of all requests.

    Args:
      attend: see above; its arguments have no B. It must mask what a query may not see: tiles may
        be filled up with zero queries, whose outputs are dropped.
      queries: pytree of [B, ..., n]; n may be 0. keys: pytree of [B, ..., S], S >= 1.
      query_bytes: size of one query's weights, all heads and S keys.
      causal: query i sees no key after i (n = S), so that `attend` gets the keys up to its block's
        end only.
      tile_bytes: most bytes of a tile's weights; 0 = 4 MiB on a CPU, 64 MiB elsewhere.
    Returns:
      [B, ..., n].
    """
    size, n = (jax.tree.leaves(queries)[0].shape[i] for i in (0, -1))
    tile_bytes = tile_bytes or TILE_BYTES.get(dispatch.platform(), LARGE_TILE_BYTES)
    # Whole requests together where they are small, else a part of one.
    query_bytes = max(1, query_bytes)  # no heads, or no width
    most = max(1, min(size, tile_bytes // max(1, n * query_bytes)))
    requests = next((r for r in range(most, most // 2, -1) if size % r == 0), most)
    largest = max(1, tile_bytes // (requests * query_bytes))
    blocks = min(CAUSAL_BLOCKS, max(1, n // CAUSAL_BLOCK)) if causal else 1
    ends = [n * (i + 1) // blocks for i in range(blocks)]

    def one(request):
        queries, keys = request
        out = []
        for start, end in zip([0, *ends], ends, strict=False):
            block = jax.tree.map(lambda x, start=start, end=end: x[..., start:end], queries)
            out.append(_block(attend, block, keys, start, end if causal else None, largest))
        return jnp.concatenate(out, -1)

    # Together they are one batched computation; a batch of one would still cost its extra axis, and
    # JAX cannot cut an array of nothing into batches.
    together = requests > 1 and all(x.size for x in jax.tree.leaves((queries, keys)))
    return jax.lax.map(one, (queries, keys), batch_size=requests if together else None)


def _block(attend, queries, keys, start, end, largest):
    """Queries from `start` on, in equal tiles of at most `largest`, over keys[..., :end]."""

    @jax.checkpoint
    def tile(queries, keys, first):
        return attend(queries, jax.tree.map(lambda x: x[..., :end], keys), first)

    n = jax.tree.leaves(queries)[0].shape[-1]
    count = -(-n // largest)
    if count <= 1:
        return tile(queries, keys, start)
    size = -(-n // count)

    def cut(x):  # [..., n] -> [count, ..., size]
        x = jnp.pad(x, (*[(0, 0)] * (x.ndim - 1), (0, count * size - n)))
        return jnp.moveaxis(x.reshape(*x.shape[:-1], count, size), -2, 0)

    tiles = jax.tree.map(cut, queries), start + size * jnp.arange(count, dtype=jnp.int32)
    out = jnp.moveaxis(jax.lax.map(lambda t: tile(t[0], keys, t[1]), tiles), 0, -2)
    return out.reshape(*out.shape[:-2], count * size)[..., :n]


def logits(k: jax.Array, q: jax.Array) -> jax.Array:
    """Products of one request's keys [H, K, S] and queries [H, K, T] -> [H, S, T], in float32 at
    least."""
    return jnp.einsum("hks,hkt->hst", k, q, preferred_element_type=accumulation_dtype(q.dtype))


def heads_last(x: jax.Array, heads: int) -> jax.Array:
    """Tokens [B, n, H K] -> [B, H, K, n], as `over_tiles` takes them."""
    b, n, width = x.shape
    return jnp.moveaxis(x.reshape(b, n, heads, width // heads), 1, -1)


def tokens_last(x: jax.Array) -> jax.Array:
    """The way back: [B, H, K, n] -> [B, n, H K]."""
    b, heads, width, n = x.shape
    return jnp.moveaxis(x, -1, 1).reshape(b, n, heads * width)
