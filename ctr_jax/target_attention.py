"""LREA's scoring unit as a layer; the op and its equations: kernels/absorbed_target_attention."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.absorbed_target_attention import (
    FORMS,
    TILINGS,
    Memory,
    Weights,
    absorbed_target_attention,
    leaky_relu,
)

__all__ = [
    "FORMS",
    "IMPLEMENTATIONS",
    "Memory",
    "TargetAttention",
    "Weights",
    "attend",
    "leaky_relu",
]

IMPLEMENTATIONS = TILINGS  # how the XLA path tiles, where no kernel is the default


def attend(
    query: jax.Array,
    memory: Memory,
    weights: Weights,
    *,
    form: str = "joint",
    slope: float = 0.01,
    implementation: str = "keys",
    tile_bytes: int = 0,
) -> jax.Array:
    """absorbed_target_attention in the implementation that is the default here: [B, C, d].

    Args:
      implementation: the XLA path's tiling: "keys" for training (B large, C small), "hidden" for
        serving (B small, C large).
    Raises:
      ValueError: an unknown form or implementation, or shapes that do not fit.
    """
    return absorbed_target_attention(
        query,
        memory,
        weights,
        form=form,
        slope=slope,
        tiling=implementation,
        tile_bytes=tile_bytes,
    )


class TargetAttention(nn.Module):
    """`attend` with its weights as parameters: `kernel` = W_in [3d, h] and `out` = W_o [h].

    Attributes:
      hidden: h.
      tile_bytes: of implementation "keys"; that of "hidden" is the machine's, not a run's.
    """

    hidden: int = 64
    form: str = "joint"
    slope: float = 0.01
    tile_bytes: int = 0

    @nn.compact
    def __call__(self, query: jax.Array, memory: Memory, implementation: str = "keys") -> jax.Array:
        """query [B, C, d], K rows -> [B, C, d]."""
        d = query.shape[-1]
        kernel = self.param("kernel", nn.initializers.xavier_normal(), (3 * d, self.hidden))
        out = self.param("out", nn.initializers.normal(self.hidden**-0.5), (self.hidden,))
        return attend(
            query,
            memory,
            Weights(*jnp.split(kernel, 3), out),
            form=self.form,
            slope=self.slope,
            implementation=implementation,
            tile_bytes=self.tile_bytes if implementation == "keys" else 0,
        )
