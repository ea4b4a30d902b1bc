"""TWIN: one attention searches the history and sums what it found (Chang et al., KDD 2023).

    s_l = (q W_Q)(x_l W_K) / sqrt(K)          per head, over the valid behaviours
    out = concat_h(sum over the k largest s of softmax(s)_l x_l W_V) W_O

The search (GSU) and the attention over what it selects (ESU) use the same scores, so the softmax is
over the selected ones and nothing is scored twice. Each head selects for itself; fewer than k valid
behaviours are all selected, none gives 0. Of equal scores at the border the newer one is selected.
No matrix has a bias. The paper's beta term of cross features (what is known of a user and an item
together, Kc columns) is left out: our data sets have none, Kc = 0.

Axis letters: B requests, C candidates, L history, d model width, H heads, K head width, T
candidates of a tile.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from ctr_jax import history_model
from ctr_jax.features import Column, DataSpec
from ctr_jax.history_model import Tokens
from ctr_jax.selected_attention import SelectedAttention
from ctr_jax.selection import largest


def default_config() -> ConfigDict:
    """100 behaviours for each of two heads at d = 128."""
    config = history_model.default_config("baselines_jax.twin")
    config.num_heads = 2
    config.top_k = 100
    return config


def build(config: ConfigDict, spec: DataSpec) -> tuple[nn.Module, tuple[Column, ...]]:
    """The module of config.model and the columns it reads.

    Raises:
      ValueError: the sizes do not fit.
    """
    if config.top_k < 1 or config.num_heads < 1 or config.width % config.num_heads:
        raise ValueError("top_k and num_heads must be >= 1, and num_heads divide width")
    interest = TWIN(config.num_heads, config.top_k)
    return history_model.build(config, spec, interest)


class TWIN(nn.Module):
    """The interest.

    Attributes:
      heads, top_k: num_heads and top_k of the config.
      tile_bytes: as in ctr_jax/query_tiles.py.
    """

    heads: int = 2
    top_k: int = 100
    tile_bytes: int = 0

    takes_tiles = loops_over_requests = True

    def setup(self):
        self.attention = SelectedAttention(self.heads, self.tile_bytes)
        nn.share_scope(self, self.attention)

    def __call__(self, tokens: Tokens, train: bool) -> jax.Array:
        """Tokens -> [B, C, d]."""
        del train
        select = functools.partial(_by_score, self.top_k)
        return self.attention(
            tokens.candidates, tokens.behaviours, tokens.batch.behaviour_mask, select
        )


def _by_score(top_k, scores, of_candidates, of_behaviours, mask):
    """scores [H, T, L], mask [L] -> bool [H, T, L]."""
    del of_candidates, of_behaviours
    return largest(scores, mask, top_k)
