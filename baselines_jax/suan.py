"""SUAN: self-attention, cross-attention to the user, a gate between them (Lai et al., RecSys 2025).

    z = RMS_1(x)
    z = RMS_2(z + Self(z))            softmax(q k / sqrt(K) + p[i - j] + w[bucket(t_i - t_j)]) v W_O
    c = Cross(z)                      softmax over the user's tokens of q k / sqrt(K), times v, W_O
    [a; b] = softmax over the two of W_2 relu(W_1 s), s the mean of z + c        (d -> d/4 -> 2 d)
    f = a * z + b * c                 a and b: a weight per channel, the same for all rows
    y = f + SwiGLU(f)

Each of N blocks; the rows of x are the history's and the candidates'. The residual stream is the
normalised tensor, the norm's eps stands outside the root, SwiGLU has biases and the attentions have
none. p and w are each block's own and the same for all heads; the buckets are
HSTU's. The user's tokens are the user and context columns, each projected to d and normalised once;
without such columns there is no Cross and no gate, f = z.

A behaviour sees the valid ones at j <= i, at its own time; a candidate all valid ones and itself,
no other candidate, at the request's time and the position after the newest behaviour.

Decided here: s is the mean over the valid behaviours, all of them, and not over the candidate. The
published sequence is [behaviours; candidate], so that its mean has 1/(L + 1) of the candidate; that
would give each candidate a history of its own. So a and b are the request's, candidates stay
isolated, and padding changes nothing; an empty history has s = 0. (A behaviour's gate thus depends
on later behaviours, though not on the candidate.) The last block needs z and c of the history too,
for s, but not its y.

The history is encoded once for all candidates, in tiles of queries (ctr_jax/query_tiles.py).

Axis letters: B requests, C candidates, L history, F user tokens, d model width, H heads, K head
width, S keys and T queries of a tile.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ctr_jax import history_model
from ctr_jax.features import Column, DataSpec, default_columns
from ctr_jax.history_model import Tokens, check_length
from ctr_jax.layers import RMSNorm, SwiGLU, token_dot_general
from ctr_jax.query_tiles import heads_last, over_tiles, tokens_last
from ctr_jax.query_tiles import logits as logits_of
from ctr_jax.time_buckets import bucket, tables
from kernels.softmax import accumulation_dtype, masked_softmax


def default_config() -> ConfigDict:
    """Two blocks of two heads at d = 128."""
    config = history_model.default_config("baselines_jax.suan")
    config.num_layers = 2
    config.num_heads = 2
    config.ffn_multiplier = 3  # SwiGLU's hidden width, in d
    config.length = 1000  # the longest history: p has a row for each distance
    return config


def build(config: ConfigDict, spec: DataSpec) -> tuple[nn.Module, tuple[Column, ...]]:
    """The module of config.model and the columns it reads.

    Raises:
      ValueError: the sizes do not fit.
    """
    sizes = (config.num_layers, config.num_heads, config.ffn_multiplier, config.length)
    if min(sizes) < 1 or config.width % config.num_heads:
        raise ValueError(
            "num_layers, num_heads, ffn_multiplier and length must be >= 1, and num_heads divide "
            "width"
        )
    columns = default_columns(spec, config.embedding_width, exclude=config.exclude)
    # In the order in which the frame joins them: the user's, then the context's.
    fields = [c.width for group in ("user", "context") for c in columns if c.group == group]
    interest = SUAN(
        config.num_layers, config.num_heads, config.ffn_multiplier, config.length, tuple(fields)
    )
    return history_model.build(config, spec, interest)


class SUAN(nn.Module):
    """The interest.

    Attributes:
      layers, heads, ffn, length: num_layers, num_heads, ffn_multiplier and length of the config.
      fields: widths of the columns that Tokens.profile holds side by side.
      tile_bytes: as in ctr_jax/query_tiles.py.
    """

    layers: int = 2
    heads: int = 2
    ffn: int = 3
    length: int = 1000
    fields: tuple[int, ...] = ()
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
        user = None
        if self.fields:
            columns = jnp.split(tokens.profile, np.cumsum(self.fields)[:-1], axis=-1)
            user = [
                nn.Dense(history.shape[-1], use_bias=False, name=f"field_{i}")(x)
                for i, x in enumerate(columns)
            ]
            user = RMSNorm(eps_outside_root=True, name="user_norm")(jnp.stack(user, 1))
        clock = (batch.behaviour_mask, batch.behaviour_time, batch.request_time)
        for i in range(self.layers):
            last = i == self.layers - 1
            block = Block(
                self.heads, self.ffn, self.length, last, self.tile_bytes, name=f"block_{i}"
            )
            history, candidates = block(history, candidates, user, *clock)
        return candidates


class Block(nn.Module):
    """One block.

    Attributes:
      last: no block follows, so that the history's output is not needed.
    """

    heads: int
    ffn: int
    length: int
    last: bool
    tile_bytes: int = 0

    @nn.compact
    def __call__(
        self,
        history: jax.Array,
        candidates: jax.Array,
        user: jax.Array | None,
        mask: jax.Array,
        times: jax.Array,
        request_time: jax.Array,
    ) -> tuple[jax.Array | None, jax.Array]:
        """One block over both kinds of rows.

        Args:
          history: [B, L, d]. candidates: [B, C, d]. user: [B, F, d] or None.
          mask: [B, L] bool. times: [B, L] int32 seconds. request_time: [B] int32.
        Returns:
          history (None if `last`) and candidates anew.
        """
        d = candidates.shape[-1]
        norm = RMSNorm(eps_outside_root=True, name="norm_1")
        attention = SelfAttention(
            self.heads, self.length, not self.last or user is not None, self.tile_bytes, name="self"
        )
        normed = norm(history), norm(candidates)
        updates = attention(*normed, mask, times, request_time)
        norm = RMSNorm(eps_outside_root=True, name="norm_2")
        history, z = (
            None if update is None else norm(x + update)
            for x, update in zip(normed, updates, strict=True)
        )
        if user is not None:
            cross = CrossAttention(self.heads, self.tile_bytes, name="cross")
            of_history, of_candidates = cross(history, user), cross(z, user)
            total = jnp.where(mask[..., None], history + of_history, 0)
            total = jnp.sum(total, 1, dtype=accumulation_dtype(total.dtype))
            mean = total / jnp.maximum(jnp.sum(mask, 1, keepdims=True), 1)
            hidden = nn.relu(nn.Dense(max(1, d // 4), name="squeeze")(mean.astype(z.dtype)))
            gate = nn.Dense(2 * d, name="excite")(hidden).reshape(-1, 2, 1, d)
            gate = nn.softmax(gate.astype(accumulation_dtype(z.dtype)), 1).astype(z.dtype)

            def fuse(x: jax.Array, other: jax.Array) -> jax.Array:
                return gate[:, 0] * x + gate[:, 1] * other

            history, z = fuse(history, of_history), fuse(z, of_candidates)
        ffn = SwiGLU(self.ffn * d, use_bias=True, name="ffn")
        return None if self.last else history + ffn(history), z + ffn(z)


class SelfAttention(nn.Module):
    """Softmax with biases by distance and by time.

    Attributes:
      length: longest history.
      of_history: whether the history's rows are queries too.
    """

    heads: int
    length: int
    of_history: bool
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
        """Arguments as of Block -> ([B, L, d] or None, [B, C, d])."""
        d, size = candidates.shape[-1], history.shape[1]
        project, out = _projections(self.heads, d)
        by_distance, by_time = tables(self.param, self.length)
        k, v = project("k", history), project("v", history)
        sizes = dict(
            query_bytes=self.heads * size * candidates.dtype.itemsize, tile_bytes=self.tile_bytes
        )

        # ---- candidates: all of the history, and themselves ----
        own = tuple(project(name, candidates) for name in "qkv")
        ages = bucket(request_time[:, None] - times)
        biases = by_distance[size:0:-1] + by_time[ages]
        itself = by_distance[0] + by_time[0]

        def of_candidates(own, keys, first):
            """Candidates' (q, k, v), each [H, K, T] -> [H, K, T]."""
            del first
            (q, own_k, own_v), (k, v, mask, bias) = own, keys
            logits = logits_of(k, q) + bias[:, None]
            own_logit = jnp.sum((own_k * q).astype(logits.dtype), 1, keepdims=True) + itself
            visible = jnp.append(mask, True)[:, None]
            weights = masked_softmax(jnp.concatenate([logits, own_logit], 1), visible, axis=-2)
            weights = weights.astype(v.dtype)
            return jnp.einsum("hks,hst->hkt", v, weights[:, :-1]) + own_v * weights[:, -1:]

        attended = out(tokens_last(over_tiles(of_candidates, own, (k, v, mask, biases), **sizes)))
        if not self.of_history:
            return None, attended

        # ---- history: causal ----
        def causal(queries, keys, first):
            """(q [H, K, T], their times [T]) from position `first` on -> [H, K, T]."""
            (q, query_time), (k, v, mask, times) = queries, keys
            at = first + jnp.arange(q.shape[-1], dtype=jnp.int32)
            distance = at - jnp.arange(mask.size, dtype=jnp.int32)[:, None]
            bias = jnp.take(by_distance, distance, mode="clip")
            bias += by_time[bucket(query_time - times[:, None])]
            visible = mask[:, None] & (distance >= 0)
            weights = masked_softmax(logits_of(k, q) + bias, visible, axis=-2)
            return jnp.einsum("hks,hst->hkt", v, weights.astype(v.dtype))

        queries = project("q", history), times
        found = over_tiles(causal, queries, (k, v, mask, times), causal=True, **sizes)
        return out(tokens_last(found)), attended


