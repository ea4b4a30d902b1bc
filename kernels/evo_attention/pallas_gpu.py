"""EvoAttention on a GPU through Pallas's Triton lowering: a program is a tile of queries of one
request, all heads.

Grids and the custom VJP; what a program does is in pallas_gpu_kernels.py. Arrays keep the layout of
the model, [B, n, H, K]: a program reads a head's rows of its tile. Nothing is added to by two
programs: the gradients of slots, user key and slopes are partial sums per tile, which XLA adds up,
and a tile makes the gradients of its own band keys from the queries that see them. The backward
pass is two kernels: the band wants tiles of few rows, since its products grow with their square;
the slots want long ones, since each tile leaves S rows of partial sums. It saves the branches'
log-normalisers, and the local output for its product with the cotangent.

Axis letters: B requests, n queries, T of a tile, S slots, H heads, K width, w, R parts of the bias.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from kernels.dispatch import device_kind
from kernels.evo_attention.pallas_gpu_kernels import band_kernel, forward_kernel, slots_kernel
from kernels.evo_attention.slots import Slots, behaviour_problem, candidate_problem
from kernels.evo_attention.tiles import SAVED
from kernels.meshes import over_requests
from kernels.triton import LEAST, call, power


class Program(NamedTuple):
    """Queries of its tile, warps, and heads whose rows are on their way at a time."""

    tile: int
    warps: int
    stages: int


# (device kind, dtype) -> of the three kernels. Where a tile meets many keys it is given more warps.
PROGRAMS: dict[tuple[str, str], dict[str, Program]] = {
    ("NVIDIA H200", "bfloat16"): {
        "forward": Program(16, 1, 3),
        "band": Program(16, 1, 3),
        "slots": Program(64, 4, 3),
    },
    ("NVIDIA H200", "float32"): {
        "forward": Program(16, 2, 3),
        "band": Program(16, 1, 3),
        "slots": Program(32, 2, 1),
    },
}
DEFAULT = {"forward": Program(16, 1, 2), "band": Program(16, 1, 2), "slots": Program(32, 2, 1)}
MOST_LOGITS = 4_096  # of a tile: a dozen such tables are alive
WARP_LOGITS = 1_024  # of a warp: RelTemporal's terms of more do not fit its registers
MOST_KEYS = 256  # of a tile in the band: beyond, their terms fill no register file


def behaviour_branches(spec, q, prefixes, band, slopes, times, mask):
    """As api.behaviour_branches; one [B, L, H, K] per prefix, then one for the band if given."""
    plan, slots, integers = behaviour_problem(
        spec, q, prefixes, band, times, mask, power, user_size=1
    )
    k, v = (None, None) if band is None else (band.k, band.v)
    return _branches(plan, q, slots, k, v, slopes, integers)


def candidate_branches(spec, q, prefixes, recent, slopes, request_time):
    """As api.candidate_branches: the same kernel without a band."""
    plan, slots, integers = candidate_problem(spec, q, prefixes, recent, request_time, power)
    return _branches(plan, q, slots, None, None, slopes, integers)


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
    """Of one of the three kernels."""
    tile, warps, stages = PROGRAMS.get((device_kind(), q.dtype.name), DEFAULT)[name]
    sizes = [b - a for a, b in plan.groups]
    if name == "slots":
        met = sum(sizes)
        while tile > LEAST and (tile * met > MOST_LOGITS or tile // 2 >= q.shape[1]):
            tile, warps = tile // 2, max(warps // 2, 1)
    else:
        band = [power(tile + plan.window)] * plan.has_band
        met = max(band if name == "band" else sizes + band)
    warps = max(warps, pl.next_power_of_2(pl.cdiv(tile * met, WARP_LOGITS)))
    return Program(plan.block or tile, warps, stages)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _branches(plan, q, slots, k, v, slopes, integers):
    return _forward_rule(plan, q, slots, k, v, slopes, integers)[0]


def _of_request(x):
    """All of a request's x."""
    rest = (0,) * (x.ndim - 1)
    return pl.BlockSpec((None, *x.shape[1:]), lambda i, b: (b, *rest))


def _of_tile(x):
    """A tile's part of x [B, tiles, ...]."""
    rest = (0,) * (x.ndim - 2)
    return pl.BlockSpec((None, None, *x.shape[2:]), lambda i, b: (b, i, *rest))


