"""EvoAttention on a GPU through Pallas's Triton lowering: a program is a tile of queries of one
request, all heads and branches.

Grids and the custom VJP; what a program does is in pallas_gpu_kernels.py. Arrays keep the layout of
the model, [B, n, H, K]: a program reads a head's rows of its tile. Nothing is added to by two
programs: the slots' and the slopes' gradients are partial sums per tile, which XLA adds up, and a
tile makes the gradients of its own band keys from the queries that see them. The backward pass
saves the branches' log-normalisers, and the local output for its product with the cotangent.

Axis letters: B requests, n queries, T of a tile, S slots, H heads, K width, w, R parts of the bias.
"""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.dispatch import block_sizes, device_kind
from kernels.evo_attention.pallas_gpu_kernels import DOT, backward_kernel, forward_kernel
from kernels.evo_attention.slots import Slots, behaviour_problem, candidate_problem
from kernels.evo_attention.tiles import SAVED
from kernels.meshes import over_requests

BLOCKS: dict[tuple[str, str, int], int] = {}  # nothing was measured: the default fits registers
QUERY_ELEMENTS = 2_048  # of a head's [T, K] and
LOGIT_ELEMENTS = 4_096  # of [T, S]: about a dozen of each are alive, over 128 threads


def behaviour_branches(spec, q, prefixes, band, slopes, times, mask):
    """As api.behaviour_branches; one [B, L, H, K] per prefix, then one for the band if given."""
    plan, slots, integers = behaviour_problem(
        spec, q, prefixes, band, times, mask, _group_size, user_size=1
    )
    k, v = (None, None) if band is None else (band.k, band.v)
    return _branches(plan, q, slots, k, v, slopes, integers)


def candidate_branches(spec, q, prefixes, recent, slopes, request_time):
    """As api.candidate_branches: the same kernel without a band."""
    plan, slots, integers = candidate_problem(spec, q, prefixes, recent, request_time, _group_size)
    return _branches(plan, q, slots, None, None, slopes, integers)


def refusal(q, local: bool, window: int, block: int) -> str | None:
    """Why these arguments cannot run; None if they can."""
    width = q.shape[-1]
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 and bfloat16, not {q.dtype}"
    if width >= DOT and _power(width) != width:
        return f"from {DOT} on a head's width must be a power of two, got {width}"
    if block and (_power(block) != block or block < DOT):
        return f"block must be a power of two, at least {DOT}, got {block}"
    return None


def _power(x: int) -> int:
    """The power of two from x on."""
    return 1 << max(x - 1, 0).bit_length()


def _group_size(slots: int) -> int:
    return max(_power(slots), DOT)


def _width(plan, q) -> int:
    """Queries of a tile."""
    _, n, _, head_width = q.shape
    slots = sum(b - a for a, b in plan.groups)
    fits = min(QUERY_ELEMENTS // head_width, LOGIT_ELEMENTS // slots, 64, _power(n))
    default = max(_power(fits + 1) // 2, DOT)
    return plan.block or block_sizes(BLOCKS, device_kind(), q.dtype, n, default)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _branches(plan, q, slots, k, v, slopes, integers):
    return _forward_rule(plan, q, slots, k, v, slopes, integers)[0]


def _of_request(x):
    """All of a request's x."""
    rest = (0,) * (x.ndim - 1)
    return pl.BlockSpec((None, *x.shape[1:]), lambda b, i: (b, *rest))


def _of_tile(x):
    """A tile's part of x [B, tiles, ...]."""
    rest = (0,) * (x.ndim - 2)
    return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, i: (b, i, *rest))


def _call(plan, kernel, grid, operands, shared, outputs, tile_outputs, name):
    """pallas_call on operands [B, ...] and `shared`; outputs [B, ...], then [B, tiles, ...]."""
    whole = [pl.BlockSpec(x.shape, lambda b, i, n=x.ndim: (0,) * n) for x in shared]
    # Deprecated from jax 0.11 on. It is lowering that warns, after this function is done: a filter
    # that ends here would not hold.
    warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[_of_request(x) for x in operands] + whole,
        out_specs=[_of_request(x) for x in outputs] + [_of_tile(x) for x in tile_outputs],
        out_shape=[*outputs, *tile_outputs],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=plan.interpret,
        name=name,
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
    width, branches = _width(plan, q), len(plan.groups)
    tiles = -(-n // width)
    padded = jax.ShapeDtypeStruct((batch, tiles * width, *q.shape[2:]), q.dtype)
    *out, log_total = _call(
        plan,
        functools.partial(forward_kernel, plan, width),
        (batch, tiles),
        [q, integers, *slots] + ([k, v] if plan.has_band else []),
        [slopes.astype(jnp.float32)],
        [padded] * branches
        + [jax.ShapeDtypeStruct((batch, branches, heads, tiles * width), jnp.float32)],
        [],
        "evo_attention_forward",
    )
    return (tuple(o[:, :n] for o in out), log_total), ()


def _backward_rule(plan, residuals, d_out):
    q, slots, k, v, slopes, integers, log_total, local = residuals
    requests = (q, slots, k, v, integers, log_total, local, d_out)
    backward = functools.partial(_backward, plan)
    gradients, d_slopes = over_requests(plan.axes, backward, requests, slopes)
    return *gradients, d_slopes, None


def _backward(plan, requests, slopes):
    """((dq, d_slots, dk, dv), d_slopes) of a device's requests."""
    q, slots, k, v, integers, log_total, local, d_out = requests
    batch, n, heads, _ = q.shape
    width, parts = _width(plan, q), max(len(plan.rel.parts), 1)
    tiles = -(-n // width)
    operands = [q, integers, *slots, log_total, *d_out]
    padded = jax.ShapeDtypeStruct((batch, tiles * width, *q.shape[2:]), q.dtype)
    partial = jax.ShapeDtypeStruct((batch, tiles, *slots.k.shape[1:]), jnp.float32)
    if plan.has_band:
        product = jnp.einsum("bnhk,bnhk->bhn", d_out[-1], local, preferred_element_type=jnp.float32)
        operands += [k, v, product]
    outputs = _call(
        plan,
        functools.partial(backward_kernel, plan, width),
        (batch, tiles),
        operands,
        [slopes.astype(jnp.float32)],
        [padded] * (3 if plan.has_band else 1),
        [partial, partial, jax.ShapeDtypeStruct((batch, tiles, parts, heads), jnp.float32)],
        "evo_attention_backward",
    )
    *per_query, d_slot_k, d_slot_v, d_slopes = outputs
    dq, dk, dv = [*(x[:, :n] for x in per_query), None, None][:3]
    d_slots = Slots(
        d_slot_k.sum(1).astype(slots.k.dtype), d_slot_v.sum(1).astype(slots.v.dtype), None
    )
    gradient = jnp.zeros_like(slopes)
    for i, part in enumerate(plan.rel.parts):
        gradient = gradient.at[part].set(-d_slopes[:, :, i].sum((0, 1)).astype(slopes.dtype))
    return (dq, d_slots, dk, dv), gradient


_branches.defvjp(_forward_rule, _backward_rule)
