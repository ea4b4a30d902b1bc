"""SparseBlock: RMSNorm, attention with fusion gate, SwiGLU (SparseCTR 3.3).

Behaviours and candidates are two streams through the same weights; candidates are never keys.
In the last block only the candidates' outputs are read (eq. 17), so behaviour queries, their
attention, W_O and FFN are not computed there; and where the aggregate is a mean, which commutes
with the linear K and V projections, keys and values are made at the chunk means, the transition
behaviours and the last w behaviours only.

Axis letters: B requests, C candidates, L history, P chunks, d model width, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ctr_jax.layers import RMSNorm, SwiGLU, token_dot_general
from kernels.evo_attention import RelTemporal
from kernels.softmax import accumulation_dtype
from sparsectr_jax import encoded_attention, evo_attention
from sparsectr_jax.aggregate import MEAN_TYPE, Aggregate, chunk_mean
from sparsectr_jax.chunking import transition_slots
from sparsectr_jax.encodings import ADDED, layer_encoding
from sparsectr_jax.evo_attention import EvoSpec, History, Keys, gather_rows
from sparsectr_jax.rivals import Rival, projections

GATES, BLOCKS, LOGIT_SCALES = ("literal", "per_head"), ("pre_norm", "suan"), ("head", "model")
DROPOUTS = 4  # places of a block where it drops
Drop = Callable[[int, jax.Array], jax.Array]


def evo_spec(config: ConfigDict) -> EvoSpec:
    """The op's static options from config.model.

    Raises:
      ValueError: no branch is left.
    """
    on = (config.use_global, config.use_transition, config.use_local)
    branches = tuple(b for b, used in zip(evo_attention.BRANCHES, on, strict=True) if used)
    if not branches:
        raise ValueError("at least one of use_global, use_transition, use_local must be True")
    temporal = config.encoding == "rel_temporal"
    rel = RelTemporal(
        time=temporal and config.rel_time,
        hour=temporal and config.rel_hour,
        weekend=temporal and config.rel_weekend,
        timezone_hours=config.timezone_hours,
        hour_form=config.hour_form,
        bucket=config.time_bucket,
    )
    return EvoSpec(
        m=config.num_transition,
        w=config.local_window,
        rel=rel,
        inclusive=config.transition_inclusive,
        scale=config.width**-0.5 if config.logit_scale == "model" else None,
        branches=branches,
    )


class FusionGate(nn.Module):
    """Softmax gate over the branches, and their weighted sum (SparseCTR eqs. 9 and 10).

    Attributes:
      kind: "literal", one gate per query from the concatenated full-width outputs, W [R, H, K, R];
        "per_head", one per query and head, of the same W.
      mask_empty: a branch with nothing to see gets gate logit -inf; False is the literal form,
        in which its output of 0 takes part.
    """

    kind: str = "literal"
    mask_empty: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, branches: list[jax.Array], nonempty: jax.Array) -> jax.Array:
        """branches: R of [B, n, H, K]; nonempty: [B, n or 1, R] bool -> [B, n, H, K]."""
        heads, width = branches[0].shape[-2:]
        number = len(branches)
        if self.kind not in GATES:
            raise ValueError(f"gate must be one of {GATES}, got {self.kind!r}")
        if self.kind == "literal":
            shape, axes = (number, heads, width, number), "rhks->s"
            init = nn.initializers.variance_scaling(
                1.0, "fan_in", "truncated_normal", in_axis=(0, 1, 2), out_axis=3
            )
        else:
            shape, axes = (number, heads, width, number), "rhks->hs"
            init = nn.initializers.variance_scaling(
                1.0, "fan_in", "truncated_normal", in_axis=(0, 2), out_axis=3, batch_axis=1
            )
        gate = self.param("kernel", init, shape).astype(self.dtype)
        spec = f"bnhk,{axes[1:4]}->bn{axes[6:]}"
        logits = sum(
            jnp.einsum(spec, x, gate[r], preferred_element_type=accumulation_dtype(self.dtype))
            for r, x in enumerate(branches)
        )
        if self.kind == "literal":
            logits = logits[:, :, None]  # one gate for all heads
        if self.mask_empty:
            logits = jnp.where(nonempty[:, :, None], logits, -jnp.inf)
            # With the local branch dropped, all branches may be empty; their outputs are 0 too.
            logits = jnp.where(nonempty.any(-1)[:, :, None, None], logits, 0)
        alpha = nn.softmax(logits).astype(self.dtype)  # [B, n, H or 1, R]
        return sum(alpha[..., r, None] * x for r, x in enumerate(branches))


class EvoAttention(nn.Module):
    """Attention of one block: projections, branches, gate and W_O (SparseCTR eqs. 3-11)."""

    config: ConfigDict
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, behaviours, candidates, user, history: History, last: bool):
        """Normalised streams [B, L, d], [B, C, d] and user token [B, d] -> their updates.

        Returns:
          ([B, L, d] or None in the last block, [B, C, d]).
        """
        config = self.config
        heads, width = config.num_heads, config.width // config.num_heads
        spec = evo_spec(config)
        dense = {
            name: nn.Dense(
                config.width,
                use_bias=False,
                dtype=self.dtype,
                dot_general=token_dot_general,
                name=name,
            )
            for name in ("query", *projections(config), "output")
        }

        def project(name: str, x: jax.Array) -> jax.Array:
            return dense[name](x).reshape(x.shape[:-1] + (heads, width))

        def output(x: jax.Array) -> jax.Array:
            return dense["output"](x.reshape(x.shape[:-2] + (config.width,)))

        length = behaviours.shape[1]
        encoding = layer_encoding(self.param, config, spec.rel, length)
        q_c = project("query", candidates)
        q_b = None if last else project("query", behaviours)

        if config.attention != "evo":
            rival = Rival(config, spec.scale, project, encoding, history, self.dtype)
            out_b, out_c = rival((q_b, q_c), (behaviours, candidates))
            return None if last else output(out_b), output(out_c)

        # Keys and values, at as few places as the block needs.
        mean_type = config.aggregate in MEAN_TYPE
        pool = Aggregate(config.aggregate, config.aggregate_scope, self.dtype, name="aggregate")
        index = transition_slots(history.chunks, spec.m)[0].reshape(behaviours.shape[0], -1)
        recent = slice(max(length - spec.w, 0), length)
        sparse = last and mean_type and config.sparse_last_layer
        k = v = None
        if not sparse:
            k, v = project("key", behaviours), project("value", behaviours)

        def at(name: str, full: jax.Array | None, rows: jax.Array | slice) -> jax.Array:
            take = (
                (lambda x: x[:, rows])
                if isinstance(rows, slice)
                else lambda x: gather_rows(x, rows)
            )
            return project(name, take(behaviours)) if full is None else take(full)

        if mean_type:
            means = chunk_mean(behaviours, history.chunks)
            chunk_k, chunk_v = pool(
                project("key", means), project("value", means), history.chunks, True
            )
        else:
            chunk_k, chunk_v = pool(k, v, history.chunks)
        keys = Keys(
            chunk_k=chunk_k,
            chunk_v=chunk_v,
            transition_k=at("key", k, index),
            transition_v=at("value", v, index),
            recent_k=at("key", k, recent),
            recent_v=at("value", v, recent),
            user_k=project("key", user),
            user_v=project("value", user),
        )
        gate = FusionGate(config.gate, config.mask_empty_branches, self.dtype, name="gate")
        used = jnp.array([evo_attention.BRANCHES.index(b) for b in spec.branches])
        seen_b, seen_c = evo_attention.branch_nonempty(history, spec)

        def fuse(branches, seen: jax.Array) -> jax.Array:
            return output(gate([x for x in branches if x is not None], seen[..., used]))

        if config.encoding in ADDED:  # the op has no such bias
            at = (history, spec, encoding)
            out_c = fuse(encoded_attention.candidate_branches(q_c, keys, *at), seen_c)
            if last:
                return None, out_c
            return fuse(encoded_attention.behaviour_branches(q_b, k, v, keys, *at), seen_b), out_c
        slopes = encoding.slopes
        if config.encoding != "rel_temporal":
            slopes = jnp.zeros((3, heads))
        if config.encoding == "rope":  # candidates stand at 0
            keys = encoded_attention.rotated_keys(keys, history, spec, encoding)
            if not last:
                at = jnp.arange(length, dtype=jnp.int32)
                q_b, k = (encoding.rotated(x, at, length) for x in (q_b, k))
        out_c = fuse(evo_attention.candidate_branches(q_c, keys, slopes, history, spec), seen_c)
        if last:
            return None, out_c
        branches = evo_attention.behaviour_branches(q_b, k, v, keys, slopes, history, spec)
        return fuse(branches, seen_b), out_c


class SparseBlock(nn.Module):
    """One block (SparseCTR 3.3).

    config.block: "pre_norm", h = x + Evo(RMS(x)), y = h + SwiGLU(RMS(h)); "suan", the sibling
    model's order, in which the residual stream is the normalised tensor: x = RMS1(x),
    x = RMS2(x + Evo(x)), y = x + SwiGLU(x), with its norm and its biases.
    """

    config: ConfigDict
    last: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, behaviours, candidates, user, history: History, drop: Drop | None = None):
        """[B, L, d], [B, C, d], user token [B, d] -> ([B, L, d] or None if last, [B, C, d]).

        Args:
          drop: (place 0..3, [B, n, d]) -> [B, n, d], the block's dropout: of the updates of
            behaviours by attention and by the FFN, then of the candidates'. None drops nothing.
        """
        drop = drop or (lambda place, x: x)
        config = self.config
        suan = config.block == "suan"
        norm_1, norm_2 = (
            RMSNorm(config.norm_eps, suan, self.dtype, name=name) for name in ("norm_1", "norm_2")
        )
        attention = EvoAttention(config, self.dtype, name="attention")
        ffn = SwiGLU(config.ffn_multiplier * config.width, suan, self.dtype, name="ffn")

        normed = [norm_1(x) for x in (behaviours, candidates, user)]
        updates = attention(*normed, history, self.last)

        def rest(place, x, z, update):
            if update is None:
                return None
            update = drop(place, update)
            if suan:
                z = norm_2(z + update)
                return z + drop(place + 1, ffn(z))
            x = x + update
            return x + drop(place + 1, ffn(norm_2(x)))

        return (
            rest(0, behaviours, normed[0], updates[0]),
            rest(2, candidates, normed[1], updates[1]),
        )
