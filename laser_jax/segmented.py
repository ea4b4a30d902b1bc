"""STA: segmented target attention, the compression of LASER.

The paper's summary gives: contiguous segments of fixed length, sigmoid gates that silence noisy
behaviours, LayerNorm and FFN on the segments, two heads with queries and keys of 16 (a reading
note: L = 1000, w = 10, d = 128). The equations are not published. Decided here:

    a_l = sigmoid(q W_Q . x_l W_K / sqrt(k) + beta)           per head; beta starts at -log w
    z_j = sum over segment j of mask_l a_l (x_l W_V)           per head; a sum, so that a segment of
    z_j = concat_h(z_j) W_O;  z_j = z_j + FFN(LN(z_j))         irrelevant behaviours stays near zero

First built was z_j = LN(concat_h(z_j) W_O), z_j = LN(z_j + FFN(z_j)). That brings every segment to
the same size, so that how much of it is relevant, which the gates have found, is lost: it costs .06
of AUC on generated data, in one seed (docs/laser.md). LayerNorm is the FFN's alone here, and the
FFN starts at zero, as its output is of one size whatever the segment's.

Segments are aligned so that the newest is full. Two orders of the projections give the same; the
one with fewer multiplications is taken (the sums are kernels/segmented_target_attention):

    shared         x W_K and x W_V once for all candidates; scores of width k, sums of width d / H
    per_candidate  q W_Q W_K^T meets x itself, and W_V comes after the sums; scores and sums of
                   width d, for each head

Axis letters: B requests, C candidates, L history, S segments, w segment size, d model width, H
heads, k query width.
"""

from __future__ import annotations

import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from ctr_jax.layers import token_dot_general, token_product
from kernels.segmented_target_attention import segmented_target_attention

ORDERS = ("auto", "shared", "per_candidate")
GATES = ("sigmoid", "softmax")
POOLS = ("sum", "mean")


def of_heads(key: jax.Array, shape: tuple[int, int, int], dtype=jnp.float32) -> jax.Array:
    """Xavier's uniform of the one matrix [d, H k] that [H, d, k] holds: heads lead, so that a
    product of one head reads its part in place, where a CPU would copy it first."""
    h, d, k = shape
    whole = nn.initializers.xavier_uniform()(key, (d, h * k), dtype)
    return jnp.moveaxis(whole.reshape(d, h, k), 1, 0)


@flax.struct.dataclass
class History:
    """A request's behaviours as all its candidates read them, padded on the left to L' = S w.

    Attributes:
      behaviours: [B, L', d].
      keys, values: [B, L', H, k] and [B, L', H, d / H] in the shared order, else None.
      mask: [B, L'] bool.
    """

    behaviours: jax.Array
    keys: jax.Array | None
    values: jax.Array | None
    mask: jax.Array

    def segments(self, segment: int) -> jax.Array:
        """[B, S] bool, the segments that hold a behaviour."""
        return self.mask.reshape(len(self.mask), -1, segment).any(-1)


class SegmentedTargetAttention(nn.Module):
    """STA with its weights.

    Attributes:
      width: d. num_heads: H, which divides d. key_width: k.
      segment: w. gate: one of GATES. pool: "sum", or "mean" (the sum over w).
      ffn_multiplier: hidden width of the FFN over d; 0 leaves it and its LayerNorm out.
      norm: the LayerNorm.
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
        self.key_kernel = self.param("key", of_heads, (h, d, k))
        self.value_kernel = self.param("value", of_heads, (h, d, d // h))
        # Of a sum, so that it starts near the size of one behaviour; a mean needs none.
        start = -math.log(self.segment) if self.pool == "sum" else 0.0
        self.bias = self.param("bias", nn.initializers.constant(start), (h,))
        # Over all segments of all candidates: what costs most.
        tokens = dict(dot_general=token_dot_general)
        self.out = nn.Dense(d, use_bias=False, **tokens)
        if self.ffn_multiplier:
            self.ffn_in = nn.Dense(self.ffn_multiplier * d, **tokens)
            self.ffn_out = nn.Dense(d, kernel_init=nn.initializers.zeros, **tokens)
            if self.norm:
                self.ffn_norm = nn.LayerNorm()

    def history(self, behaviours: jax.Array, mask: jax.Array, candidates: int) -> History:
        """What `candidates` candidates share: behaviours [B, L, d], mask [B, L] -> History."""
        b, length, d = behaviours.shape
        left = -length % self.segment
        x = jnp.pad(behaviours, ((0, 0), (left, 0), (0, 0)))
        mask = jnp.pad(mask, ((0, 0), (left, 0)))
        if self.per_candidate(length + left, candidates):
            return History(x, None, None, mask)
        heads = (b, length + left, self.num_heads, -1)
        keys, values = (
            token_product(x, jnp.moveaxis(w, 0, 1).reshape(d, -1)).reshape(heads)
            for w in (self.key_kernel, self.value_kernel)
        )
        return History(x, keys, values, mask)

    def per_candidate(self, length: int, candidates: int) -> bool:
        """Whether that order needs fewer multiplications, unless `order` says."""
        if self.order != "auto":
            return self.order == "per_candidate"
        d, h, k = self.width, self.num_heads, self.key_width
        of_one = d * h * k + 2 * h * length * d + length // self.segment * d * d
        return candidates * of_one < length * (h * k + d) * (d + candidates)

    def __call__(self, candidates: jax.Array, history: History) -> jax.Array:
        """candidates [B, C, d] -> segments [B, C, S, d]. Those without a behaviour hold anything:
        history.segments(w) tells them."""
        (b, c, d), h, k = candidates.shape, self.num_heads, self.key_width
        query = (candidates @ self.query_kernel).reshape(b, c, h, k)
        if history.keys is None:
            query = jnp.einsum("bchk,hdk->bchd", query * k**-0.5, self.key_kernel)
            z = segmented_target_attention(
                query,
                history.behaviours.reshape(b, -1, 1, d),
                None,
                history.mask,
                self.bias,
                segment=self.segment,
                activation=self.gate,
                scale=1.0,
            )
            z = z.reshape(b, -1, h, d)
            of_head = [token_product(z[:, :, i], self.value_kernel[i]) for i in range(h)]
            z = jnp.concatenate(of_head, -1)
        else:
            z = segmented_target_attention(
                query,
                history.keys,
                history.values,
                history.mask,
                self.bias,
                segment=self.segment,
                activation=self.gate,
            )
        if self.pool == "mean":
            z = z / self.segment
        z = self.out(z.reshape(b, -1, d))
        if self.ffn_multiplier:
            normed = self.ffn_norm(z) if self.norm else z
            z = z + self.ffn_out(nn.gelu(self.ffn_in(normed)))
        return z.reshape(b, c, -1, d)
