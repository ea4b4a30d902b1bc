"""Aggregation of a chunk's keys and values into one of each (SparseCTR eqs. 4 and 5).

The paper says only "implemented as an MLP". Axis letters: B requests, L history, P chunks,
H heads, K head width, d model width.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ctr_jax.layers import MLP
from sparsectr_jax.chunking import Chunks

# Those in MEAN_TYPE need the behaviours' mean only, which commutes with the K and V projections.
MEAN_TYPE = ("mean_mlp", "mean_residual", "mean")
AGGREGATES = MEAN_TYPE + ("mlp_mean", "attn_pool")
SCOPES = ("head", "model")


def membership(chunks: Chunks) -> jax.Array:
    """[B, P, L] bool: behaviour l belongs to the chunk in slot p."""
    slots = jnp.arange(1, chunks.valid.shape[1] + 1, dtype=jnp.int32)
    return chunks.chunk_id[:, None, :] == slots[:, None]


def chunk_mean(x: jax.Array, chunks: Chunks) -> jax.Array:
    """Mean of the rows of each chunk; 0 in unused slots.

    Args:
      x: [B, L, ...]. Returns: [B, P, ...] in x's dtype.
    """
    weights = membership(chunks).astype(x.dtype)
    total = jnp.einsum(
        "bpl,bl...->bp...",
        weights,
        x,
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )
    count = jnp.maximum(chunks.count, 1).reshape(chunks.count.shape + (1,) * (x.ndim - 2))
    return (total / count).astype(x.dtype)


def _slot_peaks(score: jax.Array, member: jax.Array) -> jax.Array:
    """Largest score [B, L, H] of each chunk [B, P, L] -> [B, P, H]; 0 in unused slots."""

    def of_slot(member: jax.Array) -> jax.Array:
        return jnp.max(jnp.where(member[..., None], score, -jnp.inf), 1)

    peak = jnp.moveaxis(jax.lax.map(of_slot, jnp.moveaxis(member, 1, 0)), 0, 1)
    return jnp.where(jnp.isfinite(peak), peak, 0)


class Aggregate(nn.Module):
    """Chunk keys or values from those of its behaviours.

    Attributes:
      kind: "mean_mlp": MLP(mean x). "mean_residual": mean x + MLP(mean x). "mean": mean x.
        "mlp_mean": mean MLP(x).
        "attn_pool": sum softmax_j(w . key_j) x_j with one vector w per head.
      mlp_over: what the MLPs act on: "head" maps K -> K with weights shared by the heads,
        "model" maps d -> d before the heads are split.
    """

    kind: str = "mean_mlp"
    mlp_over: str = "head"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, k: jax.Array, v: jax.Array, chunks: Chunks, is_mean: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, L, H, K] -> [B, P, H, K] each.

        Args:
          is_mean: k and v are the chunks' means [B, P, H, K] already (MEAN_TYPE kinds only).
        """
        if self.kind not in AGGREGATES:
            raise ValueError(f"aggregate must be one of {AGGREGATES}, got {self.kind!r}")
        if self.mlp_over not in SCOPES:
            raise ValueError(f"aggregate_scope must be one of {SCOPES}, got {self.mlp_over!r}")
        heads, width = k.shape[-2:]

        def mlp(x: jax.Array, name: str) -> jax.Array:
            if self.mlp_over == "head":
                return MLP((width, width), "swish", self.dtype, name=name)(x)
            flat = x.reshape(x.shape[:-2] + (heads * width,))
            return MLP((heads * width,) * 2, "swish", self.dtype, name=name)(flat).reshape(x.shape)

        if self.kind in MEAN_TYPE:
            if not is_mean:
                k, v = chunk_mean(k, chunks), chunk_mean(v, chunks)
            if self.kind == "mean_residual":
                return k + mlp(k, "mlp_k"), v + mlp(v, "mlp_v")
            return (k, v) if self.kind == "mean" else (mlp(k, "mlp_k"), mlp(v, "mlp_v"))
        if is_mean:
            raise ValueError(
                f"aggregate {self.kind!r} needs every behaviour, not the chunks' means"
            )
        if self.kind == "mlp_mean":
            return chunk_mean(mlp(k, "mlp_k"), chunks), chunk_mean(mlp(v, "mlp_v"), chunks)
        pool = self.param("pool", nn.initializers.normal(width**-0.5), (heads, width))
        # The softmax over each chunk stays [B, L, H]: peaks are found one slot at a time, where XLA
        # on a CPU would make [B, P, L, H] of all at once, and the peak of its chunk is read back
        # per behaviour through the same one-hot product that sums numerator and denominator.
        member = membership(chunks)
        score = jnp.einsum("blhk,hk->blh", k, pool.astype(k.dtype)).astype(jnp.float32)
        peak = _slot_peaks(jax.lax.stop_gradient(score), member)
        own_peak = jnp.einsum("bpl,bph->blh", member.astype(jnp.float32), peak)
        inside = chunks.chunk_id > 0
        weights = jnp.exp(jnp.where(inside[..., None], score - own_peak, -jnp.inf))
        total = jnp.einsum("bpl,blh->bph", member.astype(jnp.float32), weights)
        weights = weights[..., None].astype(k.dtype)
        total = jnp.where(total > 0, total, 1)[..., None].astype(k.dtype)
        pooled = (jnp.einsum("bpl,blhk->bphk", member.astype(k.dtype), weights * x) for x in (k, v))
        return tuple(x / total for x in pooled)
