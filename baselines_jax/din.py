"""DIN: target attention by a small MLP, without softmax (Zhou et al., KDD 2018).

a_i = MLP([q, e_i, q - e_i, q * e_i]), out = sum_i mask_i a_i e_i. The first layer is linear in its
four inputs, so it splits into a term of the candidate alone, one of the behaviour alone (computed
once for all C candidates) and one of their product; no [B, C, L, 4d] tensor is made.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ctr_jax.batch import EmbeddedBatch
from ctr_jax.batch_norm import Dice
from ctr_jax.features import Column, DataSpec, default_columns
from ctr_jax.head import MLPHead


def default_config() -> ConfigDict:
    """DIN as LongCTR runs it: one attention layer of 64 with Dice, head [512, 256, 128]."""
    return ConfigDict(
        dict(module="baselines_jax.din", embedding_width=32, width=96, attention_hidden=(64,),
             activation="dice", head_hidden=(512, 256, 128), base_rate=0.5, exclude=())
    )  # fmt: skip


def build(config: ConfigDict, spec: DataSpec) -> tuple[nn.Module, tuple[Column, ...]]:
    """The model and the columns it reads (all of the data set less `config.exclude`)."""
    columns = default_columns(spec, config.embedding_width, exclude=config.exclude)
    model = DIN(
        columns=columns,
        width=config.width,
        attention_hidden=tuple(config.attention_hidden),
        activation=config.activation,
        head_hidden=tuple(config.head_hidden),
        base_rate=config.base_rate,
    )
    return model, columns


class DINAttention(nn.Module):
    """The scoring unit and the weighted sum.

    Attributes:
      hidden: widths of the scoring MLP's hidden layers.
      activation: "dice" or "relu".
    """

    hidden: Sequence[int] = (64,)
    activation: str = "dice"

    @nn.compact
    def __call__(
        self, query: jax.Array, keys: jax.Array, mask: jax.Array, train: bool
    ) -> jax.Array:
        """query [B, C, d], keys [B, L, d], mask [B, L] bool -> [B, C, d]; 0 if none is valid."""
        d = query.shape[-1]
        kernel = self.param("kernel_0", nn.initializers.xavier_normal(), (4 * d, self.hidden[0]))
        bias = self.param("bias_0", nn.initializers.zeros, (self.hidden[0],))
        of_query, of_key, of_difference, of_product = jnp.split(kernel, 4)
        x = (query @ (of_query + of_difference) + bias)[:, :, None] + (
            keys @ (of_key - of_difference)
        )[:, None]
        x = x + jnp.einsum("bcd,bld,dh->bclh", query, keys, of_product)
        pairs = jnp.broadcast_to(mask[:, None], x.shape[:3])
        x = self._activate(x, pairs, train)
        for width in self.hidden[1:]:
            x = self._activate(nn.Dense(width)(x), pairs, train)
        scores = nn.Dense(1)(x)[..., 0]
        return jnp.einsum("bcl,bld->bcd", jnp.where(pairs, scores, 0), keys)

    def _activate(self, x: jax.Array, pairs: jax.Array, train: bool) -> jax.Array:
        return Dice()(x, pairs, train) if self.activation == "dice" else nn.relu(x)


class DIN(nn.Module):
    """logits of all candidates of a request; behaviours and candidates are projected to `width`,
    since they need not have the same fields."""

    columns: tuple[Column, ...]
    width: int
    attention_hidden: tuple[int, ...]
    activation: str
    head_hidden: tuple[int, ...]
    base_rate: float

    @nn.compact
    def __call__(self, embedded: EmbeddedBatch, train: bool) -> tuple[jax.Array, dict]:
        batch = embedded.batch
        b, length, c = batch.shape
        join = lambda group: [embedded.vectors[k.key] for k in self.columns if k.group == group]  # noqa: E731
        candidate = jnp.concatenate(join("candidate"), -1)
        parts = [candidate]
        if length and join("behaviour"):
            keys = nn.Dense(self.width, use_bias=False)(jnp.concatenate(join("behaviour"), -1))
            query = nn.Dense(self.width, use_bias=False)(candidate)
            attention = DINAttention(self.attention_hidden, self.activation)
            parts += [query, attention(query, keys, batch.behaviour_mask, train)]
        for group in ("user", "context"):
            parts += [jnp.broadcast_to(v[:, None], (b, c, v.shape[-1])) for v in join(group)]
        logits = MLPHead(self.head_hidden, base_rate=self.base_rate)(jnp.concatenate(parts, -1))
        return logits, {"losses": {}}
