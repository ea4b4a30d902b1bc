"""DIN's target attention: a small MLP scores each behaviour, no softmax (Zhou et al., KDD 2018).

    a_i = MLP([q, e_i, q - e_i, q * e_i])        out = sum_i mask_i a_i e_i

The first layer is linear in its four inputs: a term of q, one of e_i, which all candidates share,
and (q * e_i) W_p. Long histories take the last two as one product of e_i with a kernel of the
candidate's own, W_e - W_d + diag(q) W_p; short ones are not worth that kernel.

Requests, and the candidates of one request, go through in tiles, made anew in the backward pass;
the batch statistics of Dice take a pass over the tiles of their own in training. So no [B, C, L, h]
array larger than `tile_bytes` is made, or than one candidate's [L, h].

Axis letters: B requests, C candidates, L history, d model width, h hidden units.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from ctr_jax import request_tiles
from ctr_jax.layers import token_product
from kernels import dispatch

TILE_BYTES, LARGE_TILE_BYTES = {"cpu": 1 << 20}, 64 << 20  # a CPU's caches; what memory allows


def dice(x: jax.Array, mean: jax.Array, variance: jax.Array, alpha: jax.Array) -> jax.Array:
    """p x + (1 - p) alpha x with p = sigmoid((x - mean) / sqrt(variance + 1e-9)) (DIN eq. 4)."""
    gate = jax.nn.sigmoid((x - mean) * jax.lax.rsqrt(variance + 1e-9))
    return (gate * x + (1 - gate) * alpha * x).astype(x.dtype)  # the statistics are float32


class DINAttention(nn.Module):
    """The scoring unit and the weighted sum.

    Running statistics of Dice live in "batch_stats"; a batch without a valid pair leaves them.

    Attributes:
      hidden: widths of the scoring MLP's hidden layers, at least one.
      activation: "dice" (alpha starts at 0; statistics over the batch's valid pairs) or "relu".
      momentum: weight of the old running statistics.
      tile_bytes: size of a tile's [requests, candidates, L, h]; 0 = 1 MiB on a CPU, else 64 MiB.
    """

    hidden: Sequence[int] = (64,)
    activation: str = "dice"
    momentum: float = 0.9
    tile_bytes: int = 0

    @nn.compact
    def __call__(
        self, query: jax.Array, keys: jax.Array, mask: jax.Array, pairs: jax.Array, train: bool
    ) -> jax.Array:
        """Interest of each candidate.

        Args:
          query: [B, C, d]. keys: [B, L, d]. mask: [B, L] bool.
          pairs: [B, C] bool, the valid candidates, over which Dice takes its statistics.
        Returns:
          [B, C, d]; 0 where no behaviour is valid.
        """
        (_, c, d), widths = query.shape, (*self.hidden, 1)
        layers = [
            (
                self.param(f"kernel_{i}", nn.initializers.xavier_normal(), (n, width)),
                self.param(f"bias_{i}", nn.initializers.zeros, (width,)),
            )
            for i, (n, width) in enumerate(zip((4 * d, *widths), widths, strict=False))
        ]
        tile_bytes = self.tile_bytes or TILE_BYTES.get(dispatch.platform(), LARGE_TILE_BYTES)
        per_pair = max(1, keys.shape[1]) * max(widths) * query.dtype.itemsize
        at_once = max(1, tile_bytes // per_pair)  # pairs of a request and a candidate

        def tiled(function, norms):
            run = functools.partial(_by_candidates, function, at_once)
            return request_tiles.in_tiles(
                run, (query, keys), mask, (layers, norms), max(1, at_once // c)
            )

        norms = []
        for i in range(len(self.hidden) if self.activation == "dice" else 0):
            norms.append(self._norm(i, tiled, norms, mask, pairs, train))
        return tiled(_interest, norms)

    def _norm(self, layer, tiled, norms, mask, pairs, train):
        """(mean, variance, alpha) of a hidden layer's Dice."""
        width = self.hidden[layer]
        alpha = self.param(f"alpha_{layer}", nn.initializers.zeros, (width,))
        mean = self.variable("batch_stats", f"mean_{layer}", jnp.zeros, (width,))
        variance = self.variable("batch_stats", f"variance_{layer}", jnp.ones, (width,))
        if not train:
            return mean.value, variance.value, alpha
        # Moments of each candidate's pairs, joined (Chan et al. 1979).
        means, squares = tiled(_moments, norms)  # [B, C, h]
        counts = jnp.where(pairs, jnp.sum(mask, -1, dtype=jnp.float32)[:, None], 0)[..., None]
        count = jnp.sum(counts)
        batch_mean = jnp.sum(counts * means, (0, 1)) / jnp.maximum(count, 1)
        squares = jnp.where(pairs[..., None], squares, 0) + counts * jnp.square(means - batch_mean)
        batch_variance = jnp.sum(squares, (0, 1)) / jnp.maximum(count, 1)
        if not self.is_initializing():
            keep = jnp.where(count > 0, self.momentum, 1.0)
            mean.value = keep * mean.value + (1 - keep) * batch_mean
            variance.value = keep * variance.value + (1 - keep) * batch_variance
        return batch_mean, batch_variance, alpha


def _by_candidates(function, most, requests, mask, shared):
    """`function(query, keys, mask, *shared)`, at most `most` candidates at a time."""
    query, keys = requests
    b, c, d = query.shape
    if b * c <= most or c == 1:
        return function(query, keys, mask, *shared)
    tiles = -(-c // max(1, most // b))
    size = -(-c // tiles)
    cut = jnp.pad(query, ((0, 0), (0, tiles * size - c), (0, 0))).reshape(b, tiles, size, d)
    run = jax.checkpoint(lambda query: function(query, keys, mask, *shared), prevent_cse=False)
    out = jax.lax.map(run, jnp.swapaxes(cut, 0, 1))
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(b, -1, x.shape[-1])[:, :c], out)


def _interest(query, keys, mask, layers, norms):
    """[B, C, d] of all layers."""
    scores = _hidden(query, keys, layers, norms, len(layers) - 1)[..., 0]
    return jnp.einsum("bct,btd->bcd", jnp.where(mask[:, None], scores, 0), keys)


def _moments(query, keys, mask, layers, norms):
    """Mean, and sum of squared differences from it, of the hidden layer after those of `norms`,
    over each candidate's valid behaviours; both [B, C, h] in float32 at least."""
    x = _hidden(query, keys, layers, norms, len(norms))
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    valid = mask[:, None, :, None]
    count = jnp.maximum(jnp.sum(mask, -1, dtype=x.dtype), 1)[:, None, None]
    mean = jnp.sum(jnp.where(valid, x, 0), 2) / count
    return mean, jnp.sum(jnp.where(valid, jnp.square(x - mean[:, :, None]), 0), 2)


def _hidden(query, keys, layers, norms, layer):
    """[B, C, L, width] before the activation of `layer`; without `norms` that is ReLU."""
    x = _first(query, keys, *layers[0])
    for i in range(layer):
        x = dice(x, *norms[i]) if norms else nn.relu(x)
        x = x @ layers[i + 1][0] + layers[i + 1][1]
    return x


def _first(query, keys, kernel, bias):
    """The first layer [B, C, L, h]."""
    (b, c, d), length = query.shape, keys.shape[1]
    of_query, of_key, of_difference, of_product = jnp.split(kernel, 4)
    of_key, of_query = of_key - of_difference, of_query + of_difference
    start = query @ of_query + bias
    if length > d:
        kernel = of_key + query[..., None] * of_product  # [B, C, d, h]
        return jnp.einsum("btd,bcdh->bcth", keys, kernel) + start[:, :, None]
    pairs = (query[:, :, None] * keys[:, None]).reshape(b, -1, d)
    of_pairs = token_product(pairs, of_product).reshape(b, c, length, -1)
    return of_pairs + token_product(keys, of_key)[:, None] + start[:, :, None]
