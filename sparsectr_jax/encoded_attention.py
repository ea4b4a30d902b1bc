"""Sparse attention with any encoding, in plain XLA: two kinds of keys, and EvoAttention of them.

kernels/evo_attention forms RelTemporal from times and takes no other bias. Here the bias is a
function of pairs (encodings.py), for what the paper compares with: slower, and linear in L as well.

  slots  few keys per request, each seen by the queries beyond its place: chunks, transition
         behaviours, compressed blocks
  band   the w behaviours up to the query's own

All queries go in tiles (ctr_jax/query_tiles.py), so arrays of one request have their sequence
last. Candidates are queries at L and not before it: all slots are theirs, and their band is slots.

Axis letters: B requests, C candidates, L history, w window, H heads, K head width, S slots, T
queries of a tile, R branches.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ctr_jax.query_tiles import over_tiles
from ctr_jax.request_tiles import in_tiles
from kernels import dispatch
from kernels.evo_attention import NEVER
from kernels.softmax import accumulation_dtype, masked_softmax
from sparsectr_jax.chunking import Chunks, transition_slots
from sparsectr_jax.encodings import Encoding, Places
from sparsectr_jax.evo_attention import EvoSpec, History, Keys, gather_rows


class Slots(NamedTuple):
    """Keys that queries see from some place on.

    k, v: [..., H, K, S]. time: [..., S] int32 seconds. at: [..., S] int32, the place that the
    encoding sees. after: [..., S] int32, queries at i see those with after < i; NEVER for none.
    """

    k: jax.Array
    v: jax.Array
    time: jax.Array
    at: jax.Array
    after: jax.Array


class Band(NamedTuple):
    """Behaviours with w - 1 places in front of them, [..., L + w - 1]: see `band_of`."""

    k: jax.Array
    v: jax.Array
    time: jax.Array
    mask: jax.Array


class Queries(NamedTuple):
    """q: [..., H, K, T], scaled. time, at: [..., T] int32."""

    q: jax.Array
    time: jax.Array
    at: jax.Array


def sequence_last(x: jax.Array) -> jax.Array:
    """[B, S, H, K] -> [B, H, K, S]."""
    return jnp.moveaxis(x, 1, -1)


def heads_inner(x: jax.Array) -> jax.Array:
    """[..., H, K, S] -> [..., S, H, K]."""
    return jnp.moveaxis(x, -1, -3)


def behaviour_queries(q, history: History, encoding: Encoding, scale: float | None) -> Queries:
    """q [B, L, H, K] of the behaviours."""
    size, length = history.times.shape
    at = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (size, length))
    time, _ = encoding.query_times(history.times, history.request_time)
    return _queries(q, time, at, length, encoding, scale)


def candidate_queries(q, history: History, encoding: Encoding, scale: float | None) -> Queries:
    """q [B, C, H, K] of the candidates: all at L, at the request's time."""
    length = history.times.shape[1]
    at = jnp.full(q.shape[:2], length, jnp.int32)
    _, time = encoding.query_times(history.times, history.request_time)
    return _queries(q, jnp.broadcast_to(time, at.shape), at, length, encoding, scale)


def _queries(q, time, at, length, encoding, scale):
    q = encoding.rotated(q, at, length) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return Queries(sequence_last(q), time, at)


def recent_slots(
    k: jax.Array, v: jax.Array, history: History, encoding: Encoding, rows: np.ndarray
) -> Slots:
    """Behaviours at `rows` [S] of all histories as slots of the candidates.

    Args:
      k, v: [B, S, H, K], of those rows.
    """
    time, mask = history.times[:, rows], history.mask[:, rows]
    at = jnp.broadcast_to(jnp.asarray(rows, jnp.int32), time.shape)
    k = encoding.rotated(k, at, history.times.shape[1])
    return Slots(sequence_last(k), sequence_last(v), time, at, jnp.where(mask, -1, NEVER))


def band_of(k, v, history: History, encoding: Encoding, w: int) -> Band:
    """The behaviours' k, v [B, L, H, K] as what the behaviours see."""
    length = history.times.shape[1]
    k = encoding.rotated(k, jnp.arange(length, dtype=jnp.int32)[None], length)
    arrays = sequence_last(k), sequence_last(v), history.times, history.mask
    return Band(*(jnp.pad(x, (*[(0, 0)] * (x.ndim - 1), (w - 1, 0))) for x in arrays))


