"""The XLA path, in tiles that never hold B C K h numbers.

  "keys"    tiles of rows, made anew in the backward pass: B C tile h numbers at a time, at most
            `tile_bytes`. For training, where B is large and C small.
  "hidden"  tiles of candidates and rows, and in each tile one hidden unit after the other: a
            tile's C K numbers at a time, so that it stays in a CPU's cache. For serving, where B is
            small and C large.

Axis letters: B requests, C candidates, K rows, d model width, h hidden units.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from kernels import dispatch

TILINGS = ("keys", "hidden")
TILE_BYTES = {"cpu": 4 << 20}  # of "keys": what a CPU's caches like; elsewhere what memory allows
LARGE_TILE_BYTES = 64 << 20
# Of "hidden", on a CPU: 256 candidates x 128 rows. Rows beyond 128 at a time take twice as long
# each (XLA then takes another product), and a tile that is no multiple of 16 half as long again.
HIDDEN_TILE_BYTES = 128 << 10
CANDIDATE_TILE, ROW_TILE = 256, 128
LANES = 16
# Requests of "hidden": one after the other where a tile is to stay in cache, else many together.
REQUESTS_AT_ONCE, MANY_REQUESTS = {"cpu": 1}, 32


@flax.struct.dataclass
class Weights:
    """W1, W2, W3 [d, h] of the candidate, the row and their product, and W_o [h]."""

    of_query: jax.Array
    of_key: jax.Array
    of_product: jax.Array
    out: jax.Array


def leaky_relu(x: jax.Array, slope: float) -> jax.Array:
    """x where positive, slope x elsewhere (0 <= slope <= 1)."""
    return jnp.maximum(x, slope * x)


def attend(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    weights: Weights,
    *,
    form: str,
    slope: float,
    tiling: str,
    tile_bytes: int,
) -> jax.Array:
    """sum_k s_k values_k [B, C, d] without the split form's first term; in float32 at least."""
    by = {"keys": _by_keys, "hidden": _by_hidden}[tiling]
    exact = jnp.promote_types(query.dtype, jnp.float32)
    arrays = jax.tree.map(lambda x: x.astype(exact), (query, keys, values, weights))
    return by(*arrays, form, slope, tile_bytes).astype(query.dtype)


def _by_keys(query, keys, values, weights, form, slope, tile_bytes):
    b, c, d = query.shape
    hidden = weights.out.shape[0]
    per_row = b * c * hidden * query.dtype.itemsize
    tile_bytes = tile_bytes or TILE_BYTES.get(dispatch.platform(), LARGE_TILE_BYTES)
    keys, values = (_tiles(x, tile_bytes // per_row) for x in (keys, values))

    # The two terms of a row are one product with W2 + diag(t) W3: e (W2 + diag(t) W3).
    kernel = jnp.swapaxes(query, 1, 2)[..., None] * weights.of_product[:, None]  # [B, d, C, h]
    if form == "joint":
        kernel = kernel + weights.of_key[:, None]
        bias = query @ weights.of_query  # [B, C, h]

    def tile(kernel, keys, values):
        x = jnp.einsum("bkd,bdch->bkch", keys, kernel)
        if form == "joint":
            scores = leaky_relu(x + bias[:, None], slope) @ weights.out
        else:
            of_keys = leaky_relu(keys @ weights.of_key, slope) @ weights.out
            scores = leaky_relu(x, slope) @ weights.out + of_keys[..., None]
        return jnp.einsum("bkc,bkd->bcd", scores, values)

    tile = jax.checkpoint(tile, prevent_cse=False)

    def step(out, rows):
        return out + tile(kernel, *rows), None

    return jax.lax.scan(step, jnp.zeros((b, c, d), query.dtype), (keys, values))[0]


def _by_hidden(query, keys, values, weights, form, slope, tile_bytes):
    def one(request):
        return _by_hidden_of_one(*request, weights, form, slope, tile_bytes)

    requests = (query, keys, values)
    if len(query) == 1:
        return one(jax.tree.map(lambda x: x[0], requests))[None]
    at_once = REQUESTS_AT_ONCE.get(dispatch.platform(), MANY_REQUESTS)
    return jax.lax.map(one, requests, batch_size=at_once if at_once > 1 else None)


def _by_hidden_of_one(query, keys, values, weights, form, slope, tile_bytes):
    """query [C, d], keys and values [K, d] -> [C, d]."""
    pairs = (tile_bytes or HIDDEN_TILE_BYTES) // query.dtype.itemsize
    queries = _tiles(query, min(CANDIDATE_TILE, pairs))
    rows = min(ROW_TILE, pairs // queries.shape[1])
    tiles = tuple(_tiles(x, rows) for x in (keys, values))
    of_unit = (weights.of_query.T, weights.of_product.T, weights.out)

    def rows_tile(query, keys, values):
        of_keys = keys @ weights.of_key  # [K, h]

        def unit(scores, one):
            w1, w3, w, of_key = one
            kernel = keys.T * w3[:, None]  # [d, K]: t W1 + (t * e) W3 is t (W1 + diag(e) W3)
            if form == "joint":
                scores = scores + w * leaky_relu(query @ (kernel + w1[:, None]) + of_key, slope)
            else:
                scores = scores + w * leaky_relu(query @ kernel, slope)
            return scores, None

        start = jnp.zeros((len(query), len(keys)), query.dtype)
        scores, _ = jax.lax.scan(unit, start, (*of_unit, of_keys.T))
        if form == "split":
            scores = scores + leaky_relu(of_keys, slope) @ weights.out
        return scores @ values

    def candidates_tile(query):
        def step(out, tile):
            return out + rows_tile(query, *tile), None

        return jax.lax.scan(step, jnp.zeros_like(query), tiles)[0]

    out = jax.lax.map(candidates_tile, queries)
    return out.reshape(-1, query.shape[-1])[: len(query)]


def _tiles(x: jax.Array, largest: int) -> jax.Array:
    """[..., n, d] -> [tiles, ..., tile, d], zeros after the last row; tiles of equal size."""
    *leading, n, d = x.shape
    count = -(-n // max(1, min(largest, n)))
    tile = -(-n // count)
    if tile > LANES:
        tile = -(-tile // LANES) * LANES
        count = -(-n // tile)
    x = jnp.pad(x, (*[(0, 0)] * len(leading), (0, count * tile - n), (0, 0)))
    return jnp.moveaxis(x.reshape(*leading, count, tile, d), -3, 0)
