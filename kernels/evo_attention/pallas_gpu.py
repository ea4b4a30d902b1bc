"""EvoAttention on a GPU through Pallas's Triton lowering: a program is a tile of queries of one
request, all heads.

Grids and the custom VJP; what a program does is in pallas_gpu_kernels.py. Arrays keep the layout of
the model, [B, n, H, K]: a program reads a head's rows of its tile. Nothing is added to by two
programs: the gradients of slots, user key and slopes are partial sums per tile, which XLA adds up,
and a tile makes the gradients of its own band keys from the queries that see them. Both passes are
two kernels: the band wants tiles of few rows, since its products grow with their square; the slots
want longer ones, which share a load of the slots and, backward, leave S rows of partial sums each.
Saved are the logs of the branches' normalisers, to base 2, and the local output for its product
with the cotangent.

Axis letters: B requests, n queries, T of a tile, S slots, H heads, K width, w, R parts of the bias.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.dispatch import device_kind
from kernels.evo_attention.pallas_gpu_kernels import (
    band_backward,
    band_forward,
    slots_backward,
    slots_forward,
)
from kernels.evo_attention.slots import Slots, behaviour_problem, candidate_problem
from kernels.meshes import over_requests
from kernels.triton import LEAST, call, power


class Program(NamedTuple):
    """Queries of its tile, warps, and heads whose rows are on their way at a time."""

    tile: int
    warps: int
    stages: int


# (device kind, dtype) -> of the kernels. Where a tile meets many keys it is given more warps.
PROGRAMS: dict[tuple[str, str], dict[str, Program]] = {
    ("NVIDIA H200", "bfloat16"): {
        "slots_forward": Program(32, 2, 3),
        "band_forward": Program(16, 1, 3),
        "slots_backward": Program(32, 2, 3),
        "band_backward": Program(16, 1, 3),
    },
    ("NVIDIA H200", "float32"): {
        "slots_forward": Program(64, 4, 3),
        "band_forward": Program(16, 2, 2),
        "slots_backward": Program(32, 2, 1),
        "band_backward": Program(16, 1, 3),
    },
}
DEFAULT = {
    "slots_forward": Program(32, 2, 2),
    "band_forward": Program(16, 1, 2),
    "slots_backward": Program(32, 2, 1),
    "band_backward": Program(16, 1, 2),
}
MOST_LOGITS = 4_096  # of a tile: a dozen such tables are alive
WARP_LOGITS = 1_024  # of a warp: RelTemporal's terms of more do not fit its registers
MOST_KEYS = 256  # of a tile in the band: beyond, their terms fill no register file


def behaviour_branches(spec, q, prefixes, band, slopes, times, mask):
    """As api.behaviour_branches; one [B, L, H, K] per prefix, then one for the band if given."""
    plan, groups, integers = behaviour_problem(
        spec, q, prefixes, band, times, mask, power, user_size=1
    )
    if band is None:
        return _branches(plan, q, groups, None, slopes, integers)
    *groups, user = groups
    return _branches(plan, q, groups, (user.k, user.v, band.k, band.v), slopes, integers)


def candidate_branches(spec, q, prefixes, recent, slopes, request_time):
    """As api.candidate_branches: the kernels of slots only."""
    plan, groups, integers = candidate_problem(spec, q, prefixes, recent, request_time, power)
    return _branches(plan, q, groups, None, slopes, integers)


def refusal(q, local: bool, window: int, block: int) -> str | None:
    """Why these arguments cannot run; None if they can."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 and bfloat16, not {q.dtype}"
    if block and power(block) != block:
        return f"block must be a power of two, at least {LEAST}, got {block}"
    if local and window + (block or LEAST) > MOST_KEYS:
        return f"its tiles of {block or LEAST} queries hold no window of {window}"
    return None


