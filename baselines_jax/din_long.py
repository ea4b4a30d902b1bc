"""DIN with the long history, and with the short one only: LREA's upper and lower neighbours.

Everything but the long part is LREA's: tokens, scoring unit, short branch, head (docs/lrea.md). The
unit is the one LREA prints (no q - e term, no softmax), at full rank, with what depends on the
behaviours alone computed once per history and the rest tiled over it. baselines_jax/din.py is the
DIN of its own paper.

  use_long = True: DIN(Long sequence)    use_long = False: DIN(W/o long seq.)
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
from ml_collections import ConfigDict

from ctr_jax import long_short
from ctr_jax.features import Column, DataSpec


def default_config(use_long: bool = True) -> ConfigDict:
    """config.model in LREA's setting (4.1)."""
    config = long_short.default_config("baselines_jax.din_long")
    config.use_long = use_long
    return config


def build(config: ConfigDict, spec: DataSpec) -> tuple[nn.Module, tuple[Column, ...]]:
    """The module of config.model and the columns it reads.

    Raises:
      ValueError: a switch has a value that does not exist, or the sizes do not fit.
    """
    columns = long_short.build_columns(config, spec)
    long = long_short.FullRank(config.long_length) if config.use_long else None
    return long_short.LongShort(config, columns, long), columns


def beside(lrea_config: Callable[[str], ConfigDict], variant: str) -> ConfigDict:
    """LREA's experiment with DIN for a model: `variant` is one of lrea_config's, or "short", or
    "short," and one of them; without "short" the long history is read at full rank."""
    chosen = [v for v in variant.split(",") if v]
    use_long = "short" not in chosen
    config = lrea_config(",".join(v for v in chosen if v != "short"))
    theirs = config.model
    config.model = default_config(use_long)
    config.model.update({k: v for k, v in theirs.items() if k in config.model and k != "module"})
    config.name = config.name.replace("lrea", "din_long" if use_long else "din_short")
    config.loss.weights = ConfigDict()
    if not use_long:
        config.history_length = config.model.short_length  # nothing older is read or embedded
    return config
