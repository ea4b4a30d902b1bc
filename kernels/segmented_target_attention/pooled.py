"""The XLA path where behaviours are keys and values of all heads: api.py with v = None.

For few candidates, as a score is as wide as a behaviour: the gates of all heads of all candidates
are kept, [B, C H, L].

Axis letters: B requests, C candidates, L history length, S segments, w segment size, H heads, d
width, M = C H.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.softmax import masked_softmax

FEW = 4  # queries of a request, of all heads and candidates


def pooled_sums(
    q: jax.Array,
    x: jax.Array,
    mask: jax.Array,
    bias: jax.Array,
    *,
    segment: int,
    activation: str,
    scale: float,
) -> jax.Array:
    """api.segmented_target_attention on checked arguments: q [B, C, H, d], x [B, L, d]."""
    b, c, h, d = q.shape
    q = q if scale == 1 else q * scale
    rows = q.reshape(b, c * h, d), x, mask, jnp.tile(bias.astype(q.dtype), c)
    if activation == "sigmoid":
        sums = _sigmoid_sums(*rows, segment)
    else:
        scores = _products(rows[0], x) + rows[3][:, None]
        gates = _gates(scores, mask[:, None], segment, activation).astype(x.dtype)
        sums = _weighted(gates, x, segment)
    return jnp.moveaxis(sums.reshape(b, c, h, -1, d), 2, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sigmoid_sums(query, x, mask, bias, segment):
    return _sigmoid_forward(query, x, mask, bias, segment)[0]


def _sigmoid_forward(query, x, mask, bias, segment):
    """query [B, M, d], bias [M] -> [B, M, S, d]."""
    scores = _products(query, x) + bias[:, None]
    gates = _gates(scores, mask[:, None], segment, "sigmoid")
    return _weighted(gates, x, segment), (query, x, gates)


def _sigmoid_backward(segment, residuals, d_sums):
    query, x, gates = residuals
    b, m, s, d = d_sums.shape
    d_gates = jnp.einsum("bmsd,bswd->bmsw", d_sums, x.reshape(b, s, segment, d))
    d_scores = d_gates.reshape(gates.shape) * gates * (1 - gates)
    # x is keys and values at once: one pass writes its gradient, where two products would write
    # two arrays of its size and add them.
    by_segment = [_in_segments(a, segment)[..., None] for a in (gates, d_scores)]
    d_x = sum(
        by_segment[0][:, i] * d_sums[:, i, :, None] + by_segment[1][:, i] * query[:, i, None, None]
        for i in range(m)
    )
    d_query = jnp.einsum("bml,bld->bmd", d_scores, x)
    return d_query, d_x.reshape(x.shape), None, d_scores.sum((0, 2))


_sigmoid_sums.defvjp(_sigmoid_forward, _sigmoid_backward)


def _products(query, x):
    """query [B, M, d], x [B, L, d] -> [B, M, L]."""
    m = query.shape[1]
    if m > FEW or dispatch.platform() != "cpu":
        return jnp.einsum("bmd,bld->bml", query, x)
    # A CPU packs its operands for a product of matrices, and not for one with a vector.
    return jnp.stack([jnp.einsum("bd,bld->bl", query[:, i], x) for i in range(m)], 1)


def _weighted(gates, x, segment):
    """gates [B, M, L], x [B, L, d] -> sums over segments [B, M, S, d], in one pass."""
    b, length, d = x.shape
    gates, x = _in_segments(gates, segment), x.reshape(b, 1, -1, segment, d)
    return sum(gates[..., i, None] * x[..., i, :] for i in range(segment))


def _gates(scores, mask, segment, activation):
    """[..., L] -> [..., L], 0 where masked."""
    if activation == "sigmoid":
        return jnp.where(mask, jax.nn.sigmoid(scores), 0)
    mask = jnp.broadcast_to(mask, scores.shape)
    return masked_softmax(*(_in_segments(a, segment) for a in (scores, mask))).reshape(scores.shape)


def _in_segments(x, segment):
    """[..., L] -> [..., S, w]."""
    return x.reshape(*x.shape[:-1], -1, segment)
