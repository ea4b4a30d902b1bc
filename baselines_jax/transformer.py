"""Transformer: causal self-attention over the history, the candidates as isolated last tokens.

    x_l = e_l + P_l     P counted from the newest behaviour, so that left padding changes nothing
    x  <- x + Attn(LN(x)) W_O         x <- x + W_2 gelu(W_1 LN(x))         (pre-LN, N layers)
    out = LN(x of the candidate)

Attn: H heads, softmax(q k / sqrt(K)) over the valid behaviours at j <= i. A candidate sees all
valid behaviours and itself, no other candidate, and all candidates stand at one position, the one
after the newest behaviour. W_Q, W_K, W_V, W_O have no bias; W_1 (4 d wide) and W_2 do.

LASER's paper gives no sizes but FLOPs: 3.6e8 at L = 1000, which at d = 128 is about one layer with
queries of all behaviours (4 d^2 L + 2 d L^2 = 3.2e8 multiply-adds, and the FFN). Only the
candidates' outputs are used, so the last layer here forms keys and values of the history and
nothing else of it: one layer costs 2 d^2 L = 3.3e7 and does not contextualise the history, which
begins with the second. So two layers are the default: 4.9e8, less 3/4 d L^2 = 1.0e8 that causal
tiles leave out.

The history is encoded once for all candidates, in tiles of queries (ctr_jax/query_tiles.py).

Axis letters: B requests, C candidates, L history, d model width, H heads, K head width, S keys and
T queries of a tile.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ctr_jax import history_model
from ctr_jax.features import Column, DataSpec
from ctr_jax.history_model import Tokens, check_length
from ctr_jax.layers import token_dot_general
from ctr_jax.query_tiles import heads_last, over_tiles, tokens_last
from ctr_jax.query_tiles import logits as logits_of
from kernels.softmax import masked_softmax


def default_config() -> ConfigDict:
    """Two layers of two heads at d = 128."""
    config = history_model.default_config("baselines_jax.transformer")
    config.num_layers = 2
    config.num_heads = 2
    config.length = 1000  # rows of P: the longest history
    return config


def build(config: ConfigDict, spec: DataSpec) -> tuple[nn.Module, tuple[Column, ...]]:
    """The module of config.model and the columns it reads.

    Raises:
      ValueError: the sizes do not fit.
    """
    if config.num_layers < 1 or config.num_heads < 1 or config.width % config.num_heads:
        raise ValueError("num_layers and num_heads must be >= 1, and num_heads divide width")
    interest = Transformer(config.num_layers, config.num_heads, config.length)
    return history_model.build(config, spec, interest)


class Transformer(nn.Module):
    """The interest.

    Attributes:
      layers, heads, length: num_layers, num_heads and length of the config.
      tile_bytes: as in ctr_jax/query_tiles.py.
    """

    layers: int = 2
    heads: int = 2
    length: int = 1000
    tile_bytes: int = 0

    takes_tiles = loops_over_requests = True

    @nn.compact
    def __call__(self, tokens: Tokens, train: bool) -> jax.Array:
        """Tokens -> [B, C, d].

        Raises:
          ValueError: the history is longer than `length`.
        """
        del train
        history, candidates = tokens.behaviours, tokens.candidates
        (_, length, d), mask = history.shape, tokens.batch.behaviour_mask
        check_length(tokens, self.length)
        init = nn.initializers.normal(0.02)
        position = self.param("position", init, (self.length + 1, d))  # oldest first, then q
        history = history + position[self.length - length : -1]
        candidates = candidates + position[-1]
        for i in range(self.layers):
            rows = 0 if i == self.layers - 1 else length
            layer = Layer(self.heads, rows, self.tile_bytes, name=f"layer_{i}")
            history, candidates = layer(history, candidates, mask)
        return nn.LayerNorm(name="norm")(candidates)


class Layer(nn.Module):
    """One pre-LN layer.

    Attributes:
      rows: how many of the history's last rows are queries, so go into its output: none where no
        layer follows, the most recent ones in LONGER.
    """

    heads: int
    rows: int
    tile_bytes: int = 0

    @nn.compact
    def __call__(
        self, history: jax.Array, candidates: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array | None, jax.Array]:
        """history [B, L, d], candidates [B, C, d], mask [B, L] -> the two anew, None of no rows."""
        d, length = candidates.shape[-1], mask.shape[1]

        def dense(width: int, name: str, use_bias: bool = False) -> nn.Dense:
            return nn.Dense(width, use_bias, dot_general=token_dot_general, name=name)

        norm, ffn_norm = nn.LayerNorm(name="norm"), nn.LayerNorm(name="ffn_norm")
        of_query, of_key_value, out = dense(d, "q"), dense(2 * d, "kv"), dense(d, "out")
        up, down = dense(4 * d, "up", True), dense(d, "down", True)

        def split(x: jax.Array) -> list[jax.Array]:
            return [heads_last(part, self.heads) for part in jnp.split(of_key_value(x), 2, -1)]

        def finish(x: jax.Array, attended: jax.Array) -> jax.Array:
            x = x + out(tokens_last(attended))
            return x + down(nn.gelu(up(ffn_norm(x)), approximate=False))

        def query(x: jax.Array) -> jax.Array:
            return heads_last(of_query(x) * (d // self.heads) ** -0.5, self.heads)

        # ---- candidates: all of the history, and themselves ----
        normed, own = norm(history), norm(candidates)
        keys = (*split(normed), mask)
        sizes = dict(
            query_bytes=self.heads * length * candidates.dtype.itemsize,
            tile_bytes=self.tile_bytes,
        )
        attended = over_tiles(_candidates, (query(own), *split(own)), keys, **sizes)
        candidates = finish(candidates, attended)
        if not self.rows:
            return None, candidates

        # ---- history: causal ----
        start = length - self.rows
        attend = functools.partial(_causal, start)
        attended = over_tiles(attend, query(normed[:, start:]), keys, causal=not start, **sizes)
        return finish(history[:, start:], attended), candidates


def _causal(start, q, keys, first):
    """q [H, K, T] from position `start + first` on -> [H, K, T]."""
    k, v, mask = keys
    at = start + first + jnp.arange(q.shape[-1], dtype=jnp.int32)
    visible = mask[:, None] & (jnp.arange(mask.size, dtype=jnp.int32)[:, None] <= at)
    weights = masked_softmax(logits_of(k, q), visible, axis=-2)
    return jnp.einsum("hks,hst->hkt", v, weights.astype(v.dtype))


def _candidates(own, keys, first):
    """Candidates' (q, k, v), each [H, K, T] -> [H, K, T]."""
    del first
    (q, own_k, own_v), (k, v, mask) = own, keys
    logits = logits_of(k, q)
    itself = jnp.sum((own_k * q).astype(logits.dtype), 1, keepdims=True)
    visible = jnp.append(mask, True)[:, None]
    weights = masked_softmax(jnp.concatenate([logits, itself], 1), visible, axis=-2)
    weights = weights.astype(v.dtype)
    return jnp.einsum("hks,hst->hkt", v, weights[:, :-1]) + own_v * weights[:, -1:]
