"""The kernels for TPUs: a block of the history is on chip for all heads at once.

Candidates are one block up to 128, so the history is read once for all of them. Heads lie side by
side in the last axis ([L, H K]), where 4 to 64 wide ones fill lanes that a head axis of its own
would leave empty. A segment's sum is a product of its gates, zero elsewhere in the block, with the
block's values: segments need not begin where tiles of memory do. A softmax is made segment by
segment, in blocks that hold whole ones. Where keys are the values too (`tied`), a kernel is given
one ref as both, and what it adds to either goes to one sum.

The backward pass makes the gates anew. It walks the grid in order: gradients of rows gather over
the blocks of candidates, those of candidates over the whole history of a request. Nothing is added
in an order that could change, so two runs give equal bits.

Axis letters: B requests, C candidates, c of a block, L history length, l of a block, G groups and
n segments of a block (blocks.Tiling), H heads, Kq and Kv head widths.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.products import dot
from kernels.segmented_target_attention.blocks import SUBLANES, Static, Tiling, tiling

MOST_CANDIDATES = 2048  # the backward pass keeps a request's query gradient on chip
MOST_SOFTMAX_ROWS = 1024  # of a segment, which a block has to hold whole
HIDDEN = -1e30  # a logit that is not visible
NN, NT, TN = (1, 0), (1, 1), (0, 0)  # axes that a product contracts


class Shape(NamedTuple):
    """What a kernel knows when it is traced."""

    candidates: int  # C
    block: int  # c
    segment: int  # w
    segments: int  # S
    heads: int
    key_width: int
    value_width: int
    shared: bool  # values without a head axis
    tied: bool  # keys without one, which are the values
    softmax: bool
    scale: float
    rows: Tiling

    @property
    def candidate_blocks(self) -> int:
        return -(-self.candidates // self.block)

    def of_query(self, h: int) -> slice:
        return slice(h * self.key_width, (h + 1) * self.key_width)

    def of_key(self, h: int) -> slice:
        return self.of_query(0 if self.tied else h)

    def of_value(self, h: int) -> slice:
        return self.of_sum(0 if self.shared else h)

    def of_sum(self, h: int) -> slice:
        return slice(h * self.value_width, (h + 1) * self.value_width)


def refusal(candidates: int, dtype: Any, softmax_rows: int) -> str | None:
    """Why the kernels cannot take these arguments, or None; softmax_rows: of a segment."""
    if candidates > MOST_CANDIDATES:
        return f"it takes {MOST_CANDIDATES} candidates at most, got {candidates}"
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 and bfloat16, got {jnp.dtype(dtype).name}"
    if softmax_rows > MOST_SOFTMAX_ROWS:
        return f"its softmax takes segments of {MOST_SOFTMAX_ROWS} rows at most, got {softmax_rows}"
    return None


def _inside(block: jax.Array, first: Any, size: int, step: int) -> jax.Array:
    """The block with rows beyond the array's end set to 0: they are undefined there."""
    if size % step == 0:
        return block
    index = first + jax.lax.broadcasted_iota(jnp.int32, block.shape, 0)
    return jnp.where(index < size, block, jnp.zeros_like(block))


def _of_segment(s: Any, gates: jax.Array, shape: Shape, other: float = 0.0) -> jax.Array:
    """[c, l] with `other` outside of the block's segment s."""
    if shape.rows.segments == 1:
        return gates
    row = jax.lax.broadcasted_iota(jnp.int32, gates.shape, 1)
    first = s * shape.segment
    return jnp.where((row >= first) & (row < first + shape.segment), gates, other)


