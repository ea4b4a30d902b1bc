"""LREA's scoring unit as a layer; the op and its equations: kernels/absorbed_target_attention."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.absorbed_target_attention import Memory, Weights, absorbed_target_attention


class TargetAttention(nn.Module):
    """The op with its weights as parameters: `kernel` = W_in [3d, h] and `out` = W_o [h].

    Attributes:
      hidden: h.
      tile_bytes: of tiling "keys"; that of "hidden" is the machine's, not a run's.
    """

    hidden: int = 64
    form: str = "joint"
    slope: float = 0.01
    tile_bytes: int = 0

    @nn.compact
    def __call__(self, query: jax.Array, memory: Memory, tiling: str = "keys") -> jax.Array:
        """query [B, C, d], K rows -> [B, C, d]."""
        d = query.shape[-1]
        kernel = self.param("kernel", nn.initializers.xavier_normal(), (3 * d, self.hidden))
        out = self.param("out", nn.initializers.normal(self.hidden**-0.5), (self.hidden,))
        return absorbed_target_attention(
            query,
            memory,
            Weights(*jnp.split(kernel, 3), out),
            form=self.form,
            slope=self.slope,
            tiling=tiling,
            tile_bytes=self.tile_bytes if tiling == "keys" else 0,
        )