def middle(chunks: Chunks) -> jax.Array:
    """[B, P] int32: where a chunk stands."""
    return jnp.where(chunks.valid, (chunks.start + chunks.end) // 2, 0)


def slot_weights(queries: Queries, slots: Slots, encoding: Encoding) -> jax.Array:
    """Of one request, the weights [H, S, T]; 0 where a query sees no slot."""
    visible = slots.after[:, None] < queries.at
    return masked_softmax(slot_logits(queries, slots, encoding), visible, -2)


def slot_logits(queries: Queries, slots: Slots, encoding: Encoding) -> jax.Array:
    """Of one request, [H, S, T]."""
    dtype = accumulation_dtype(queries.q.dtype)
    logits = jnp.einsum("hks,hkt->hst", slots.k, queries.q, preferred_element_type=dtype)
    query = Places(queries.time[None, None], queries.at[None, None])
    key = Places(slots.time[None, :, None], slots.at[None, :, None])
    return logits + encoding.bias(query, key, dtype)


def over_slots(weights: jax.Array, v: jax.Array) -> jax.Array:
    """Weights [H, S, T] and values [H, K, S] -> [H, K, T]."""
    return jnp.einsum("hks,hst->hkt", v, weights.astype(v.dtype))


def band_logits(
    queries: Queries, band: Band, first: jax.Array, w: int, encoding: Encoding
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of one request, those of queries from `first` on.

    Returns:
      logits [H, w, T], oldest first; visible [1, w, T]; values [H, K, w, T].
    """
    dtype, number = accumulation_dtype(queries.q.dtype), queries.q.shape[-1]
    # Clipped: a tile may be filled up with queries behind the history, whose outputs are dropped.
    rows = first + jnp.arange(number + w - 1, dtype=jnp.int32)
    band = jax.tree.map(lambda x: jnp.take(x, rows, -1, mode="clip"), band)
    k, v, time, visible = (jnp.stack([x[..., s : s + number] for s in range(w)], -2) for x in band)
    logits = jnp.einsum("hkst,hkt->hst", k, queries.q, preferred_element_type=dtype)
    at = queries.at + jnp.arange(1 - w, 1, dtype=jnp.int32)[:, None]
    query = Places(queries.time[None, None], queries.at[None, None])
    bias = encoding.bias(query, Places(time[None], at[None]), dtype)
    return logits + bias, visible[None], v


def over_band(weights: jax.Array, v: jax.Array) -> jax.Array:
    """Weights [H, w, T] and values [H, K, w, T] -> [H, K, T]."""
    return jnp.einsum("hkst,hst->hkt", v, weights.astype(v.dtype))


def by_requests(function, requests, fixed, encoding: Encoding):
    """`function(requests, fixed, encoding)`; on a mesh each device goes through its own requests.

    `function` closes over no arrays; `requests` have gradients, `fixed` have none, both are trees
    of [B, ...].
    """
    most = dispatch.requests_of_a_device(len(jax.tree.leaves(requests)[0]))
    return in_tiles(function, requests, fixed, encoding, most)


# ---- EvoAttention of slots and a band -----------------------------------------------------------


def candidate_branches(q, keys: Keys, history: History, spec: EvoSpec, encoding: Encoding):
    """The branches in use, of the candidates, with the encoding's bias in RelTemporal's place.

    Args:
      q: [B, C, H, K].
    Returns:
      [B, C, H, K] of each of spec.branches.
    """
    length, number = history.times.shape[1], keys.recent_k.shape[1]
    rows = np.arange(length - number, length)
    recent = recent_slots(keys.recent_k, keys.recent_v, history, encoding, rows)
    local = (recent, keys.user_k, keys.user_v) if "local" in spec.branches else None
    queries = candidate_queries(q, history, encoding, spec.scale)

    def of_request(queries, slots, local):
        out = [over_slots(slot_weights(queries, s, encoding), s.v) for s in slots]
        if local is not None:
            recent, *user = local
            logits, visible = slot_logits(queries, recent, encoding), recent.after < NEVER
            own = logits, visible[None, :, None], recent.v
            out.append(_with_user(queries, *user, *own, over_slots))
        return out

    out = jax.vmap(of_request)(queries, evo_slots(keys, history, spec, encoding), local)
    return [heads_inner(x) for x in out]


def behaviour_branches(q, k, v, keys: Keys, history: History, spec: EvoSpec, encoding: Encoding):
    """As `candidate_branches` of the behaviours: q, k, v [B, L, H, K]."""
    return by_requests(
        functools.partial(_behaviour_branches, spec), (q, k, v, keys), history, encoding
    )


def _behaviour_branches(spec, requests, history, encoding):
    q, k, v, keys = requests
    heads, width = q.shape[-2:]
    slots, local = evo_slots(keys, history, spec, encoding), None
    w = min(spec.w, k.shape[1])
    if "local" in spec.branches:
        user = keys.user_k[..., None], keys.user_v[..., None]
        local = band_of(k, v, history, encoding, w), user

    def attend(queries, keys, first):
        """-> [R, H, K, T]."""
        slots, local = keys
        out = [over_slots(slot_weights(queries, s, encoding), s.v) for s in slots]
        if local is not None:
            band, user = local
            own = band_logits(queries, band, first, w, encoding)
            out.append(_with_user(queries, *(x[..., 0] for x in user), *own, over_band))
        return jnp.stack(out)

    number = sum(s.time.shape[1] for s in slots) + w * (2 * width + 1)
    out = over_tiles(
        attend,
        behaviour_queries(q, history, encoding, spec.scale),
        (slots, local),
        query_bytes=heads * number * accumulation_dtype(q.dtype).itemsize,
    )
    return [heads_inner(out[:, r]) for r in range(len(spec.branches))]


def _with_user(queries, user_k, user_v, logits, visible, v, over):
    """Attention of one request to the user key [H, K], which has no bias, and to other keys."""
    of_user = jnp.einsum("hk,hkt->ht", user_k, queries.q, preferred_element_type=logits.dtype)
    visible = jnp.broadcast_to(visible, (1, *logits.shape[1:]))
    visible = jnp.pad(visible, ((0, 0), (1, 0), (0, 0)), constant_values=True)
    weights = masked_softmax(jnp.concatenate([of_user[:, None], logits], 1), visible, -2)
    of_user = user_v[..., None] * weights[:, :1].astype(user_v.dtype)
    return over(weights[:, 1:], v) + of_user


def evo_slots(keys: Keys, history: History, spec: EvoSpec, encoding: Encoding) -> list[Slots]:
    """The slots of the global and of the transition branch, of those that are in use."""
    chunks, length, slots = history.chunks, history.times.shape[1], []
    if "global" in spec.branches:
        at, after = middle(chunks), jnp.where(chunks.valid, chunks.end, NEVER)
        k, v = encoding.rotated(keys.chunk_k, at, length), keys.chunk_v
        slots.append(Slots(sequence_last(k), sequence_last(v), chunks.mean_time, at, after))
    if "transition" in spec.branches:
        index, valid = (x.reshape(len(x), -1) for x in transition_slots(chunks, spec.m))
        after = jnp.where(valid, index - int(spec.inclusive), NEVER)
        k, v = encoding.rotated(keys.transition_k, index, length), keys.transition_v
        time = gather_rows(history.times, index)
        slots.append(Slots(sequence_last(k), sequence_last(v), time, index, after))
    return slots


def rotated_keys(keys: Keys, history: History, spec: EvoSpec, encoding: Encoding) -> Keys:
    """What kernels/evo_attention needs of RoPE: the keys of the slots turned.

    The user key stands with the candidates, so as it is.
    """
    length, recent = history.times.shape[1], keys.recent_k.shape[1]
    index = transition_slots(history.chunks, spec.m)[0].reshape(len(history.times), -1)
    rows = jnp.arange(length - recent, length, dtype=jnp.int32)[None]
    return keys.replace(
        chunk_k=encoding.rotated(keys.chunk_k, middle(history.chunks), length),
        transition_k=encoding.rotated(keys.transition_k, index, length),
        recent_k=encoding.rotated(keys.recent_k, rows, length),
    )
