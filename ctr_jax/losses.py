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


def loss_denominator(mask: jax.Array, per_request: bool = False) -> jax.Array:
    """What `binary_cross_entropy` divides by: the valid candidates, or the rows that have one.

    Args:
      mask: [B, C] bool, of the global batch.
    Returns:
      float32 scalar, at least 1, so that an empty batch has loss 0.
    """
    counted = jnp.any(mask, axis=1) if per_request else mask.astype(bool)
    # Counted as int32: a float32 sum of ones is not exact beyond 2**24.
    return jnp.maximum(jnp.sum(counted, dtype=jnp.int32), 1).astype(jnp.float32)


def binary_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    *,
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
        denominator = loss_denominator(mask, per_request)
    # Replaced before the loss, not after: otherwise a NaN at padding gets through the gradient.
    losses = candidate_losses(jnp.where(mask, logits, 0), jnp.where(mask, labels, 0))
    losses = jnp.where(mask, losses, 0)
    if per_request:
        losses = jnp.sum(losses, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)
    return jnp.sum(losses) / denominator
