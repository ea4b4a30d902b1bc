"""Models of a short and a long history: tokens, short branch and head; the long part is given.

LREA and the two DIN baselines beside it (short history only; the long one at full rank) are this
frame with another `long`: a module with

    memory(tokens [B, n, d]) -> Memory               what candidates attend to
    losses(tokens, rows [B] bool) -> {name: scalar}  auxiliary losses

The last `short_length` behaviours are the short history, those before it the long one. A user's
`Memory` and his short tokens are all that scoring needs of his history: `summary` makes them once,
`score` uses them for any candidates.

Axis letters: B requests, C candidates, L history, S short history, d model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ctr_jax.batch import EmbeddedBatch
from ctr_jax.batch_norm import MaskedBatchNorm
from ctr_jax.features import Column, DataSpec, default_columns, require
from ctr_jax.head import base_rate_logit, check_head
from ctr_jax.target_attention import TargetAttention
from ctr_jax.tokens import BehaviourToken
from kernels.absorbed_target_attention import FORMS, Memory, leaky_relu


def default_config(module: str) -> ConfigDict:
    """The fields that every model of this frame has, in LREA's setting (4.1)."""
    config = ConfigDict()
    config.module = module
    config.embedding_width = 16
    config.exclude = ()
    config.width = 16  # d; every behaviour and candidate is projected to it, without bias
    config.short_length = 64  # S: the most recent behaviours
    config.long_length = 500  # L: those before them
    # The scoring unit of both branches.
    config.hidden = 64  # h
    config.form = "joint"  # joint | split: the two sides of eq. 5
    config.slope = 0.01  # a of leaky ReLU, there and in the head; 1 = linear
    config.tile_bytes = 0  # of a tile's largest temporary; 0 = target_attention's default
    # Head.
    config.head_hidden = (512, 256, 128)
    config.batch_norm_momentum = 0.9
    config.batch_norm_eps = 1e-5
    config.base_rate = 0.5
    return config


@flax.struct.dataclass
class Summary:
    """A user's history as scoring needs it.

    Attributes:
      long: Memory of the long history, or None where the model reads the short one only.
      recent: [B, S, d] tokens of the short history; padding is exactly zero.
    """

    long: Memory | None
    recent: jax.Array


class NormalisedHead(nn.Module):
    """Dense, leaky ReLU, batch normalisation for each hidden layer, then one logit (LREA 4.1).

    "Each hidden layer follows a Leaky ReLU and a BatchNorm Layer" is read in that order. Statistics
    run over valid candidates of the global batch in training; evaluation uses the running ones.
    """

    hidden: Sequence[int] = (512, 256, 128)
    slope: float = 0.01
    momentum: float = 0.9
    eps: float = 1e-5
    base_rate: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        """x [B, C, d], mask [B, C] bool -> [B, C] logits."""
        for i, width in enumerate(self.hidden):
            x = leaky_relu(nn.Dense(width, name=f"dense_{i}")(x), self.slope)
            x = MaskedBatchNorm(self.momentum, self.eps, name=f"norm_{i}")(x, mask, train)
        bias = nn.initializers.constant(base_rate_logit(self.base_rate))
        return nn.Dense(1, bias_init=bias, name="logit")(x)[..., 0]


class FullRank(nn.Module):
    """The long history itself, its most recent `length` behaviours: DIN."""

    length: int

    def memory(self, tokens: jax.Array) -> Memory:
        """tokens [B, n, d] -> Memory of min(n, length) rows."""
        return whole(tokens[:, max(tokens.shape[1] - self.length, 0) :])

    def losses(self, tokens: jax.Array, rows: jax.Array) -> dict[str, jax.Array]:
        del tokens, rows
        return {}


def whole(tokens: jax.Array) -> Memory:
    """Tokens [B, n, d] as keys and values."""
    return Memory(tokens, tokens, tokens.sum(1))


