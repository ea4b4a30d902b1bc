"""Recency embedding: log2 of a behaviour's age at the request, as a vector added to its token.

The paper's ablation gives it the largest part of the gain (.09 pp); its input, buckets and how it
joins are not published. Decided here: floor(log2(max(age, 1))) seconds, added.
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


class RecencyEmbedding(nn.Module):
    """The table and each behaviour's row of it, for `rows_of` or the norm that adds them."""

    width: int

    @nn.compact
    def __call__(self, request_time: jax.Array, times: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B], [B, L] int32 seconds -> table [NUM_BUCKETS, width] and rows [B, L]."""
        table = self.param("table", nn.initializers.normal(0.02), (NUM_BUCKETS, self.width))
        return table, age_buckets(request_time, times)


@jax.custom_vjp
def rows_of(table: jax.Array, index: jax.Array) -> jax.Array:
    """table[index], with a gradient that is a product: scattering is slow into so few rows."""
    return table[index]


def summed_by_row(index: jax.Array, gradient: jax.Array, rows: int) -> jax.Array:
    """index [B, L], gradient [B, L, d] -> [rows, d], the sum of what goes to each row."""
    chosen = (index[..., None] == jnp.arange(rows)).astype(gradient.dtype)
    return jnp.einsum("...r,...d->rd", chosen, gradient)


def _forward(table, index):
    return table[index], (index, table.shape[0])


def _backward(residuals, gradient):
    index, rows = residuals
    return summed_by_row(index, gradient, rows), None


rows_of.defvjp(_forward, _backward)
