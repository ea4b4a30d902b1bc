"""Kernels under a mesh: every device runs them on its own requests.

XLA cannot partition a kernel, but the ops are independent over requests: `over_requests` maps one
over the mesh axes that hold the batch, with weights on every device. An op does so in the rules of
its custom VJP, forward and backward, and not around it: the transpose of a `shard_map` that does
not check replication would also sum the gradient of every history over the mesh's other axes, where
all devices hold the same.

Axis letter: B requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec


def axes_to_map(batch_axes: Sequence[str]) -> tuple[str, ...]:
    """Those of `batch_axes` that the mesh set here leaves to XLA; () where the mesh leaves nothing,
    which is so on one device, and within a `shard_map` over all axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if all(mesh.shape[axis] == 1 for axis in mesh.auto_axes):
        return ()
    return tuple(axis for axis in batch_axes if axis in mesh.auto_axes)


def refusal(batch_axes: Sequence[str], batch: int, partitioned: bool) -> str | None:
    """Why a kernel cannot be mapped over the mesh set here; None if it can, or need not.

    Args:
      batch: B.
      partitioned: XLA can partition the kernel, as it is interpreted: no axis has to be named.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = axes_to_map(batch_axes)
    shards = math.prod(mesh.shape[axis] for axis in axes)
    if batch % shards:
        sizes = {axis: mesh.shape[axis] for axis in axes}
        return f"{batch} requests do not divide over the mesh axes {sizes}"
    left = {a: mesh.shape[a] for a in (*mesh.auto_axes, *mesh.explicit_axes) if mesh.shape[a] > 1}
    if not left or partitioned or (axes and not set(left) & set(mesh.explicit_axes)):
        return None
    return (
        f"XLA cannot partition a kernel over the mesh axes {left}: name those of the batch "
        "(kernels.dispatch.scope; they have to be Auto), or use jax.shard_map"
    )


def over_requests(
    axes: Sequence[str], function: Callable[[Any, Any], tuple[Any, Any]], requests: Any, shared: Any
) -> tuple[Any, Any]:
    """`function(requests, shared)` with each device's part of the requests.

    Args:
      axes: of `axes_to_map`; () calls the function as it is.
      function: (requests, shared) -> (results of requests [B, ...], sums over requests).
      requests: a tree of [B, ...], B a multiple of the axes' devices. shared: a tree that all
        requests use: weights.
    Returns:
      (results [B, ...], split over the axes as the requests are; sums over all requests).
    """
    if not axes:
        return function(requests, shared)

    def of_device(requests, shared):
        results, sums = function(requests, shared)
        return results, jax.tree.map(lambda x: jax.lax.psum(x, axes), sums)

    of_requests, whole = PartitionSpec(tuple(axes)), PartitionSpec()
    return jax.shard_map(
        of_device,
        in_specs=(of_requests, whole),
        out_specs=(of_requests, whole),
        # All of them: XLA could partition over none of those that are left.
        axis_names=set(jax.sharding.get_abstract_mesh().auto_axes),
        check_vma=False,
    )(requests, shared)
