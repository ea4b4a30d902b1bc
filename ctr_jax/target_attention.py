"""DIN's target attention in the form that LREA prints it (eqs. 3, 5, 9), at any rank.

A candidate t [1, d] scores K rows `keys` and sums K rows `values`; phi is leaky ReLU, and
W_in = [W1; W2; W3]. The two sides of eq. 5 are different functions, so both are here:

    joint  s = phi(1 t W1 + keys W2 + (1 t * keys) W3) W_o                    (eq. 5, left; eq. 9)
    split  s = [1 phi(t W1) + phi(keys W2) + phi((1 t * keys) W3)] W_o        (eq. 5, right; eq. 8)
    out = values^T s                                                          (eq. 3)

Who uses which rows:

    full rank (DIN)     keys = E_s            values = E_s        K = L
    LREA, decompressed  keys = W_d^T W_c^T E  values = E_s        K = L
    LREA, absorbed      keys = W_c^T E        values = W_d E_s    K = r

The first term of the split form does not go through the rows: it weighs `total`, the sum of the
behaviours, in all three. (phi(t W1) W_o is a number, and sum_l e_l times it is exact at any rank.)
No softmax, no biases. A padding behaviour is an exact zero row of E_s, so it adds nothing.

No [B, C, K, h] array is made. `implementation`:
  "keys"    tiles of rows, made anew in the backward pass: B C tile h numbers at a time, at most
            `tile_bytes`. For training, where B is large and C small.
  "hidden"  tiles of candidates and rows, and in each tile one hidden unit after the other: a
            tile's C K numbers at a time, so that it stays in a CPU's cache. For serving, where B is
            small and C large.

Axis letters: B requests, C candidates, K rows, d model width, h hidden units.
"""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

FORMS = ("joint", "split")
IMPLEMENTATIONS = ("keys", "hidden")
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
class Memory:
    """What candidates attend to.

    Attributes:
      keys: [B, K, d].
      values: [B, K, d].
      total: [B, d], the sum of the behaviours themselves; used by the split form.
    """

    keys: jax.Array
    values: jax.Array
    total: jax.Array


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
    memory: Memory,
    weights: Weights,
    *,
    form: str = "joint",
    slope: float = 0.01,
    implementation: str = "keys",
    tile_bytes: int = 0,
) -> jax.Array:
    """sum_k s_k values_k of every candidate (module docstring): [B, C, d].

    Args:
      query: [B, C, d] candidates.
      memory: K rows; K = 0 gives zeros.
      slope: a of phi.
      tile_bytes: size of the largest temporary of a tile; 0 = 4 MiB on a CPU and 64 MiB
        elsewhere ("keys"), 128 KiB ("hidden").
    Raises:
      ValueError: an unknown form or implementation.
    """
    if form not in FORMS or implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"form must be one of {FORMS} and implementation one of {IMPLEMENTATIONS}, got "
            f"{form!r} and {implementation!r}"
        )
    if memory.keys.shape[1] == 0:
        return jnp.zeros_like(query)
    by = {"keys": _by_keys, "hidden": _by_hidden}[implementation]
    out = by(query, memory, weights, form, slope, tile_bytes)
    if form == "split":
        of_query = leaky_relu(query @ weights.of_query, slope) @ weights.out
        out = out + of_query[..., None] * memory.total[:, None]
    return out


def _by_keys(query, memory, weights, form, slope, tile_bytes):
    b, c, d = query.shape
    hidden = weights.out.shape[0]
    per_row = b * c * hidden * query.dtype.itemsize
    tile_bytes = tile_bytes or TILE_BYTES.get(jax.default_backend(), LARGE_TILE_BYTES)
    keys, values = (_tiles(x, tile_bytes // per_row) for x in _rows(memory))

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


def _by_hidden(query, memory, weights, form, slope, tile_bytes):
    def one(request):
        return _by_hidden_of_one(*request, weights, form, slope, tile_bytes)

    requests = (query, *_rows(memory))
    if len(query) == 1:
        return one(jax.tree.map(lambda x: x[0], requests))[None]
    at_once = REQUESTS_AT_ONCE.get(jax.default_backend(), MANY_REQUESTS)
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


def _rows(memory: Memory) -> tuple[jax.Array, jax.Array]:
    return memory.keys, memory.values


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


class TargetAttention(nn.Module):
    """`attend` with its weights as parameters: `kernel` = W_in [3d, h] and `out` = W_o [h].

    Attributes:
      hidden: h.
      tile_bytes: of implementation "keys"; that of "hidden" is the machine's, not a run's.
    """

    hidden: int = 64
    form: str = "joint"
    slope: float = 0.01
    tile_bytes: int = 0

    @nn.compact
    def __call__(self, query: jax.Array, memory: Memory, implementation: str = "keys") -> jax.Array:
        """query [B, C, d], K rows -> [B, C, d]."""
        d = query.shape[-1]
        kernel = self.param("kernel", nn.initializers.xavier_normal(), (3 * d, self.hidden))
        out = self.param("out", nn.initializers.normal(self.hidden**-0.5), (self.hidden,))
        return attend(
            query,
            memory,
            Weights(*jnp.split(kernel, 3), out),
            form=self.form,
            slope=self.slope,
            implementation=implementation,
            tile_bytes=self.tile_bytes if implementation == "keys" else 0,
        )
