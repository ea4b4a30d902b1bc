"""LONGER: merged behaviours, global tokens, queries of the recent part only (Chai et al., 2025).

    x_l = e_l + T[bucket(t - t_l)] + P_l             t of the request; P counted from the newest
    h_g = [y_1; ..; y_K]                             K adjacent ones, y = x or InnerTrans(x) in g
    R   = [G; H],  H newest to oldest, K d wide,  G = candidate, CLS, user
    layer 1         queries [G; the `recent` newest of H], keys all of R
    layers 2..N     queries and keys [G; the `recent` newest of H]
    out             LN of G

with the mask as printed, M_ij = 0 iff j >= i. That is causal attention: it hides the candidate,
which comes first in R, from all but itself, and CLS and the user from H. So CLS, user and H are
encoded once for all candidates (the paper's KV cache), and each candidate, first in an R of its
own, sees all of that and no other candidate. Read backwards R is oldest to newest, user, CLS,
candidate, and the layers are those of baselines_jax/transformer.py, the first with fewer queries
than keys. The last layer's queries are G alone: no more of it is read.

Decided here, the paper being silent:
- T is added: to concatenate a time feature and project it is to add a row of another table. Its
  buckets are HSTU's. The paper's MLP after P is left out; the tokens are projections already.
- Groups are aligned to the right: the newest is full and the oldest is filled up with zeros. One
  without a valid behaviour is no key. P has a row per behaviour, so padding changes nothing.
- The model is K d wide after merging, as the paper counts operations, 24 L K d^2 + 4 L^2 d / K.
  That is 4 d^2 of weights in the attention and 8 d^2 in the FFN: pre-LN with a GELU 4 d wide.
- InnerTrans is one such layer, d wide; in it the valid behaviours of a group all see one another.
- The user token is a projection of the user and context vectors; without any it is left out.
- G's outputs go side by side into the head, [B, C, 3 K d].

Axis letters: B requests, C candidates, L history, N groups of K behaviours, d model width, H heads.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from baselines_jax.transformer import Layer
from ctr_jax import history_model
from ctr_jax.features import Column, DataSpec
from ctr_jax.history_model import Tokens, check_length
from ctr_jax.layers import token_dot_general
from ctr_jax.time_buckets import BUCKETS, bucket
from kernels.softmax import accumulation_dtype, masked_softmax


def default_config() -> ConfigDict:
    """Four behaviours to a token, and the paper's best number of queries."""
    config = history_model.default_config("baselines_jax.longer")
    config.num_layers = 2  # the cross-causal one and a self-causal one
    config.num_heads = 2
    config.merge = 4  # K
    config.inner = True  # InnerTrans before the concatenation
    config.recent = 100  # merged tokens that are queries
    config.length = 1000  # rows of P: the longest history
    return config


def build(config: ConfigDict, spec: DataSpec) -> tuple[nn.Module, tuple[Column, ...]]:
    """The module of config.model and the columns it reads.

    Raises:
      ValueError: the sizes do not fit.
    """
    sizes = (config.num_layers, config.num_heads, config.merge, config.recent, config.length)
    if min(sizes) < 1 or config.width % config.num_heads:
        raise ValueError(
            "num_layers, num_heads, merge, recent and length must be >= 1, and num_heads divide "
            "width"
        )
    interest = Longer(
        config.num_layers,
        config.num_heads,
        config.merge,
        config.inner,
        config.recent,
        config.length,
    )
    return history_model.build(config, spec, interest)


