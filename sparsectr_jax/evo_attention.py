"""EvoAttention: global, transition and local attention over a history (SparseCTR 3.4).

The op between the projections and the fusion gate, in plain XLA. It returns the three branch
outputs apart. What a query at position i (a behaviour's index; L for every candidate) may see:

  global      the aggregate of each chunk that ended before i                       (eq. 6)
  transition  the last m behaviours of each chunk, those at positions j <= i        (eq. 7)
  local       the user key, and the behaviours in [i - w + 1, i]; a candidate sees the
              history's last w                                                      (eq. 8)

Candidates are never keys. A branch with nothing to see gives 0. RelTemporal is added to every
logit but the user key's, which has no time.

No tensor here is n x n. A query's global and transition keys are a prefix of P (1 + m) slots, so
they are one dense product with a mask; the local band is w shifted products. Logits are laid out
[B, H, keys, queries]: the long axis is the minor one, and softmax reduces over a major one.

Axis letters: B requests, C candidates, L history, n = L + C, P chunks, m, w, H heads, K width.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from ctr_jax.layers import accumulation_dtype, masked_softmax
from sparsectr_jax.chunking import Chunks, transition_slots
from sparsectr_jax.evo_tiles import Band, Prefix, tiled_branches
from sparsectr_jax.temporal import RelTemporal

BRANCHES = ("global", "transition", "local")
NEVER = 2**30  # a position that no query reaches: that of unused slots


@dataclasses.dataclass(frozen=True)
class EvoSpec:
    """The static part of the op.

    Attributes:
      m: transition behaviours per chunk. w: width of the local band.
      rel: the parts of RelTemporal that are on.
      inclusive: a behaviour that is a transition behaviour sees itself (j <= i, or j < i).
      scale: of the logits; None is K^-1/2.
      branches: those to compute; the others are returned as None.
      tile_logits: logits of one branch in a tile of the behaviours' loop; 0 chooses.
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
      chunks: Chunks.
      times: [B, L] int32 seconds. mask: [B, L] bool, right-aligned.
      request_time: [B] int32, the candidates' time.
    """

    chunks: Chunks
    times: jax.Array
    mask: jax.Array
    request_time: jax.Array


def gather_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, L, ...] at index [B, J] -> [B, J, ...]."""
    return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), 1)


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
    prefixes = []
    if "global" in spec.branches:
        time, position = _chunk_times(history)
        prefixes.append(Prefix(keys.chunk_k, keys.chunk_v, time, position))
    if "transition" in spec.branches:
        time, position = _transition_times(history, spec)
        prefixes.append(Prefix(keys.transition_k, keys.transition_v, time, position))
    band = Band(k, v, keys.user_k, keys.user_v) if "local" in spec.branches else None
    budget = spec.tile_logits or default_tile_logits()
    out = tiled_branches(
        (spec, budget), q, tuple(prefixes), band, slopes, history.times, history.mask
    )
    out = dict(zip([b for b in BRANCHES if b in spec.branches], out, strict=True))
    return tuple(out.get(b) for b in BRANCHES)


def default_tile_logits() -> int:
    """Logits of a tile: what stays in a CPU's cache; on accelerators, 256 MB of float32."""
    return 600_000 if jax.default_backend() == "cpu" else 64_000_000


def _chunk_times(history: History):
    """Time and last position [B, P] of the chunks; unused slots are behind every query."""
    chunks = history.chunks
    return chunks.mean_time, jnp.where(chunks.valid, chunks.end, NEVER)


def _transition_times(history: History, spec: EvoSpec):
    """Time [B, P m] of the transition behaviours, and the position a query must be beyond."""
    index, valid = transition_slots(history.chunks, spec.m)
    index, valid = (x.reshape(x.shape[0], -1) for x in (index, valid))
    time = gather_rows(history.times, index)
    return time, jnp.where(valid, index - int(spec.inclusive), NEVER)


def candidate_branches(q, keys: Keys, slopes, history: History, spec: EvoSpec):
    """The branches for the candidates' queries: q [B, C, H, K]; k and v are not needed.

    Candidates stand behind the whole history and share one time, so masks and biases are
    per request, [B, S].
    """
    glob = trans = local = None
    if "global" in spec.branches:
        time, position = _chunk_times(history)
        glob = _attend(q, keys.chunk_k, keys.chunk_v, time, position < NEVER, slopes, history, spec)
    if "transition" in spec.branches:
        time, position = _transition_times(history, spec)
        trans = _attend(
            q, keys.transition_k, keys.transition_v, time, position < NEVER, slopes, history, spec
        )
    if "local" in spec.branches:
        recent = slice(history.times.shape[1] - keys.recent_k.shape[1], None)
        local = _attend(
            q,
            jnp.concatenate([keys.user_k[:, None], keys.recent_k], 1),
            jnp.concatenate([keys.user_v[:, None], keys.recent_v], 1),
            history.times[:, recent],
            jnp.pad(history.mask[:, recent], ((0, 0), (1, 0)), constant_values=True),
            slopes,
            history,
            spec,
        )
    return glob, trans, local


def _attend(q, k, v, time, visible, slopes, history, spec):
    """q [B, C, H, K], k, v [B, S, H, K], visible [B, S], time [B, S or S - 1] -> [B, C, H, K].

    Where time is one short, the first key is the user's, without a bias.
    """
    dtype = accumulation_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if spec.scale is None else spec.scale
    logits = jnp.einsum("bchk,bshk->bhcs", q * scale, k, preferred_element_type=dtype)
    terms = spec.rel.pair_terms(history.request_time[:, None], time, dtype.type)
    user = k.shape[1] - time.shape[1]
    for part, term in zip(spec.rel.parts, terms, strict=True):
        bias = slopes[part].astype(dtype)[:, None] * jnp.pad(term, ((0, 0), (user, 0)))[:, None]
        logits = logits - bias[:, :, None]
    weights = masked_softmax(logits, visible[:, None, None]).astype(v.dtype)
    return jnp.einsum("bhcs,bshk->bchk", weights, v)
