"""DIN: target attention by a small MLP, without softmax (Zhou et al., KDD 2018).

The unit is ctr_jax/din_attention.py, over the whole history. baselines_jax/din_long.py is the DIN
that LREA prints.
"""

from __future__ import annotations

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from ctr_jax import history_model
from ctr_jax.din_attention import DINAttention
from ctr_jax.features import Column, DataSpec
from ctr_jax.history_model import Tokens


def default_config() -> ConfigDict:
    """DIN as LongCTR runs it: one attention layer of 64 with Dice, head [512, 256, 128]."""
    config = history_model.default_config("baselines_jax.din")
    config.width = 96
    config.attention_hidden = (64,)
    config.activation = "dice"  # dice | relu
    return config


def build(config: ConfigDict, spec: DataSpec) -> tuple[nn.Module, tuple[Column, ...]]:
    """The module of config.model and the columns it reads.

    Raises:
      ValueError: the activation does not exist, or the sizes do not fit.
    """
    if config.activation not in ("dice", "relu"):
        raise ValueError(f"activation must be dice or relu, got {config.activation!r}")
    interest = DIN(tuple(config.attention_hidden), config.activation)
    return history_model.build(config, spec, interest)


class DIN(nn.Module):
    """The interest: DINAttention over all behaviours; fields as there."""

    hidden: tuple[int, ...] = (64,)
    activation: str = "dice"

    @nn.compact
    def __call__(self, tokens: Tokens, train: bool) -> jax.Array:
        """Tokens -> [B, C, d]."""
        batch = tokens.batch
        unit = DINAttention(self.hidden, self.activation)
        return unit(
            tokens.candidates, tokens.behaviours, batch.behaviour_mask, batch.candidate_mask, train
        )
