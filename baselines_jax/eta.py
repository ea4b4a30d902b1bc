"""ETA: the search compares hashes (Chen et al., 2021, arXiv 2108.04468).

    h(x) = 1[x R > 0]                      R [s, bits], fixed (ctr_jax/hashing.py)
    distance of q and x_l = the bits in which h(q) and h(x_l) differ
    out = attention of q to the k nearest  (ctr_jax/selected_attention.py)

Of equal distances the newer is nearer; fewer than k valid behaviours are all selected. The distance
is read off the product of the two codes as vectors of +1 and -1, bits - 2 distance, which is exact.

What is hashed: the paper embeds items and targets alike. Here each is projected to d by a matrix of
its own, which a hash does not train (it has no gradient), so that the tokens of a candidate and of
an equal behaviour would be as far apart as any. So the embedding vectors of the columns that both
have are hashed, before they are projected.

Axis letters: B requests, C candidates, L history, d model width, H heads, T candidates of a tile, s
width of the common columns.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ctr_jax import history_model
from ctr_jax.features import Column, DataSpec
from ctr_jax.hashing import SignHash
from ctr_jax.history_model import Tokens
from ctr_jax.selected_attention import SelectedAttention
from ctr_jax.selection import largest


def default_config() -> ConfigDict:
    """32 bits, and the 50 nearest for two heads, as LongCTR."""
    config = history_model.default_config("baselines_jax.eta")
    config.num_heads = 2
    config.top_k = 50
    config.bits = 32
    return config


def build(config: ConfigDict, spec: DataSpec) -> tuple[nn.Module, tuple[Column, ...]]:
    """The module of config.model and the columns it reads.

    Raises:
      ValueError: the sizes do not fit, or candidates and behaviours have no column in common.
    """
    if config.top_k < 1 or config.num_heads < 1 or config.width % config.num_heads:
        raise ValueError("top_k and num_heads must be >= 1, and num_heads divide width")
    if config.bits < 1:
        raise ValueError(f"bits must be >= 1, got {config.bits}")
    interest = ETA(config.num_heads, config.top_k, config.bits)
    model, columns = history_model.build(config, spec, interest)
    history_model.require_common(columns, spec, config.module)
    return model, columns


class ETA(nn.Module):
    """The interest.

    Attributes:
      heads, top_k, bits: num_heads, top_k and bits of the config.
      tile_bytes: as in ctr_jax/query_tiles.py.
    """

    heads: int = 2
    top_k: int = 50
    bits: int = 32
    tile_bytes: int = 0

    compares = True

    @nn.compact
    def __call__(self, tokens: Tokens, train: bool) -> jax.Array:
        """Tokens -> [B, C, d]."""
        del train
        dtype = tokens.behaviours.dtype
        of_candidates, of_behaviours = (
            jnp.swapaxes(jnp.where(bits, 1, -1).astype(dtype), 1, 2)
            for bits in SignHash(self.bits, name="hash")(*tokens.common)
        )
        return SelectedAttention(self.heads, self.tile_bytes, name="attention")(
            tokens.candidates,
            tokens.behaviours,
            tokens.batch.behaviour_mask,
            functools.partial(_nearest, self.top_k),
            of_candidates,
            of_behaviours,
        )


def _nearest(top_k, scores, of_candidates, of_behaviours, mask):
    """Codes [bits, T] and [bits, L], mask [L] -> bool [T, L]."""
    del scores
    alike = jnp.einsum(
        "kt,ks->ts", of_candidates, of_behaviours, preferred_element_type=jnp.float32
    )
    return largest(alike, mask, top_k)
