"""TWIN-V2: TWIN over clusters of the history (Si et al., CIKM 2024).

    s_j = (q W_Q)(k_j W_K) / sqrt(K) + ln n_j           per head, over the clusters
    out = concat_h(sum over the k largest s of softmax(s)_j k_j W_V) W_O

n_j is the number of behaviours in cluster j: the more behaviours one stands for, the more weight it
has, and one of a single behaviour is that behaviour as TWIN reads it. Search (GSU) and attention
(ESU) use the same scores, ln n_j in both.

The paper clusters offline, on stored embeddings; here it is done in the graph, on the tokens of the
current weights, without gradients, once per history for all candidates (`cluster`). So:

- the paper splits by play ratio first. Our data sets have none: one group.
- the paper splits a cluster by k-means with k = floor(size^0.3) until none has more than gamma
  members (`cluster_size`). Here k = 2, and all clusters that are too large are split at once, at
  most ceil(log2(L / gamma)) + SPARE_LEVELS times: shapes are static. What is too large then, such
  as many equal behaviours, is cut by order of time into as few runs as will do, of equal length.
- k-means starts from the member farthest from the cluster's centroid and the one farthest from
  that, so that nothing is drawn.
- the virtual behaviour takes numeric features by their mean and categorical ones from the member
  nearest to the centroid. All our columns of behaviours are categorical: k_j is that member's token
  (the medoid's), and the cluster lives in its place in the history. Nothing is gathered: a mask of
  the medoids takes the place of that of the behaviours, ln n_j is a bias, and the rest is TWIN.

Distances are in the tokens, with the weights that W gives the columns. They are compared on a grid
of integers, 2^10 steps for the largest entry of a history at d = 128: sums are then exact in any
order, so that clusters do not depend on padding, on the batch, or on how a device adds. A serving
system would keep a user's clusters with the history and renew them with the weights.

Axis letters: B requests, C candidates, L history, d model width, H heads, T candidates of a tile.
"""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ctr_jax import history_model
from ctr_jax.features import Column, DataSpec
from ctr_jax.history_model import Tokens
from ctr_jax.request_tiles import in_tiles
from ctr_jax.selected_attention import SelectedAttention
from ctr_jax.selection import largest
from kernels import dispatch

SPARE_LEVELS = 3  # for clusters that are not split into halves
# Of the integers of the requests that are clustered at a time. On a CPU: one request.
TILE_BYTES, LARGE_TILE_BYTES = {"cpu": 0}, 64 << 20


def default_config() -> ConfigDict:
    """100 clusters of at most 20 behaviours for each of two heads at d = 128."""
    config = history_model.default_config("baselines_jax.twin_v2")
    config.num_heads = 2
    config.top_k = 100  # clusters
    config.cluster_size = 20  # gamma: the most behaviours of a cluster; 1 is TWIN
    config.iterations = 4  # of k-means at each split
    return config


def build(config: ConfigDict, spec: DataSpec) -> tuple[nn.Module, tuple[Column, ...]]:
    """The module of config.model and the columns it reads.

    Raises:
      ValueError: the sizes do not fit.
    """
    if config.top_k < 1 or config.num_heads < 1 or config.width % config.num_heads:
        raise ValueError("top_k and num_heads must be >= 1, and num_heads divide width")
    if config.cluster_size < 1 or config.iterations < 1:
        raise ValueError("cluster_size and iterations must be >= 1")
    interest = TWINV2(config.num_heads, config.top_k, config.cluster_size, config.iterations)
    return history_model.build(config, spec, interest)


