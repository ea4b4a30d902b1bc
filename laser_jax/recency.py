"""Recency embedding: log2 of a behaviour's age at the request, as a vector added to its token.

The paper's ablation gives it the largest part of the gain (.09 pp); its input, buckets and how it
joins are not published. Decided here (laser.md 3): floor(log2(max(age, 1))) seconds, added.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.evo_attention import floor_log2

NUM_BUCKETS = 31  # floor(log2) of positive int32


def age_buckets(request_time: jax.Array, times: jax.Array) -> jax.Array:
    """[B] and [B, L] int32 seconds -> int32 buckets [B, L] in 0..30; ages below a second are 0."""
    return floor_log2(request_time[:, None] - times)


@jax.custom_vjp
def rows_of(table: jax.Array, index: jax.Array) -> jax.Array:
    """table[index], with a gradient that is a product: scattering is slow into so few rows."""
    return table[index]


def _forward(table, index):
    return table[index], (index, table.shape[0])


def _backward(residuals, gradient):
    index, rows = residuals
    chosen = (index[..., None] == jnp.arange(rows)).astype(gradient.dtype)
    return jnp.einsum("...r,...d->rd", chosen, gradient), None


rows_of.defvjp(_forward, _backward)


class RecencyEmbedding(nn.Module):
    """A row of [NUM_BUCKETS, width] for each behaviour."""

    width: int

    @nn.compact
    def __call__(self, request_time: jax.Array, times: jax.Array) -> jax.Array:
        """[B], [B, L] int32 seconds -> [B, L, width]."""
        table = self.param("table", nn.initializers.normal(0.02), (NUM_BUCKETS, self.width))
        return rows_of(table, age_buckets(request_time, times))
