"""Full attention over the history with RelTemporal: ablation A1 (SparseCTR 4.3).

Standard causal self-attention in the place of EvoAttention: a behaviour sees the valid
behaviours at j <= i, a candidate all of them. No user key, no fusion gate. This is the one
place where a tensor of L x n is made.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.evo_attention import RelTemporal
from kernels.softmax import accumulation_dtype, masked_softmax


def full_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slopes: jax.Array,
    times: jax.Array,
    mask: jax.Array,
    request_time: jax.Array,
    rel: RelTemporal,
    scale: float | None = None,
    has_behaviours: bool = True,
) -> jax.Array:
    """Dense attention; the bias's integer terms are made once and shared by the heads.

    Args:
      q: [B, n, H, K]: the behaviours' queries (absent unless has_behaviours), the candidates'.
      k, v: [B, L, H, K]. slopes: [3, H]. times: [B, L] int32. mask: [B, L]. request_time: [B].
    Returns:
      [B, n, H, K] in q's dtype; 0 where nothing is visible.
    """
    dtype = accumulation_dtype(q.dtype)
    batch, length = times.shape
    candidates = q.shape[1] - (length if has_behaviours else 0)
    query_time = jnp.broadcast_to(request_time[:, None], (batch, candidates))
    position = jnp.full((candidates,), length, jnp.int32)
    if has_behaviours:
        query_time = jnp.concatenate([times, query_time], 1)
        position = jnp.concatenate([jnp.arange(length, dtype=jnp.int32), position])
    logits = jnp.einsum("bnhk,blhk->bhnl", q, k, preferred_element_type=dtype)
    logits = logits * (q.shape[-1] ** -0.5 if scale is None else scale)
    terms = rel.pair_terms(query_time[:, :, None], times[:, None, :], dtype.type)
    for part, term in zip(rel.parts, terms, strict=True):
        logits = logits - slopes[part].astype(dtype)[:, None, None] * term[:, None]
    visible = (jnp.arange(length) <= position[:, None]) & mask[:, None, :]
    weights = masked_softmax(logits, visible[:, None]).astype(v.dtype)
    return jnp.einsum("bhnl,blhk->bnhk", weights, v)