class TWINV2(nn.Module):
    """The interest.

    Attributes:
      heads, top_k, cluster_size, iterations: those of the config, num_heads first.
      tile_bytes: as in ctr_jax/query_tiles.py.
    """

    heads: int = 2
    top_k: int = 100
    cluster_size: int = 20
    iterations: int = 4
    tile_bytes: int = 0

    # Not in the frame's tiles of requests: the backward pass would cluster each history again.

    def setup(self):
        self.attention = SelectedAttention(self.heads, self.tile_bytes)
        nn.share_scope(self, self.attention)

    def __call__(self, tokens: Tokens, train: bool) -> jax.Array:
        """Tokens -> [B, C, d]."""
        del train
        behaviours, mask = tokens.behaviours, tokens.batch.behaviour_mask
        _, counts = cluster(behaviours, mask, self.cluster_size, self.iterations)
        select = functools.partial(_by_score, self.top_k)
        return self.attention(
            tokens.candidates,
            behaviours,
            counts > 0,
            select,
            bias=jnp.log(jnp.maximum(counts, 1).astype(jnp.float32)),
        )


def _by_score(top_k, scores, of_candidates, of_behaviours, mask):
    """scores [H, T, L], mask [L] -> bool [H, T, L]."""
    del of_candidates, of_behaviours
    return largest(scores, mask, top_k)