def _gates(q, k, bias, visible, shape: Shape):
    """q [c, Kq], k [l, Kq], visible [1, l] -> gates [c, l], and their derivative over them: what
    the gradient of a gate is multiplied with, beside the gate, to be that of its logit."""
    logits = dot(q, k, NT) * shape.scale + bias
    if not shape.softmax:
        sigmoid = jax.nn.sigmoid(logits)
        return jnp.where(visible, sigmoid, 0.0), 1 - sigmoid
    logits = jnp.where(visible, logits, HIDDEN)

    def of_segment(s, gates):
        here = _of_segment(s, logits, shape, HIDDEN)
        peak = jnp.max(here, axis=1, keepdims=True)
        weights = jnp.where(here > HIDDEN, jnp.exp(here - peak), 0.0)
        total = jnp.sum(weights, axis=1, keepdims=True)
        return gates + weights / jnp.where(total > 0, total, 1.0)

    return jax.lax.fori_loop(0, shape.rows.segments, of_segment, jnp.zeros_like(logits)), 1.0


def _forward_kernel(
    bias_ref,  # [1, H], scalars
    q_ref,  # [c, H Kq]
    k_ref,  # [l, H Kq]
    v_ref,  # [l, H Kv] or [l, Kv]
    mask_ref,  # [1, l]
    z_ref,  # [n, c, H Kv]
    sums_ref,  # [n, c, H Kv] float32
    *,
    shape: Shape,
):
    t, rows = pl.program_id(3), shape.rows

    @pl.when(rows.whole or t == 0)
    def _():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    v = _inside(v_ref[...], t * rows.rows, rows.group_rows, rows.rows)
    for h in range(shape.heads):
        q, k = q_ref[:, shape.of_query(h)], k_ref[:, shape.of_key(h)]
        gates, _ = _gates(q, k, bias_ref[0, h], mask_ref[...] > 0, shape)
        values, of_sum = v[:, shape.of_value(h)], shape.of_sum(h)

        def of_segment(s, _, gates=gates, values=values, of_sum=of_sum):
            part = _of_segment(s, gates, shape).astype(values.dtype)
            sums_ref[s, :, of_sum] += dot(part, values, NN)

        jax.lax.fori_loop(0, rows.segments, of_segment, None)
    z_ref[...] = sums_ref[...].astype(z_ref.dtype)


def _backward_kernel(
    bias_ref,  # [1, H], scalars
    q_ref,  # [c, H Kq]
    k_ref,  # [l, H Kq]
    v_ref,  # [l, H Kv] or [l, Kv]
    mask_ref,  # [1, l]
    dz_ref,  # [n, c, H Kv]
    dq_ref,  # [C, H Kq]
    dk_ref,  # [l, H Kq]
    dv_ref,  # [l, H Kv] or [l, Kv]
    dbias_ref,  # [C, H]
    q_sum,  # [blocks, c, H Kq] float32
    k_sum,  # [l, H Kq] float32
    v_sum,  # [l, H Kv] or [l, Kv] float32
    bias_sum,  # [blocks, c, H] float32
    *,
    shape: Shape,
):
    g, t, i = pl.program_id(1), pl.program_id(2), pl.program_id(3)
    rows = shape.rows

    @pl.when((g == 0) & (t == 0))
    def _():
        q_sum[i] = jnp.zeros_like(q_sum[i])
        bias_sum[i] = jnp.zeros_like(bias_sum[i])

    @pl.when(i == 0)
    def _():
        k_sum[...] = jnp.zeros_like(k_sum)
        v_sum[...] = jnp.zeros_like(v_sum)

    inside_rows = functools.partial(
        _inside, first=t * rows.rows, size=rows.group_rows, step=rows.rows
    )
    inside_candidates = functools.partial(
        _inside, first=i * shape.block, size=shape.candidates, step=shape.block
    )
    q, k, v = inside_candidates(q_ref[...]), inside_rows(k_ref[...]), inside_rows(v_ref[...])
    visible = mask_ref[...] > 0
    for h in range(shape.heads):
        of_query, of_key, of_value = shape.of_query(h), shape.of_key(h), shape.of_value(h)
        gates, slope = _gates(q[:, of_query], k[:, of_key], bias_ref[0, h], visible, shape)

        def of_segment(s, of_gates, gates=gates, h=h, of_value=of_value):
            dz = inside_candidates(dz_ref[s, :, shape.of_sum(h)])
            if rows.whole and shape.segments % rows.segments:
                dz = jnp.where(t * rows.segments + s < shape.segments, dz, jnp.zeros_like(dz))
            part = _of_segment(s, gates, shape)
            v_sum[:, of_value] += dot(part.astype(dz.dtype), dz, TN)
            here = dot(dz, v[:, of_value], NT)
            if shape.softmax:
                here -= jnp.sum(part * here, axis=1, keepdims=True)
            return of_gates + _of_segment(s, here, shape)

        of_gates = jax.lax.fori_loop(0, rows.segments, of_segment, jnp.zeros_like(gates))
        of_logits = of_gates * gates * slope
        bias_sum[i, :, h : h + 1] += jnp.sum(of_logits, axis=1, keepdims=True)
        of_logits = (of_logits * shape.scale).astype(q.dtype)
        q_sum[i, :, of_query] += dot(of_logits, k[:, of_key], NN)
        k_sum[:, of_key] += dot(of_logits, q[:, of_query], TN)

    @pl.when(i == shape.candidate_blocks - 1)
    def _():
        dk_ref[...] = k_sum[...].astype(dk_ref.dtype)
        dv_ref[...] = v_sum[...].astype(dv_ref.dtype)

    @pl.when((g == rows.groups - 1) & (t == rows.blocks - 1))
    def _():
        for block in range(shape.candidate_blocks):

            @pl.when(i == block)
            def _(block=block):
                first = block * shape.block
                last = min(first + shape.block, shape.candidates)
                dq_ref[first:last] = q_sum[block, : last - first].astype(dq_ref.dtype)
                dbias_ref[first:last] = bias_sum[block, : last - first]


