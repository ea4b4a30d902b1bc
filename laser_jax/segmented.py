"""STA: segmented target attention, the compression of LASER.

The paper's summary gives: contiguous segments of fixed length, sigmoid gates that silence noisy
behaviours, LayerNorm and FFN on the segments, two heads with queries and keys of 16 (a reading
note: L = 1000, w = 10, d = 128). The equations are not published. Decided here (laser.md 3):

    a_l = sigmoid(q W_Q . x_l W_K / sqrt(k) + beta)           per head; beta starts at -log w
    z_j = sum over segment j of mask_l a_l (x_l W_V)           per head; a sum, so that a segment of
    z_j = LN(concat_h(z_j) W_O);  z_j = LN(z_j + FFN(z_j))     irrelevant behaviours stays near zero

Segments are aligned so that the newest is full. Work on the history is done once for all
candidates, in one of two orders each for keys and values, whichever costs less:

    keys    shared: x W_K, then scores of width k     folded: q W_Q W_K^T, scores of width d
    values  shared: x W_V, then sums of width d / H   pooled: sums of width d, then W_V

Axis letters: B requests, C candidates, L history, S segments, w segment size, d model width, H
heads, k query width.
"""

from __future__ import annotations

import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from ctr_jax.layers import masked_softmax, token_dot_general

ORDERS = ("auto", "shared", "per_candidate")
GATES = ("sigmoid", "softmax")
POOLS = ("sum", "mean")


@flax.struct.dataclass
class History:
    """A request's behaviours as all its candidates read them.

    Attributes:
      keys: [B, L', H, k] x W_K, or [B, L', 1, d] the behaviours themselves (folded order).
      values: [B, L', H, d / H] x W_V, or [B, L', 1, d] the behaviours themselves (pooled order).
      mask: [B, L'] bool. L' is L padded on the left to a multiple of w.
    """

    keys: jax.Array
    values: jax.Array
    mask: jax.Array

    def segments(self, segment: int) -> jax.Array:
        """[B, S] bool, the segments that hold a behaviour."""
        return self.mask.reshape(len(self.mask), -1, segment).any(-1)