def cluster(
    x: jax.Array, mask: jax.Array, most: int, iterations: int
) -> tuple[jax.Array, jax.Array]:
    """Clusters of at most `most` members of each history; no gradient goes through.

    Args:
      x: [B, L, d], L >= 1. mask: [B, L] bool.
      most: gamma. iterations: of k-means at each split.
    Returns:
      medoids: [B, L] int32, the place of the medoid of each behaviour's cluster, L where not
        `mask`. Of members equally near to the centroid the newest is the medoid.
      counts: [B, L] int32, at a medoid the members of its cluster, elsewhere 0.
    """
    size, length, d = x.shape
    most_bytes = TILE_BYTES.get(dispatch.platform(), LARGE_TILE_BYTES)
    requests = max(1, most_bytes // (length * d * 4))
    return in_tiles(
        functools.partial(_of_requests, most, iterations),
        jax.lax.stop_gradient(x),
        mask,
        (),
        min(requests, dispatch.requests_of_a_device(size)),
    )


def _of_requests(most, iterations, x, mask, shared):
    del shared
    one = functools.partial(_of_request, most, iterations)
    if len(x) > 1:
        return jax.vmap(one)(x, mask)
    # Not by vmap, under which every request would go through all levels.
    return jax.tree.map(lambda a: a[None], one(x[0], mask[0]))


def _of_request(most, iterations, x, mask):
    """x [L, d], mask [L] -> medoids [L], counts [L]."""
    length, _ = x.shape
    place = jnp.arange(length, dtype=jnp.int32)
    x = _on_grid(x, mask)

    # A cluster is named by the place of one of its members, so that no two have one name.
    newest = jnp.max(jnp.where(mask, place, -1))
    names = jnp.where(mask, newest, length)
    levels = max(0, math.ceil(math.log2(length / most))) + SPARE_LEVELS

    def large(names):
        return jnp.take(_count(names), names, mode="fill", fill_value=0) > most

    def split(names):
        side = large(names) & _side(x, names, iterations)
        # Both are named anew: the old name may be that of a member of either.
        halves = jnp.where(mask, names + length * side, 2 * length)
        renamed = _largest(place, halves, 2 * length)
        return jnp.where(mask, _of(renamed, halves), length)

    def level(_, names):
        return jax.lax.cond(jnp.any(large(names)), split, lambda names: names, names)

    names = jax.lax.fori_loop(0, levels, level, names)
    names = _cut_by_time(names, most)
    medoid, counts = _medoids(x, names)
    medoids = jnp.where(mask, _of(medoid, names), length)
    at = jnp.where(medoid >= 0, medoid, length)
    return medoids, jnp.zeros(length, jnp.int32).at[at].set(counts, mode="drop")


def _on_grid(x, mask):
    """x [L, d] as integers, zero where not `mask`, of so many bits that a squared distance
    overflows nowhere."""
    bits = (30 - math.ceil(math.log2(x.shape[-1]))) // 2 - 1
    x = jnp.where(mask[:, None], x, 0).astype(jnp.float32)
    peak = jnp.max(jnp.abs(x))
    return jnp.round(x / jnp.where(peak > 0, peak, 1) * (1 << bits)).astype(jnp.int32)


def _side(x, names, iterations):
    """bool [L]: which of the two halves of its cluster a behaviour is in; False in all of a cluster
    of equal ones."""
    count, total = _of(_count(names), names), _of(_sum(x, names), names)

    # ---- start: the member farthest from the centroid, and the one farthest from that ----
    first = _farthest(x, _mean(total, count), names)
    second = _farthest(x, first, names)
    side = _nearer(x, second, first)

    def step(_, side):
        count_1 = _of(jax.ops.segment_sum(side.astype(jnp.int32), names, len(x)), names)
        total_1 = _of(_sum(jnp.where(side[:, None], x, 0), names), names)
        mean_0, mean_1 = _mean(total - total_1, count - count_1), _mean(total_1, count_1)
        moved = _nearer(x, mean_1, mean_0)
        # On the grid two means may fall together, and a half be left empty: then it stands.
        whole = _of(jax.ops.segment_sum(moved.astype(jnp.int32), names, len(x)), names)
        return jnp.where((whole > 0) & (whole < count), moved, side)

    return jax.lax.fori_loop(0, iterations, step, side)


def _farthest(x, point, names):
    """The member of each cluster farthest from [L, d] `point`, the newest of equals, [L, d]."""
    far = _squares(x, point)
    border = _of(_largest(far, names, len(x)), names)
    place = jnp.where(far == border, jnp.arange(len(x), dtype=jnp.int32), -1)
    return _of(x, _of(_largest(place, names, len(x)), names))


def _cut_by_time(names, most):
    """Clusters of more than `most` in as few runs of as equal length as there can be."""
    length = len(names)
    index = jnp.arange(length, dtype=jnp.int32)
    order = jnp.argsort(names, stable=True)
    found = names[order]

    def starts(new):  # where the run began that each is in
        return jax.lax.cummax(jnp.where(new, index, 0))

    new = jnp.append(True, found[1:] != found[:-1])
    rank, count = index - starts(new), jnp.take(_count(names), found, mode="clip")
    runs = -(-count // most)
    run = rank * runs // jnp.maximum(count, 1)
    new |= jnp.append(True, run[1:] != run[:-1])
    found = jnp.where(found == length, length, starts(new))
    return jnp.zeros_like(names).at[order].set(found)


def _medoids(x, names):
    """Of each name the place of the member nearest to the centroid, -1 where there is none, and the
    number of members; both [L]."""
    count = _count(names)
    away = _squares(x, _mean(_of(_sum(x, names), names), _of(count, names)))
    border = _of(jax.ops.segment_min(away, names, len(x)), names)
    place = jnp.where(away == border, jnp.arange(len(x), dtype=jnp.int32), -1)
    return _largest(place, names, len(x)), count


def _count(names):
    """[L]: members of the cluster of each name; padding has none."""
    return jax.ops.segment_sum(jnp.ones_like(names), names, len(names))


def _sum(x, names):
    """[L, d]: sums of the clusters, by name."""
    return jax.ops.segment_sum(x, names, len(names))


def _largest(values, names, number):
    """[number]: the largest of the values >= 0 of each name, -1 where there is none."""
    return jnp.maximum(jax.ops.segment_max(values, names, number), -1)


def _of(table, names):
    """table[names], anything at padding."""
    return jnp.take(table, names, axis=0, mode="clip")


def _mean(total, count):
    """Sums [L, d] over members [L], on the grid."""
    return jnp.round(total / jnp.maximum(count, 1)[:, None]).astype(jnp.int32)


def _squares(x, point):
    """Squared distances [L] of [L, d] and [L, d]."""
    return jnp.sum(jnp.square(x - point), -1)


def _nearer(x, one, other):
    """bool [L]: whether x is nearer to `one` than to `other`, both [L, d]."""
    return _squares(x, one) < _squares(x, other)
