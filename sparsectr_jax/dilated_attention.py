"""DilatedAttention: a window and every s-th behaviour, which SparseCTR compares with (4.4.1).

A query at i sees the valid behaviours {j: i - w < j <= i} and {j <= i: (i - j) mod s = 0}, in one
softmax: the strided pattern of Child et al. 2019, whose window is the stride. A candidate stands at
L, where no behaviour is: it sees the last w, as EvoAttention's, and L - s, L - 2 s, ...

Queries see the behaviours of their own residue class mod s: s causal attentions of L / s rows, no
mask over pairs of other classes. What is in the window is left to the window there; the two parts
give their sums unnormalised, beside the peak that was taken off, and are joined.

Axis letters: B requests, C candidates, L history, w window, s stride, G = L / s rows of a residue
class, H heads, K head width, T queries of a tile.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ctr_jax.query_tiles import over_tiles
from kernels.softmax import accumulation_dtype
from sparsectr_jax import encoded_attention as sparse
from sparsectr_jax.encodings import Encoding
from sparsectr_jax.evo_attention import History

EMPTY = -1e30  # the peak of an empty set


def candidate_rows(length: int, w: int, stride: int) -> np.ndarray:
    """Which behaviours a candidate sees, ascending: at most w + L / s."""
    distance = length - np.arange(length)
    return np.flatnonzero((distance <= w) | (distance % stride == 0))


def candidates(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    history: History,
    encoding: Encoding,
    rows: np.ndarray,
    scale: float | None = None,
) -> jax.Array:
    """q [B, C, H, K], k, v [B, S, H, K] of `candidate_rows` -> [B, C, H, K]."""
    slots = sparse.recent_slots(k, v, history, encoding, rows)
    queries = sparse.candidate_queries(q, history, encoding, scale)

    def of_request(queries, slots):
        return sparse.over_slots(sparse.slot_weights(queries, slots, encoding), slots.v)

    return sparse.heads_inner(jax.vmap(of_request)(queries, slots))


def behaviours(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    history: History,
    encoding: Encoding,
    w: int,
    stride: int,
    scale: float | None = None,
) -> jax.Array:
    """q, k, v [B, L, H, K] -> [B, L, H, K]."""
    function = functools.partial(_behaviours, w, stride, scale)
    return sparse.by_requests(function, (q, k, v), history, encoding)


def _behaviours(w, stride, scale, requests, history, encoding):
    q, k, v = requests
    heads, width = q.shape[-2:]
    itemsize = accumulation_dtype(q.dtype).itemsize
    queries = sparse.behaviour_queries(q, history, encoding, scale)
    band = sparse.band_of(k, v, history, encoding, w)

    def of_window(queries, band, first):
        logits, visible, v = sparse.band_logits(queries, band, first, w, encoding)
        return _part(logits, visible, v, "hkst,hst->hkt")

    def of_class(queries, keys, first):
        """Of one residue class: what is in no window."""
        del first
        k, v, time, at, mask = keys
        slots = sparse.Slots(k, v, time, at, at)
        logits = sparse.slot_logits(queries, slots, encoding)
        visible = mask[:, None] & (queries.at - at[:, None] >= w)
        return _part(logits, visible[None], v, "hks,hst->hkt")

    size = heads * w * (2 * width + 1) * itemsize
    window = over_tiles(of_window, queries, band, query_bytes=size)

    length = q.shape[1]
    pad = -length % stride
    rows = (length + pad) // stride

    def cut(x):  # [B, ..., L] -> [B s, ..., G], filled up on the left
        x = jnp.pad(x, (*[(0, 0)] * (x.ndim - 1), (pad, 0)))
        x = jnp.moveaxis(x.reshape(*x.shape[:-1], rows, stride), -1, 1)
        return x.reshape(-1, *x.shape[2:])

    first = w - 1  # without what stands before the history
    keys = band.k[..., first:], band.v[..., first:], history.times, queries.at, history.mask
    queries, keys = jax.tree.map(cut, (queries, keys))
    size = heads * rows * itemsize
    strided = over_tiles(of_class, queries, keys, query_bytes=size, causal=True)
    strided = strided.reshape(-1, stride, *strided.shape[1:])
    strided = jnp.moveaxis(strided, 1, -1).reshape(*window.shape[:-1], -1)[..., pad:]
    return sparse.heads_inner(_joined(window, strided)).astype(v.dtype)


def _part(logits, visible, v, over):
    """Sums [H, K + 2, T] of one part of the keys: of exp(logits - peak) v, of exp(logits - peak),
    and the peak, EMPTY where nothing is visible."""
    peak = jnp.max(jnp.where(visible, logits, EMPTY), 1, keepdims=True)
    peak = jax.lax.stop_gradient(peak)
    weights = jnp.exp(jnp.where(visible, logits - peak, -jnp.inf))
    total = jnp.sum(weights, 1, keepdims=True)
    summed = jnp.einsum(over, v, weights.astype(v.dtype), preferred_element_type=total.dtype)
    return jnp.concatenate([summed, total, peak], 1)


def _joined(*parts):
    """Parts [B, H, K + 2, T] -> the softmax's weighted sum [B, H, K, T]."""
    peak = functools.reduce(jnp.maximum, (x[:, :, -1:] for x in parts))
    summed = sum(jnp.exp(x[:, :, -1:] - peak) * x[:, :, :-1] for x in parts)
    total = summed[:, :, -1:]
    return summed[:, :, :-1] / jnp.where(total > 0, total, 1)
