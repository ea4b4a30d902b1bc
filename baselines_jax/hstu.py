"""HSTU: self-attention by SiLU without softmax (Zhai et al., ICML 2024), candidates as targets.

One layer, the rows of x being the history's and the candidates':

    [U, Q, V, K] = silu(LN(x) W)
    A_ij = silu(Q_i K_j + p[i - j] + w[bucket(t_{i+1} - t_j)]) / n      for visible j, else 0
    out  = x + LN(A V) * U W_O

with n = config.length, the longest history, whatever a batch is padded to (the published code takes
the padded length, which is the same number in all its batches). LN has no scale or bias, and adds
its eps of 1e-6, as there, to a variance that 1/n makes small: what a history adds grows with its
share of n. No 1/sqrt(K); the biases
p and w are each layer's own and the same for all heads, and
bucket(D) = clip(int(ln(max(|D|, 1)) / 0.301), 0, 128). The time of a query is that of the next
item: for the newest behaviour and for a candidate, which is the item after it, the request's.

A behaviour sees the valid ones at j <= i; a candidate all valid ones and itself, no other candidate
(the isolated targets of the published ranking model: one position and one time for all).

LASER's paper gives no sizes but FLOPs: 3.7e8 at L = 1000, which at d = 128 is about one layer with
queries of all behaviours (5 d^2 L + 2 d L^2 = 3.4e8 multiply-adds). Only the candidates' outputs
are used, so the last layer here forms V and K of the history and nothing else of it: one layer
costs 2 d^2 L = 3.3e7 and does not contextualise the history, which begins with the second. So two
layers are the default: 3.7e8, less 3/4 d L^2 = 1.0e8 that causal tiles leave out.

The history is encoded once for all candidates, in tiles of queries (ctr_jax/query_tiles.py).

Axis letters: B requests, C candidates, L history, d model width, H heads, K head width, S keys and
T queries of a tile.
"""

from __future__ import annotations

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
from ctr_jax.time_buckets import bucket, tables


def default_config() -> ConfigDict:
    """Two layers of two heads at d = 128."""
    config = history_model.default_config("baselines_jax.hstu")
    config.num_layers = 2
    config.num_heads = 2
    config.length = 1000  # n: the longest history
    return config


def build(config: ConfigDict, spec: DataSpec) -> tuple[nn.Module, tuple[Column, ...]]:
    """The module of config.model and the columns it reads.

    Raises:
      ValueError: the sizes do not fit.
    """
    if config.num_layers < 1 or config.num_heads < 1 or config.width % config.num_heads:
        raise ValueError("num_layers and num_heads must be >= 1, and num_heads divide width")
    interest = HSTU(config.num_layers, config.num_heads, config.length)
    return history_model.build(config, spec, interest)


class HSTU(nn.Module):
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
        check_length(tokens, self.length)
        history, candidates, batch = tokens.behaviours, tokens.candidates, tokens.batch
        clock = (batch.behaviour_mask, batch.behaviour_time, batch.request_time)
        for i in range(self.layers):
            last = i == self.layers - 1
            layer = Layer(self.heads, self.length, last, self.tile_bytes, name=f"layer_{i}")
            history, candidates = layer(history, candidates, *clock)
        return candidates


class Layer(nn.Module):
    """One layer.

    Attributes:
      length: n.
      last: no layer follows, so that the history's output is not needed.
    """

    heads: int
    length: int
    last: bool
    tile_bytes: int = 0

    @nn.compact
    def __call__(
        self,
        history: jax.Array,
        candidates: jax.Array,
        mask: jax.Array,
        times: jax.Array,
        request_time: jax.Array,
    ) -> tuple[jax.Array | None, jax.Array]:
        """One layer over both kinds of rows.

        Args:
          history: [B, L, d]. candidates: [B, C, d].
          mask: [B, L] bool. times: [B, L] int32 seconds. request_time: [B] int32.
        Returns:
          history (None if `last`) and candidates anew.
        """
        d = candidates.shape[-1]
        small, xavier = nn.initializers.normal(0.02), nn.initializers.xavier_uniform()

        def dense(width: int, name: str, init) -> nn.Dense:
            return nn.Dense(
                width, False, kernel_init=init, dot_general=token_dot_general, name=name
            )

        of_uq, of_vk = dense(2 * d, "uq", small), dense(2 * d, "vk", small)
        out = nn.Dense(d, kernel_init=xavier, dot_general=token_dot_general, name="out")
        norm = nn.LayerNorm(use_bias=False, use_scale=False)
        by_distance, by_time = tables(self.param, self.length)

        def split(projection: nn.Dense, x: jax.Array) -> list[jax.Array]:
            return jnp.split(nn.silu(projection(x)), 2, -1)

        def heads(x: jax.Array) -> jax.Array:
            return heads_last(x, self.heads)

        def finish(x: jax.Array, attended: jax.Array, u: jax.Array) -> jax.Array:
            return x + out(norm(tokens_last(attended) / self.length) * u)

        # ---- candidates: all of the history, and themselves ----
        normed, own = norm(history), norm(candidates)
        keys = (*map(heads, split(of_vk, normed)), mask)
        u, q = split(of_uq, own)
        own = (heads(q), *map(heads, split(of_vk, own)))
        sizes = dict(
            query_bytes=self.heads * mask.shape[1] * candidates.dtype.itemsize,
            tile_bytes=self.tile_bytes,
        )
        ages = bucket(request_time[:, None] - times)
        biases = by_distance[mask.shape[1] : 0 : -1] + by_time[ages]
        itself = by_distance[0] + by_time[0]

        def of_candidates(own, keys, first):
            """Candidates' (q, v, k), each [H, K, T] -> [H, K, T]."""
            del first
            (q, own_v, own_k), (v, k, mask, bias) = own, keys
            weights = _weights(k, q, bias[:, None], mask[:, None])
            of_own = nn.silu(jnp.sum((own_k * q).astype(weights.dtype), 1, keepdims=True) + itself)
            weights, of_own = weights.astype(v.dtype), of_own.astype(v.dtype)
            return jnp.einsum("hks,hst->hkt", v, weights) + own_v * of_own

        attended = over_tiles(of_candidates, own, (*keys, biases), **sizes)
        candidates = finish(candidates, attended, u)
        if self.last:
            return None, candidates

        # ---- history: causal ----
        def of_history(queries, keys, first):
            """(q [H, K, T], the times of its next items [T]) from `first` on -> [H, K, T]."""
            (q, next_time), (v, k, mask, times) = queries, keys
            at = first + jnp.arange(q.shape[-1], dtype=jnp.int32)
            distance = at - jnp.arange(mask.size, dtype=jnp.int32)[:, None]
            bias = jnp.take(by_distance, distance, mode="clip")
            bias += by_time[bucket(next_time - times[:, None])]
            weights = _weights(k, q, bias, mask[:, None] & (distance >= 0))
            return jnp.einsum("hks,hst->hkt", v, weights.astype(v.dtype))

        u, q = split(of_uq, normed)
        next_time = jnp.concatenate([times[:, 1:], request_time[:, None]], 1)
        attended = over_tiles(
            of_history, (heads(q), next_time), (*keys, times), causal=True, **sizes
        )
        return finish(history, attended, u), candidates


def _weights(k, q, bias, visible):
    """silu(k q + bias) where `visible`, else 0, without the 1/n: k [H, K, S], q [H, K, T] ->
    [H, S, T], float32 at least."""
    return jnp.where(visible, nn.silu(logits_of(k, q) + bias), 0)
