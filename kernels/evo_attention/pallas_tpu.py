"""EvoAttention on a TPU: one grid step is a tile of queries of one request, all heads and branches.

Layouts, grids and the custom VJP; what a step does is in pallas_tpu_kernels.py. Everything lies
with the long axis on lanes: queries are [H K, T], slots [H K, S], so that a head of width 4 fills
registers as one of width 64 does.

The backward pass saves the branches' log-normalisers alone. Tiles of a request run from the last to
the first: what a tile adds to the keys of the tile before waits in scratch, and the slots'
gradients stay in their output block. No order of additions is left open.

Axis letters: B requests, n queries, T of a tile, S slots, H heads, K width, w, R parts of the bias.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.dispatch import block_sizes, device_kind
from kernels.evo_attention.pallas_tpu_kernels import LANES, backward_kernel, forward_kernel
from kernels.evo_attention.slots import ROWS, Slots, behaviour_problem, candidate_problem, joined
from kernels.meshes import over_requests

BLOCKS: dict[tuple[str, str, int], int] = {}  # nothing was measured: the default is what compiles
QUERY_ELEMENTS = 65_536  # of [H K, T] and
LOGIT_ELEMENTS = 16_384  # of [S, T]: what bounds VMEM, and the code, which is unrolled over them


def behaviour_branches(spec, q, prefixes, band, slopes, times, mask):
    """As api.behaviour_branches; one [B, L, H, K] per prefix, then one for the band if given."""
    plan, groups, integers = behaviour_problem(
        spec, q, prefixes, band, times, mask, _group_size, user_size=_group_size(1)
    )
    k, v = (None, None) if band is None else (band.k, band.v)
    return _branches(plan, q, joined(plan, groups), k, v, slopes, integers)


def candidate_branches(spec, q, prefixes, recent, slopes, request_time):
    """As api.candidate_branches: the same kernel without a band."""
    plan, groups, integers = candidate_problem(spec, q, prefixes, recent, request_time, _group_size)
    return _branches(plan, q, joined(plan, groups), None, None, slopes, integers)


def refusal(q, local: bool, window: int, block: int) -> str | None:
    """Why these arguments cannot run; None if they can."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 and bfloat16, not {q.dtype}"
    if block % LANES or block < 0:
        return f"block must be a multiple of {LANES}, got {block}"
    if local and block and block % halo_of(window):
        return f"block {block} must be a multiple of {halo_of(window)} to hold a window of {window}"
    return None


