"""Full attention over the history: ablation A1 (SparseCTR 4.3).

Standard causal self-attention in the place of EvoAttention: a behaviour sees the valid
behaviours at j <= i, a candidate all of them. No user key, no fusion gate. This is the one
place where a tensor of L x n is made.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.softmax import accumulation_dtype, masked_softmax
from sparsectr_jax.encodings import Encoding, Places


def full_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    times: jax.Array,
    mask: jax.Array,
    request_time: jax.Array,
    encoding: Encoding,
    scale: float | None = None,
    has_behaviours: bool = True,
) -> jax.Array:
    """Dense attention; RelTemporal's integer terms are made once and shared by the heads.

    Args:
      q: [B, n, H, K]: the behaviours' queries (absent unless has_behaviours), the candidates'.
      k, v: [B, L, H, K]. times: [B, L] int32. mask: [B, L]. request_time: [B].
    Returns:
      [B, n, H, K] in q's dtype; 0 where nothing is visible.
    """
    dtype = accumulation_dtype(q.dtype)
    batch, length = times.shape
    candidates = q.shape[1] - (length if has_behaviours else 0)
    of_behaviours, of_candidates = encoding.query_times(times, request_time)
    query_time = jnp.broadcast_to(of_candidates, (batch, candidates))
    position = jnp.full((candidates,), length, jnp.int32)
    index = jnp.arange(length, dtype=jnp.int32)
    if has_behaviours:
        query_time = jnp.concatenate([of_behaviours, query_time], 1)
        position = jnp.concatenate([index, position])
    q, k = (encoding.rotated(x, at, length) for x, at in ((q, position), (k, index)))
    logits = jnp.einsum("bnhk,blhk->bhnl", q, k, preferred_element_type=dtype)
    logits = logits * (q.shape[-1] ** -0.5 if scale is None else scale)

    def with_bias(logits, query_time, time):
        query = Places(query_time[None, :, None], position[None, :, None])
        key = Places(time[None, None], index[None, None])
        return logits + encoding.bias(query, key, dtype)

    logits = jax.vmap(with_bias)(logits, query_time, times)
    visible = (index <= position[:, None]) & mask[:, None, :]
    weights = masked_softmax(logits, visible[:, None]).astype(v.dtype)
    return jnp.einsum("bhnl,blhk->bnhk", weights, v)
