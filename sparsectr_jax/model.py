"""SparseCTR (WWW 2026): long user behaviour modelling with EvoAttention and RelTemporal.

`build(config.model, spec)` gives the Linen module and the columns it wants embedded. Every
ablation of the paper is a change of the config alone:

  A1 attention="full"    A2, A3, A4 use_global, use_transition, use_local = False
  B1 all of rel_time, rel_hour, rel_weekend = False    B2, B3, B4 one of them
  chunking = "time" | "fixed" | "sim"

and so is each alternative of Figure 2: attention = "dilated" | "nsa" | "kernel" (rivals.py, and a
file each), encoding = "hstu" | "t5" | "alibi" | "rope" (encodings.py).

Axis letters: B requests, C candidates, L history, P chunks, d model width, H heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ctr_jax.batch import EmbeddedBatch
from ctr_jax.embedding import DATA_AXIS, context_mesh
from ctr_jax.features import Column, DataSpec, default_columns, require
from ctr_jax.head import MLPHead, check_head
from ctr_jax.layers import MLP, check_dropout, dropped, token_dot_general
from ctr_jax.request_tiles import in_tiles, loss_in_tiles
from ctr_jax.tokens import BehaviourToken
from kernels import dispatch
from sparsectr_jax import chunking, encodings, rivals
from sparsectr_jax.aggregate import AGGREGATES, SCOPES
from sparsectr_jax.block import BLOCKS, DROPOUTS, GATES, LOGIT_SCALES, SparseBlock, evo_spec
from sparsectr_jax.evo_attention import History


def default_config() -> ConfigDict:
    """config.model of the paper's setting (4.1.4), Sparsity-2."""
    config = ConfigDict()
    config.module = "sparsectr_jax.model"
    # Inputs: every column of the data set at one width, but those in `exclude` ("group/name").
    config.embedding_width = 32
    config.exclude = ()
    # Size.
    config.width = 32  # d
    config.num_layers = 2  # l
    config.num_heads = 8  # H
    config.ffn_multiplier = 3  # SwiGLU's hidden width over d
    # Sparsity: (8, 1, 2), (16, 2, 5), (16, 3, 10), (32, 4, 20) are the paper's Sparsity-1..4.
    config.num_chunks = 16  # P
    config.num_transition = 2  # m
    config.local_window = 5  # w
    # EvoAttention.
    config.attention = "evo"  # evo | full (A1) | dilated | nsa | kernel (4.4.1)
    config.use_global = True  # False: A2
    config.use_transition = True  # False: A3
    config.use_local = True  # False: A4
    config.chunking = "time"  # time | fixed | sim
    config.aggregate = "mean_mlp"  # mean_mlp | mean_residual | mlp_mean | attn_pool | mean
    config.aggregate_scope = "head"  # its MLPs: head (K to K, shared by heads) | model (d to d)
    config.transition_inclusive = True  # a transition behaviour sees itself
    config.gate = "literal"  # literal (3d x 3) | per_head
    config.mask_empty_branches = True  # gate logit -inf for a branch with nothing to see
    config.logit_scale = "head"  # 1 / sqrt of the head's width | the model's, as eqs. 6-8 print it
    # The other attentions; the window of dilated and nsa is local_window.
    config.dilated_stride = 32  # s: every s-th behaviour
    config.nsa_block = 32  # l: behaviours of a compressed run and of a selection block
    config.nsa_stride = 16  # s: between the ends of runs
    config.nsa_top = 5  # n: blocks read, of them the oldest, the own one and the one before
    config.kernel_rows = 64  # Linformer's rows, for any length; needs encoding = "none"
    config.length = 1024  # the longest history, for attention = "kernel" or encoding = "hstu"
    # Relative encoding: rel_temporal | hstu | t5 | alibi | rope (4.4.3) | none.
    config.encoding = "rel_temporal"
    # RelTemporal.
    config.rel_time = True  # False: B2
    config.rel_hour = True  # False: B3
    config.rel_weekend = True  # False: B4; all three False: B1
    config.timezone_hours = 8.0  # local time minus UTC
    config.hour_form = "delta"  # delta | clock
    config.time_bucket = "log2"  # log2 | suan
    config.slope_init = "paper"  # paper (from 1) | alibi (from 2^(-8/H)) | zero
    # Blocks and head.
    config.block = "pre_norm"  # pre_norm | suan
    config.norm_eps = 1e-6
    config.dropout = 0.0
    config.head_hidden = (32,)
    config.head_activation = "relu"
    config.base_rate = 0.5  # the final bias starts at its logit
    # Numbers.
    config.sparse_last_layer = True  # last block: K and V only where read; the same values
    config.rows_per_tile = 0  # requests at a time; 0: as `rows_per_tile` says
    return config


