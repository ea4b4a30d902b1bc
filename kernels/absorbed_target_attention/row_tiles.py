"""The XLA path for training: tiles of requests and rows, made anew in the backward pass.

A candidate t scores a row e by e (W2 + diag(t) W3) + t W1: one product with a kernel of its own,
d h numbers. A tile reads the kernels of its candidates, and in the backward pass adds to their
gradient; so it has many rows of few requests, not the other way round: with ROWS of them the
kernels are d / ROWS of its own B C rows h numbers, which are at most `tile_bytes`.

Axis letters: B requests, C candidates, K rows, d model width, h hidden units.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.absorbed_target_attention.reference import Weights, leaky_relu, tiles
from kernels.request_groups import cut, size_of_groups, whole

ROWS = 256  # of a tile, where there are as many
# A CPU's caches like the first (measured: .5 and 1 MiB alike, 4 MiB slower); memory allows the
# second.
TILE_BYTES, LARGE_TILE_BYTES = {"cpu": 1 << 20}, 64 << 20


def forward(query, keys, values, weights, *, joint, slope, tile_bytes, together):
    """sum_k s_k values_k [B, C, d] without the split form's first term; in float32 at least.

    Args:
      joint, slope: form "joint", a of phi.
      tile_bytes: of a tile; 0 = the machine's.
      together: never take requests apart, as XLA has to partition them over a mesh.
    """
    weights = _exact(weights, query.dtype)
    query, rows = _tiles(query, (keys, values), weights, tile_bytes, together)

    def of_requests(requests):
        query, rows = requests
        prepared = _prepare(query, weights, joint)

        def step(out, rows):
            return out + _tile(prepared, *rows, joint, slope), None

        return jax.lax.scan(step, jnp.zeros(query.shape, weights.out.dtype), rows)[0]

    out = jax.lax.map(of_requests, (query, rows)).astype(query.dtype)
    return whole(out, len(keys))


def backward(query, keys, values, weights, dout, *, joint, slope, tile_bytes, together):
    """Gradients of query, keys, values and weights, given that of the result."""
    b, k = keys.shape[:2]
    weights = _exact(weights, query.dtype)
    query, rows = _tiles(query, (keys, values), weights, tile_bytes, together)
    dout = cut(dout, query.shape[1])

    def of_requests(dweights, requests):
        query, rows, dout = requests
        dout = dout.astype(weights.out.dtype)
        prepared, back = jax.vjp(lambda q, w: _prepare(q, w, joint), query, weights)

        def step(dprepared, rows):
            of_tile = jax.vjp(lambda *x: _tile(*x, joint, slope), prepared, *rows)[1]
            dprepared_here, *drows = of_tile(dout)
            return jax.tree.map(jnp.add, dprepared, dprepared_here), drows

        dprepared, drows = jax.lax.scan(step, jax.tree.map(jnp.zeros_like, prepared), rows)
        dquery, dweights_here = back(dprepared)
        return jax.tree.map(jnp.add, dweights, dweights_here), (dquery, *drows)

    start = jax.tree.map(jnp.zeros_like, weights)
    dweights, (dquery, *drows) = jax.lax.scan(of_requests, start, (query, rows, dout))
    # [groups, tiles, requests, rows, d] -> [groups, requests, tiles x rows, d]
    drows = [jnp.moveaxis(x, 1, 2) for x in drows]
    drows = [x.reshape(*x.shape[:2], -1, x.shape[-1])[:, :, :k] for x in drows]
    return *whole((dquery, *drows), b), dweights


def _prepare(query, weights, joint):
    """What a tile needs of its candidates: (kernel [B, d, C, h], bias [B, C, h], weights)."""
    query = query.astype(weights.out.dtype)
    kernel = jnp.swapaxes(query, 1, 2)[..., None] * weights.of_product[:, None]
    if joint:
        kernel = kernel + weights.of_key[:, None]
    return kernel, query @ weights.of_query, weights


def _tile(prepared, keys, values, joint, slope):
    """keys and values [B, rows, d] -> their part of the result [B, C, d]."""
    kernel, bias, weights = prepared
    keys, values = (x.astype(kernel.dtype) for x in (keys, values))
    x = jnp.einsum("bkd,bdch->bkch", keys, kernel)
    if joint:
        scores = leaky_relu(x + bias[:, None], slope) @ weights.out
    else:
        of_keys = leaky_relu(keys @ weights.of_key, slope) @ weights.out
        scores = leaky_relu(x, slope) @ weights.out + of_keys[..., None]
    return jnp.einsum("bkc,bkd->bcd", scores, values)


def _exact(weights: Weights, dtype: jnp.dtype) -> Weights:
    """The weights in float32 at least, or the query's dtype: all else follows theirs."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(dtype, jnp.float32)), weights)


def _tiles(query, rows, weights, tile_bytes, together):
    """Query [groups, g, C, d] and rows [groups, tiles, g, n, d] of tiles that fit `tile_bytes`."""
    b, c, _ = query.shape
    k = rows[0].shape[1]
    tile_bytes = tile_bytes or TILE_BYTES.get(dispatch.platform(), LARGE_TILE_BYTES)
    fit = tile_bytes // (c * weights.out.size * weights.out.dtype.itemsize)  # requests x rows
    requests = b if together else size_of_groups(b, fit // min(k, ROWS))
    query, rows = cut((query, rows), requests)
    return query, tuple(jnp.moveaxis(tiles(x, fit // requests), 0, 1) for x in rows)