def _tied_forward(bias, q, k, *refs, shape: Shape):
    _forward_kernel(bias, q, k, k, *refs, shape=shape)


def _tied_backward(bias, q, k, mask, dz, dq, dk, dbias, q_sum, k_sum, bias_sum, *, shape: Shape):
    results = dq, dk, dk, dbias, q_sum, k_sum, k_sum, bias_sum
    _backward_kernel(bias, q, k, k, mask, dz, *results, shape=shape)


def _arguments(static: Static, q, k, v, mask, bias):
    """What the kernels know, and the arguments as they take them."""
    batch, candidates, heads, key_width = q.shape
    length, value_heads, value_width = (k if v is None else v).shape[1:]
    segment, blocks = static.segment, static.blocks
    most_rows = max(blocks.rows, segment) if static.softmax else blocks.rows
    rows = tiling(length, segment, most_rows)
    block = blocks.candidates // SUBLANES * SUBLANES or SUBLANES
    shape = Shape(
        candidates=candidates,
        block=min(candidates, block),
        segment=segment,
        segments=length // segment,
        heads=heads,
        key_width=key_width,
        value_width=value_width,
        shared=value_heads == 1,
        tied=v is None,
        softmax=static.softmax,
        scale=static.scale,
        rows=rows,
    )
    of_rows = (batch, rows.groups, rows.group_rows, -1)
    # Rows beyond a group's end are masked, whatever a ragged block holds there.
    mask = mask.reshape(batch, rows.groups, rows.group_rows).astype(jnp.float32)
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, rows.blocks * rows.rows - rows.group_rows)))
    return shape, (
        bias.astype(jnp.float32)[None],
        q.reshape(batch, candidates, -1),
        *(x.reshape(of_rows) for x in (k, v) if x is not None),
        mask.reshape(batch, rows.groups, rows.blocks, 1, rows.rows),
    )


