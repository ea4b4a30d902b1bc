"""Binary cross-entropy of clicks, over the valid candidates of a batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def candidate_losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log p(label) of each candidate, natural logarithm, in float32 (float64 if the logits are).

    Written as y softplus(-x) + (1 - y) softplus(x): neither the value nor the gradient
    sigmoid(x) - y loses digits to cancellation, however large the logit. Shapes alike.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    labels = labels.astype(logits.dtype)
    return labels * jax.nn.softplus(-logits) + (1 - labels) * jax.nn.softplus(logits)


def loss_denominator(
    mask: jax.Array, per_request: bool = False, weights: jax.Array | None = None
) -> jax.Array:
    """What `binary_cross_entropy` divides by: the valid candidates, or the rows that have one.

    Args:
      mask: [B, C] bool, of the global batch.
      weights: [B, C]; candidates count by them, rows if one is more than 0.
    Returns:
      float32 scalar, more than 0, so that an empty batch has loss 0.
    """
    if weights is not None and not per_request:
        total = jnp.sum(jnp.where(mask, weights, 0), dtype=jnp.float32)
        return jnp.where(total > 0, total, 1.0)
    counted = mask.astype(bool) if weights is None else mask.astype(bool) & (weights > 0)
    counted = jnp.any(counted, axis=1) if per_request else counted
    # Counted as int32: a float32 sum of ones is not exact beyond 2**24.
    return jnp.maximum(jnp.sum(counted, dtype=jnp.int32), 1).astype(jnp.float32)


def binary_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    *,
    weights: jax.Array | None = None,
    per_request: bool = False,
    denominator: jax.Array | None = None,
) -> jax.Array:
    """Binary cross-entropy of a batch (SparseCTR eq. 18), a float32 scalar.

    Under `jax.jit` with sharded inputs the sums run over the global batch. Where a program sees a
    part only (a micro-batch, a `jax.shard_map` body), pass the global `denominator`: the losses of
    the parts then add up to the loss of the whole.

    Args:
      logits: [B, C]; padded positions may hold anything, NaN included, in value and gradient.
      labels: [B, C] in {0, 1}.
      mask: [B, C] bool, the valid candidates.
      weights: [B, C], 0 or more; means become weighted means, so that their scale changes nothing.
      per_request: False: sum over valid candidates / their number. True: the mean over a row's
        valid candidates, averaged over the rows that have any, so that a request with many
        candidates weighs no more than one with few (rows of a split request count apart).
      denominator: scalar; `loss_denominator` of the global mask. None: of this mask.
    Raises:
      ValueError: shapes differ.
    """
    if not logits.shape == labels.shape == mask.shape or mask.ndim != 2:
        raise ValueError(
            f"logits {logits.shape}, labels {labels.shape}, mask {mask.shape}: need [B, C] alike"
        )
    mask = mask.astype(bool)
    if denominator is None:
        denominator = loss_denominator(mask, per_request, weights)
    # Replaced before the loss, not after: otherwise a NaN at padding gets through the gradient.
    losses = candidate_losses(jnp.where(mask, logits, 0), jnp.where(mask, labels, 0))
    counts = mask if weights is None else jnp.where(mask, weights, 0)
    losses = losses * counts
    if per_request:
        of_row = jnp.sum(counts, axis=1)
        losses = jnp.sum(losses, axis=1) / jnp.where(of_row > 0, of_row, 1)
    return jnp.sum(losses) / denominator
