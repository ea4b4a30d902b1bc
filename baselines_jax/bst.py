"""BST: a Transformer over the behaviours and the candidate together (Chen et al., DLP-KDD 2019).

    x_i = e_i + P[pos(i)]                           i over the valid behaviours, the candidate last
    s   = LN(x + drop(Attn(x)))                     Attn: H heads, softmax(q k / sqrt(K)) v W_O
    x  <- LN(s + drop(W_2 leaky_relu(W_1 s)))       N layers; W_1, W_2 with biases, Attn without

Every row sees every row, so the encoded history depends on the candidate: each candidate has a
sequence of its own, and candidates do not see one another. pos is the time to the request in HSTU's
buckets ("time": the paper's t(v_t) - t(v_i), 0 for the candidate), or the place counted from the
candidate ("index": FuxiCTR's, a row for each). P is added where the paper concatenates and then
projects: a projection of [e; p] is a sum, and e_i is projected already. W_1 is ffn_multiplier d
wide, the slope .01 and LN's eps 1e-5, as in FuxiCTR; the paper does not say.

What goes to the head: "target", the candidate's row, d; "mean" over the valid rows, d; "concat" of
all rows, (length + 1) d, the paper's choice for its 20 behaviours. "target" is the default: at
thousands of behaviours a concatenation is a head of millions of weights, and all rows of the last
layer but the candidate's need not be computed.

All candidates of a request have one time and one place, so that the same history enters the first
layer for each, and its attention needs no pass per candidate: with o_i the attention of row i over
the history alone, and Z_i the log of the sum of its exponentials,

    Attn_i = o_i + sigmoid(q_i k_c - Z_i) (v_c - o_i)

is that over the history and c. o and Z are made once, O(L^2 d); each candidate costs O(L d^2) in
the first layer, and O(L^2 d) in a later one of which all rows are read. One layer with "target" is
one row per candidate, and no more. Candidates go in tiles (ctr_jax/query_tiles.py), so that
[L, d] exists for the few of a tile.

Axis letters: B requests, C candidates, L history, n = L + 1 rows, d model width, H heads, K head
width, S keys and T queries, or candidates, of a tile.
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
from ctr_jax.layers import check_dropout, dropped, token_product
from ctr_jax.query_tiles import heads_last, over_tiles, tokens_last
from ctr_jax.time_buckets import BUCKETS, bucket
from kernels.softmax import accumulation_dtype, masked_softmax

POSITIONS, POOLINGS = ("time", "index"), ("target", "mean", "concat")
SLOPE, EPS = 0.01, 1e-5
NOTHING = -1e30  # the log of a sum over no behaviours, with room for a difference


def default_config() -> ConfigDict:
    """One layer, the paper's best, of two heads at d = 128."""
    config = history_model.default_config("baselines_jax.bst")
    config.num_layers = 1
    config.num_heads = 2
    config.ffn_multiplier = 1
    config.position = "time"
    config.pooling = "target"
    config.dropout = 0.0
    config.length = 1000  # the longest history, where position is "index" or pooling "concat"
    return config


def build(config: ConfigDict, spec: DataSpec) -> tuple[nn.Module, tuple[Column, ...]]:
    """The module of config.model and the columns it reads.

    Raises:
      ValueError: the sizes do not fit, or there is no such position or pooling.
    """
    sizes = (config.num_layers, config.num_heads, config.ffn_multiplier, config.length)
    if min(sizes) < 1 or config.width % config.num_heads:
        raise ValueError(
            "num_layers, num_heads, ffn_multiplier and length must be >= 1, and num_heads divide "
            "width"
        )
    if config.position not in POSITIONS or config.pooling not in POOLINGS:
        raise ValueError(f"position must be one of {POSITIONS} and pooling one of {POOLINGS}")
    check_dropout(config.dropout)
    interest = BST(
        config.num_layers,
        config.num_heads,
        config.ffn_multiplier,
        config.position,
        config.pooling,
        config.dropout,
        config.length,
    )
    return history_model.build(config, spec, interest)


