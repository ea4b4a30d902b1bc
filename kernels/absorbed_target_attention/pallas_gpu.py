"""The kernels for GPUs, through Pallas' Triton lowering: the sums of pallas_tpu.py.

A program of the forward pass holds a block of candidates and walks over blocks of rows and, in
each, over the hidden units. Blocks are padded to powers of 2 (16 at least, for the matrix units) by
masked loads, so nothing is padded in memory. The backward pass makes x_j anew, twice: once per
block of rows, for the gradients of rows, and once per block of candidates, some units at a time,
for those of candidates and weights; the latter leave the chip once per block of candidates. No
atomics: two runs give equal bits.

Axis letters: B requests, C candidates, c of a block, K rows, k of a block, d model width, h hidden
units.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.absorbed_target_attention.blocks import Blocks
from kernels.absorbed_target_attention.reference import Weights, leaky_relu
from kernels.absorbed_target_attention.unit import Shape, derivative
from kernels.triton import dot, load, power, store

UNITS = 4  # of one walk over the rows


def refusal(candidates: int, dtype: Any) -> str | None:
    """Why the kernels cannot take these arguments, or None."""
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"it takes float32, bfloat16 and float16, got {jnp.dtype(dtype).name}"
    return None


def _block(ref, b, index, step: int, size: int, shape: Shape):
    """Block `index` of ref[b] [size, d], [step, padded d]: the part, and which of it exists."""
    rows, columns = index * step + jnp.arange(step)[:, None], jnp.arange(power(shape.width))[None]
    return ref.at[b, rows, columns], (rows < size) & (columns < shape.width)


def _candidates(ref, b, i, shape: Shape):
    return _block(ref, b, i, shape.block, shape.candidates, shape)


def _rows(ref, b, t, shape: Shape):
    return _block(ref, b, t, shape.row_block, shape.rows, shape)


def _unit(ref, before: tuple, j, shape: Shape):
    """ref[*before, j] [d], padded: the part, and which of it exists; nothing beyond unit h."""
    columns = jnp.arange(power(shape.width))
    return ref.at[(*before, j, columns)], (columns < shape.width) & (j < shape.hidden)


class Unit(NamedTuple):
    """A hidden unit's weights and what it makes of a block of candidates q and rows."""

    w1: jax.Array  # [d]
    w2: jax.Array
    w3: jax.Array
    x: jax.Array  # [c, k], the pre-activation; without w2 in the split form
    alone: jax.Array  # [k], w2 keys^T
    scaled: jax.Array  # [c, d], q * w3

    def activated(self, shape: Shape) -> jax.Array:
        """[c, k]."""
        scores = leaky_relu(self.x, shape.slope)
        return scores if shape.joint else scores + leaky_relu(self.alone, shape.slope)[None]

    def of_alone(self, of_scores, of_x, shape: Shape) -> jax.Array:
        """[k], the gradient of `alone` without the unit's own weight."""
        if shape.joint:
            return jnp.sum(of_x, axis=0)
        return jnp.sum(of_scores, axis=0) * derivative(self.alone, shape.slope)


def _of_unit(refs, q, keys, j, shape: Shape) -> Unit:
    """q and keys as they are stored."""
    w1, w2, w3 = (load(_unit(ref, (), j, shape)) for ref in refs)
    exact = q.astype(jnp.float32)
    scaled = (exact * w3[None]).astype(keys.dtype)
    alone = jnp.sum(keys.astype(jnp.float32) * w2[None], axis=1)
    x = dot(scaled, keys.T)
    if shape.joint:
        x += jnp.sum(exact * w1[None], axis=1)[:, None] + alone[None]
    return Unit(w1, w2, w3, x, alone, scaled)


def _forward_kernel(
    out_ref,  # [h]
    w1_ref,  # [h, d]
    w2_ref,  # [h, d]
    w3_ref,  # [h, d]
    q_ref,  # [B, C, d]
    keys_ref,  # [B, K, d]
    values_ref,  # [B, K, d]
    result_ref,  # [B, C, d]
    *,
    shape: Shape,
):
    i, b = pl.program_id(0), pl.program_id(1)
    q = load(_candidates(q_ref, b, i, shape))

    def of_rows(t, total):
        keys, values = (load(_rows(ref, b, t, shape)) for ref in (keys_ref, values_ref))

        def of_unit(j, scores):
            unit = _of_unit((w1_ref, w2_ref, w3_ref), q, keys, j, shape)
            return scores + out_ref[j] * unit.activated(shape)

        scores = jnp.zeros((shape.block, shape.row_block), jnp.float32)
        scores = jax.lax.fori_loop(0, shape.hidden, of_unit, scores)
        return total + dot(scores.astype(values.dtype), values)

    total = jnp.zeros(q.shape, jnp.float32)
    total = jax.lax.fori_loop(0, shape.row_blocks, of_rows, total)
    store(_candidates(result_ref, b, i, shape), total)