def gated_sums(
    query: jax.Array, history: History, bias: jax.Array, segment: int, gate: str = "sigmoid"
) -> jax.Array:
    """sum over each segment of mask_l a_l values_l.

    Args:
      query: [B, C, H, k or d], scaled; as wide as history.keys.
      bias: [H].
      gate: "sigmoid", or "softmax" over each segment's behaviours.
    Returns:
      [B, C, S, H, values' width].
    """
    (b, c, h, _), length = query.shape, history.mask.shape[1]
    if history.keys.shape[2] == 1:
        scores = jnp.einsum("bchk,blk->bchl", query, history.keys[:, :, 0])
    else:
        scores = jnp.einsum("bchk,blhk->bchl", query, history.keys)
    scores = scores.reshape(b, c, h, length // segment, segment) + bias[:, None, None]
    mask = history.mask.reshape(b, 1, 1, length // segment, segment)
    if gate == "softmax":
        gates = masked_softmax(scores, mask)
    else:
        gates = jnp.where(mask, jax.nn.sigmoid(scores), 0)
    values = history.values.reshape(b, length // segment, segment, *history.values.shape[2:])
    # Segments lead: a small product per segment, candidates and heads together as its rows.
    if values.shape[3] == 1:
        sums = jnp.einsum("bchsw,bswv->bschv", gates, values[..., 0, :])
    else:
        sums = jnp.einsum("bchsw,bswhv->bschv", gates, values)
    return jnp.moveaxis(sums, 1, 2)


class SegmentedTargetAttention(nn.Module):
    """STA with its weights.

    Attributes:
      width: d. num_heads: H, which divides d. key_width: k.
      segment: w. gate: one of GATES. pool: "sum", or "mean" (the sum over w).
      ffn_multiplier: hidden width of the FFN over d; 0 leaves it out.
      norm: LayerNorms.
      order: one of ORDERS; "auto" chooses by multiplications.
    """

    width: int = 128
    num_heads: int = 2
    key_width: int = 16
    segment: int = 10
    gate: str = "sigmoid"
    pool: str = "sum"
    ffn_multiplier: int = 1
    norm: bool = True
    order: str = "auto"

    def setup(self):
        d, h, k = self.width, self.num_heads, self.key_width
        init = nn.initializers.xavier_uniform()
        self.query_kernel = self.param("query", init, (d, h * k))
        self.key_kernel = self.param("key", init, (d, h * k))
        self.value_kernel = self.param("value", init, (d, d))
        # Of a sum, so that it starts near the size of one behaviour; a mean needs none.
        start = -math.log(self.segment) if self.pool == "sum" else 0.0
        self.bias = self.param("bias", nn.initializers.constant(start), (h,))
        # Over all segments of all candidates: what costs most.
        tokens = dict(dot_general=token_dot_general)
        self.out = nn.Dense(d, use_bias=False, **tokens)
        if self.ffn_multiplier:
            self.ffn_in = nn.Dense(self.ffn_multiplier * d, **tokens)
            self.ffn_out = nn.Dense(d, **tokens)
        if self.norm:
            self.pool_norm = nn.LayerNorm()
            if self.ffn_multiplier:
                self.ffn_norm = nn.LayerNorm()

    def history(self, behaviours: jax.Array, mask: jax.Array, candidates: int) -> History:
        """What `candidates` candidates share: behaviours [B, L, d], mask [B, L] -> History."""
        b, length, d = behaviours.shape
        left = -length % self.segment
        x = jnp.pad(behaviours, ((0, 0), (left, 0), (0, 0)))
        mask = jnp.pad(mask, ((0, 0), (left, 0)))
        keys = values = x[:, :, None]
        fold, pool = self.per_candidate(length + left, candidates)
        if not fold:
            keys = self._project(x, self.key_kernel).reshape(b, -1, self.num_heads, self.key_width)
        if not pool:
            values = self._project(x, self.value_kernel).reshape(b, x.shape[1], self.num_heads, -1)
        return History(keys, values, mask)

    def per_candidate(self, length: int, candidates: int) -> tuple[bool, bool]:
        """(fold keys, pool before the value projection): the cheaper order of each, in
        multiplications, unless `order` says."""
        if self.order != "auto":
            return (self.order == "per_candidate",) * 2
        d, h, k = self.width, self.num_heads, self.key_width
        fold = candidates * (d * h * k + h * length * d) < length * h * k * (d + candidates)
        pool = candidates * (h * length * d + length // self.segment * d * d) < length * d * (
            d + candidates
        )
        return fold, pool

    def __call__(self, candidates: jax.Array, history: History) -> jax.Array:
        """candidates [B, C, d] -> segments [B, C, S, d]. Those without a behaviour hold anything:
        history.segments(w) tells them."""
        (b, c, d), h, k = candidates.shape, self.num_heads, self.key_width
        query = (candidates @ (self.query_kernel * k**-0.5)).reshape(b, c, h, k)
        if history.keys.shape[2:] == (1, d):
            query = jnp.einsum("bchk,dhk->bchd", query, self.key_kernel.reshape(d, h, k))
        z = gated_sums(query, history, self.bias, self.segment, self.gate)
        if self.pool == "mean":
            z = z / self.segment
        s, z = z.shape[2], z.reshape(b, -1, h, z.shape[-1])
        if history.values.shape[2:] == (1, d):
            kernels = jnp.split(self.value_kernel, h, 1)
            z = jnp.stack([self._project(z[:, :, i], kernels[i]) for i in range(h)], 2)
        z = self.out(z.reshape(b, -1, d))
        if self.norm:
            z = self.pool_norm(z)
        if self.ffn_multiplier:
            z = z + self.ffn_out(nn.gelu(self.ffn_in(z)))
            if self.norm:
                z = self.ffn_norm(z)
        return z.reshape(b, c, s, d)

    def _project(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return token_dot_general(x, kernel, (((2,), (0,)), ((), ())))
