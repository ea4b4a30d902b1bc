"""EvoAttention: global, transition and local attention over a history (SparseCTR 3.4).

What a query at position i (a behaviour's index; L for every candidate) may see:

  global      the aggregate of each chunk that ended before i                       (eq. 6)
  transition  the last m behaviours of each chunk, those at positions j <= i        (eq. 7)
  local       the user key, and the behaviours in [i - w + 1, i]; a candidate sees the
              history's last w                                                      (eq. 8)

Candidates are never keys. A branch with nothing to see gives 0. RelTemporal is added to every
logit but the user key's, which has no time. Here the chunks become slots, each with a time and the
position that a query must be beyond; the attention itself is kernels/evo_attention.

Axis letters: B requests, C candidates, L history, n = L + C, P chunks, m, w, H heads, K width.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from kernels import evo_attention as op
from kernels.evo_attention import NEVER, Band, Prefix, Recent, RelTemporal
from sparsectr_jax.chunking import Chunks, transition_slots

BRANCHES = ("global", "transition", "local")


@dataclasses.dataclass(frozen=True)
class EvoSpec:
    """The static part of the op.

    Attributes:
      m: transition behaviours per chunk. w: width of the local band.
      rel: the parts of RelTemporal that are on.
      inclusive: a behaviour that is a transition behaviour sees itself (j <= i, or j < i).
      scale: of the logits; None is K^-1/2.
      branches: those to compute; the others are returned as None.
      tile_logits: as of the op.
    """

    m: int = 2
    w: int = 5
    rel: RelTemporal = RelTemporal()
    inclusive: bool = True
    scale: float | None = None
    branches: tuple[str, ...] = BRANCHES
    tile_logits: int = 0


@flax.struct.dataclass
class Keys:
    """What queries see besides the band: all of it is O(P m + w) per request.

    Attributes:
      chunk_k, chunk_v: [B, P, H, K]. transition_k, transition_v: [B, P m, H, K].
      recent_k, recent_v: [B, min(w, L), H, K], the history's last behaviours.
      user_k, user_v: [B, H, K].
    """

    chunk_k: jax.Array
    chunk_v: jax.Array
    transition_k: jax.Array
    transition_v: jax.Array
    recent_k: jax.Array
    recent_v: jax.Array
    user_k: jax.Array
    user_v: jax.Array


@flax.struct.dataclass
class History:
    """The integers of a batch of histories: all that masks and biases need.

    Attributes:
      chunks: Chunks; None where the attention has none.
      times: [B, L] int32 seconds. mask: [B, L] bool, right-aligned.
      request_time: [B] int32, the candidates' time.
    """

    chunks: Chunks | None
    times: jax.Array
    mask: jax.Array
    request_time: jax.Array


def gather_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, L, ...] at index [B, J] -> [B, J, ...]."""
    # As whole rows: a TPU pads the last axes of what it gathers from, [H, K] of 8 x 4 to 16 times
    # its size.
    flat = x.reshape(*x.shape[:2], -1)
    return jnp.take_along_axis(flat, index[..., None], 1).reshape(*index.shape, *x.shape[2:])


def evo_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    chunk_k: jax.Array,
    chunk_v: jax.Array,
    user_k: jax.Array,
    user_v: jax.Array,
    slopes: jax.Array,
    history: History,
    spec: EvoSpec,
) -> tuple[jax.Array | None, ...]:
    """The three sparse branches (SparseCTR eqs. 6-8 and 16).

    Args:
      q: [B, n, H, K], n = L + C: the behaviours' queries, then the candidates'.
      k, v: [B, L, H, K]. chunk_k, chunk_v: [B, P, H, K]. user_k, user_v: [B, H, K].
      slopes: [3, H] of RelTemporal: time, hour, weekend.
    Returns:
      (global, transition, local), each [B, n, H, K] in q's dtype, or None if not in
      spec.branches. Rows of padding behaviours are finite and mean nothing.
    """
    length = k.shape[1]
    index, _ = transition_slots(history.chunks, spec.m)
    index = index.reshape(index.shape[0], -1)
    recent = slice(max(length - spec.w, 0), length)
    keys = Keys(
        chunk_k,
        chunk_v,
        gather_rows(k, index),
        gather_rows(v, index),
        k[:, recent],
        v[:, recent],
        user_k,
        user_v,
    )
    behaviours = behaviour_branches(q[:, :length], k, v, keys, slopes, history, spec)
    if q.shape[1] == length:
        return behaviours
    candidates = candidate_branches(q[:, length:], keys, slopes, history, spec)
    return tuple(
        None if b is None else jnp.concatenate([b, c], 1)
        for b, c in zip(behaviours, candidates, strict=True)
    )