class CrossAttention(nn.Module):
    """Attention of rows to the user's tokens."""

    heads: int
    tile_bytes: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, user: jax.Array) -> jax.Array:
        """x [B, n, d], user [B, F, d] -> [B, n, d]."""
        project, out = _projections(self.heads, x.shape[-1])

        def attend(q, keys, first):
            """q [H, K, T] -> [H, K, T]."""
            del first
            k, v = keys
            weights = nn.softmax(logits_of(k, q), -2).astype(v.dtype)
            return jnp.einsum("hks,hst->hkt", v, weights)

        query_bytes = self.heads * user.shape[1] * x.dtype.itemsize
        found = over_tiles(
            attend,
            project("q", x),
            (project("k", user), project("v", user)),
            query_bytes=query_bytes,
            tile_bytes=self.tile_bytes,
        )
        return out(tokens_last(found))


def _projections(heads: int, d: int):
    """(project(name, x [B, n, d]) -> [B, H, K, n], q scaled; out) of the module that calls this."""
    dense = functools.partial(nn.Dense, d, use_bias=False, dot_general=token_dot_general)
    of = {name: dense(name=name) for name in "qkv"}

    def project(name: str, x: jax.Array) -> jax.Array:
        x = of[name](x)
        return heads_last(x * (d // heads) ** -0.5 if name == "q" else x, heads)

    return project, dense(name="out")
