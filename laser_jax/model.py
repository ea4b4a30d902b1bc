"""LASER: compress with STA, refine with GSTA, fuse (arXiv 2602.11562, by its public summary).

`build(config.model, spec)` gives the Linen module and the columns it wants embedded. What the paper
states and what is decided here stands in each file. Every ablation is a change of the config alone:

  no recency embedding  recency=False          softmax for sigmoid  gate="softmax"
  no fusion             fusion="none"          segment size         segment=5 | 10 | 20
  no FFN, no LayerNorm  ffn_multiplier=0       GSTA layers          num_layers=1..4
  no LayerNorm          norm=False             length               config.history_length
  tokens as they are    token_norm=False

Decided here: behaviours and target are normalised before anything
meets them. Embedding tables start at .01, so products of two tokens are 1e-4 and every gate alike.

Candidates go through in tiles, so that the segments of a tile, [B, tile, S, d], stay in cache; what
belongs to the history is made once, before them. No [B, C, L, d] array is made.

Axis letters: B requests, C candidates, L history, S segments, d model width.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ctr_jax import history_model
from ctr_jax.features import Column, DataSpec
from ctr_jax.history_model import Tokens
from kernels import dispatch
from laser_jax import fusion, segmented
from laser_jax.behaviour_norm import BehaviourNorm
from laser_jax.recency import RecencyEmbedding, rows_of
from laser_jax.segmented import SegmentedTargetAttention
from laser_jax.stacked import StackedTargetAttention

# Of a tile's segments, [B, tile, S, d]: what a CPU's caches like; elsewhere what memory allows.
TILE_BYTES, LARGE_TILE_BYTES = {"cpu": 8 << 20}, 256 << 20


def default_config() -> ConfigDict:
    """config.model at the paper's size (L = 1000, w = 10, d = 128, 2 heads, keys of 16, M = 2)."""
    config = history_model.default_config("laser_jax.model")
    config.num_heads = 2
    config.key_width = 16  # per head
    config.segment = 10  # w
    config.num_layers = 2  # M
    config.token_norm = True  # LayerNorm of behaviours and target, before the recency embedding
    config.recency = True
    config.gate = "sigmoid"  # sigmoid | softmax
    config.pool = "sum"  # sum | mean
    config.norm = True
    config.ffn_multiplier = 1  # of STA; 0 = none
    config.order = "auto"  # of projections: auto | shared | per_candidate
    config.fusion = "rankmixer"  # rankmixer | mlp | none
    config.fusion_tokens = 8  # T
    config.recent = 4  # r
    config.fusion_blocks = 2
    return config


def build(config: ConfigDict, spec: DataSpec) -> tuple[nn.Module, tuple[Column, ...]]:
    """The module of config.model and the columns it reads.

    Raises:
      ValueError: a switch has a value that does not exist, or the sizes do not fit.
    """
    for name, allowed in (
        ("gate", segmented.GATES),
        ("pool", segmented.POOLS),
        ("order", segmented.ORDERS),
        ("fusion", fusion.KINDS),
    ):
        if config[name] not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {config[name]!r}")
    if min(config.segment, config.num_heads, config.key_width) < 1:
        raise ValueError("segment, num_heads and key_width must be >= 1")
    if min(config.num_layers, config.ffn_multiplier, config.fusion_blocks) < 0:
        raise ValueError("num_layers, ffn_multiplier and fusion_blocks must be >= 0")
    if config.width % config.num_heads:
        raise ValueError(f"width {config.width} is not a multiple of num_heads {config.num_heads}")
    if config.recent < 0 or config.fusion_tokens < config.recent + 4:
        raise ValueError(
            f"fusion_tokens {config.fusion_tokens} must hold the {config.recent} recent segments "
            "and at least 4 more: refined, salient, target, profile"
        )
    if config.fusion == "rankmixer" and config.width % config.fusion_tokens:
        raise ValueError(
            f"width {config.width} is not a multiple of fusion_tokens {config.fusion_tokens}"
        )
    return history_model.build(config, spec, LASER(config))


class LASER(nn.Module):
    """The interest; fields of config as in `default_config`."""

    config: ConfigDict

    takes_tiles = True

    @nn.compact
    def __call__(self, tokens: Tokens, train: bool) -> jax.Array:
        """Tokens -> [B, C, d]."""
        config, batch = self.config, tokens.batch
        b, c, d = tokens.candidates.shape
        x, targets, mask = tokens.behaviours, tokens.candidates, batch.behaviour_mask
        recency = ()
        if config.recency:
            recency = RecencyEmbedding(d, name="recency")(batch.request_time, batch.behaviour_time)
        if config.token_norm:
            x = BehaviourNorm(name="behaviour_norm")(x, mask, *recency)
            targets = nn.LayerNorm(name="target_norm")(targets)
        elif config.recency:
            x = jnp.where(mask[..., None], x + rows_of(*recency), 0)
        candidates = OfCandidates(config, name="candidates")
        history = candidates.history(x, mask, c)

        segments = history.mask.shape[1] // config.segment
        tile_bytes = TILE_BYTES.get(dispatch.platform(), LARGE_TILE_BYTES)
        tile = max(1, tile_bytes // (b * segments * d * x.dtype.itemsize))
        if tile >= c or self.is_initializing():
            return candidates(targets, history, tokens.profile)

        def step(module, carry, candidates):
            return carry, module(candidates, *carry)

        count = -(-c // tile)
        tile = -(-c // count)
        tiles = jnp.pad(targets, ((0, 0), (0, count * tile - c), (0, 0)))
        if train:
            step = nn.remat(step, prevent_cse=False)
        scan = nn.scan(
            step, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1
        )
        _, out = scan(candidates, (history, tokens.profile), tiles.reshape(b, count, tile, d))
        return out.reshape(b, count * tile, d)[:, :c]


class OfCandidates(nn.Module):
    """All that is done for a candidate."""

    config: ConfigDict

    def setup(self):
        config = self.config
        self.segmented = SegmentedTargetAttention(
            width=config.width,
            num_heads=config.num_heads,
            key_width=config.key_width,
            segment=config.segment,
            gate=config.gate,
            pool=config.pool,
            ffn_multiplier=config.ffn_multiplier,
            norm=config.norm,
            order=config.order,
        )
        self.stacked = StackedTargetAttention(config.num_layers, config.num_heads)
        self.fusion = fusion.Fusion(
            config.fusion, config.fusion_tokens, config.recent, config.fusion_blocks
        )

    def history(self, behaviours, mask, candidates: int) -> segmented.History:
        """behaviours [B, L, d], mask [B, L] -> what `candidates` candidates share."""
        return self.segmented.history(behaviours, mask, candidates)

    def __call__(self, candidates, history: segmented.History, profile) -> jax.Array:
        """candidates [B, C, d], profile [B, p] -> [B, C, d]."""
        z = self.segmented(candidates, history)
        mask = history.segments(self.config.segment)
        refined = self.stacked(candidates, z, mask)
        return self.fusion(refined, z, mask, candidates, profile)
