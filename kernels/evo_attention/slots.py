"""How kernels are given EvoAttention: every key that is no band is a slot.

Behaviours' and candidates' calls become the same problem. A group of slots is a branch: global,
transition, and for candidates the recent behaviours with the user key; for behaviours the user
key is a group of its own, that joins the band. All of this is plain differentiable XLA on
O(P m + w) rows per request.

Axis letters: B requests, n queries, S slots of all groups, H heads, K head width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.evo_attention.arguments import NEVER, Static, scale_of
from kernels.evo_attention.rel_temporal import RelTemporal

# Rows of the integers of queries (those of their own keys in the band) and of slots.
CLOCK, POSITION, FLAG, ROWS = slice(0, 4), 4, 5, 8
ALWAYS, HOLE = -1, NEVER + 1  # positions: seen by every query, by none (candidates are at NEVER)


class Plan(NamedTuple):
    """The static part of a kernel call.

    groups: (begin, end) of the branches' slots; with has_band the last is the user key's, and its
    branch is the local one. timeless: whether a slot, the user key's, has no bias. The others: as
    of the op.
    """

    groups: tuple[tuple[int, int], ...]
    has_band: bool
    timeless: bool
    rel: RelTemporal
    window: int
    scale: float
    block: int
    interpret: Any
    axes: tuple[str, ...]


class Slots(NamedTuple):
    """k, v: [B, S, H, K]. integers: [B, S, ROWS] int32: clock, position, 1 where biased."""

    k: jax.Array
    v: jax.Array
    integers: jax.Array


def behaviour_problem(spec: Static, q, prefixes, band, times, mask, size_of, user_size):
    """(Plan, groups: Slots each, integers of the queries [B, ROWS, L]) of api.behaviour_branches.

    Args:
      size_of: slots in use -> what the plan counts the group for. user_size: the same of the user
        key's group.
    """
    groups = [Slots(p.k, p.v, _integers(spec, p.time, p.position, 1)) for p in prefixes]
    sizes = [size_of(p.k.shape[1]) for p in prefixes]
    if band is not None:
        groups.append(_user(spec, band))
        sizes.append(user_size)
    position = jnp.broadcast_to(jnp.arange(times.shape[1], dtype=jnp.int32), times.shape)
    integers = jnp.swapaxes(_integers(spec, times, position, mask), 1, 2)
    has_band = band is not None
    return _plan(spec, q, sizes, has_band, has_band), groups, integers


def candidate_problem(spec: Static, q, prefixes, recent, request_time, size_of):
    """(Plan, groups, integers of the queries [B, ROWS, C]) of api.candidate_branches."""
    groups = [Slots(p.k, p.v, _integers(spec, p.time, p.position, 1)) for p in prefixes]
    if recent is not None:
        position = jnp.where(recent.mask, 0, HOLE)
        own = Slots(recent.k, recent.v, _integers(spec, recent.time, position, 1))
        groups.append(jax.tree.map(lambda *x: jnp.concatenate(x, 1), own, _user(spec, recent)))
    times = jnp.broadcast_to(request_time[:, None], q.shape[:2])
    integers = jnp.swapaxes(_integers(spec, times, jnp.full_like(times, NEVER), 1), 1, 2)
    sizes = [size_of(group.k.shape[1]) for group in groups]
    return _plan(spec, q, sizes, False, recent is not None), groups, integers


def joined(plan: Plan, groups: list[Slots]) -> Slots:
    """The groups one after the other, each padded to what the plan counts it for."""
    padded = []
    for (k, v, integers), (begin, end) in zip(groups, plan.groups, strict=True):
        edge = ((0, 0), (0, end - begin - k.shape[1]), (0, 0))
        holes = jnp.pad(integers, edge)
        hole = jnp.arange(end - begin) >= k.shape[1]
        holes = holes.at[..., POSITION].set(jnp.where(hole, HOLE, holes[..., POSITION]))
        padded.append(Slots(jnp.pad(k, (*edge, (0, 0))), jnp.pad(v, (*edge, (0, 0))), holes))
    return jax.tree.map(lambda *x: jnp.concatenate(x, 1), *padded)


def _integers(spec, time, position, flag):
    """[B, S, ROWS] of int32 times and positions [B, S] and flags that broadcast to them."""
    flag = jnp.broadcast_to(jnp.asarray(flag, jnp.int32), time.shape)
    rest = [position, flag] + [jnp.zeros_like(time)] * (ROWS - 6)
    return jnp.stack([*spec.rel.clock(time), *rest], -1)


def _user(spec, keys):
    """The user key as a group of one slot."""
    zero = jnp.zeros((keys.user_k.shape[0], 1), jnp.int32)
    return Slots(
        keys.user_k[:, None], keys.user_v[:, None], _integers(spec, zero, zero + ALWAYS, 0)
    )


def _plan(spec, q, sizes, has_band, timeless):
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return Plan(
        groups=tuple(zip(ends[:-1], ends[1:], strict=True)),
        has_band=has_band,
        timeless=timeless,
        rel=spec.rel,
        window=spec.window,
        scale=scale_of(q, spec),
        block=spec.block,
        interpret=spec.interpret,
        axes=spec.axes,
    )
