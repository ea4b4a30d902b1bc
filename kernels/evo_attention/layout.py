"""How EvoAttention's tiles lie in memory: cutting a batch into tiles, reading and writing one.

A batch [B, L, H, K] becomes [B, H, K, blocks * T]: a tile is G requests, `groups` apart in the
batch, times T consecutive positions, which are the minor axis.

Axis letters: B requests, L history, G requests of a tile, T queries of a tile, H heads, K width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ZERO = np.int32(0)  # indices of one type, with 64-bit integers enabled or not


class Tiling(NamedTuple):
    """rows: G, a divisor of B. groups: B / G. width: T. blocks: at least L / T."""

    rows: int
    groups: int
    width: int
    blocks: int


def choose_tiling(
    batch: int, length: int, heads: int, keys: int, halo: int, budget: int, sharded: bool = False
) -> Tiling:
    """Tiles of about `budget` logits: of whole histories where they fit, else of 8 requests each,
    then no narrower than `halo`, the positions before it that a tile reads.

    The requests of a tile are B / G apart. Where XLA has sharded the batch a tile has 8 of them,
    so that up to eight devices walk over their own rows.
    """
    history = heads * keys * length
    several = [g for g in (8, 4, 2, 1) if batch % g == 0]
    # One history alone was slower on a CPU, but where it is much longer than its keys are many.
    whole = [g for g in several if g * history <= budget and (g > 1 or length >= 32 * keys)]
    rows = several[0] if sharded or not whole else whole[0]
    groups = batch // rows
    widest = max(budget // (rows * heads * keys), -(-halo // 64) * 64, 64)
    if length <= widest:
        more = max(budget // (rows * history), 1)
        factor = next(f for f in range(min(more, groups), 0, -1) if groups % f == 0)
        return Tiling(rows * factor, groups // factor, length, 1)
    # Whole vectors, with as little padding as possible, then as wide as possible.
    widths = range(max(-(-halo // 64), 1) * 64, widest + 1, 64)
    width = min(widths, key=lambda t: (-(-length // t) * t, -t))
    return Tiling(rows, groups, width, -(-length // width))


def pad_last(x, tiling: Tiling, before: int = 0):
    """[..., L] -> [..., before + blocks * width]."""
    after = tiling.width * tiling.blocks - x.shape[-1]
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((before, after),)) if before + after else x


def long(x, tiling: Tiling):
    """[B, L, H, K] -> [B, H, K, blocks * width]: queries (or keys) minor.

    Where blocks * width is L nothing but a transposition, which XLA on a CPU does in blocks, and
    element by element where it is fused with anything else, a scale or a halo.
    """
    b, length, heads, width = x.shape
    x = jnp.swapaxes(x.reshape(b, length, heads * width), 1, 2)
    return pad_last(x, tiling).reshape(b, heads, width, -1)


def unlong(x, length: int):
    """The inverse of `long`."""
    b, heads, width, long = x.shape
    x = jnp.swapaxes(x.reshape(b, heads * width, long)[..., :length], 1, 2)
    return x.reshape(b, length, heads, width)


def _groups(x, tiling: Tiling):
    """[B, ...] -> [G, groups, ...]. Within the loop: outside XLA lays the axes out anew for it."""
    return x.reshape((tiling.rows, tiling.groups) + x.shape[1:])


def take(x, tiling: Tiling, row, start=None, width: int = 0):
    """Request group `row`, [G, ...] of [B, ...]; with `start` the `width` positions from there.
    Width 0: the positions of a tile, and before them the halo that x was padded with."""
    if tiling.groups > 1:
        x = jax.lax.dynamic_index_in_dim(_groups(x, tiling), row, 1, False)
    if start is None:
        return x
    width = width or x.shape[-1] - tiling.width * (tiling.blocks - 1)
    return jax.lax.dynamic_slice_in_dim(x, start, width, x.ndim - 1)


def take_with_halo(x, tiling: Tiling, row, start, halo: int):
    """[G, ..., halo + T]: a tile after the positions before it; before the first, anything."""
    own = take(x, tiling, row, start)
    if tiling.blocks == 1:
        before = jnp.zeros(own.shape[:-1] + (halo,), own.dtype)
    else:
        before = take(x, tiling, row, jnp.maximum(start - np.int32(halo), ZERO), halo)
    return jnp.concatenate([before, own], -1)


def put_with_halo(buffer, tiling: Tiling, x, row, start, halo: int):
    """Adds x [G, ..., halo + T] to where `take_with_halo` read; 0 stands before the first tile."""
    buffer = put(buffer, tiling, x[..., halo:], row, start, add=True)
    if tiling.blocks == 1 or not halo:
        return buffer
    before = jnp.maximum(start - np.int32(halo), ZERO)
    return put(buffer, tiling, x[..., :halo], row, before, add=True)


def put(buffer, tiling: Tiling, x, row, start=ZERO, add=False):
    """The inverse of `take`; `add` adds to what is there."""
    shape, at = buffer.shape, [ZERO] * buffer.ndim
    at[-1] = start
    if tiling.groups > 1:
        buffer, x = _groups(buffer, tiling), x[:, None]
        at = [ZERO, row, *at[1:]]
    if add:
        x = x + jax.lax.dynamic_slice(buffer, at, x.shape)
    return jax.lax.dynamic_update_slice(buffer, x.astype(buffer.dtype), at).reshape(shape)


def loop(tiling: Tiling, read, body, buffers):
    """body(read(row, start), row, start, buffers) over all tiles.

    A tile is read one turn ahead and carried by the loop, so that it lies in memory of its own.
    XLA fuses a slice at a place known at run time into whatever reads it, and where it is read at
    several offsets (by neighbours, by head dimension) loses the vector loop on a CPU.
    """
    count = tiling.groups * tiling.blocks
    if count == 1:
        return body(read(ZERO, ZERO), ZERO, ZERO, buffers)

    def place(i):
        return i // tiling.blocks, i % tiling.blocks * tiling.width

    def step(i, state):
        i = i.astype(jnp.int32)
        tile, buffers = state
        buffers = body(tile, *place(i), buffers)
        return read(*place(jnp.minimum(i + 1, np.int32(count - 1)))), buffers

    start = read(ZERO, ZERO), buffers
    return jax.lax.fori_loop(ZERO, np.int32(count), step, start)[1]