def _program(plan, q, name: str) -> Program:
    """Of one of the kernels."""
    tile, warps, stages = PROGRAMS.get((device_kind(), q.dtype.name), DEFAULT)[name]
    if name.startswith("band"):
        met = power(tile + plan.window)
    else:
        met = sum(end - begin for begin, end in plan.groups)
        while tile > LEAST and (tile * met > MOST_LOGITS or tile // 2 >= q.shape[1]):
            tile, warps = tile // 2, max(warps // 2, 1)
    warps = max(warps, pl.next_power_of_2(pl.cdiv(tile * met, WARP_LOGITS)))
    return Program(plan.block or tile, warps, stages)


def _of_request(x):
    """All of a request's x."""
    rest = (0,) * (x.ndim - 1)
    return pl.BlockSpec((None, *x.shape[1:]), lambda i, b: (b, *rest))


def _of_tile(x):
    """A tile's part of x [B, tiles, ...]."""
    rest = (0,) * (x.ndim - 2)
    return pl.BlockSpec((None, None, *x.shape[2:]), lambda i, b: (b, i, *rest))


def _call(plan, kernel, operands, slopes, outputs, tile_outputs=()):
    """pallas_call of one of the kernels on operands [B, ...] and slopes.

    Args:
      outputs, tile_outputs: (shape of a request's or a tile's, dtype).
    Returns:
      [B, ...] and [B, tiles, ...] of each.
    """
    batch, n = operands[0].shape[:2]
    tile, warps, stages = _program(plan, operands[0], kernel.__name__)
    tiles = -(-n // tile)
    outputs = [jax.ShapeDtypeStruct((batch, *x), dtype) for x, dtype in outputs]
    tile_outputs = [jax.ShapeDtypeStruct((batch, tiles, *x), dtype) for x, dtype in tile_outputs]
    # The bias is added to products that are not scaled yet.
    slopes = slopes.astype(jnp.float32) / -plan.scale
    return call(
        functools.partial(kernel, plan, tile),
        [*outputs, *tile_outputs],
        f"evo_attention_{kernel.__name__}",
        plan.interpret,
        warps,
        stages,
        grid=(tiles, batch),  # the first goes fastest: tiles of a request meet in the cache
        in_specs=[_of_request(x) for x in operands]
        + [pl.BlockSpec(slopes.shape, lambda i, b: (0, 0))],
        out_specs=[_of_request(x) for x in outputs] + [_of_tile(x) for x in tile_outputs],
    )(*operands, slopes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _branches(plan, q, groups, band, slopes, integers):
    """groups: Slots of each branch over slots. band: the user's key and value [B, 1, H, K], k and v
    [B, n, H, K]; or None."""
    return _forward_rule(plan, q, groups, band, slopes, integers)[0]


def _forward_rule(plan, q, groups, band, slopes, integers):
    forward = functools.partial(_forward, plan)
    (out, log_total), _ = over_requests(plan.axes, forward, (q, groups, band, integers), slopes)
    local = None if band is None else out[-1]
    return out, (q, groups, band, slopes, integers, log_total, local)


def _forward(plan, requests, slopes):
    """((branches' outputs, logs of their normalisers), ()) of a device's requests."""
    q, groups, band, integers = requests
    of_branch, log = (q.shape[1:], q.dtype), ((q.shape[2], q.shape[1]), jnp.float32)
    number, outs, logs = len(groups), (), ()
    if groups:
        operands = [q, integers, *(x for group in groups for x in group)]
        found = _call(plan, slots_forward, operands, slopes, [of_branch] * number + [log] * number)
        outs, logs = tuple(found[:number]), tuple(found[number:])
    if band is not None:
        out, log = _call(plan, band_forward, [q, integers, *band], slopes, [of_branch, log])
        outs, logs = (*outs, out), (*logs, log)
    return (outs, logs), ()


def _backward_rule(plan, residuals, d_out):
    q, groups, band, slopes, integers, log_total, local = residuals
    requests = (q, groups, band, integers, log_total, local, d_out)
    backward = functools.partial(_backward, plan)
    gradients, d_slopes = over_requests(plan.axes, backward, requests, slopes)
    return *gradients, d_slopes, None


def _backward(plan, requests, slopes):
    """((dq, those of groups, of band), d_slopes) of a device's requests."""
    q, groups, band, integers, log_total, local, d_out = requests
    number, head, like_q = len(groups), q.shape[2:], (q.shape[1:], q.dtype)
    of_slopes = max(len(plan.rel.parts), 1), q.shape[2]
    dq, d_groups, d_band, d_slopes = [], [], None, 0.0
    if band is not None:
        product = jnp.einsum("bnhk,bnhk->bhn", d_out[-1], local, preferred_element_type=jnp.float32)
        *dq, dk, dv, d_user_k, d_user_v, added = _call(
            plan,
            band_backward,
            [q, integers, *band, d_out[-1], log_total[-1], product],
            slopes,
            [like_q] * 3,
            [(head, jnp.float32)] * 2 + [(of_slopes, jnp.float32)],
        )
        d_user = (x.sum(1, keepdims=True).astype(q.dtype) for x in (d_user_k, d_user_v))
        d_band, d_slopes = (*d_user, dk, dv), added.sum((0, 1))
    if groups:
        operands = [q, integers, *(x for group in groups for x in group)]
        # Sums over a tile are rounded as the sum over all of them is.
        sums = [(group.k.shape[1:], q.dtype) for group in groups for _ in range(2)]
        *dq, added = _call(
            plan,
            slots_backward,
            [*operands, *d_out[:number], *log_total[:number], *dq],
            slopes,
            [like_q],
            [*sums, ((number, *of_slopes), jnp.float32)],
        )
        dq, sums = dq[:1], [x.sum(1, dtype=jnp.float32).astype(q.dtype) for x in dq[1:]]
        d_groups = [Slots(*sums[2 * i : 2 * i + 2], None) for i in range(number)]
        d_slopes += added.sum((0, 1, 2))
    gradient = jnp.zeros_like(slopes)
    for i, part in enumerate(plan.rel.parts):
        gradient = gradient.at[part].set(-d_slopes[i].astype(slopes.dtype))
    return (*dq, d_groups, d_band), gradient


_branches.defvjp(_forward_rule, _backward_rule)
