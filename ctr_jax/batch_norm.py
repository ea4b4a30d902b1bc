"""Batch normalisation over valid positions only."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


class MaskedBatchNorm(nn.Module):
    """Batch normalisation whose statistics run over the valid positions of the global batch.

    Under `jax.jit` with a sharded batch the sums span all devices. Running statistics live in the
    "batch_stats" collection; a batch without a valid position leaves them as they are.

    Attributes:
      momentum: weight of the old running statistics.
      affine: learn a scale and a shift.
    """

    momentum: float = 0.9
    eps: float = 1e-5
    affine: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        """x [..., d], mask [...] bool -> [..., d]; masked positions are computed like any other."""
        width, dtype = x.shape[-1], x.dtype
        mean = self.variable("batch_stats", "mean", jnp.zeros, (width,))
        variance = self.variable("batch_stats", "variance", jnp.ones, (width,))
        if train:
            exact = jnp.promote_types(dtype, jnp.float32)
            weight = mask[..., None].astype(exact)
            axes = tuple(range(x.ndim - 1))
            count = jnp.sum(weight)
            total = jnp.maximum(count, 1.0)
            # Where, not only a product: a masked position may hold anything, NaN included.
            valid = jnp.where(mask[..., None], x, 0).astype(exact)
            batch_mean = jnp.sum(valid, axes) / total
            centred = jnp.where(mask[..., None], x - batch_mean, 0)
            batch_variance = jnp.sum(centred * centred, axes) / total
            if not self.is_initializing():
                keep = jnp.where(count > 0, self.momentum, 1.0)
                mean.value = keep * mean.value + (1 - keep) * batch_mean
                variance.value = keep * variance.value + (1 - keep) * batch_variance
        else:
            batch_mean, batch_variance = mean.value, variance.value
        x = (x - batch_mean) * jax.lax.rsqrt(batch_variance + self.eps)
        if self.affine:
            x = x * self.param("scale", nn.initializers.ones, (width,))
            x = x + self.param("bias", nn.initializers.zeros, (width,))
        return x.astype(dtype)  # the statistics are float32 at least
