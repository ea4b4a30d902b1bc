"""Relative encodings that SparseCTR compares RelTemporal with (4.4.3, Figure 2).

config.encoding: what the logit of query i and key j has, at distance i - j,

  rel_temporal  - RelTemporal (3.5), by the switches rel_*
  hstu          + p[i - j] + w[bucket(t_{i+1} - t_j)], learned, the same for all heads (HSTU)
  t5            + table[h, bucket(i - j)], learned: 32 buckets, one per distance below 16, then by
                its logarithm to 128, unidirectional (T5)
  alibi         - 2^(-8 h / H) (i - j), h = 1..H, fixed (ALiBi)
  rope          instead of a term, q and k with their pairs of places (2c, 2c + 1) turned by
                i 10000^(-2c / K) and j 10000^(-2c / K) (RoFormer)
  none          nothing

Every layer has its own tables, as it has its own slopes of RelTemporal. Where the paper is silent:

- A behaviour stands at its index, every candidate at L. What sums up several behaviours, a chunk or
  a compressed block, stands at the middle of their indices, rounded down, as its time is the mean.
- The query's time of HSTU is the next item's, the request's for the newest behaviour and for the
  candidates, as in baselines_jax/hstu.py; its p has config.length + 1 rows.
- The user key has no time and no place, so no term. RoPE, which cannot leave a key out, has it
  stand with the candidates.
- RoPE's angles are of i - L, so that left padding changes no number.

Axis letters: B requests, C candidates, L history, H heads, K head width, S keys, T queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ctr_jax.time_buckets import bucket, tables
from kernels.evo_attention import RelTemporal
from kernels.softmax import widened
from sparsectr_jax.temporal import FORMS, slope_init

ADDED = ("hstu", "t5", "alibi")  # by EvoAttention's op not, by encoded_attention.py
ENCODINGS = ("rel_temporal", *ADDED, "rope", "none")
T5_BUCKETS, T5_MAX_DISTANCE = 32, 128


class Places(NamedTuple):
    """Where queries or keys stand. time: int32 seconds. at: int32 index in the history."""

    time: jax.Array
    at: jax.Array


@flax.struct.dataclass
class Encoding:
    """One layer's encoding; of which arrays are in use, `kind` says.

    Attributes:
      rel: of rel_temporal, the parts that are on.
      slopes: [3, H] of rel_temporal.
      by_distance: [length + 1] of hstu, [H, 128 + 1] of t5; float32 at least, as their gradients
        add up over the rounds of a loop.
      by_time: [129] of hstu; likewise.
    """

    kind: str = flax.struct.field(pytree_node=False)
    heads: int = flax.struct.field(pytree_node=False)
    rel: RelTemporal = flax.struct.field(pytree_node=False)
    slopes: jax.Array | None = None
    by_distance: jax.Array | None = None
    by_time: jax.Array | None = None

    def bias(self, query: Places, key: Places, dtype: jnp.dtype) -> jax.Array:
        """What is added to the logits of one request.

        Args:
          query, key: arrays [1 or H, x, y] that broadcast together; query.time as of
            `query_times`.
        Returns:
          [1 or H, x, y], or a scalar 0.
        """
        if self.kind == "rel_temporal":
            terms = self.rel.pair_terms(query.time, key.time, jnp.dtype(dtype).type)
            slopes = self.slopes.astype(dtype)[:, :, None, None]
            parts = zip(self.rel.parts, terms, strict=True)
            return -sum((slopes[part] * term for part, term in parts), jnp.zeros((), dtype))
        distance = query.at - key.at
        if self.kind == "alibi":
            slopes = jnp.asarray(alibi_slopes(self.heads), dtype)[:, None, None]
            return -slopes * distance.astype(dtype)
        if self.kind == "t5":
            head = jnp.arange(self.heads)[:, None, None]
            return self.by_distance.astype(dtype)[head, jnp.clip(distance, 0, T5_MAX_DISTANCE)]
        if self.kind == "hstu":
            # Subtracted as int32; float32 has steps of 128 s at today's seconds.
            of_time = self.by_time.astype(dtype)[bucket(query.time - key.time)]
            return jnp.take(self.by_distance.astype(dtype), distance, mode="clip") + of_time
        return jnp.zeros((), dtype)

    def rotated(self, x: jax.Array, at: jax.Array, length: int) -> jax.Array:
        """x [..., H, K] of queries or keys that stand at `at` [...]: turned by RoPE, else as is."""
        return rotate(x, at - length) if self.kind == "rope" else x

    def query_times(self, times: jax.Array, request_time: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The times of the behaviours [B, L] and candidates [B, 1] as queries."""
        request_time = request_time[:, None]
        if self.kind == "hstu":
            times = jnp.concatenate([times[:, 1:], request_time], 1)
        return times, request_time


