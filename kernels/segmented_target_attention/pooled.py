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
from kernels.segmented_target_attention.reference import wide_einsum
from kernels.softmax import accumulation_dtype, masked_softmax, widened

FEW = 4  # queries of a request, of all heads and candidates
MOST_UNROLLED = 64  # behaviours of a segment: of 500, compiling would take seconds


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
    """api.segmented_target_attention on checked arguments: q [B, C, H, d], x [B, L, d]; scores,
    gates and sums in float32 at least."""
    b, c, h, d = q.shape
    rows = q.reshape(b, c * h, d), x, mask, jnp.tile(widened(bias), c)
    if activation == "sigmoid":
        sums = _sigmoid_sums(*rows, segment, scale)
    else:
        scores = _scores(rows[0], x, rows[3], scale)
        sums = _weighted(_gates(scores, mask[:, None], segment, activation), x, segment)
    return jnp.moveaxis(sums.reshape(b, c, h, -1, d), 2, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _sigmoid_sums(query, x, mask, bias, segment, scale):
    return _sigmoid_forward(query, x, mask, bias, segment, scale)[0]


def _sigmoid_forward(query, x, mask, bias, segment, scale):
    """query [B, M, d], bias [M] -> [B, M, S, d]."""
    gates = _gates(_scores(query, x, bias, scale), mask[:, None], segment, "sigmoid")
    return _weighted(gates, x, segment), (query, x, gates)


def _sigmoid_backward(segment, scale, residuals, d_sums):
    query, x, gates = residuals
    b, m, s, d = d_sums.shape
    by_segment = x.reshape(b, s, segment, d)
    d_gates = wide_einsum("bmsd,bswd->bmsw", d_sums, by_segment, gates.dtype)
    d_scores = d_gates.reshape(gates.shape) * gates * (1 - gates)
    d_products = d_scores if scale == 1 else d_scores * scale
    # x is keys and values at once: one pass writes its gradient, where two products would write
    # two arrays of its size and add them.
    of_gates, of_products = (_in_segments(a, segment)[..., None] for a in (gates, d_products))
    d_x = sum(
        of_gates[:, i] * d_sums[:, i, :, None] + of_products[:, i] * query[:, i, None, None]
        for i in range(m)
    )
    d_query = wide_einsum("bml,bld->bmd", d_products, x, gates.dtype)
    d_x = d_x.reshape(x.shape).astype(x.dtype)
    return d_query.astype(query.dtype), d_x, None, d_scores.sum((0, 2))


_sigmoid_sums.defvjp(_sigmoid_forward, _sigmoid_backward)


def _scores(query, x, bias, scale):
    """query [B, M, d], x [B, L, d], bias [M] -> [B, M, L]."""
    m, exact = query.shape[1], accumulation_dtype(x.dtype)
    if m > FEW or dispatch.platform() != "cpu":
        products = wide_einsum("bmd,bld->bml", query, x, exact)
    else:
        # A CPU packs its operands for a product of matrices, and not for one with a vector.
        products = [wide_einsum("bd,bld->bl", query[:, i], x, exact) for i in range(m)]
        products = jnp.stack(products, 1)
    return (products if scale == 1 else products * scale) + bias[:, None]


def _weighted(gates, x, segment):
    """gates [B, M, L], x [B, L, d] -> sums over segments [B, M, S, d], in one pass."""
    b, length, d = x.shape
    gates, rows = _in_segments(gates, segment), x.reshape(b, 1, -1, segment, d)
    if segment > MOST_UNROLLED:
        sums = wide_einsum("bmsw,bswd->bmsd", gates, rows[:, 0], gates.dtype)
    else:
        sums = sum(gates[..., i, None] * rows[..., i, :] for i in range(segment))
    return sums.astype(x.dtype)


def _gates(scores, mask, segment, activation):
    """[..., L] -> [..., L], 0 where masked."""
    if activation == "sigmoid":
        return jnp.where(mask, jax.nn.sigmoid(scores), 0)
    mask = jnp.broadcast_to(mask, scores.shape)
    return masked_softmax(*(_in_segments(a, segment) for a in (scores, mask))).reshape(scores.shape)


def _in_segments(x, segment):
    """[..., L] -> [..., S, w]."""
    return x.reshape(*x.shape[:-1], -1, segment)
