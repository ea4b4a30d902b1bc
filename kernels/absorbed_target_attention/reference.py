"""The XLA path for serving, where B is small and C large: tiles of candidates and rows.

In each tile one hidden unit after the other: a tile's C K numbers at a time, so that it stays in a
CPU's cache. (For training: row_tiles.py.)

Axis letters: B requests, C candidates, K rows, d model width, h hidden units.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from kernels import dispatch

# On a CPU: 256 candidates x 128 rows. Rows beyond 128 at a time take twice as long
# each (XLA then takes another product), and a tile that is no multiple of 16 half as long again.
TILE_BYTES = 128 << 10
CANDIDATE_TILE, ROW_TILE = 256, 128
LANES = 16
# Requests: one after the other where a tile is to stay in cache, else many together.
REQUESTS_AT_ONCE, MANY_REQUESTS = {"cpu": 1}, 32


@flax.struct.dataclass
class Weights:
    """W1, W2, W3 [d, h] of the candidate, the row and their product, and W_o [h]."""

    of_query: jax.Array
    of_key: jax.Array
    of_product: jax.Array
    out: jax.Array


def leaky_relu(x: jax.Array, slope: float) -> jax.Array:
    """x where positive, slope x elsewhere: of derivative `slope` at 0."""
    return jnp.where(x > 0, x, slope * x)


def attend(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    weights: Weights,
    *,
    joint: bool,
    slope: float,
    tile_bytes: int,
) -> jax.Array:
    """sum_k s_k values_k [B, C, d] without the split form's first term; in float32 at least."""
    exact = jnp.promote_types(query.dtype, jnp.float32)
    *arrays, weights = jax.tree.map(lambda x: x.astype(exact), (query, keys, values, weights))

    def one(request):
        return _one(*request, weights, joint, slope, tile_bytes).astype(query.dtype)

    if len(query) == 1:
        return one([x[0] for x in arrays])[None]
    at_once = REQUESTS_AT_ONCE.get(dispatch.platform(), MANY_REQUESTS)
    return jax.lax.map(one, arrays, batch_size=at_once if at_once > 1 else None)


def _one(query, keys, values, weights, joint, slope, tile_bytes):
    """query [C, d], keys and values [K, d] -> [C, d]."""
    pairs = (tile_bytes or TILE_BYTES) // query.dtype.itemsize
    queries = tiles(query, min(CANDIDATE_TILE, pairs))
    rows = min(ROW_TILE, pairs // queries.shape[1])
    memory = tuple(tiles(x, rows) for x in (keys, values))
    of_unit = (weights.of_query.T, weights.of_product.T, weights.out)

    def rows_tile(query, keys, values):
        of_keys = keys @ weights.of_key  # [K, h]

        def unit(scores, one):
            w1, w3, w, of_key = one
            kernel = keys.T * w3[:, None]  # [d, K]: t W1 + (t * e) W3 is t (W1 + diag(e) W3)
            if joint:
                scores = scores + w * leaky_relu(query @ (kernel + w1[:, None]) + of_key, slope)
            else:
                scores = scores + w * leaky_relu(query @ kernel, slope)
            return scores, None

        start = jnp.zeros((len(query), len(keys)), query.dtype)
        scores, _ = jax.lax.scan(unit, start, (*of_unit, of_keys.T))
        if not joint:
            scores = scores + leaky_relu(of_keys, slope) @ weights.out
        return scores @ values

    def candidates_tile(query):
        def step(out, tile):
            return out + rows_tile(query, *tile), None

        return jax.lax.scan(step, jnp.zeros_like(query), memory)[0]

    out = jax.lax.map(candidates_tile, queries)
    return out.reshape(-1, query.shape[-1])[: len(query)]


def tiles(x: jax.Array, largest: int) -> jax.Array:
    """[..., n, d] -> [tiles, ..., tile, d], zeros after the last row; tiles of equal size."""
    *leading, n, d = x.shape
    count = -(-n // max(1, min(largest, n)))
    tile = -(-n // count)
    if tile > LANES:
        tile = -(-tile // LANES) * LANES
        count = -(-n // tile)
    x = jnp.pad(x, (*[(0, 0)] * len(leading), (0, count * tile - n), (0, 0)))
    return jnp.moveaxis(x.reshape(*leading, count, tile, d), -3, 0)