def check(config: ConfigDict) -> None:
    """Raises ValueError where config.encoding does not exist or does not go with the rest."""
    if config.encoding not in ENCODINGS:
        raise ValueError(f"encoding must be one of {ENCODINGS}, got {config.encoding!r}")
    if config.attention == "kernel" and config.encoding != "none":
        raise ValueError(
            f"attention='kernel' has no pairs of behaviours: it needs encoding='none', got "
            f"{config.encoding!r}"
        )
    if config.slope_init not in FORMS:
        raise ValueError(f"slope_init must be one of {FORMS}, got {config.slope_init!r}")
    head = config.width // config.num_heads
    if config.encoding == "rope" and head % 2:
        raise ValueError(f"encoding='rope' turns pairs: the head width {head} must be even")
    if (config.encoding == "hstu" or config.attention == "kernel") and config.length < 1:
        raise ValueError(f"length, the longest history, must be >= 1, got {config.length}")


def layer_encoding(param: Callable, config: ConfigDict, rel: RelTemporal, length: int) -> Encoding:
    """A layer's encoding, its parameters made by a module's `param`.

    Raises:
      ValueError: HSTU's table is shorter than the history of `length`.
    """
    heads, kind = config.num_heads, config.encoding
    encoding = Encoding(kind, heads, rel)
    if kind == "rel_temporal":
        slopes = param("slopes", lambda rng: slope_init(heads, config.slope_init).astype("float32"))
        return encoding.replace(slopes=slopes)
    if kind == "hstu":
        check_length(config, length)
        by_distance, by_time = tables(param, config.length)
        return encoding.replace(by_distance=by_distance, by_time=by_time)
    if kind == "t5":
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")  # that of T5X
        of_buckets = widened(param("t5", init, (heads, T5_BUCKETS)))
        return encoding.replace(by_distance=of_buckets[:, t5_buckets(T5_MAX_DISTANCE)])
    return encoding


def check_length(config: ConfigDict, length: int) -> None:
    """Raises ValueError where a history is longer than a table that has a row per behaviour."""
    if length > config.length:
        raise ValueError(
            f"a history of {length} behaviours, but config.model.length={config.length}"
        )


def t5_buckets(most: int) -> np.ndarray:
    """The buckets of the distances 0..most, int [most + 1]."""
    exact = T5_BUCKETS // 2
    distance = np.arange(most + 1)
    # No distance but 16 and 128 is where a bucket begins, so that floor sees no tie.
    log = np.log(np.maximum(distance, exact) / exact) / math.log(T5_MAX_DISTANCE / exact)
    large = np.minimum(exact + np.floor(log * exact + 1e-9).astype(int), T5_BUCKETS - 1)
    return np.where(distance < exact, distance, large)


def alibi_slopes(heads: int) -> np.ndarray:
    """[H]: 2^(-8 h / H), h = 1..H, whatever H; the published code differs where H is no power of
    two."""
    return 2.0 ** (-8.0 / heads * np.arange(1, heads + 1))


def rotate(x: jax.Array, at: jax.Array) -> jax.Array:
    """RoPE: x [..., H, K], K even, turned by the places `at` [...] int32; in x's dtype."""
    width = x.shape[-1]
    exact = jnp.promote_types(x.dtype, jnp.float32)
    frequency = jnp.asarray(10_000.0 ** (-np.arange(0, width, 2) / width), exact)
    angle = at[..., None, None].astype(exact) * frequency
    even, odd = (x[..., i::2].astype(exact) for i in (0, 1))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    return turned.reshape(x.shape).astype(x.dtype)