def _rows_kernel(
    out_ref,  # [h]
    w1_ref,  # [h, d]
    w2_ref,  # [h, d]
    w3_ref,  # [h, d]
    q_ref,  # [B, C, d]
    keys_ref,  # [B, K, d]
    values_ref,  # [B, K, d]
    gradient_ref,  # [B, C, d]
    dkeys_ref,  # [B, K, d]
    dvalues_ref,  # [B, K, d]
    *,
    shape: Shape,
):
    """One block of rows, all candidates."""
    t, b = pl.program_id(0), pl.program_id(1)
    keys, values = (load(_rows(ref, b, t, shape)) for ref in (keys_ref, values_ref))

    def of_block(i, sums):
        dkeys, dvalues = sums
        q, gradient = (load(_candidates(ref, b, i, shape)) for ref in (q_ref, gradient_ref))
        of_scores = dot(gradient, values.T)

        def of_unit(j, sums):
            scores, dkeys = sums
            unit, weight = _of_unit((w1_ref, w2_ref, w3_ref), q, keys, j, shape), out_ref[j]
            of_x = of_scores * derivative(unit.x, shape.slope)
            of_alone = unit.of_alone(of_scores, of_x, shape)
            dkeys += weight * of_alone[:, None] * unit.w2[None]
            dkeys += dot((weight * of_x).astype(q.dtype).T, unit.scaled)
            return scores + weight * unit.activated(shape), dkeys

        start = (jnp.zeros(of_scores.shape, jnp.float32), dkeys)
        scores, dkeys = jax.lax.fori_loop(0, shape.hidden, of_unit, start)
        return dkeys, dvalues + dot(scores.astype(gradient.dtype).T, gradient)

    start = (jnp.zeros(keys.shape, jnp.float32),) * 2
    dkeys, dvalues = jax.lax.fori_loop(0, shape.candidate_blocks, of_block, start)
    store(_rows(dkeys_ref, b, t, shape), dkeys)
    store(_rows(dvalues_ref, b, t, shape), dvalues)


class Sums(NamedTuple):
    """Over the rows, of one hidden unit and without its own weight."""

    of_scaled: jax.Array  # [c, d]
    of_query: jax.Array  # [c], of q w1
    of_w2: jax.Array  # [d]
    of_out: jax.Array  # [c]