def branch_nonempty(history: History, spec: EvoSpec) -> tuple[jax.Array, jax.Array]:
    """Which queries see anything in each branch.

    Returns:
      behaviours: [B, L, 3] bool. candidates: [B, 1, 3] bool. The local branch always has the
      user key.
    """
    chunks, length = history.chunks, history.times.shape[1]
    first_end = jnp.where(chunks.valid[:, 0], chunks.end[:, 0], length)
    first_transition = jnp.maximum(chunks.start[:, 0], chunks.end[:, 0] - (spec.m - 1))
    first_transition = jnp.where(chunks.valid[:, 0], first_transition, length)
    position = jnp.arange(length, dtype=jnp.int32)
    behaviours = jnp.stack(
        [
            first_end[:, None] < position,
            first_transition[:, None] < position + int(spec.inclusive),
            jnp.ones_like(history.mask),
        ],
        -1,
    )
    any_chunk = chunks.valid[:, :1]
    candidates = jnp.stack([any_chunk, any_chunk, jnp.ones_like(any_chunk)], -1)
    return behaviours, candidates


def behaviour_branches(q, k, v, keys: Keys, slopes, history: History, spec: EvoSpec):
    """The branches for the behaviours' queries: q, k, v [B, L, H, K]."""
    return op.behaviour_branches(
        q,
        *_slots(keys, history, spec),
        Band(k, v, keys.user_k, keys.user_v) if "local" in spec.branches else None,
        slopes,
        history.times,
        history.mask,
        rel=spec.rel,
        window=spec.w,
        scale=spec.scale,
        tile_logits=spec.tile_logits,
    )


def candidate_branches(q, keys: Keys, slopes, history: History, spec: EvoSpec):
    """The branches for the candidates' queries: q [B, C, H, K]; k and v are not needed."""
    recent = None
    if "local" in spec.branches:
        last = slice(history.times.shape[1] - keys.recent_k.shape[1], None)
        recent = Recent(
            keys.recent_k,
            keys.recent_v,
            keys.user_k,
            keys.user_v,
            history.times[:, last],
            history.mask[:, last],
        )
    return op.candidate_branches(
        q,
        *_slots(keys, history, spec),
        recent,
        slopes,
        history.request_time,
        rel=spec.rel,
        scale=spec.scale,
    )


def _slots(keys: Keys, history: History, spec: EvoSpec) -> tuple[Prefix | None, Prefix | None]:
    """The global and transition keys, with their times and the positions they end at."""
    glob = trans = None
    if "global" in spec.branches:
        chunks = history.chunks
        position = jnp.where(chunks.valid, chunks.end, NEVER)
        glob = Prefix(keys.chunk_k, keys.chunk_v, chunks.mean_time, position)
    if "transition" in spec.branches:
        index, valid = transition_slots(history.chunks, spec.m)
        index, valid = (x.reshape(x.shape[0], -1) for x in (index, valid))
        time = gather_rows(history.times, index)
        position = jnp.where(valid, index - int(spec.inclusive), NEVER)
        trans = Prefix(keys.transition_k, keys.transition_v, time, position)
    return glob, trans