def rows_per_tile(config: ConfigDict, batch: int) -> int:
    """Requests that go through the model at a time, at most.

    By itself the whole batch, but on a CPU what is fastest there: 16 where a block works on all
    behaviours, and 64 where there is only the last, which makes little more than keys and values.
    """
    rows = config.rows_per_tile
    if not rows:
        rows = {"cpu": 64 if config.num_layers == 1 else 16}.get(dispatch.platform(), batch)
    return min(rows, batch)


class SparseCTR(nn.Module):
    """The whole model behind the embeddings; see `default_config` for the fields of config.

    Requests do not see each other, so on a CPU a few at a time go through the model to the loss and
    back, in cache: faster, and memory does not grow with the batch (ctr_jax/request_tiles.py).
    """

    config: ConfigDict
    columns: tuple[Column, ...]

    takes_rows = True
    takes_loss = True  # steps.train_step gives it the loss

    @nn.compact
    def __call__(
        self,
        embedded: EmbeddedBatch,
        train: bool,
        loss: Callable[..., jax.Array] | None = None,
        denominator: jax.Array | None = None,
    ) -> tuple[jax.Array, dict]:
        """EmbeddedBatch -> (logits [B, C] float32, out).

        `out` holds "losses" (none), and the final candidate vectors "candidates" [B, C, d].

        Args:
          loss: (logits [b, C], RequestBatch of b requests, denominator) -> scalar. With it the
            result is the sum of these scalars in place of the logits, and `out` has no candidates:
            gradients are then made with it, a few requests at a time.
          denominator: what the loss of the whole batch is divided by, so that parts add up
            (losses.loss_denominator); it goes with `loss`.
        """
        if (loss is None) != (denominator is None):
            raise ValueError("loss and denominator go together")
        keys = tuple(c.key for c in self.columns if c.group == "behaviour")
        if not keys:
            raise ValueError("SparseCTR needs at least one behaviour column")
        tokens = BehaviourToken(self.config.width, keys, use_bias=True, name="behaviour_token")
        behaviours, batch = tokens(embedded), embedded.batch
        vectors = {k: x for k, x in embedded.vectors.items() if k not in keys}
        mesh = context_mesh()
        local = batch.shape[0] // (1 if mesh is None else mesh.shape[DATA_AXIS])
        rows = rows_per_tile(self.config, local)
        seeds = None  # a request draws for itself, whatever goes through with it
        if train and self.config.dropout > 0:
            seeds = jax.random.bits(self.make_rng("dropout"), batch.shape[:1], jnp.uint32)
        if rows == local or self.is_initializing():
            requests = Requests(self.config, self.columns, name="requests")
            logits, candidates = requests(EmbeddedBatch(batch, vectors), behaviours, seeds)
            if loss is not None:
                return loss(logits, batch, denominator), {"losses": {}}
            return logits, {"losses": {}, "candidates": candidates}

        params = self.variables["params"]["requests"]

        def run(requests, fixed, params):
            (vectors, behaviours), (batch, seeds) = requests, fixed
            module = Requests(self.config, self.columns, parent=None)
            embedded = EmbeddedBatch(batch, vectors)
            return module.apply({"params": params}, embedded, behaviours, seeds)

        def run_to_loss(requests, fixed, shared):
            params, denominator = shared
            return loss(run(requests, fixed, params)[0], fixed[0], denominator)

        requests, fixed = (vectors, behaviours), (batch, seeds)
        if loss is not None:
            shared = params, denominator
            return loss_in_tiles(run_to_loss, requests, fixed, shared, rows), {"losses": {}}
        logits, candidates = in_tiles(run, requests, fixed, params, rows)
        return logits, {"losses": {}, "candidates": candidates}