def _group_size(slots: int) -> int:
    return -(-slots // 8) * 8


def halo_of(window: int) -> int:
    """Columns before a tile that the band reaches into."""
    return max(-(-(window - 1) // LANES), 1) * LANES


def _width(plan, q, slots) -> int:
    """Queries of a tile: at most the block, with little padding, then as wide as possible."""
    _, n, heads, head_width = q.shape
    step = halo_of(plan.window)
    fits = min(QUERY_ELEMENTS // (heads * head_width), LOGIT_ELEMENTS // slots.k.shape[1])
    default = max(fits // step, 1) * step
    widest = plan.block or block_sizes(BLOCKS, device_kind(), q.dtype, n, default)
    return min(range(step, widest + 1, step), key=lambda t: (-(-n // t) * t, -t))


def _lanes(x, n: int):
    """[B, L, H, K] -> [B, H K, n], zeros behind L."""
    b, length, heads, width = x.shape
    x = jnp.swapaxes(x.reshape(b, length, heads * width), 1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, n - length)))


def _unlanes(x, like):
    """The inverse of `_lanes`, in the shape and dtype of `like`."""
    b, length, heads, width = like.shape
    return jnp.swapaxes(x[..., :length], 1, 2).reshape(b, length, heads, width).astype(like.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _branches(plan, q, slots, k, v, slopes, integers):
    return _forward_rule(plan, q, slots, k, v, slopes, integers)[0]


def _forward_rule(plan, q, slots, k, v, slopes, integers):
    forward = functools.partial(_forward, plan)
    (out, log_total), _ = over_requests(plan.axes, forward, (q, slots, k, v, integers), slopes)
    return out, (q, slots, k, v, slopes, integers, log_total)


def _forward(plan, requests, slopes):
    """((branches' outputs, log_total), ()) of a device's requests."""
    q, slots, k, v, integers = requests
    call = _Call(plan, q, slots)
    out_shape = [jax.ShapeDtypeStruct((call.batch, call.rows, call.n), q.dtype)] * call.branches
    out_shape.append(
        jax.ShapeDtypeStruct((call.batch, call.branches, call.heads, call.n), jnp.float32)
    )
    *out, log_total = pl.pallas_call(
        functools.partial(forward_kernel, plan, call.heads),
        grid=(call.batch, call.tiles),
        in_specs=call.input_specs(lambda i: i),
        out_specs=[call.tile(lambda i: i)] * call.branches + [call.log_total(lambda i: i)],
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=plan.interpret,
        name="evo_attention_forward",
    )(*call.inputs(q, slots, k, v, slopes, integers))
    return (tuple(_unlanes(o, q) for o in out), log_total), ()


def _backward_rule(plan, residuals, d_out):
    q, slots, k, v, slopes, integers, log_total = residuals
    requests = (q, slots, k, v, integers, log_total, d_out)
    backward = functools.partial(_backward, plan)
    gradients, d_slopes = over_requests(plan.axes, backward, requests, slopes)
    return *gradients, d_slopes, None


def _backward(plan, requests, slopes):
    """((dq, d_slots, dk, dv), d_slopes) of a device's requests."""
    q, slots, k, v, integers, log_total, d_out = requests
    call = _Call(plan, q, slots)
    parts = max(len(plan.rel.parts), 1)

    def last_first(i):
        return call.tiles - 1 - i

    def whole(*shape):  # one block per request, added to by all its tiles
        zeros = (0,) * len(shape)
        return pl.BlockSpec((None, *shape), lambda b, i: (b, *zeros))

    tile = call.tile(last_first)
    slot_shape = (call.rows, slots.k.shape[1])
    slope_shape = (parts, call.heads, LANES)
    out_specs = [tile, whole(*slot_shape), whole(*slot_shape), whole(*slope_shape)]
    shapes = [(call.rows, call.n), slot_shape, slot_shape, slope_shape]
    dtypes = [q.dtype, jnp.float32, jnp.float32, jnp.float32]
    scratch = []
    if plan.has_band:
        out_specs += [tile, tile]
        shapes += [(call.rows, call.n)] * 2
        dtypes += [k.dtype, v.dtype]
        scratch = [pltpu.VMEM((call.rows, halo_of(plan.window)), jnp.float32)] * 2
    dq, d_slot_k, d_slot_v, d_slopes, *d_band = pl.pallas_call(
        functools.partial(backward_kernel, plan, call.heads),
        grid=(call.batch, call.tiles),
        in_specs=call.input_specs(last_first)
        + [call.log_total(last_first)]
        + [tile] * call.branches,
        out_specs=out_specs,
        out_shape=[
            jax.ShapeDtypeStruct((call.batch, *s), d) for s, d in zip(shapes, dtypes, strict=True)
        ],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=plan.interpret,
        name="evo_attention_backward",
    )(
        *call.inputs(q, slots, k, v, slopes, integers),
        log_total,
        *(_lanes(d, call.n) for d in d_out),
    )
    d_slots = Slots(_unlanes(d_slot_k, slots.k), _unlanes(d_slot_v, slots.v), None)
    dk, dv = (
        (_unlanes(d, x) for d, x in zip(d_band, (k, v), strict=True)) if d_band else (None,) * 2
    )
    gradient = jnp.zeros_like(slopes)
    for i, part in enumerate(plan.rel.parts):
        gradient = gradient.at[part].set(-d_slopes[:, i].sum((0, 2)).astype(slopes.dtype))
    return (_unlanes(dq, q), d_slots, dk, dv), gradient


_branches.defvjp(_forward_rule, _backward_rule)


class _Call:
    """Sizes, operands and block specs that the forward and the backward call share."""

    def __init__(self, plan, q, slots):
        self.plan = plan
        self.batch, n, self.heads, width = q.shape
        self.rows = self.heads * width
        self.slots = slots.k.shape[1]
        self.width = _width(plan, q, slots)
        self.tiles = -(-n // self.width)
        self.n = self.tiles * self.width
        self.branches = len(plan.groups)

    def inputs(self, q, slots, k, v, slopes, integers):
        """The operands, in the order of `input_specs`."""
        integers = jnp.pad(integers, ((0, 0), (0, 0), (0, self.n - integers.shape[-1])))
        slot_k, slot_v = (_lanes(x, self.slots) for x in (slots.k, slots.v))
        operands = [_lanes(q, self.n), integers, slot_k, slot_v, slots.integers]
        operands.append(slopes.astype(jnp.float32).T)
        if self.plan.has_band:
            k, v = _lanes(k, self.n), _lanes(v, self.n)
            operands += [k, v, k, v, integers]
        return operands

    def tile(self, order):
        """[H K, T] of [B, H K, n]; order: step of the grid -> tile."""
        return pl.BlockSpec((None, self.rows, self.width), lambda b, i: (b, 0, order(i)))

    def log_total(self, order):
        """[branches, H, T] of [B, branches, H, n]."""
        block = (None, self.branches, self.heads, self.width)
        return pl.BlockSpec(block, lambda b, i: (b, 0, 0, order(i)))

    def input_specs(self, order):
        def of_request(*shape):
            return pl.BlockSpec((None, *shape), lambda b, i: (b, 0, 0))

        halo = halo_of(self.plan.window)

        def before(rows):  # the halo before the tile; before the first tile, anything
            def index(b, i):
                return b, 0, jnp.maximum(order(i) * (self.width // halo) - 1, 0)

            return pl.BlockSpec((None, rows, halo), index)

        tile = self.tile(order)
        integers = pl.BlockSpec((None, ROWS, self.width), lambda b, i: (b, 0, order(i)))
        specs = [tile, integers, *[of_request(self.rows, self.slots)] * 2]
        specs.append(of_request(self.slots, ROWS))
        specs.append(pl.BlockSpec((self.heads, 3), lambda b, i: (0, 0)))
        if self.plan.has_band:
            specs += [tile, tile, before(self.rows), before(self.rows), before(ROWS)]
        return specs