class LongShort(nn.Module):
    """The frame; see `default_config` for the fields of config.

    Attributes:
      columns: what `build_columns` returned.
      long: the long part, or None.
    """

    config: ConfigDict
    columns: tuple[Column, ...]
    long: Any

    takes_rows = True

    def setup(self):
        config = self.config
        keys = tuple(c.key for c in self.columns if c.group == "behaviour")
        self.behaviour_token = BehaviourToken(config.width, keys)
        self.candidate_token = nn.Dense(config.width, use_bias=False)
        unit = dict(
            hidden=config.hidden,
            form=config.form,
            slope=config.slope,
            tile_bytes=config.tile_bytes,
        )
        self.short_attention = TargetAttention(**unit)
        if self.long is not None:
            self.long_attention = TargetAttention(**unit)
        self.head = NormalisedHead(
            tuple(config.head_hidden),
            config.slope,
            config.batch_norm_momentum,
            config.batch_norm_eps,
            config.base_rate,
        )

    def __call__(self, embedded: EmbeddedBatch, train: bool) -> tuple[jax.Array, dict]:
        """EmbeddedBatch -> (logits [B, C], out); `out` holds "losses" and "long" [B, C, d]."""
        older, recent = self.tokens(embedded)
        memory, losses = None, {}
        if self.long is not None:
            memory = self.long.memory(older)
            losses = self.long.losses(older, embedded.batch.candidate_mask.any(-1))
        logits, interest = self._score(embedded, Summary(memory, recent), train, "keys")
        return logits, {"losses": losses, "long": interest}

    def tokens(self, embedded: EmbeddedBatch) -> tuple[jax.Array, jax.Array]:
        """Tokens of the long and the short history, [B, n, d] and [B, s, d]; padding is zero."""
        mask = embedded.batch.behaviour_mask
        # Whatever stands in padding, its token is an exact zero: nothing below looks at a mask.
        tokens = self.behaviour_token(embedded, mask)
        cut = max(mask.shape[1] - self.config.short_length, 0)
        return tokens[:, :cut], tokens[:, cut:]

    def summary(self, embedded: EmbeddedBatch) -> Summary:
        """What `score` needs of the histories of B users."""
        older, recent = self.tokens(embedded)
        memory = None if self.long is None else self.long.memory(older)
        # Right-aligned like the history, so that caches of one size hold shorter ones.
        missing = self.config.short_length - recent.shape[1]
        return Summary(memory, jnp.pad(recent, ((0, 0), (missing, 0), (0, 0))))

    def score(self, summary: Summary, embedded: EmbeddedBatch) -> jax.Array:
        """Logits [B, C] of candidates, from summaries alone: `embedded` needs no history."""
        return self._score(embedded, summary, False, "hidden")[0]

    def interest(self, summary: Summary, query: jax.Array) -> jax.Array:
        """The long branch alone: query [B, C, d] -> [B, C, d]."""
        return self.long_attention(query, summary.long, "hidden")

    def _score(self, embedded, summary, train, tiling):
        b, _, c = embedded.batch.shape
        candidate = self._join(embedded, "candidate")
        query = self.candidate_token(candidate)
        recent = self.short_attention(query, whole(summary.recent), tiling)
        parts, interest = [candidate, query, recent], None
        if self.long is not None:
            interest = self.long_attention(query, summary.long, tiling)
            parts.append(interest)
        for group in ("user", "context"):
            parts += [
                jnp.broadcast_to(v[:, None], (b, c, v.shape[-1]))
                for v in self._vectors(embedded, group)
            ]
        logits = self.head(jnp.concatenate(parts, -1), embedded.batch.candidate_mask, train)
        return logits, interest

    def _vectors(self, embedded: EmbeddedBatch, group: str) -> list[jax.Array]:
        return [embedded.vectors[c.key] for c in self.columns if c.group == group]

    def _join(self, embedded: EmbeddedBatch, group: str) -> jax.Array:
        return jnp.concatenate(self._vectors(embedded, group), -1)


def build_columns(config: ConfigDict, spec: DataSpec) -> tuple[Column, ...]:
    """The columns a model of this frame reads: all of the data set less `config.exclude`.

    Raises:
      ValueError: a switch has a value that does not exist, sizes are not positive, or the data set
        lacks behaviour or candidate columns.
    """
    if config.form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {config.form!r}")
    if not 0 <= config.slope <= 1:
        raise ValueError(f"slope must lie in [0, 1], got {config.slope}")
    if min(config.width, config.hidden, config.short_length, config.long_length) < 1:
        raise ValueError("width, hidden, short_length and long_length must be >= 1")
    check_head(config.head_hidden, config.base_rate)
    columns = default_columns(spec, config.embedding_width, exclude=config.exclude)
    require(columns, spec, config.module)
    return columns
