"""Multi-head target attention over the behaviours that a search selected for each candidate.

    s_l = (q W_Q)(x_l W_K) / sqrt(K)                    per head
    out = concat_h(sum over the selected l of softmax(s)_l x_l W_V) W_O

No matrix has a bias; nothing selected gives 0. It is the second stage (ESU) of SIM and ETA, and
both stages of TWIN, whose search uses the scores s themselves.

x_l W_K is formed once per history for all candidates. x_l W_V is formed of no behaviour: the
selected x_l are summed first, which gives the same, and costs less where C (H - 1) < d.

Axis letters: B requests, C candidates, L history, d model width, H heads, K head width, T
candidates of a tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ctr_jax.layers import token_dot_general
from ctr_jax.query_tiles import heads_last, over_tiles, tokens_last
from ctr_jax.request_tiles import in_tiles
from kernels import dispatch
from kernels.softmax import accumulation_dtype, masked_softmax

Select = Callable[[jax.Array, Any, Any, jax.Array], jax.Array]


class SelectedAttention(nn.Module):
    """The attention.

    Attributes:
      heads: H, a divisor of d.
      tile_bytes: as in ctr_jax/query_tiles.py.
    """

    heads: int
    tile_bytes: int = 0

    @nn.compact
    def __call__(
        self,
        candidates: jax.Array,
        behaviours: jax.Array,
        mask: jax.Array,
        select: Select,
        of_candidates: Any = (),
        of_behaviours: Any = (),
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """candidates [B, C, d], behaviours [B, L, d], mask [B, L] -> [B, C, d].

        Args:
          select: (scores [H, T, L], of_candidates [..., T], of_behaviours [..., L], mask [L]) of
            one request -> bool [T, L] or [H, T, L], within the mask. It closes over no arrays.
          of_candidates, of_behaviours: what the search compares, trees of [B, ..., C] and
            [B, ..., L]. No gradient goes to them.
          bias: [B, L] without gradients, which s has in addition; for all heads.
        """
        d, heads = behaviours.shape[-1], self.heads

        def dense(name: str) -> nn.Dense:
            return nn.Dense(d, use_bias=False, dot_general=token_dot_general, name=name)

        query = heads_last(dense("q")(candidates) * (d // heads) ** -0.5, heads)
        key = heads_last(dense("k")(behaviours), heads)
        # On a mesh each device goes through its own requests; elsewhere this is a plain call.
        found = in_tiles(
            functools.partial(_sums, select, self.tile_bytes),
            (query, key, jnp.swapaxes(behaviours, 1, 2)),
            jax.lax.stop_gradient((mask, bias, of_candidates, of_behaviours)),
            (),
            dispatch.requests_of_a_device(len(mask)),
        )
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "normal", 1, 2, batch_axis=0)
        of_value = self.param("v", init, (heads, d, d // heads))
        return dense("out")(tokens_last(jnp.einsum("bhdc,hdk->bhkc", found, of_value)))


def _sums(select, tile_bytes, requests, fixed, shared):
    """The weighted sums of x: q [B, H, K, C], k [B, H, K, L], x [B, d, L] -> [B, H, d, C]."""
    del shared
    (query, key, x), (mask, bias, of_candidates, of_behaviours) = requests, fixed

    def attend(queries, keys, first):
        """([H, K, T], of_candidates), ([H, K, L], [d, L], [L], bias [L] or None, of_behaviours) ->
        [H, d, T]."""
        del first
        (q, of_candidates), (k, x, mask, bias, of_behaviours) = queries, keys
        exact = accumulation_dtype(q.dtype)
        scores = jnp.einsum("hks,hkt->hts", k, q, preferred_element_type=exact)
        scores = scores if bias is None else scores + bias
        weights = masked_softmax(scores, select(scores, of_candidates, of_behaviours, mask))
        return jnp.einsum("hts,ds->hdt", weights.astype(x.dtype), x)

    return over_tiles(
        attend,
        (query, of_candidates),
        (key, x, mask, bias, of_behaviours),
        query_bytes=query.shape[1] * mask.shape[1] * query.dtype.itemsize,
        tile_bytes=tile_bytes,
    )