def _call(plan, kernel, name, operands, shared, outputs, tile_outputs):
    """pallas_call on operands [B, ...] and `shared`; outputs [B, ...], then [B, tiles, ...]."""
    batch, n = operands[0].shape[:2]
    tile, warps, stages = _program(plan, operands[0], name)
    tiles = -(-n // tile)
    tile_outputs = [jax.ShapeDtypeStruct((batch, tiles, *x), jnp.float32) for x in tile_outputs]
    whole = [pl.BlockSpec(x.shape, lambda i, b, n=x.ndim: (0,) * n) for x in shared]
    return call(
        functools.partial(kernel, plan, tile),
        [*outputs, *tile_outputs],
        f"evo_attention_{name}",
        plan.interpret,
        warps,
        stages,
        grid=(tiles, batch),  # the first goes fastest: tiles of a request meet in the cache
        in_specs=[_of_request(x) for x in operands] + whole,
        out_specs=[_of_request(x) for x in outputs] + [_of_tile(x) for x in tile_outputs],
    )(*operands, *shared)


def _forward_rule(plan, q, slots, k, v, slopes, integers):
    forward = functools.partial(_forward, plan)
    results, _ = over_requests(plan.axes, forward, (q, slots, k, v, integers), slopes)
    # Where a caller makes activations anew, these are worth keeping.
    out, log_total = checkpoint_name(results, SAVED)
    local = out[-1] if plan.has_band else None
    return out, (q, slots, k, v, slopes, integers, log_total, local)


def _forward(plan, requests, slopes):
    """((branches' outputs, log_total), ()) of a device's requests."""
    q, slots, k, v, integers = requests
    batch, n, heads, _ = q.shape
    branches = len(plan.groups)
    *out, log_total = _call(
        plan,
        forward_kernel,
        "forward",
        [q, integers, *slots] + ([k, v] if plan.has_band else []),
        [slopes.astype(jnp.float32)],
        [jax.ShapeDtypeStruct(q.shape, q.dtype)] * branches
        + [jax.ShapeDtypeStruct((batch, branches, heads, n), jnp.float32)],
        [],
    )
    return (tuple(out), log_total), ()


def _backward_rule(plan, residuals, d_out):
    q, slots, k, v, slopes, integers, log_total, local = residuals
    requests = (q, slots, k, v, integers, log_total, local, d_out)
    backward = functools.partial(_backward, plan)
    gradients, d_slopes = over_requests(plan.axes, backward, requests, slopes)
    return *gradients, d_slopes, None


def _backward(plan, requests, slopes):
    """((dq, d_slots, dk, dv), d_slopes) of a device's requests."""
    q, slots, k, v, integers, log_total, local, d_out = requests
    shared, like_q = [slopes.astype(jnp.float32)], jax.ShapeDtypeStruct(q.shape, q.dtype)
    head, of_slopes = q.shape[2:], (max(len(plan.rel.parts), 1), q.shape[2])
    band, dk, dv, of_band, soft = [], None, None, 0.0, slots.k.shape[1]
    if plan.has_band:
        product = jnp.einsum("bnhk,bnhk->bhn", d_out[-1], local, preferred_element_type=jnp.float32)
        dq, dk, dv, *of_user, of_band = _call(
            plan,
            band_kernel,
            "band",
            [q, integers, *slots, k, v, log_total, d_out[-1], product],
            shared,
            [like_q] * 3,
            [head, head, of_slopes],
        )
        band, d_out, of_band, soft = [dq], d_out[:-1], of_band.sum((0, 1)), plan.groups[-1][0]
    of_slots, d_slopes = [jnp.zeros((len(q), 1, 0, *head), jnp.float32)] * 2, of_band
    if soft:
        dq, *of_slots, d_slopes = _call(
            plan,
            slots_kernel,
            "slots",
            [q, integers, *slots, log_total, *d_out, *band],
            shared,
            [like_q],
            [(soft, *head), (soft, *head), of_slopes],
        )
        d_slopes = d_slopes.sum((0, 1)) + of_band
    of_slots = [x.sum(1) for x in of_slots]
    if plan.has_band:  # the user key is the last slot
        both = zip(of_slots, of_user, strict=True)
        of_slots = [jnp.concatenate([x, y.sum(1)[:, None]], 1) for x, y in both]
    d_slots = Slots(*(x.astype(q.dtype) for x in of_slots), None)
    gradient = jnp.zeros_like(slopes)
    for i, part in enumerate(plan.rel.parts):
        gradient = gradient.at[part].set(-d_slopes[i].astype(slopes.dtype))
    return (dq, d_slots, dk, dv), gradient


_branches.defvjp(_forward_rule, _backward_rule)
