"""NSAttention: native sparse attention (Yuan et al. 2025), which SparseCTR compares with (4.4.1).

    out = sum_c g_c Attn(q, K_c, V_c)       g = sigmoid(x W_g + b_g), per head; c one of

  compressed  one key per run of l behaviours, a run every s: MLP of [k_j + e_(j in the run)], side
              by side; seen once the run's last behaviour is before i
  selected    the blocks of l behaviours that the compressed weights name: each block has the weight
              that falls on it, spread evenly over the s-behaviour pieces of its runs (the paper's
              eq. 9). n are read: the oldest, the query's own up to the query and the one before
              it always, the n - 3 heaviest of the others. Each head selects for itself (one head
              per group)
  window      the w behaviours up to the query's own

Each branch has keys and values of its own (section 3.3.3). The gate is one layer, for the paper's
MLP. Decided where the papers are silent: runs and blocks are counted from the newest behaviour, so
that left padding changes nothing and a candidate sees the newest run; of a run that reaches beyond
the history the missing behaviours add 0 to the MLP's input, and it counts if any is there.
Selection blocks are as long as runs. MLPs: l K to l K to K, ReLU, the same for all heads, of keys
and of values each. A run stands at its middle, at its mean time. A candidate stands at L: all runs
are over, no block is its own, so that n - 1 are read, and its window is the history's last w, as
EvoAttention's. A behaviour sees itself in its block and window. Of blocks of one weight the newer
is read. No user key.

Work is O(L (L / s + n l + w)), in tiles of queries.

Axis letters: B requests, C candidates, L history, l, s, n, w as above, N runs, M blocks, H heads, K
head width, S keys, T queries of a tile.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ctr_jax.layers import MLP
from ctr_jax.query_tiles import over_tiles
from kernels.evo_attention import NEVER
from kernels.softmax import accumulation_dtype, masked_softmax
from sparsectr_jax import encoded_attention as sparse
from sparsectr_jax.encoded_attention import Slots
from sparsectr_jax.encodings import Encoding, Places
from sparsectr_jax.evo_attention import History, gather_rows


@dataclasses.dataclass(frozen=True)
class NSASpec:
    """block: l. stride: s, a divisor of l. top: n >= 3. w: of the window. scale: as elsewhere."""

    block: int
    stride: int
    top: int
    w: int
    scale: float | None = None

    def __post_init__(self):
        if min(self.block, self.stride) < 1 or self.block % self.stride:
            raise ValueError(
                f"nsa_block {self.block} and nsa_stride {self.stride} must be at least 1, and the "
                "stride divide the block"
            )
        if self.top < 3:
            raise ValueError(f"nsa_top counts three blocks that are always read, got {self.top}")


BRANCHES = ("compressed", "selected", "window")
ALWAYS = 1e9  # above any weight


class Blocks(NamedTuple):
    """Behaviours by selection block, the block last: k, v [..., H, K, l, M]; time, at, mask
    [..., l, M]."""

    k: jax.Array
    v: jax.Array
    time: jax.Array
    at: jax.Array
    mask: jax.Array


class NativeSparseAttention(nn.Module):
    """The attention between the projections and W_O."""

    spec: NSASpec
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        queries: tuple[jax.Array | None, jax.Array],
        streams: tuple[jax.Array | None, jax.Array],
        keys: dict[str, tuple[jax.Array, jax.Array]],
        history: History,
        encoding: Encoding,
    ) -> tuple[jax.Array | None, jax.Array]:
        """Behaviours, None in the last block, and candidates.

        Args:
          queries: [B, L, H, K], [B, C, H, K]. streams: the same tokens [B, L, d], [B, C, d].
          keys: {branch: (k, v)} [B, L, H, K], the keys not turned by RoPE.
        Returns:
          [B, L, H, K], [B, C, H, K].
        """
        spec, heads = self.spec, queries[1].shape[2]
        gate = nn.Dense(3 * heads, dtype=self.dtype, name="gate")
        compressed = self._compressed(*keys["compressed"], history, encoding)

        def gated(branches, x):  # [B, 3, H, K, n]
            g = nn.sigmoid(gate(x)).reshape(*x.shape[:2], 3, heads, 1)
            return jnp.sum(g * jnp.moveaxis(branches, -1, 1), 2)

        def of(function, q, x):
            shared = functools.partial(function, spec)
            requests = q, compressed[:2], keys["selected"], keys["window"]
            found = sparse.by_requests(shared, requests, (history, *compressed[2:]), encoding)
            return gated(found, x)

        q_b, q_c = queries
        out_b = None if q_b is None else of(_behaviours, q_b, streams[0])
        return out_b, of(_candidates, q_c, streams[1])

    def _compressed(self, k, v, history, encoding):
        """Slots of the runs, as a tuple."""
        spec = self.spec
        (_, length, heads, width), mask = k.shape, history.mask
        number = -(-length // spec.stride)
        # Index of each run's behaviours: run N - 1 is the last l, those before are s earlier each.
        last = length - 1 - spec.stride * np.arange(number, dtype=np.int32)[::-1]
        index = last[:, None] + np.arange(1 - spec.block, 1, dtype=np.int32)
        there, rows = index >= 0, np.maximum(index, 0)
        mask = mask[:, rows] & there  # [B, N, l]

        def compress(x, name):
            place = self.param(f"place_{name}", nn.initializers.normal(0.02), (spec.block, width))
            x = x[:, rows] + place[:, None].astype(x.dtype)  # [B, N, l, H, K]
            x = jnp.where(mask[..., None, None], x, 0)
            x = jnp.moveaxis(x, 3, 2).reshape(*x.shape[:2], heads, -1)
            return MLP((spec.block * width, width), "relu", self.dtype, name=f"mlp_{name}")(x)

        # The mean time as of a chunk (chunking.py), and the middle of the behaviours there are; the
        # sum of quotients and that of remainders stay within int32.
        count = jnp.maximum(jnp.sum(mask, -1, dtype=jnp.int32), 1)
        oldest = gather_rows(history.times, last - count + 1)
        since = jnp.where(mask, history.times[:, rows] - oldest[..., None], 0)
        quotient, rest = since // count[..., None], since % count[..., None]
        time = oldest + jnp.sum(quotient, -1) + jnp.sum(rest, -1) // count
        at = last - count // 2
        after = jnp.where(mask.any(-1), last, NEVER)
        k, v = compress(k, "key"), compress(v, "value")
        k = encoding.rotated(k, at, length)
        return sparse.sequence_last(k), sparse.sequence_last(v), time, at, after


def _behaviours(spec, requests, fixed, encoding):
    q, *_, (k, v) = requests
    history, *_ = fixed
    queries = sparse.behaviour_queries(q, history, encoding, spec.scale)
    w = min(spec.w, k.shape[1])
    window = sparse.band_of(k, v, history, encoding, w)

    def of_window(queries, band, first):
        logits, visible, v = sparse.band_logits(queries, band, first, w, encoding)
        return sparse.over_band(masked_softmax(logits, visible, -2), v)

    return _over_tiles(spec, queries, of_window, window, requests, fixed, encoding)


def _candidates(spec, requests, fixed, encoding):
    q, *_, (k, v) = requests
    history, *_ = fixed
    length = k.shape[1]
    queries = sparse.candidate_queries(q, history, encoding, spec.scale)
    recent = slice(max(length - spec.w, 0), length)
    rows = np.arange(length)[recent]
    window = sparse.recent_slots(k[:, recent], v[:, recent], history, encoding, rows)

    def of_window(queries, slots, first):
        del first
        return sparse.over_slots(sparse.slot_weights(queries, slots, encoding), slots.v)

    return _over_tiles(spec, queries, of_window, window, requests, fixed, encoding)


def _over_tiles(spec, queries, of_window, window, requests, fixed, encoding):
    """All branches of all queries, [B, 3, H, K, n]."""
    _, of_runs, (k, v), _ = requests
    history, *places = fixed
    runs, blocks = Slots(*of_runs, *places), _blocks(spec, k, v, history, encoding)
    heads, width = k.shape[-2:]

    def attend(queries, keys, first):
        runs, blocks, window = keys
        weights = sparse.slot_weights(queries, runs, encoding)
        out = sparse.over_slots(weights, runs.v)
        of_runs = jax.lax.stop_gradient(weights)
        chosen = select(spec, of_runs, queries.at, blocks.mask, k.shape[1])
        selected = _selected(queries, *chosen, blocks, encoding)
        return jnp.stack([out, selected, of_window(queries, window, first)])

    read = min(spec.top, blocks.mask.shape[-1] + 1) * spec.block + min(spec.w, k.shape[1])
    number = runs.time.shape[1] + read * (2 * width + 1)
    size = heads * number * accumulation_dtype(k.dtype).itemsize
    return over_tiles(attend, queries, (runs, blocks, window), query_bytes=size)


def _blocks(spec, k, v, history, encoding) -> Blocks:
    length = k.shape[1]
    pad = -length % spec.block
    at = jnp.arange(length, dtype=jnp.int32)[None]
    k = encoding.rotated(k, at, length)
    at = jnp.broadcast_to(at, history.times.shape)
    arrays = sparse.sequence_last(k), sparse.sequence_last(v), history.times, at, history.mask

    def cut(x):  # [..., L] -> [..., l, M], filled up on the left
        x = jnp.pad(x, (*[(0, 0)] * (x.ndim - 1), (pad, 0)))
        return jnp.swapaxes(x.reshape(*x.shape[:-1], -1, spec.block), -1, -2)

    return Blocks(*map(cut, arrays))


def select(
    spec: NSASpec, weights: jax.Array, at: jax.Array, mask: jax.Array, length: int
) -> tuple[jax.Array, jax.Array]:
    """Of one request, the blocks of each query.

    Args:
      weights: [H, N, T] of the runs. at: [T], where the queries stand. mask: [l, M].
      length: L.
    Returns:
      index [H, T, n] of blocks, the own one last; and which of them count, bool.
    """
    heads, runs, number = weights.shape
    pieces, count = spec.block // spec.stride, mask.shape[-1]
    # A piece of s behaviours is in the run that ends with it and in the l / s - 1 that follow.
    padded = jnp.pad(weights, ((0, 0), (count * pieces - runs, pieces - 1), (0, 0)))
    of_pieces = sum(padded[:, i : i + count * pieces] for i in range(pieces))
    of_blocks = of_pieces.reshape(heads, count, pieces, number).sum(2)
    own = (at - length) // spec.block + count  # L of a candidate: one behind the last
    some, block = mask.any(0)[:, None], jnp.arange(count, dtype=jnp.int32)[:, None]
    before = block < own
    always = (block == own - 1) | (block == jnp.argmax(some))
    of_blocks = jnp.where(before & some, jnp.where(always, ALWAYS, of_blocks), -1)
    # Turned round, as of equal ones top_k takes the first.
    of_blocks = jnp.swapaxes(of_blocks, 1, 2)[..., ::-1]
    heaviest, index = jax.lax.top_k(of_blocks, min(spec.top - 1, count))
    index = count - 1 - index
    own = jnp.broadcast_to(own[:, None], (heads, number, 1))
    index = jnp.concatenate([index.astype(jnp.int32), jnp.clip(own, 0, count - 1)], -1)
    return index, jnp.concatenate([heaviest >= 0, own < count], -1)


def _selected(queries, index, counts, blocks, encoding):
    """Attention of one request to the blocks `index` [H, T, n], those that `counts`."""
    q, dtype = queries.q, accumulation_dtype(queries.q.dtype)
    heads, number = q.shape[0], q.shape[-1]

    def rows(x):  # [H, K, l, M] -> [H, T, n, K, l]
        x = jnp.moveaxis(x, -1, 1)
        return jax.vmap(lambda x, i: x[i])(x, index)

    def places(x):  # [l, M] -> [H, S, T]
        return jnp.moveaxis(x.T[index].reshape(heads, number, -1), -1, 1)

    k, v = rows(blocks.k), rows(blocks.v)
    logits = jnp.einsum("hkt,htbkl->hblt", q, k, preferred_element_type=dtype)
    logits = logits.reshape(heads, -1, number)
    at = places(blocks.at)
    query = Places(queries.time[None, None], queries.at[None, None])
    logits = logits + encoding.bias(query, Places(places(blocks.time), at), dtype)
    counts = jnp.repeat(jnp.moveaxis(counts, -1, 1), blocks.mask.shape[0], 1)
    visible = places(blocks.mask) & counts & (at <= queries.at)
    weights = masked_softmax(logits, visible, -2).astype(v.dtype)
    weights = weights.reshape(heads, index.shape[-1], -1, number)
    return jnp.einsum("hblt,htbkl->hkt", weights, v)
