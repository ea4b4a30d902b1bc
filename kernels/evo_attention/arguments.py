"""What EvoAttention's branches read: the arguments that every implementation shares."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from kernels.evo_attention.rel_temporal import RelTemporal

NEVER = 2**30  # a position that no query reaches: that of unused slots


class Prefix(NamedTuple):
    """Keys that queries see from some position on: those of the global or transition branch.

    k, v: [B, S, H, K]. time, position: [B, S] int32; a query at i sees those with position < i,
    NEVER marks an unused slot.
    """

    k: jax.Array
    v: jax.Array
    time: jax.Array
    position: jax.Array


class Band(NamedTuple):
    """What behaviours see in the local branch. k, v: [B, L, H, K]. user_k, user_v: [B, H, K]."""

    k: jax.Array
    v: jax.Array
    user_k: jax.Array
    user_v: jax.Array


class Recent(NamedTuple):
    """What candidates see in the local branch: the user key and the history's last behaviours.

    k, v: [B, R, H, K]. user_k, user_v: [B, H, K]. time: [B, R] int32. mask: [B, R] bool.
    """

    k: jax.Array
    v: jax.Array
    user_k: jax.Array
    user_v: jax.Array
    time: jax.Array
    mask: jax.Array


class Static(NamedTuple):
    """The static part of a call.

    rel: RelTemporal. window: w. scale: of the logits; None is K^-1/2. tile_logits: logits of one
    branch in a tile of the XLA path, block: queries in a tile of a kernel; 0 chooses. interpret:
    as given to pallas_call. axes: of the mesh, as meshes.over_requests takes them.
    """

    rel: RelTemporal
    window: int
    scale: float | None
    tile_logits: int
    block: int
    interpret: Any
    axes: tuple[str, ...]


def scale_of(q: jax.Array, spec: Static) -> float:
    return q.shape[-1] ** -0.5 if spec.scale is None else spec.scale
