"""Base of LASER's table: no long sequence, the most recent behaviours only.

ctr_jax/history_model.py with its short branch alone; the paper says no more of Base than its length
(100), AUC (.7802) and FLOPs (1.3e7).
"""

from __future__ import annotations

import flax.linen as nn
from ml_collections import ConfigDict

from ctr_jax import history_model
from ctr_jax.features import Column, DataSpec


def default_config() -> ConfigDict:
    """Length 100."""
    config = history_model.default_config("baselines_jax.base")
    config.short_length = 100
    return config


def build(config: ConfigDict, spec: DataSpec) -> tuple[nn.Module, tuple[Column, ...]]:
    """The module of config.model and the columns it reads.

    Raises:
      ValueError: the sizes do not fit.
    """
    return history_model.build(config, spec, None)
