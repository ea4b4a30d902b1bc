"""The XLA path: einsums over reshaped blocks, some segments at a time.

A tile of segments makes B C H (its rows) logits, at most `tile_bytes` of them (one segment at
least), made anew in the backward pass. Tiles run along the history and not along the batch, so that
a sharded batch stays where it is.

Axis letters: B requests, C candidates, S segments, w segment size, H heads, K head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.softmax import masked_softmax

TILE_BYTES = {"cpu": 4 << 20}  # what a CPU's caches like; elsewhere what memory allows
LARGE_TILE_BYTES = 64 << 20


def segmented(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    bias: jax.Array,
    *,
    segment: int,
    activation: str,
    scale: float,
    tile_bytes: int = 0,
) -> jax.Array:
    """api.segmented_target_attention on checked arguments; logits and sums in float32 at least."""
    batch, candidates, heads, _ = q.shape
    length = k.shape[1]
    exact = jnp.promote_types(q.dtype, jnp.float32)
    per_segment = max(1, batch * candidates) * heads * segment * exact.itemsize
    tile_bytes = tile_bytes or TILE_BYTES.get(dispatch.platform(), LARGE_TILE_BYTES)
    segments = length // segment
    tiles = -(-segments // max(1, min(tile_bytes // per_segment, segments)))
    per_tile = -(-segments // tiles)

    def tile(k, v, mask):
        """k [B, s, w, H, Kq], v [B, s, w, H or 1, Kv], mask [B, s, w] -> [B, C, s, H, Kv]."""
        logits = wide_einsum("bchk,bswhk->bhcsw", q, k, exact)
        logits = logits * scale + bias.astype(exact)[:, None, None, None]
        weights = _weights(logits, mask[:, None, None], activation).astype(v.dtype)
        if v.shape[3] == 1:
            z = wide_einsum("bhcsw,bswv->bcshv", weights, v[:, :, :, 0], exact)
        else:
            z = wide_einsum("bhcsw,bswhv->bcshv", weights, v, exact)
        return z.astype(v.dtype)

    def tiled(x):
        """[B, L, ...] -> [tiles, B, s, w, ...], zeros after the last segment."""
        rows = tiles * per_tile * segment
        x = jnp.pad(x, ((0, 0), (0, rows - length), *[(0, 0)] * (x.ndim - 2)))
        x = x.reshape(batch, tiles, per_tile, segment, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    rows = tuple(tiled(x) for x in (k, v, mask))
    tile = jax.checkpoint(tile, prevent_cse=tiles == 1)
    if tiles == 1:
        return tile(*(x[0] for x in rows))
    z = jnp.moveaxis(jax.lax.map(lambda x: tile(*x), rows), 0, 2)  # [B, C, tiles, s, H, Kv]
    return z.reshape(batch, candidates, -1, *z.shape[4:])[:, :, :segments]


def wide_einsum(axes: str, x: jax.Array, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """With sums in `dtype`. XLA has no such product of narrower numbers on a CPU, where they are
    widened first: the same products, the same sums."""
    if dispatch.platform() == "cpu":
        x, y = x.astype(dtype), y.astype(dtype)
    return jnp.einsum(axes, x, y, preferred_element_type=dtype)


def _weights(logits: jax.Array, mask: jax.Array, activation: str) -> jax.Array:
    """Of [..., w] logits; 0 where masked, and everywhere in a segment without behaviours."""
    if activation == "sigmoid":
        return jnp.where(mask, jax.nn.sigmoid(logits), 0)
    return masked_softmax(logits, mask)
