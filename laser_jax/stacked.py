"""GSTA: global stacked target attention over segments, the refinement of LASER.

The paper's summary gives: a light module of stacked target attention on the compressed segments; a
reading note: M = 2 layers that update the target vector. Decided here: softmax and post-norm:

    u = LN(u + MHA(u; Z W_K, Z W_V));  u = LN(u + FFN(u))        m = 1..M, u_0 = the candidate

There is one query per candidate, so keys and values are never formed: per head u W_Q W_K^T meets
the segments themselves, and W_V comes after the weighted sum. A layer costs 2 H S d + O(d^2)
multiplications per candidate, not 2 S d^2.

Axis letters: B requests, C candidates, S segments, d model width, H heads.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.softmax import masked_softmax
from laser_jax.segmented import of_heads


class StackedLayer(nn.Module):
    """One layer; d is divisible by num_heads."""

    num_heads: int = 2
    ffn_multiplier: int = 1

    @nn.compact
    def __call__(self, u: jax.Array, segments: jax.Array, mask: jax.Array) -> jax.Array:
        """u [B, C, d], segments [B, C, S, d], mask [B, S] bool -> [B, C, d]."""
        (*_, d), h = u.shape, self.num_heads
        of_query = self.param("query", nn.initializers.xavier_uniform(), (d, d))
        of_key, of_value = (self.param(name, of_heads, (h, d, d // h)) for name in ("key", "value"))
        query = (u @ of_query).reshape(*u.shape[:-1], h, -1) * (d // h) ** -0.5
        query = jnp.einsum("bchk,hdk->bchd", query, of_key)
        logits = jnp.einsum("bchd,bcsd->bchs", query, segments)
        weights = masked_softmax(logits, mask[:, None, None]).astype(segments.dtype)
        pooled = jnp.einsum("bchs,bcsd->bchd", weights, segments)
        heads = jnp.einsum("bchd,hdk->bchk", pooled, of_value).reshape(u.shape)
        u = nn.LayerNorm(name="norm")(u + nn.Dense(d, use_bias=False, name="out")(heads))
        hidden = nn.gelu(nn.Dense(self.ffn_multiplier * d, name="ffn_in")(u))
        return nn.LayerNorm(name="ffn_norm")(u + nn.Dense(d, name="ffn_out")(hidden))


class StackedTargetAttention(nn.Module):
    """M layers."""

    num_layers: int = 2
    num_heads: int = 2
    ffn_multiplier: int = 1

    @nn.compact
    def __call__(self, candidates: jax.Array, segments: jax.Array, mask: jax.Array) -> jax.Array:
        """candidates [B, C, d], segments [B, C, S, d], mask [B, S] bool -> u_M [B, C, d]."""
        u = candidates
        # What an empty segment holds meets a weight of zero: it has to be finite, so zero.
        segments = jnp.where(mask[:, None, :, None], segments, 0)
        for i in range(self.num_layers):
            u = StackedLayer(self.num_heads, self.ffn_multiplier, name=f"layer_{i}")(
                u, segments, mask
            )
        return u