def _candidates_kernel(
    out_ref,  # [h]
    w1_ref,  # [h, d]
    w2_ref,  # [h, d]
    w3_ref,  # [h, d]
    q_ref,  # [B, C, d]
    keys_ref,  # [B, K, d]
    values_ref,  # [B, K, d]
    gradient_ref,  # [B, C, d]
    dq_ref,  # [B, C, d]
    dw1_ref,  # [B, blocks, h, d] float32, as all that follows
    dw2_ref,  # [B, blocks, h, d]
    dw3_ref,  # [B, blocks, h, d]
    dout_ref,  # [B, blocks, h]
    *,
    shape: Shape,
):
    """One block of candidates, all rows."""
    i, b = pl.program_id(0), pl.program_id(1)
    q, gradient = (load(_candidates(ref, b, i, shape)) for ref in (q_ref, gradient_ref))
    exact = q.astype(jnp.float32)

    def of_units(some, dq):
        units = [some * UNITS + n for n in range(UNITS)]

        def of_rows(t, sums):
            keys, values = (load(_rows(ref, b, t, shape)) for ref in (keys_ref, values_ref))
            of_scores = dot(gradient, values.T)

            def added(j, sums):
                unit = _of_unit((w1_ref, w2_ref, w3_ref), q, keys, j, shape)
                of_x = of_scores * derivative(unit.x, shape.slope)
                of_alone = unit.of_alone(of_scores, of_x, shape)
                return Sums(
                    sums.of_scaled + dot(of_x.astype(keys.dtype), keys),
                    sums.of_query + jnp.sum(of_x, axis=1),
                    sums.of_w2 + jnp.sum(of_alone[:, None] * keys.astype(jnp.float32), axis=0),
                    sums.of_out + jnp.sum(of_scores * unit.activated(shape), axis=1),
                )

            return tuple(added(j, s) for j, s in zip(units, sums, strict=True))

        zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
        start = Sums(
            zeros(q.shape), zeros(shape.block), zeros(power(shape.width)), zeros(shape.block)
        )
        sums = jax.lax.fori_loop(0, shape.row_blocks, of_rows, (start,) * UNITS)
        for j, total in zip(units, sums, strict=True):
            at = out_ref.at[j]
            weight = plgpu.load(at, mask=j < shape.hidden, other=0.0)
            w1, w3 = (load(_unit(ref, (), j, shape)) for ref in (w1_ref, w3_ref))
            dq += weight * total.of_scaled * w3[None]
            of_w1 = jnp.zeros(power(shape.width), jnp.float32)
            if shape.joint:
                dq += weight * total.of_query[:, None] * w1[None]
                of_w1 = jnp.sum(total.of_query[:, None] * exact, axis=0)
            of_w3 = jnp.sum(total.of_scaled * exact, axis=0)
            for ref, x in ((dw1_ref, of_w1), (dw2_ref, total.of_w2), (dw3_ref, of_w3)):
                store(_unit(ref, (b, i), j, shape), weight * x)
            plgpu.store(dout_ref.at[b, i, j], jnp.sum(total.of_out), mask=j < shape.hidden)
        return dq

    dq = jnp.zeros(q.shape, jnp.float32)
    dq = jax.lax.fori_loop(0, -(-shape.hidden // UNITS), of_units, dq)
    store(_candidates(dq_ref, b, i, shape), dq)


def _arguments(query, keys, values, weights: Weights, joint: bool, slope: float, blocks: Blocks):
    """What the kernels know, and the arguments as they take them."""
    _, candidates, width = query.shape
    shape = Shape(
        candidates=candidates,
        block=min(power(candidates), power(blocks.candidates)),
        rows=keys.shape[1],
        row_block=min(power(keys.shape[1]), power(blocks.rows)),
        width=width,
        hidden=len(weights.out),
        joint=joint,
        slope=slope,
    )
    weights = jax.tree.map(lambda x: x.astype(jnp.float32), weights)
    kernels = (w.T for w in (weights.of_query, weights.of_key, weights.of_product))
    return shape, (weights.out, *kernels, query, keys, values)


def _call(kernel, grid, outputs, interpret, name: str):
    # The lowering, which a caller may start long after this line, warns that it will be replaced.
    warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=outputs,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name=name,
    )


def forward(query, keys, values, weights, *, joint, slope, blocks: Blocks, interpret: bool):
    """sum_k s_k values_k [B, C, d] of checked arguments, without the split form's first term."""
    shape, arguments = _arguments(query, keys, values, weights, joint, slope, blocks)
    return _call(
        functools.partial(_forward_kernel, shape=shape),
        (shape.candidate_blocks, len(query)),
        jax.ShapeDtypeStruct(query.shape, query.dtype),
        interpret,
        "absorbed_target_attention_forward",
    )(*arguments)


def backward(query, keys, values, weights, dout, *, joint, slope, blocks: Blocks, interpret: bool):
    """Gradients of query, keys, values and weights, given that of the result."""
    shape, arguments = _arguments(query, keys, values, weights, joint, slope, blocks)
    arguments = (*arguments, dout)
    dkeys, dvalues = _call(
        functools.partial(_rows_kernel, shape=shape),
        (shape.row_blocks, len(query)),
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (keys, values)],
        interpret,
        "absorbed_target_attention_backward_rows",
    )(*arguments)
    units = (len(query), shape.candidate_blocks, shape.hidden)
    dq, *dkernels, dunits = _call(
        functools.partial(_candidates_kernel, shape=shape),
        (shape.candidate_blocks, len(query)),
        [
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            *[jax.ShapeDtypeStruct((*units, shape.width), jnp.float32)] * 3,
            jax.ShapeDtypeStruct(units, jnp.float32),
        ],
        interpret,
        "absorbed_target_attention_backward_candidates",
    )(*arguments)
    dweights = Weights(*(x.sum((0, 1)).T for x in dkernels), dunits.sum((0, 1)))
    return dq, dkeys, dvalues, dweights
