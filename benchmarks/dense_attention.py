"""Full causal attention with RelTemporal's bias or without: what the sparse op is measured against.

Every form is (q, k, v, slopes, times) -> [B, L, H, K], with q, k, v [B, L, H, K], slopes [3, H] and
times [B, L] int32. The bias' integer terms are made once and shared by the heads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.evo_attention import Prefix, RelTemporal, behaviour_branches
from kernels.softmax import masked_softmax

NO_BIAS = RelTemporal(time=False, hour=False, weekend=False)


def bias_terms(rel: RelTemporal, slopes, query_times, key_times):
    """RelTemporal's bias [B, H, n, j] of times [B, n] and [B, j], float32; 0 with no part on."""
    bias = jnp.float32(0)
    terms = rel.pair_terms(query_times[:, :, None], key_times[:, None])
    for part, term in zip(rel.parts, terms, strict=True):
        bias = bias - slopes[part][:, None, None] * term[:, None]
    return bias


def dense_blocks(block, rel, q, k, v, slopes, times):
    """Masked attention by blocks of queries, over the keys up to the block's end."""
    out = []
    for a in range(0, q.shape[1], block):
        b = min(a + block, q.shape[1])
        scaled = q[:, a:b] * q.shape[-1] ** -0.5
        logits = jnp.einsum("bnhk,bjhk->bhnj", scaled, k[:, :b], preferred_element_type=jnp.float32)
        if rel.parts:
            logits = logits + bias_terms(rel, slopes, times[:, a:b], times[:, :b])
        visible = jnp.arange(b) <= jnp.arange(a, b)[:, None]
        weights = masked_softmax(logits, visible).astype(v.dtype)
        out.append(jnp.einsum("bhnj,bjhk->bnhk", weights, v[:, :b]))
    return jnp.concatenate(out, 1)


def dense_tiled(tile, rel, q, k, v, slopes, times):
    """Every behaviour as a key of the sparse op's prefix branch: its loop, layout and recomputing
    backward pass. tile: logits of a tile; 0 chooses."""
    position = jnp.arange(k.shape[1], dtype=jnp.int32) - 1
    every = Prefix(k, v, times, jnp.broadcast_to(position, times.shape))
    mask = jnp.ones(times.shape, bool)
    return behaviour_branches(
        q, every, None, None, slopes, times, mask, rel=rel, window=1, tile_logits=tile,
        implementation="xla",
    )[0]  # fmt: skip


def library(implementation, rel, width, q, k, v, slopes, times):
    """jax.nn.dot_product_attention ("xla" or "cudnn"), heads padded with zeros to `width`."""
    own = q.shape[-1]
    q, k, v = (jnp.pad(x, ((0, 0),) * 3 + ((0, width - own),)) for x in (q, k, v))
    bias = None
    if rel.parts:
        # Of q's type: cuDNN gives NaN gradients for a wider one. Written to memory: fused into the
        # softmax, it takes XLA's GPU compiler a minute and more.
        bias = bias_terms(rel, slopes, times, times).astype(q.dtype)
        bias = jax.lax.optimization_barrier(bias)
    out = jax.nn.dot_product_attention(
        q, k, v, bias, is_causal=True, scale=own**-0.5, implementation=implementation
    )
    return out[..., :own]
