"""LREA (SIGIR 2025): low-rank target attention over a long history, beside a short-term DIN branch.

`build(config.model, spec)` gives the Linen module and the columns it wants embedded. The loss is
BCE + lambda L_non-neg (eq. 11): lambda is config.loss.weights.non_negativity.

Training memory: C [B, r, d] (and W_d^T C [B, L, d] on the decompressed path), and a tile of
B C tile h <= `tile_bytes`; no [B, C, L, h].
"""

from __future__ import annotations

import flax.linen as nn
from ml_collections import ConfigDict

from ctr_jax import long_short
from ctr_jax.features import Column, DataSpec
from lrea_jax import low_rank


def default_config() -> ConfigDict:
    """config.model of the paper's setting (4.1); sizes of the history are the data set's."""
    config = long_short.default_config("lrea_jax.model")
    config.rank = 128  # r
    config.training_path = "decompressed"  # decompressed (the paper's) | absorbed (as served)
    config.parametrisation = "free"  # free (the paper's) | stochastic
    config.start = "segments"  # segments | normal
    config.penalty = "sum"  # sum (eq. 10) | mean
    return config


def build(config: ConfigDict, spec: DataSpec) -> tuple[nn.Module, tuple[Column, ...]]:
    """The module of config.model and the columns it reads.

    Raises:
      ValueError: a switch has a value that does not exist, or the sizes do not fit.
    """
    switches = dict(
        path=config.training_path,
        parametrisation=config.parametrisation,
        start=config.start,
        penalty=config.penalty,
    )
    low_rank.check(config.long_length, config.rank, **switches)
    columns = long_short.build_columns(config, spec)
    long = low_rank.LowRank(config.long_length, config.rank, **switches)
    return long_short.LongShort(config, columns, long), columns
