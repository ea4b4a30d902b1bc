"""The MLP head: features of a candidate to a click logit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from ctr_jax.layers import ACTIVATIONS


def base_rate_logit(base_rate: float) -> float:
    """logit(base_rate); what the final bias starts from, so that the first loss is known.

    Raises:
      ValueError: base_rate is not strictly between 0 and 1.
    """
    if not 0 < base_rate < 1:
        raise ValueError(f"base_rate must lie strictly between 0 and 1, got {base_rate}")
    return math.log(base_rate / (1 - base_rate))


def check_head(hidden: Sequence[int], base_rate: float, activation: str = "relu") -> None:
    """For `build`, before anything is made of config.model's head_hidden, base_rate and
    head_activation.

    Raises:
      ValueError: a width is not positive, the rate no rate, or the activation does not exist.
    """
    if any(width < 1 for width in hidden):
        raise ValueError(f"head_hidden must hold widths >= 1, got {tuple(hidden)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"head_activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")
    base_rate_logit(base_rate)


class MLPHead(nn.Module):
    """Hidden layers, then one logit in float32 (SparseCTR 4.1.4: [32, 1] with ReLU).

    Attributes:
      hidden: widths of the hidden layers; () gives a linear head.
      activation: a name in ctr_jax.layers.ACTIVATIONS.
      base_rate: the final bias starts at logit(base_rate); .5 starts it at zero.
    """

    hidden: Sequence[int] = (32,)
    activation: str = "relu"
    base_rate: float = 0.5
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d] -> [...] float32 logits."""
        for i, width in enumerate(self.hidden):
            x = nn.Dense(width, dtype=self.dtype, name=f"dense_{i}")(x)
            x = ACTIVATIONS[self.activation](x)
        bias = nn.initializers.constant(base_rate_logit(self.base_rate))
        x = nn.Dense(
            1, dtype=jnp.promote_types(x.dtype, jnp.float32), bias_init=bias, name="logit"
        )(x)
        return x[..., 0]
