"""DIN's target attention: a small MLP scores each behaviour, no softmax (Zhou et al., KDD 2018).

    a_i = MLP([q, e_i, q - e_i, q * e_i])        out = sum_i mask_i a_i e_i

The first layer is linear in its four inputs: a term of q, one of e_i, which all candidates share,
and (q * e_i) W_p. Long histories take the last two as one product of e_i with a kernel of the
candidate's own, W_e - W_d + diag(q) W_p; short ones are not worth that kernel.

What does not fit `tile_bytes` goes through in tiles of behaviours, made anew in the backward pass;
the batch statistics of Dice take a pass over the tiles of their own in training. So no [B, C, L, h]
array larger than that is made.

Axis letters: B requests, C candidates, L history, d model width, h hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from ctr_jax.layers import token_product

TILE_BYTES = 64 << 20  # smaller ones, which stay in a CPU's cache, are slower: more passes


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
      tile_bytes: size of a tile's [B, C, rows, h].
    """

    hidden: Sequence[int] = (64,)
    activation: str = "dice"
    momentum: float = 0.9
    tile_bytes: int = TILE_BYTES

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
        (b, c, d), widths = query.shape, (*self.hidden, 1)
        layers = [
            (
                self.param(f"kernel_{i}", nn.initializers.xavier_normal(), (n, width)),
                self.param(f"bias_{i}", nn.initializers.zeros, (width,)),
            )
            for i, (n, width) in enumerate(zip((4 * d, *widths), widths, strict=False))
        ]
        of_query, of_key, of_difference, of_product = jnp.split(layers[0][0], 4)
        of_key, of_query = of_key - of_difference, of_query + of_difference
        start = query @ of_query + layers[0][1]
        long = keys.shape[1] > d
        if long:
            kernel = of_key + query[..., None] * of_product  # [B, C, d, h]

        per_row = b * c * max(widths) * query.dtype.itemsize
        rows = _tiles(keys, mask, self.tile_bytes // per_row)

        def first(keys: jax.Array) -> jax.Array:
            if long:
                return jnp.einsum("btd,bcdh->bcth", keys, kernel) + start[:, :, None]
            pairs = (query[:, :, None] * keys[:, None]).reshape(b, -1, d)
            of_pairs = token_product(pairs, of_product).reshape(b, c, keys.shape[1], -1)
            return of_pairs + token_product(keys, of_key)[:, None] + start[:, :, None]

        norms = []

        def hidden(keys: jax.Array, layer: int) -> jax.Array:
            """keys [B, t, d] -> [B, C, t, width] before the activation of `layer`."""
            x = first(keys)
            for i in range(layer):
                x = dice(x, *norms[i]) if self.activation == "dice" else nn.relu(x)
                x = x @ layers[i + 1][0] + layers[i + 1][1]
            return x

        for i in range(len(self.hidden) if self.activation == "dice" else 0):
            norms.append(self._norm(i, hidden, rows, pairs, train))

        def step(out, tile):
            keys, mask = tile
            scores = jnp.where(mask[:, None], hidden(keys, len(self.hidden))[..., 0], 0)
            return out + jnp.einsum("bct,btd->bcd", scores, keys), None

        return _over_tiles(step, jnp.zeros_like(query), rows)

    def _norm(self, layer, hidden, rows, pairs, train):
        """(mean, variance, alpha) of a hidden layer's Dice."""
        width = self.hidden[layer]
        alpha = self.param(f"alpha_{layer}", nn.initializers.zeros, (width,))
        mean = self.variable("batch_stats", f"mean_{layer}", jnp.zeros, (width,))
        variance = self.variable("batch_stats", f"variance_{layer}", jnp.ones, (width,))
        if not train:
            return mean.value, variance.value, alpha

        def step(totals, tile):
            """Moments of a tile joined to those before it (Chan et al. 1979)."""
            keys, mask = tile
            valid = (mask[:, None] & pairs[..., None])[..., None]
            x = hidden(keys, layer)
            x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            count = jnp.sum(valid, dtype=jnp.float32)
            mean = jnp.sum(jnp.where(valid, x, 0), (0, 1, 2)) / jnp.maximum(count, 1)
            squares = jnp.sum(jnp.where(valid, jnp.square(x - mean), 0), (0, 1, 2))
            n, old_mean, old_squares = totals
            both, gap = jnp.maximum(n + count, 1), mean - old_mean
            squares = old_squares + squares + jnp.square(gap) * n * count / both
            return (n + count, old_mean + gap * count / both, squares), None

        zero = jnp.zeros((width,), jnp.float32)
        count, batch_mean, squares = _over_tiles(step, (jnp.zeros(()), zero, zero), rows)
        batch_variance = squares / jnp.maximum(count, 1)
        if not self.is_initializing():
            keep = jnp.where(count > 0, self.momentum, 1.0)
            mean.value = keep * mean.value + (1 - keep) * batch_mean
            variance.value = keep * variance.value + (1 - keep) * batch_variance
        return batch_mean, batch_variance, alpha


def _over_tiles(step, start, rows):
    """The carry of a scan whose rounds are made anew in the backward pass, if there are several."""
    if len(rows[0]) == 1:
        return step(start, jax.tree.map(lambda x: x[0], rows))[0]
    return jax.lax.scan(jax.checkpoint(step, prevent_cse=False), start, rows)[0]


def _tiles(keys: jax.Array, mask: jax.Array, largest: int) -> tuple[jax.Array, jax.Array]:
    """[B, L, d], [B, L] -> [tiles, B, t, d], [tiles, B, t] of equal size, t <= largest."""
    b, length, d = keys.shape
    count = -(-length // max(1, min(largest, length)))
    size = -(-length // count)
    extra = count * size - length
    keys = jnp.pad(keys, ((0, 0), (extra, 0), (0, 0))).reshape(b, count, size, d)
    mask = jnp.pad(mask, ((0, 0), (extra, 0))).reshape(b, count, size)
    return jnp.swapaxes(keys, 0, 1), jnp.swapaxes(mask, 0, 1)
