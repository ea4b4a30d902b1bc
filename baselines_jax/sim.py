"""SIM: search the history, then attend to what was found (Pi et al., CIKM 2020).

    out = attention of q to the selected x_l + p[bucket(t - t_l)]  (ctr_jax/selected_attention.py)

search = "soft" selects the k largest of

    r_l = (x_l W_b)(q W_a)

and trains the search, whose choice has no gradient, by a click model of its own: the loss "search",
which config.loss.weights.search weighs, is the binary cross-entropy of MLP([q, c sum_l r_l x_l])
over valid candidates, each of one weight. LongCTR's MLP reads the profile too, which has the user's
row trained twice over. The sum, over all valid behaviours, is a product of q W_a with sum_l x_l
(x_l W_b)^T, formed once per history: r itself is needed for the choice only. The paper has c = 1;
here c = SUM_SCALE / sqrt(d), which changes neither the choice nor what can be learned: with 1 the
sum over a long history drowns all else in the first steps. The MLP has the widths of the head. Of
equal r the newer behaviour is selected. With micro-batches the loss is the mean of those of the
parts.

search = "hard" selects the k most recent behaviours of the candidate's category: of column
`category`, which candidates and behaviours share. Padding, out-of-vocabulary and missing are no
categories: what is rare is not alike. A candidate of none of them, or without such a behaviour, has
the interest 0.

Fewer than k that can be selected are all selected. p is the paper's embedding of the time between
behaviour and candidate, which it appends to what the second stage reads; appended columns times W_K
and W_V are added ones. bucket = the length of the whole seconds in bits, 0 for none and below:
RelTemporal's powers of two. `time_gap` = False leaves p out, as LongCTR does.

Axis letters: B requests, C candidates, L history, d model width, H heads, T candidates of a tile.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ctr_jax import history_model
from ctr_jax.batch import RequestBatch
from ctr_jax.features import FIRST_KNOWN, Column, DataSpec
from ctr_jax.head import MLPHead
from ctr_jax.history_model import Tokens
from ctr_jax.layers import token_dot_general, token_product
from ctr_jax.losses import binary_cross_entropy
from ctr_jax.selected_attention import SelectedAttention
from ctr_jax.selection import largest, most_recent
from kernels.softmax import accumulation_dtype

SEARCHES = ("soft", "hard")
SUM_SCALE = 0.01  # about one over the length of a history
GAP_BUCKETS = 32  # of int32 seconds


def default_config() -> ConfigDict:
    """The soft search for 50 behaviours and two heads, as LongCTR."""
    config = history_model.default_config("baselines_jax.sim")
    config.search = "soft"  # soft | hard
    config.category = "category"  # of the hard search: a column of candidates and of behaviours
    config.num_heads = 2
    config.top_k = 50
    config.time_gap = True
    return config


def build(config: ConfigDict, spec: DataSpec) -> tuple[nn.Module, tuple[Column, ...]]:
    """The module of config.model and the columns it reads.

    Raises:
      ValueError: the search does not exist, the sizes do not fit, or the data set has no such
        category.
    """
    if config.search not in SEARCHES:
        raise ValueError(f"search must be one of {SEARCHES}, got {config.search!r}")
    if config.top_k < 1 or config.num_heads < 1 or config.width % config.num_heads:
        raise ValueError("top_k and num_heads must be >= 1, and num_heads divide width")
    second = Second(config.num_heads, config.time_gap)
    if config.search == "soft":
        interest = SoftSIM(second, config.top_k, tuple(config.head_hidden), config.base_rate)
    else:
        _require_category(config.category, spec)
        interest = HardSIM(second, config.top_k, config.category)
    return history_model.build(config, spec, interest)


def _require_category(name: str, spec: DataSpec) -> None:
    vocabularies = [
        {c.vocabulary for c in spec.group(group) if c.name == name and c.kind == "id"}
        for group in ("candidate", "behaviour")
    ]
    if not vocabularies[0] or vocabularies[0] != vocabularies[1]:
        raise ValueError(
            f"category {name!r} must be an id column of candidates and of behaviours of "
            f"{spec.name!r}, with one vocabulary"
        )


class Second(nn.Module):
    """The second stage.

    Attributes:
      heads, time_gap: num_heads and time_gap of the config.
      tile_bytes: as in ctr_jax/query_tiles.py.
    """

    heads: int = 2
    time_gap: bool = True
    tile_bytes: int = 0

    @nn.compact
    def __call__(self, tokens: Tokens, select: Any, of_candidates: Any, of_behaviours: Any):
        """Tokens -> [B, C, d]; the others as of SelectedAttention."""
        x = tokens.behaviours
        if self.time_gap:
            shape = (GAP_BUCKETS, x.shape[-1])
            of_gap = self.param("time_gap", nn.initializers.normal(0.02), shape).astype(x.dtype)
            x = x + token_product(
                jax.nn.one_hot(buckets(tokens.batch), GAP_BUCKETS, dtype=x.dtype), of_gap
            )
        attention = SelectedAttention(self.heads, self.tile_bytes, name="attention")
        mask = tokens.batch.behaviour_mask
        return attention(tokens.candidates, x, mask, select, of_candidates, of_behaviours)


def buckets(batch: RequestBatch) -> jax.Array:
    """bucket(t - t_l) of all behaviours, [B, L] int32 below GAP_BUCKETS."""
    gaps = batch.request_time[:, None] - batch.behaviour_time
    return 32 - jax.lax.clz(jnp.maximum(gaps, 0))


class SoftSIM(nn.Module):
    """The interest with search = "soft".

    Attributes:
      second: the second stage.
      top_k: k.
      hidden, base_rate: of the MLP of the loss "search".
    """

    second: Second
    top_k: int = 50
    hidden: tuple[int, ...] = (512, 256, 128)
    base_rate: float = 0.5

    @nn.compact
    def __call__(self, tokens: Tokens, train: bool) -> Any:
        """Tokens -> [B, C, d]; in training ([B, C, d], {"search": scalar})."""
        candidates, batch = tokens.candidates, tokens.batch
        d, mask = candidates.shape[-1], batch.behaviour_mask

        def dense(name: str) -> nn.Dense:
            return nn.Dense(d, use_bias=False, dot_general=token_dot_general, name=name)

        behaviours = jnp.where(mask[..., None], tokens.behaviours, 0)
        q, k = dense("search_q")(candidates), dense("search_k")(behaviours)
        select = functools.partial(_by_product, self.top_k)
        found = self.second(tokens, select, jnp.swapaxes(q, 1, 2), jnp.swapaxes(k, 1, 2))
        if not train and not self.is_initializing():
            return found

        exact = dict(preferred_element_type=accumulation_dtype(q.dtype))
        history = jnp.einsum("bld,blk->bdk", behaviours, k, **exact)
        q = q * (SUM_SCALE * d**-0.5)
        pooled = jnp.einsum("bdk,bck->bcd", history, q, **exact).astype(q.dtype)
        head = MLPHead(self.hidden, base_rate=self.base_rate, name="search_head")
        logits = head(jnp.concatenate([candidates, pooled], -1))
        loss = binary_cross_entropy(logits, batch.label, batch.candidate_mask, weights=batch.weight)
        return found, {"search": loss}


def _by_product(top_k, scores, q, k, mask):
    """q [d, T], k [d, L], mask [L] -> bool [T, L]."""
    del scores
    products = jnp.einsum("kt,ks->ts", q, k, preferred_element_type=accumulation_dtype(q.dtype))
    return largest(products, mask, top_k)


class HardSIM(nn.Module):
    """The interest with search = "hard".

    Attributes:
      second: the second stage.
      top_k: k.
      category: name of the column.
    """

    second: Second
    top_k: int = 50
    category: str = "category"

    takes_tiles = loops_over_requests = True

    @nn.compact
    def __call__(self, tokens: Tokens, train: bool) -> jax.Array:
        """Tokens -> [B, C, d]."""
        del train
        of_candidates = tokens.batch.candidate[self.category]
        of_behaviours = tokens.batch.behaviour[self.category]
        select = functools.partial(_of_category, self.top_k)
        return self.second(tokens, select, of_candidates, of_behaviours)


def _of_category(top_k, scores, of_candidates, of_behaviours, mask):
    """Ids [T] and [L], mask [L] -> bool [T, L]."""
    del scores
    of_candidates = of_candidates[:, None]
    alike = (of_candidates == of_behaviours) & (of_candidates >= FIRST_KNOWN)
    return most_recent(alike & mask, top_k)