class BST(nn.Module):
    """The interest.

    Attributes:
      layers, heads, ffn: num_layers, num_heads and ffn_multiplier of the config.
      position, pooling, dropout, length: of the config.
      tile_bytes: as in ctr_jax/query_tiles.py, of attention's tiles and of candidates' alike.
    """

    layers: int = 1
    heads: int = 2
    ffn: int = 1
    position: str = "time"
    pooling: str = "target"
    dropout: float = 0.0
    length: int = 1000
    tile_bytes: int = 0

    takes_tiles = loops_over_requests = True

    @nn.compact
    def __call__(self, tokens: Tokens, train: bool) -> jax.Array:
        """Tokens -> [B, C, d], or [B, C, (length + 1) d] for "concat".

        Raises:
          ValueError: the history is longer than `length`, where that matters.
        """
        batch, history, candidates = tokens.batch, tokens.behaviours, tokens.candidates
        (_, length, d), mask = history.shape, batch.behaviour_mask
        if self.position == "index" or self.pooling == "concat":
            check_length(tokens, self.length)

        # ---- positions ----
        rows = self.length + 1 if self.position == "index" else BUCKETS + 1
        table = self.param("position", nn.initializers.normal(0.02), (rows, d))
        if self.position == "index":
            history = history + table[self.length - length : -1]
            candidates = candidates + table[-1]
        else:
            ages = bucket(batch.request_time[:, None] - batch.behaviour_time)
            history = history + table[ages]
            candidates = candidates + table[0]

        # ---- first layer's attention over the history: for all candidates at once ----
        layers = [Weights(d, self.ffn, name=f"layer_{i}")() for i in range(self.layers)]
        project = functools.partial(_project, layers[0], self.heads)
        keys = (project("k", history), project("v", history), mask)
        sizes = dict(
            query_bytes=self.heads * length * history.dtype.itemsize, tile_bytes=self.tile_bytes
        )
        own = {name: project(name, candidates) for name in "qkv"}
        own["seen"] = over_tiles(_over_history, own["q"], keys, **sizes)
        own["x"] = jnp.swapaxes(candidates, 1, 2)
        if tokens.seeds is not None:
            own["seed"] = tokens.seeds
        # Whether all rows are read of a layer, or the candidate's alone.
        whole = [True] * (self.layers - 1) + [self.pooling != "target"]
        shared = {"mask": mask}
        if whole[0]:
            q = project("q", history)
            seen = over_tiles(_over_history, q, keys, **sizes)
            shared |= {"q": q, "seen": seen, "x": jnp.swapaxes(history, 1, 2)}

        # ---- the rest: for each candidate ----
        def rest(own, shared, first):
            """T candidates of one request -> what is pooled of each, [p, T]."""
            del first

            def drop(layer: int, place: int, x: jax.Array) -> jax.Array:
                return dropped(self.dropout, own.get("seed"), 2 * layer + place, x)

            valid = jnp.append(shared["mask"], True)
            x, attended = own["x"].T[:, None], _own_row(own)
            if whole[0]:
                rows = jnp.broadcast_to(shared["x"].T, (len(x), length, d))
                x = jnp.concatenate([rows, x], 1)
                attended = jnp.concatenate([_history_rows(own, shared), attended], 1)
            x = _finish(layers[0], x, attended, functools.partial(drop, 0))
            for i, weights in enumerate(layers[1:], 1):
                project = functools.partial(_project, weights, self.heads)
                keys = (
                    project("k", x),
                    project("v", x),
                    jnp.broadcast_to(valid, (len(x), length + 1)),
                )
                x = x if whole[i] else x[:, -1:]
                attended = over_tiles(
                    _attend,
                    project("q", x),
                    keys,
                    query_bytes=self.heads * (length + 1) * x.dtype.itemsize,
                    tile_bytes=self.tile_bytes,
                )
                x = _finish(weights, x, tokens_last(attended), functools.partial(drop, i))
            return self._pool(x, valid).T

        per_row = max(self.ffn, 3) * d * candidates.dtype.itemsize
        found = over_tiles(
            rest,
            own,
            shared,
            query_bytes=per_row * (length + 1 if whole[0] else 1),
            tile_bytes=self.tile_bytes,
        )
        return jnp.swapaxes(found, 1, 2)

    def _pool(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        """x [T, n, d], or the target's row [T, 1, d]; valid [n] -> [T, pooled]."""
        if self.pooling == "target":
            return x[:, -1]
        x = jnp.where(valid[:, None], x, 0)
        if self.pooling == "mean":
            dtype = accumulation_dtype(x.dtype)
            return (jnp.sum(x, 1, dtype=dtype) / jnp.sum(valid)).astype(x.dtype)
        x = jnp.pad(x, ((0, 0), (self.length + 1 - x.shape[1], 0), (0, 0)))
        return x.reshape(len(x), -1)


class Weights(nn.Module):
    """The parameters of one layer: they are used inside loops, where Flax modules cannot be."""

    width: int
    ffn: int

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        d, hidden = self.width, self.ffn * self.width
        kernel, zeros, ones = (
            nn.initializers.lecun_normal(),
            nn.initializers.zeros,
            nn.initializers.ones,
        )
        shapes = {name: (kernel, (d, d)) for name in ("q", "k", "v", "out")} | {
            "up": (kernel, (d, hidden)),
            "up_bias": (zeros, (hidden,)),
            "down": (kernel, (hidden, d)),
            "down_bias": (zeros, (d,)),
            "norm_scale": (ones, (d,)),
            "norm_bias": (zeros, (d,)),
            "ffn_norm_scale": (ones, (d,)),
            "ffn_norm_bias": (zeros, (d,)),
        }
        return {name: self.param(name, *of) for name, of in shapes.items()}


def _project(weights, heads: int, name: str, x: jax.Array) -> jax.Array:
    """x [B, n, d] -> [B, H, K, n]; queries scaled."""
    x = token_product(x, weights[name])
    return heads_last(x * (x.shape[-1] // heads) ** -0.5 if name == "q" else x, heads)


def _finish(weights, x: jax.Array, attended: jax.Array, drop) -> jax.Array:
    """The layer after its softmax: x, attended [T, n, d] -> [T, n, d]."""

    def norm(x: jax.Array, name: str) -> jax.Array:
        wide = x.astype(accumulation_dtype(x.dtype))
        wide -= jnp.mean(wide, -1, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + EPS)
        return (wide * weights[f"{name}_scale"] + weights[f"{name}_bias"]).astype(x.dtype)

    x = norm(x + drop(0, token_product(attended, weights["out"])), "norm")
    hidden = nn.leaky_relu(token_product(x, weights["up"]) + weights["up_bias"], SLOPE)
    return norm(
        x + drop(1, token_product(hidden, weights["down"]) + weights["down_bias"]), "ffn_norm"
    )


def _over_history(q, keys, first):
    """q [H, K, T] -> [H, K + 1, T]: o, and Z as its last row."""
    del first
    k, v, mask = keys
    dtype = accumulation_dtype(q.dtype)
    logits = jnp.einsum("hks,hkt->hst", k, q, preferred_element_type=dtype)
    logits = jnp.where(mask[:, None], logits, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.max(logits, 1, keepdims=True))
    peak = jnp.where(jnp.isfinite(peak), peak, 0)
    weights = jnp.exp(logits - peak)
    total = jnp.sum(weights, 1, keepdims=True)
    some = total > 0
    safe = jnp.where(some, total, 1)
    o = jnp.einsum("hks,hst->hkt", v, (weights / safe).astype(v.dtype))
    return jnp.concatenate([o.astype(dtype), jnp.where(some, peak + jnp.log(safe), NOTHING)], 1)


def _own_row(own):
    """The candidates' rows in the first layer, [T, 1, d]."""
    o, z = own["seen"][:, :-1], own["seen"][:, -1:]
    gate = nn.sigmoid(jnp.sum((own["q"] * own["k"]).astype(z.dtype), 1, keepdims=True) - z)
    attended = o + gate * (own["v"] - o)
    return attended.astype(own["x"].dtype).reshape(-1, attended.shape[-1]).T[:, None]


def _history_rows(own, shared):
    """The history's rows in the first layer, for each candidate: [T, L, d]."""
    o, z = shared["seen"][:, :-1], shared["seen"][:, -1]
    logits = jnp.einsum("hks,hkt->hts", shared["q"], own["k"], preferred_element_type=z.dtype)
    gate = nn.sigmoid(logits - z[:, None])
    attended = o[:, :, None] + gate[:, None] * (own["v"][..., None] - o[:, :, None])
    attended = jnp.moveaxis(attended.astype(own["x"].dtype), (0, 1), (2, 3))
    return attended.reshape(*attended.shape[:2], -1)


def _attend(q, keys, first):
    """q [H, K, T], keys (k, v [H, K, S], mask [S]) -> [H, K, T]."""
    del first
    k, v, mask = keys
    dtype = accumulation_dtype(q.dtype)
    logits = jnp.einsum("hks,hkt->hst", k, q, preferred_element_type=dtype)
    weights = masked_softmax(logits, mask[:, None], axis=-2)
    return jnp.einsum("hks,hst->hkt", v, weights.astype(v.dtype))
