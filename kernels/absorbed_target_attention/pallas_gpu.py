"""The kernels for GPUs, through Pallas' Triton lowering: how pallas_gpu_kernels.py is started.

The joint form is one product per candidate; the split form is a sum of two, of the candidates with
W2 = W1 = 0, and of W2 alone, whose result all candidates share.

What programs add up leaves the chip as float32 parts, and XLA adds them: no atomics, two runs give
equal bits. At d = 16, h = 64 a block of 128 rows reads 8 KB (bfloat16), and

    result, dt      64 bytes per candidate and walk
    dW_i            12 KB per program, which makes M too: so it takes LEAST_PAIRS rows x candidates
    dkeys, dvalues  16 KB per block of rows and of candidates, 8 KB and no sum where candidates are
                    one block: so they are split only where rows do not give PROGRAMS

Axis letters: B requests, C candidates, K rows, d model width, h hidden units.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.absorbed_target_attention.blocks import Blocks
from kernels.absorbed_target_attention.pallas_gpu_kernels import (
    Shape,
    backward_kernel,
    forward_kernel,
)
from kernels.absorbed_target_attention.reference import Weights
from kernels.triton import call, power

PROGRAMS = 1024  # about; a GPU has 132 multiprocessors, of a few programs each
LEAST_PAIRS = 512  # rows x candidates of a program
WARPS, STAGES = 4, 3  # of a program; of its loads, two blocks of rows ahead


def refusal(candidates: int, dtype: Any) -> str | None:
    """Why the kernels cannot take these arguments, or None."""
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"it takes float32, bfloat16 and float16, got {jnp.dtype(dtype).name}"
    return None


def _shape(query, keys, hidden: int, slope: float, block: int, row_block: int) -> Shape:
    """What the kernels know, of `block` candidates per program."""
    batch, candidates, width = query.shape
    row_block = min(power(keys.shape[1]), power(row_block))
    row_blocks = pl.cdiv(keys.shape[1], row_block)
    walks = pl.cdiv(PROGRAMS, batch * pl.cdiv(candidates, block))
    least = pl.cdiv(LEAST_PAIRS, row_block * block)
    return Shape(
        candidates=candidates,
        block=block,
        rows=keys.shape[1],
        row_block=row_block,
        walk=min(row_blocks, max(least, pl.cdiv(row_blocks, walks))),
        width=width,
        hidden=hidden,
        slope=slope,
    )


def _call(kernel, shape: Shape, batch: int, outputs, interpret, name: str):
    kernel = functools.partial(kernel, shape=shape)
    grid = (shape.candidate_blocks, shape.walks, batch)
    name = f"absorbed_target_attention_{name}"
    return call(kernel, outputs, name, interpret, WARPS, STAGES, grid=grid)


def _parts(dtype, *sizes: int) -> jax.ShapeDtypeStruct:
    """Of a sum over axis 1: float32 where it has more than one part."""
    return jax.ShapeDtypeStruct(sizes, dtype if sizes[1] == 1 else jnp.float32)


def _sum(parts) -> jax.Array:
    """Over axis 1."""
    return parts.sum(1) if parts.shape[1] > 1 else parts[:, 0]


def _terms(query, weights: Weights, joint: bool) -> list[tuple[jax.Array, Weights]]:
    """Candidates and float32 weights of the products that a form is a sum of."""
    weights = jax.tree.map(lambda x: x.astype(jnp.float32), weights)
    if joint:
        return [(query, weights)]
    none = jnp.zeros_like(weights.of_key)
    of_candidates = weights.replace(of_query=none, of_key=none)
    return [
        (query, of_candidates),
        (query[:, :1], weights.replace(of_query=none, of_product=none)),
    ]


def _arrays(query, weights: Weights) -> tuple[jax.Array, ...]:
    """W_o, W3, W2, W1 and t W1 [B, C, h]."""
    start = jnp.matmul(query.astype(jnp.float32), weights.of_query, precision="highest")
    return weights.out, weights.of_product, weights.of_key, weights.of_query, start


def forward(query, keys, values, weights, *, joint, slope, blocks: Blocks, interpret: bool):
    """sum_k s_k values_k [B, C, d] of checked arguments, without the split form's first term."""
    dtype, result = query.dtype if joint else jnp.float32, 0
    for q, of_term in _terms(query, weights, joint):
        batch, candidates, width = q.shape
        block = min(candidates, blocks.candidates)
        shape = _shape(q, keys, len(weights.out), slope, block, blocks.rows)
        parts = _parts(dtype, batch, shape.walks, candidates, width)
        run = _call(forward_kernel, shape, batch, parts, interpret, "forward")
        result += _sum(run(*_arrays(q, of_term), q, keys, values))
    return result.astype(query.dtype)


def backward(query, keys, values, weights, dout, *, joint, slope, blocks: Blocks, interpret: bool):
    """Gradients of query, keys, values and weights, given that of the result."""
    how = dict(slope=slope, blocks=blocks, interpret=interpret)
    terms = _terms(query, weights, joint)
    if joint:
        return _backward(*terms[0], keys, values, dout, keys.dtype, **how)
    of_all = dout.astype(jnp.float32).sum(1, keepdims=True)
    (dq, *drows, of_candidates), (_, *others, of_rows) = (
        _backward(*term, keys, values, gradient, jnp.float32, **how)
        for term, gradient in zip(terms, (dout, of_all), strict=True)
    )
    dweights = Weights(
        of_query=jnp.zeros_like(of_rows.of_query),
        of_key=of_rows.of_key,
        of_product=of_candidates.of_product,
        out=of_candidates.out + of_rows.out,
    )
    return dq, *jax.tree.map(jnp.add, drows, others), dweights


def _backward(query, weights, keys, values, dout, dtype, *, slope, blocks, interpret):
    """Of one term; dtype: of the rows' gradients."""
    hidden, row_block = len(weights.out), blocks.rows // 2
    batch, candidates, width = query.shape
    shape = _shape(query, keys, hidden, slope, candidates, row_block)
    programs = batch * shape.walks
    if programs < PROGRAMS and candidates > blocks.candidates:
        most = pl.cdiv(candidates, blocks.candidates)
        block = pl.cdiv(candidates, min(most, pl.cdiv(PROGRAMS, programs)))
        shape = _shape(query, keys, hidden, slope, block, row_block)
    steps = shape.walks * (1 if shape.block == 1 else shape.walk)
    of_queries = _parts(query.dtype, batch, steps, candidates, width)
    of_rows = _parts(dtype, batch, shape.candidate_blocks, shape.rows, width)
    of_weights = (batch, shape.walks, shape.candidate_blocks, width, hidden)
    of_weights = jax.ShapeDtypeStruct(of_weights, jnp.float32)
    outputs = [of_queries, of_rows, of_rows, *[of_weights] * 3]
    run = _call(backward_kernel, shape, batch, outputs, interpret, "backward")
    arrays = out, *kernels, _ = _arrays(query, weights)
    dquery, dkeys, dvalues, *dkernels = run(*arrays, query, keys, values, dout)
    dkernels = [x.sum((0, 1, 2)) for x in dkernels]
    dunits = sum(jnp.sum(w * x, axis=0) for w, x in zip(kernels, dkernels, strict=True))
    dw3, dw2, dw1 = (x * out for x in dkernels)
    return _sum(dquery), _sum(dkeys), _sum(dvalues), Weights(dw1, dw2, dw3, dunits)
