"""A batch in parts, one after another: less memory on any device, and on a CPU what a part needs
stays in cache.

A part takes the same number of requests from every data shard, in place: splitting moves nothing
between devices. Axis letters: B requests of the batch, N parts.
"""

from __future__ import annotations

import jax
from jax.sharding import NamedSharding, PartitionSpec

from ctr_jax.config import ConfigError
from ctr_jax.sharding import DATA


def parts_of(batch_size: int, micro_batch: int, shards: int) -> int:
    """The number of parts when each takes `micro_batch` requests per data shard; 0 = one part.

    Raises:
      ConfigError: the shards' shares do not divide into such parts.
    """
    if not micro_batch:
        return 1
    parts, rest = divmod(batch_size, micro_batch * shards)
    if rest:
        raise ConfigError(
            f"batch size {batch_size} does not divide into micro-batches of {micro_batch} requests "
            f"on each of {shards} data shards"
        )
    return parts


def parts_of_any(batch_size: int, micro_batch: int, shards: int) -> int:
    """The same of a batch of any size: one part where it does not divide, as live requests."""
    if not micro_batch or batch_size % (micro_batch * shards):
        return 1
    return max(1, batch_size // (micro_batch * shards))


def split(tree, parts: int, mesh: jax.sharding.Mesh):
    """[B, ...] leaves -> [N, B / N, ...], each part spread over the data axis like the batch."""
    shards = mesh.shape[DATA]
    sharding = NamedSharding(mesh, PartitionSpec(None, DATA))

    def leaf(x):
        rows, rest = len(x) // (shards * parts), x.shape[1:]  # not -1: histories may have length 0
        x = x.reshape(shards, parts, rows, *rest).swapaxes(0, 1)
        x = x.reshape(parts, shards * rows, *rest)
        return jax.lax.with_sharding_constraint(x, sharding)

    return jax.tree.map(leaf, tree)


def join(tree, mesh: jax.sharding.Mesh):
    """The inverse of `split`: [N, B / N, ...] leaves -> [B, ...] in the batch's order."""
    shards = mesh.shape[DATA]
    sharding = NamedSharding(mesh, PartitionSpec(DATA))

    def leaf(x):
        parts, size, rest = x.shape[0], x.shape[1], x.shape[2:]
        x = x.reshape(parts, shards, size // shards, *rest).swapaxes(0, 1)
        x = x.reshape(parts * size, *rest)
        return jax.lax.with_sharding_constraint(x, sharding)

    return jax.tree.map(leaf, tree)