class Longer(nn.Module):
    """The interest.

    Attributes:
      layers, heads, merge, inner, recent, length: num_layers, num_heads and the others of the
        config.
      tile_bytes: as in ctr_jax/query_tiles.py.
    """

    layers: int = 2
    heads: int = 2
    merge: int = 4
    inner: bool = True
    recent: int = 100
    length: int = 1000
    tile_bytes: int = 0

    takes_tiles = loops_over_requests = True

    @nn.compact
    def __call__(self, tokens: Tokens, train: bool) -> jax.Array:
        """Tokens -> [B, C, m K d]; m = 3, or 2 without a profile.

        Raises:
          ValueError: the history is longer than `length`.
        """
        del train
        batch, history, k = tokens.batch, tokens.behaviours, self.merge
        (b, length, d), mask = history.shape, batch.behaviour_mask
        check_length(tokens, self.length)
        init = nn.initializers.normal(0.02)

        # ---- behaviours, K to a token ----
        position = self.param("position", init, (self.length, d))
        by_time = self.param("time", init, (BUCKETS + 1, d))
        ages = bucket(batch.request_time[:, None] - batch.behaviour_time)
        history = history + position[self.length - length :] + by_time[ages]
        left = -length % k
        history = jnp.where(mask[..., None], history, 0)  # before it is filled up with zeros
        history = jnp.pad(history, ((0, 0), (left, 0), (0, 0)))
        mask = jnp.pad(mask, ((0, 0), (left, 0)))
        if self.inner:
            history = InnerTrans(self.heads, k, name="inner")(history, mask)
        history = history.reshape(b, -1, k * d)
        mask = mask.reshape(b, -1, k).any(-1)

        # ---- the global tokens; all but the candidate belong to the request ----
        def dense(name: str) -> nn.Dense:
            return nn.Dense(k * d, use_bias=False, dot_general=token_dot_general, name=name)

        candidates = dense("candidate")(tokens.candidates)
        cls = self.param("cls", init, (k * d,)).astype(history.dtype)
        shared = [jnp.broadcast_to(cls, (b, 1, k * d))]
        if tokens.profile.shape[-1]:
            shared = [dense("user")(tokens.profile)[:, None], *shared]
        sequence = jnp.concatenate([history, *shared], 1)
        mask = jnp.pad(mask, ((0, 0), (0, len(shared))), constant_values=True)

        # ---- cross-causal, then self-causal ----
        queries = min(self.recent, history.shape[1]) + len(shared)
        for i in range(self.layers):
            rows = len(shared) if i == self.layers - 1 else queries
            layer = Layer(self.heads, rows, self.tile_bytes, name=f"layer_{i}")
            sequence, candidates = layer(sequence, candidates, mask)
            mask = mask[:, -rows:]
        norm = nn.LayerNorm(name="norm")
        shared = norm(sequence).reshape(b, 1, -1)
        shared = jnp.broadcast_to(shared, (*candidates.shape[:2], shared.shape[-1]))
        return jnp.concatenate([norm(candidates), shared], -1)


class InnerTrans(nn.Module):
    """One pre-LN layer inside each group of `merge` adjacent behaviours."""

    heads: int
    merge: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """x [B, N K, d], mask [B, N K] -> [B, N K, d]; zero where not `mask`."""
        b, length, d = x.shape
        shape = (b, length // self.merge, self.merge, self.heads, d // self.heads)

        def dense(width: int, name: str, use_bias: bool = False) -> nn.Dense:
            return nn.Dense(width, use_bias, dot_general=token_dot_general, name=name)

        normed = nn.LayerNorm(name="norm")(x)
        q, k, v = (
            part.reshape(shape) for part in jnp.split(dense(3 * d, "qkv")(normed), 3, axis=-1)
        )
        logits = jnp.einsum(
            "bnqhk,bnshk->bnhqs", q, k, preferred_element_type=accumulation_dtype(x.dtype)
        )
        visible = mask.reshape(b, -1, 1, 1, self.merge)
        weights = masked_softmax(logits * shape[-1] ** -0.5, visible).astype(v.dtype)
        attended = jnp.einsum("bnhqs,bnshk->bnqhk", weights, v).reshape(x.shape)
        x = x + dense(d, "out")(attended)
        hidden = dense(4 * d, "up", True)(nn.LayerNorm(name="ffn_norm")(x))
        x = x + dense(d, "down", True)(nn.gelu(hidden, approximate=False))
        return jnp.where(mask[..., None], x, 0)
