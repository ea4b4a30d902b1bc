"""The kernels for TPUs: one hidden unit after the other on a block of candidates and rows.

    x_j = (q * w3_j) keys^T + q w1_j + w2_j keys^T     [c, k], of hidden unit j
    scores = sum_j out_j phi(x_j)

so nothing with a hidden axis leaves the chip, or exists beyond one unit. Rows lie in the last axis
([d, K]), which fills lanes that a width of 16 would leave empty.

The backward pass makes x_j anew. It walks the grid in order: gradients of rows gather over the
blocks of candidates, those of candidates over the blocks of rows, those of weights over everything.
Nothing is added in an order that could change, so two runs give equal bits.

Axis letters: B requests, C candidates, c of a block, K rows, k of a block, d model width, h hidden
units.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.absorbed_target_attention.blocks import Blocks
from kernels.absorbed_target_attention.reference import Weights, leaky_relu
from kernels.products import dot

MOST_CANDIDATES = 2048  # the backward pass keeps a request's query gradient on chip
SUBLANES, LANES = 8, 128
NN, NT, TN = (1, 0), (1, 1), (0, 0)  # axes that a product contracts


class Shape(NamedTuple):
    """What the kernels know when they are traced."""

    candidates: int  # C
    block: int  # c
    rows: int  # K
    row_block: int  # k
    width: int  # d
    hidden: int  # h
    joint: bool
    slope: float

    @property
    def candidate_blocks(self) -> int:
        return -(-self.candidates // self.block)

    @property
    def row_blocks(self) -> int:
        return -(-self.rows // self.row_block)


def refusal(candidates: int, dtype: Any) -> str | None:
    """Why the kernels cannot take these arguments, or None."""
    if candidates > MOST_CANDIDATES:
        return f"it takes {MOST_CANDIDATES} candidates at most, got {candidates}"
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 and bfloat16, got {jnp.dtype(dtype).name}"
    return None


def _inside(block: jax.Array, index: Any, size: int, axis: int) -> jax.Array:
    """Block `index` of an axis; what lies beyond its end is undefined, and set to 0."""
    step = block.shape[axis]
    if size % step == 0:
        return block
    at = index * step + jax.lax.broadcasted_iota(jnp.int32, block.shape, axis)
    return jnp.where(at < size, block, jnp.zeros_like(block))


def _slope(x: jax.Array, shape: Shape) -> jax.Array:
    """phi'(x)."""
    return jnp.where(x > 0, 1.0, shape.slope)


def _unit(ref: Any, j: Any) -> jax.Array:
    """[1, n] of hidden unit j."""
    return ref[pl.ds(j, 1), :]


def _product(q, keys, w1_ref, w3_ref, of_keys, j, shape: Shape):
    """x_j without w2 in the split form, and q * w3_j: [c, k] and [c, d]. q is float32."""
    scaled = (q * _unit(w3_ref, j)).astype(keys.dtype)
    x = dot(scaled, keys, NN)
    if shape.joint:
        x += jnp.sum(q * _unit(w1_ref, j), axis=1, keepdims=True) + _unit(of_keys, j)
    return x, scaled


