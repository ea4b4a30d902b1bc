"""SDIM: behaviours that fall into the candidate's hash bucket are summed (Cao et al., CIKM 2022).

    bucket_g(x) = the `bits` sign bits of x R_g as a number       R fixed (ctr_jax/hashing.py)
    out = 1 / G sum_g unit(sum over the valid l with bucket_g(x_l) = bucket_g(q) of x_l)

unit(x) = x / ||x||, and 0 of 0; `normalise` = False leaves it out, as LongCTR does by default. In
expectation it is attention with weights (1 - angle / pi)^bits, sharper with more bits and closer to
that with more groups; it has no parameters.

The sums of all buckets, [G, 2^bits, d], are formed once per history; a candidate reads G of them.
So the cost of a candidate does not depend on L. Both are products with the buckets as indicators: a
scatter, and the one that is the gradient of a gather, take longer.

What is hashed are the embedding vectors of the columns that candidates and behaviours have in
common, as baselines_jax/eta.py says; what is summed are the tokens.

Axis letters: B requests, C candidates, L history, d model width, G groups, n buckets of all groups.
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
from ctr_jax.query_tiles import LARGE_TILE_BYTES, TILE_BYTES
from ctr_jax.request_tiles import in_tiles
from kernels import dispatch
from kernels.softmax import accumulation_dtype

MOST_BITS = 8  # of a group: its 2^bits buckets are all kept


def default_config() -> ConfigDict:
    """16 groups of 3 bits, the paper's m = 48 and tau = 3 (LongCTR's configs: 2 of 4)."""
    config = history_model.default_config("baselines_jax.sdim")
    config.groups = 16
    config.bits = 3
    config.normalise = True
    return config


def build(config: ConfigDict, spec: DataSpec) -> tuple[nn.Module, tuple[Column, ...]]:
    """The module of config.model and the columns it reads.

    Raises:
      ValueError: the sizes do not fit, or candidates and behaviours have no column in common.
    """
    if config.groups < 1 or not 1 <= config.bits <= MOST_BITS:
        raise ValueError(f"groups must be >= 1, and bits lie between 1 and {MOST_BITS}")
    interest = SDIM(config.groups, config.bits, config.normalise)
    model, columns = history_model.build(config, spec, interest)
    history_model.require_common(columns, spec, config.module)
    return model, columns


class SDIM(nn.Module):
    """The interest.

    Attributes:
      groups, bits, normalise: as of the config.
      tile_bytes: most bytes of indicators [b, L, n] at a time; 0 as in ctr_jax/query_tiles.py.
    """

    groups: int = 16
    bits: int = 3
    normalise: bool = True
    tile_bytes: int = 0

    compares = True

    @nn.compact
    def __call__(self, tokens: Tokens, train: bool) -> jax.Array:
        """Tokens -> [B, C, d]."""
        del train
        x, mask = tokens.behaviours, tokens.batch.behaviour_mask
        hashed = SignHash(self.groups * self.bits, name="hash")(*tokens.common)
        of_candidates, of_behaviours = (self._buckets(bits) for bits in hashed)

        # ---- once per history ----
        row = mask.shape[1] * self.groups * 2**self.bits * x.dtype.itemsize
        tile = self.tile_bytes or TILE_BYTES.get(dispatch.platform(), LARGE_TILE_BYTES)
        # Padding lies in no bucket.
        of_behaviours = jnp.where(mask[..., None], of_behaviours, -1)
        run = functools.partial(_sums, 2**self.bits)
        sums = in_tiles(run, x, of_behaviours, (), max(1, tile // row))
        if self.normalise:
            sums = _unit(sums)

        # ---- per candidate ----
        indicators = _indicators(of_candidates, 2**self.bits, x.dtype)
        sums = (sums / self.groups).astype(x.dtype)
        return jnp.einsum("bcn,bnd->bcd", indicators, sums)

    def _buckets(self, bits: jax.Array) -> jax.Array:
        """bool [B, n, G bits] -> int32 [B, n, G]."""
        bits = bits.reshape(*bits.shape[:-1], self.groups, self.bits).astype(jnp.int32)
        return jnp.sum(bits << jnp.arange(self.bits, dtype=jnp.int32), -1)


def _indicators(buckets: jax.Array, size: int, dtype: jnp.dtype) -> jax.Array:
    """int32 [B, L, G] -> [B, L, G size]: 1 at each group's bucket, nowhere if that is < 0."""
    at = buckets[..., None] == jnp.arange(size, dtype=jnp.int32)
    return at.reshape(*buckets.shape[:2], -1).astype(dtype)


def _sums(size, x, buckets, shared):
    """x [B, L, d], buckets [B, L, G] -> [B, G size, d]."""
    del shared
    indicators = _indicators(buckets, size, x.dtype)
    exact = accumulation_dtype(x.dtype)
    return jnp.einsum("bln,bld->bnd", indicators, x, preferred_element_type=exact)


def _unit(x: jax.Array) -> jax.Array:
    """x / ||x|| over the last axis; 0 of 0, with a gradient of 0."""
    square = jnp.sum(x * x, -1, keepdims=True)
    return x * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)