class Requests(nn.Module):
    """The model on some requests: (logits [B, C], candidate vectors [B, C, d])."""

    config: ConfigDict
    columns: tuple[Column, ...]

    @nn.compact
    def __call__(
        self, embedded: EmbeddedBatch, behaviours: jax.Array, seeds: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """What `embedded` holds, but for the behaviours' vectors, which it need not.

        Args:
          behaviours: [B, L, d], their tokens.
          seeds: [B] uint32, each request's for its dropout; None drops nothing.
        """
        config, batch = self.config, embedded.batch
        dtype = jnp.result_type(*embedded.vectors.values())
        size, length, num_candidates = batch.shape

        def vectors(group: str) -> list[jax.Array]:
            return [embedded.vectors[c.key].astype(dtype) for c in self.columns if c.group == group]

        def dense(name: str) -> nn.Dense:
            return nn.Dense(config.width, dtype=dtype, dot_general=token_dot_general, name=name)

        # ---- tokens (3.2): concatenated columns to width d; the context is the candidates' ----
        times, mask = batch.behaviour_time, batch.behaviour_mask
        behaviours = behaviours.astype(dtype)
        if length == 0:  # no history: one padding behaviour, so that every shape below is usual
            times, mask = jnp.zeros((size, 1), jnp.int32), jnp.zeros((size, 1), bool)
            behaviours = jnp.zeros((size, 1, config.width), dtype)
        context = [
            jnp.broadcast_to(x[:, None], (size, num_candidates, x.shape[-1]))
            for x in vectors("context")
        ]
        candidates = dense("candidate_token")(jnp.concatenate(vectors("candidate") + context, -1))
        user_vectors = vectors("user")
        if user_vectors:
            e_u = jnp.concatenate(user_vectors, -1)
            u_c = MLP((config.width, config.width), "swish", dtype, name="user_token")(e_u)
        else:
            u_c = self.param("user_token", nn.initializers.normal(1.0), (config.width,))
            u_c = jnp.broadcast_to(u_c.astype(dtype), (size, config.width))

        # ---- blocks (3.3); chunks are cut once, unless the similarity of block inputs cuts ----
        def cut(x: jax.Array) -> chunking.Chunks:
            if config.chunking == "sim":
                return chunking.sim_chunks(x, times, mask, config.num_chunks)
            by = {"time": chunking.time_chunks, "fixed": chunking.fixed_chunks}[config.chunking]
            return by(times, mask, config.num_chunks)

        def drop(layer: int, place: int, x: jax.Array) -> jax.Array:
            return dropped(config.dropout, seeds, DROPOUTS * layer + place, x)

        chunks = None
        for i in range(config.num_layers):
            if config.attention == "evo" and (chunks is None or config.chunking == "sim"):
                chunks = cut(behaviours)
            history = History(chunks, times, mask, batch.request_time)
            block = SparseBlock(config, i == config.num_layers - 1, dtype, name=f"block_{i}")
            streams = behaviours, candidates, u_c
            behaviours, candidates = block(*streams, history, functools.partial(drop, i))

        # ---- prediction (3.6, eq. 17) ----
        x = nn.relu(dense("head_candidate")(candidates))
        if user_vectors:
            x = x * nn.sigmoid(dense("head_user")(e_u))[:, None]
        head = MLPHead(
            config.head_hidden, config.head_activation, config.base_rate, dtype, name="head"
        )
        return head(x), candidates


def build(config: ConfigDict, spec: DataSpec) -> tuple[nn.Module, tuple[Column, ...]]:
    """The module of config.model and the columns it reads.

    Raises:
      ValueError: a switch has a value that does not exist, or the sizes do not fit.
    """
    if config.num_heads < 1 or config.width % config.num_heads:
        raise ValueError(f"width {config.width} is not a multiple of num_heads {config.num_heads}")
    for name, allowed in (
        ("chunking", chunking.METHODS),
        ("aggregate", AGGREGATES),
        ("aggregate_scope", SCOPES),
        ("gate", GATES),
        ("logit_scale", LOGIT_SCALES),
        ("block", BLOCKS),
    ):
        if config[name] not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {config[name]!r}")
    for name in ("num_layers", "ffn_multiplier", "num_chunks", "num_transition", "local_window"):
        if config[name] < 1:
            raise ValueError(f"{name} must be >= 1, got {config[name]}")
    check_dropout(config.dropout)
    check_head(config.head_hidden, config.base_rate, config.head_activation)
    evo_spec(config)
    rivals.check(config)
    encodings.check(config)
    columns = default_columns(spec, config.embedding_width, exclude=config.exclude)
    require(columns, spec, "SparseCTR")
    return SparseCTR(config, columns), columns
