"""EvoAttention in plain XLA: what kernels are measured against, and the path that runs anywhere.

No tensor here is n x n. A query's global and transition keys are a prefix of P (1 + m) slots, so
they are one dense product with a mask; the local band is w shifted products (tiles.py). Logits are
laid out [B, H, keys, queries]: the long axis is the minor one, and softmax reduces over a major
one.

Axis letters: B requests, C candidates, L history, S slots, R recent behaviours, H heads, K width.
"""

from __future__ import annotations

import jax.numpy as jnp

from kernels.evo_attention.arguments import NEVER, Static, scale_of
from kernels.evo_attention.tiles import tiled_branches
from kernels.softmax import accumulation_dtype, masked_softmax


def behaviour_branches(spec: Static, q, prefixes, band, slopes, times, mask):
    """As api.behaviour_branches; one [B, L, H, K] per prefix, then one for the band if given."""
    return tiled_branches(spec, q, tuple(prefixes), band, slopes, times, mask)


def candidate_branches(spec: Static, q, prefixes, recent, slopes, request_time):
    """As api.candidate_branches; one [B, C, H, K] per prefix, then one for `recent` if given.

    Candidates stand behind the whole history and share one time, so masks and biases are per
    request, [B, S].
    """
    out = [_attend(spec, q, *p[:3], p.position < NEVER, slopes, request_time) for p in prefixes]
    if recent is not None:
        k = jnp.concatenate([recent.user_k[:, None], recent.k], 1)
        v = jnp.concatenate([recent.user_v[:, None], recent.v], 1)
        visible = jnp.pad(recent.mask, ((0, 0), (1, 0)), constant_values=True)
        out.append(_attend(spec, q, k, v, recent.time, visible, slopes, request_time))
    return tuple(out)


def _attend(spec, q, k, v, time, visible, slopes, request_time):
    """q [B, C, H, K], k, v [B, S, H, K], visible [B, S], time [B, S or S - 1] -> [B, C, H, K].

    Where time is one short, the first key is the user's, without a bias.
    """
    dtype = accumulation_dtype(q.dtype)
    logits = jnp.einsum("bchk,bshk->bhcs", q * scale_of(q, spec), k, preferred_element_type=dtype)
    terms = spec.rel.pair_terms(request_time[:, None], time, dtype.type)
    user = k.shape[1] - time.shape[1]
    for part, term in zip(spec.rel.parts, terms, strict=True):
        bias = slopes[part].astype(dtype)[:, None] * jnp.pad(term, ((0, 0), (user, 0)))[:, None]
        logits = logits - bias[:, :, None]
    weights = masked_softmax(logits, visible[:, None, None])
    # Not rounded, so that neither are their gradients: the slopes' are sums that nearly cancel.
    return jnp.einsum("bhcs,bshk->bchk", weights, v.astype(dtype)).astype(v.dtype)