def _forward_kernel(
    out_ref,  # [1, h], scalars
    w1_ref,  # [h, d]
    w2_ref,  # [h, d]
    w3_ref,  # [h, d]
    q_ref,  # [c, d]
    keys_ref,  # [d, k]
    values_ref,  # [d, k]
    result_ref,  # [c, d]
    of_keys,  # [h, k] float32, w2 keys^T
    total,  # [c, d] float32
    *,
    shape: Shape,
):
    t = pl.program_id(2)

    @pl.when(t == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    keys, values = (_inside(x[...], t, shape.rows, 1) for x in (keys_ref, values_ref))
    q = q_ref[...].astype(jnp.float32)
    of_keys[...] = dot(w2_ref[...], keys.astype(jnp.float32), NN)

    def unit(j, scores):
        x, _ = _product(q, keys, w1_ref, w3_ref, of_keys, j, shape)
        activated = leaky_relu(x, shape.slope)
        if not shape.joint:
            activated += leaky_relu(_unit(of_keys, j), shape.slope)
        return scores + out_ref[0, j] * activated

    scores = jnp.zeros((shape.block, shape.row_block), jnp.float32)
    scores = jax.lax.fori_loop(0, shape.hidden, unit, scores)
    total[...] += dot(scores.astype(values.dtype), values, NT)
    result_ref[...] = total[...].astype(result_ref.dtype)


def _backward_kernel(
    out_ref,  # [1, h], scalars
    w1_ref,  # [h, d]
    w2_ref,  # [h, d]
    w3_ref,  # [h, d]
    q_ref,  # [c, d]
    keys_ref,  # [d, k]
    values_ref,  # [d, k]
    gradient_ref,  # [c, d]
    dq_ref,  # [C, d]
    dkeys_ref,  # [d, k]
    dvalues_ref,  # [d, k]
    dw1_ref,  # [h, d] float32, as all that follows
    dw2_ref,  # [h, d]
    dw3_ref,  # [h, d]
    dout_ref,  # [h, k], to be summed over k
    of_keys,  # [h, k], w2 keys^T
    of_rows,  # [h, k], its gradient
    q_sum,  # [blocks, c, d]
    keys_sum,  # [d, k]
    values_sum,  # [d, k]
    *,
    shape: Shape,
):
    b, t, i = (pl.program_id(axis) for axis in range(3))

    @pl.when((b == 0) & (t == 0) & (i == 0))
    def _():
        for ref in (dw1_ref, dw2_ref, dw3_ref, dout_ref):
            ref[...] = jnp.zeros_like(ref)

    @pl.when(t == 0)
    def _():
        q_sum[i] = jnp.zeros_like(q_sum[i])

    @pl.when(i == 0)
    def _():
        keys_sum[...] = jnp.zeros_like(keys_sum)
        values_sum[...] = jnp.zeros_like(values_sum)

    keys, values = (_inside(x[...], t, shape.rows, 1) for x in (keys_ref, values_ref))
    q, gradient = (_inside(x[...], i, shape.candidates, 0) for x in (q_ref, gradient_ref))
    q = q.astype(jnp.float32)
    of_keys[...] = dot(w2_ref[...], keys.astype(jnp.float32), NN)
    of_scores = dot(gradient, values, NN)  # [c, k]

    def unit(j, sums):
        scores, dq, dkeys = sums
        weight = out_ref[0, j]
        x, scaled = _product(q, keys, w1_ref, w3_ref, of_keys, j, shape)
        activated, of_x = leaky_relu(x, shape.slope), of_scores * _slope(x, shape)
        if shape.joint:
            of_rows[pl.ds(j, 1), :] = weight * jnp.sum(of_x, axis=0, keepdims=True)
            of_query = weight * jnp.sum(of_x, axis=1, keepdims=True)
            dq += of_query * _unit(w1_ref, j)
            dw1_ref[pl.ds(j, 1), :] += jnp.sum(of_query * q, axis=0, keepdims=True)
        else:
            alone = _unit(of_keys, j)
            activated += leaky_relu(alone, shape.slope)
            of_alone = jnp.sum(of_scores, axis=0, keepdims=True) * _slope(alone, shape)
            of_rows[pl.ds(j, 1), :] = weight * of_alone
        dout_ref[pl.ds(j, 1), :] += jnp.sum(of_scores * activated, axis=0, keepdims=True)
        of_x = (weight * of_x).astype(keys.dtype)
        of_scaled = dot(of_x, keys, NT)  # [c, d]
        dq += of_scaled * _unit(w3_ref, j)
        dw3_ref[pl.ds(j, 1), :] += jnp.sum(of_scaled * q, axis=0, keepdims=True)
        return scores + weight * activated, dq, dkeys + dot(scaled, of_x, TN)

    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    start = (zeros(of_scores.shape), zeros(q.shape), zeros(keys.shape))
    scores, dq, dkeys = jax.lax.fori_loop(0, shape.hidden, unit, start)
    q_sum[i] += dq
    keys_sum[...] += dkeys + dot(w2_ref[...], of_rows[...], TN)
    values_sum[...] += dot(gradient, scores.astype(gradient.dtype), TN)
    dw2_ref[...] += dot(of_rows[...], keys.astype(jnp.float32), NT)

    @pl.when(i == shape.candidate_blocks - 1)
    def _():
        dkeys_ref[...] = keys_sum[...].astype(dkeys_ref.dtype)
        dvalues_ref[...] = values_sum[...].astype(dvalues_ref.dtype)

    @pl.when(t == shape.row_blocks - 1)
    def _():
        for block in range(shape.candidate_blocks):

            @pl.when(i == block)
            def _(block=block):
                first = block * shape.block
                last = min(first + shape.block, shape.candidates)
                dq_ref[first:last] = q_sum[block, : last - first].astype(dq_ref.dtype)


def _arguments(query, keys, values, weights: Weights, joint: bool, slope: float, blocks: Blocks):
    """What the kernels know, and the arguments as they take them."""
    _, candidates, width = query.shape
    block = blocks.candidates // SUBLANES * SUBLANES or SUBLANES
    row_block = blocks.rows // LANES * LANES or LANES
    shape = Shape(
        candidates=candidates,
        block=min(candidates, block),
        rows=keys.shape[1],
        row_block=min(keys.shape[1], row_block),
        width=width,
        hidden=len(weights.out),
        joint=joint,
        slope=slope,
    )
    weights = jax.tree.map(lambda x: x.astype(jnp.float32), weights)
    return shape, (
        weights.out[None],
        *(w.T for w in (weights.of_query, weights.of_key, weights.of_product)),
        query,
        *(jnp.swapaxes(x, 1, 2) for x in (keys, values)),
    )


def _specs(shape: Shape, order: Any):
    """BlockSpecs of _arguments; `order` brings grid indices to (b, i, t)."""

    def of_candidates(*grid):
        b, i, _ = order(*grid)
        return b, i, 0

    def of_rows(*grid):
        b, _, t = order(*grid)
        return b, 0, t

    weight = pl.BlockSpec((shape.hidden, shape.width), lambda *grid: (0, 0))
    candidate = pl.BlockSpec((None, shape.block, shape.width), of_candidates)
    row = pl.BlockSpec((None, shape.width, shape.row_block), of_rows)
    return [pl.BlockSpec(memory_space=pltpu.SMEM), weight, weight, weight, candidate, row, row]


def forward(query, keys, values, weights, *, joint, slope, blocks: Blocks, interpret: Any):
    """sum_k s_k values_k [B, C, d] of checked arguments, without the split form's first term."""
    shape, arguments = _arguments(query, keys, values, weights, joint, slope, blocks)
    specs = _specs(shape, order=lambda b, i, t: (b, i, t))
    return pl.pallas_call(
        functools.partial(_forward_kernel, shape=shape),
        grid=(len(query), shape.candidate_blocks, shape.row_blocks),
        in_specs=specs,
        out_specs=specs[4],
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        scratch_shapes=[
            pltpu.VMEM((shape.hidden, shape.row_block), jnp.float32),
            pltpu.VMEM((shape.block, shape.width), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="absorbed_target_attention_forward",
    )(*arguments)


def backward(query, keys, values, weights, dout, *, joint, slope, blocks: Blocks, interpret: Any):
    """Gradients of query, keys, values and weights, given that of the result."""
    shape, arguments = _arguments(query, keys, values, weights, joint, slope, blocks)
    specs = _specs(shape, order=lambda b, t, i: (b, i, t))
    weight, candidate, row = specs[1], specs[4], specs[5]
    of_request = pl.BlockSpec((None, shape.candidates, shape.width), lambda b, t, i: (b, 0, 0))
    of_units = pl.BlockSpec((shape.hidden, shape.row_block), lambda b, t, i: (0, 0))

    def float32(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    units, kernel = (shape.hidden, shape.row_block), (shape.hidden, shape.width)
    rows = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments[5:]]
    scratch = (
        units,
        units,
        (shape.candidate_blocks, shape.block, shape.width),
        (shape.width, shape.row_block),
        (shape.width, shape.row_block),
    )
    dq, dkeys, dvalues, *dkernels, dunits = pl.pallas_call(
        functools.partial(_backward_kernel, shape=shape),
        grid=(len(query), shape.row_blocks, shape.candidate_blocks),
        in_specs=[*specs, candidate],
        out_specs=[of_request, row, row, weight, weight, weight, of_units],
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            *rows,
            *[float32(*kernel)] * 3,
            float32(*units),
        ],
        scratch_shapes=[pltpu.VMEM(block, jnp.float32) for block in scratch],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",) * 3),
        interpret=interpret,
        name="absorbed_target_attention_backward",
    )(*arguments, dout)
    dweights = Weights(*(x.T for x in dkernels), dunits.sum(1))
    return dq, jnp.swapaxes(dkeys, 1, 2), jnp.swapaxes(dvalues, 1, 2), dweights