def _specs(shape: Shape, order: Any):
    """BlockSpecs of _arguments and of z; `order` brings grid indices to (b, i, g, t)."""
    rows, heads = shape.rows, shape.heads
    value_columns = shape.value_width * (1 if shape.shared else heads)

    def spec(block, index):
        return pl.BlockSpec(block, lambda *grid: index(*order(*grid)))

    def of_rows(b, i, g, t):
        return b, g, t, 0

    def of_candidates(b, i, g, t):
        return b, i, 0

    def of_mask(b, i, g, t):
        return b, g, t, 0, 0

    def of_sums(b, i, g, t):
        return b, t if rows.whole else g, i, 0

    key_columns = shape.key_width * (1 if shape.tied else heads)
    arguments = [
        pl.BlockSpec(memory_space=pltpu.SMEM),
        spec((None, shape.block, heads * shape.key_width), of_candidates),
        spec((None, None, rows.rows, key_columns), of_rows),
        *([] if shape.tied else [spec((None, None, rows.rows, value_columns), of_rows)]),
        spec((None, None, None, 1, rows.rows), of_mask),
    ]
    return arguments, spec((None, rows.segments, shape.block, heads * shape.value_width), of_sums)


def forward(static: Static, q, k, v, mask, bias) -> jax.Array:
    """z [B, C, S, H, Kv] of checked arguments."""
    shape, arguments = _arguments(static, q, k, v, mask, bias)
    rows = shape.rows
    in_specs, z_spec = _specs(shape, order=lambda b, i, g, t: (b, i, g, t))
    sums = (rows.segments, shape.block, shape.heads * shape.value_width)
    z = pl.pallas_call(
        functools.partial(_tied_forward if shape.tied else _forward_kernel, shape=shape),
        grid=(len(q), shape.candidate_blocks, rows.groups, rows.blocks),
        in_specs=in_specs,
        out_specs=z_spec,
        out_shape=jax.ShapeDtypeStruct(
            (len(q), shape.segments, shape.candidates, sums[-1]), q.dtype
        ),
        scratch_shapes=[pltpu.VMEM(sums, jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=static.interpret,
        name="segmented_target_attention_forward",
    )(*arguments)
    z = z.reshape(len(q), shape.segments, shape.candidates, shape.heads, shape.value_width)
    return jnp.swapaxes(z, 1, 2)


def backward(static: Static, q, k, v, mask, bias, dz):
    """Gradients of q, k, v (None without it) and bias, given that of z."""
    shape, arguments = _arguments(static, q, k, v, mask, bias)
    rows, batch = shape.rows, len(q)
    in_specs, z_spec = _specs(shape, order=lambda b, g, t, i: (b, i, g, t))
    dz = jnp.swapaxes(dz, 1, 2).reshape(batch, shape.segments, shape.candidates, -1)
    row_specs = in_specs[2:-1]  # of k, and of v

    def of_request(columns):
        return pl.BlockSpec((None, shape.candidates, columns), lambda b, g, t, i: (b, 0, 0))

    def float32(*block):
        return pltpu.VMEM(block, jnp.float32)

    query_columns = shape.heads * shape.key_width
    dq, *of_rows, dbias = pl.pallas_call(
        functools.partial(_tied_backward if shape.tied else _backward_kernel, shape=shape),
        grid=(batch, rows.groups, rows.blocks, shape.candidate_blocks),
        in_specs=[*in_specs, z_spec],
        out_specs=[of_request(query_columns), *row_specs, of_request(shape.heads)],
        out_shape=[
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments[1:-1]),
            jax.ShapeDtypeStruct((batch, shape.candidates, shape.heads), jnp.float32),
        ],
        scratch_shapes=[
            float32(shape.candidate_blocks, shape.block, query_columns),
            *(float32(*spec.block_shape[2:]) for spec in row_specs),
            float32(shape.candidate_blocks, shape.block, shape.heads),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary")
        ),
        interpret=static.interpret,
        name="segmented_target_attention_backward",
    )(*arguments, dz)
    dk, dv = of_rows if v is not None else (*of_rows, None)
    dv = None if v is None else dv.reshape(v.shape)
    return dq.reshape(q.shape), dk.reshape(k.shape), dv, dbias.sum((0, 1))
