"""The kernels for GPUs, through Pallas' Triton lowering: hidden units are an axis of a product.

A candidate t and a block of rows meet all hidden units at once,

    x = (1 t * keys) W3 + keys W2 + (1 t) W1     [k, h], of which the split form has the first
    scores = phi(x) W_o                          [k]; the split form adds phi(keys W2) W_o

so a product has k, h and d as its sides: whole tiles of the matrix units however few candidates
there are, and the weights are the same for all, so they stay on chip. A program takes some
candidates and walks over blocks of rows (a walk), in each over its candidates.

The backward pass makes x anew, once. With g [k, h] = phi'(x) times the gradient of the scores,

    dkeys, dt   from g (W_o * W_i)^T       [k, d], of each i
    dW_i        W_o * what x has of W_i, transposed, times g: three products that add up on chip
    dW_o        phi(x) = phi'(x) x, so the sum over i and d of W_i * dW_i / W_o: XLA's

What programs add up leaves the chip as float32 parts, and XLA adds them: no atomics, two runs give
equal bits. At d = 16, h = 64 a block of 64 rows reads 4 KB (bfloat16), and

    result, dt      64 bytes per candidate and block of rows: written by each, so no sums on chip
    dW_i            12 KB per program: so a program takes LEAST_PAIRS rows x candidates or more
    dkeys, dvalues  8 KB per block of rows and of candidates, 4 KB and no sum where candidates are
                    one block: so they are split only where rows do not give LEAST_PROGRAMS

Narrow products round t * keys and g, and no weight of x: each is two numbers. Blocks are padded to
powers of 2 (16 at least, for the matrix units) by masked loads, so nothing is padded in memory. A
padded unit has W_o = 0; a padded row has values of 0 and a padded candidate a gradient of 0, so
both have g = 0.

Axis letters: B requests, C candidates, K rows, k of a block, d model width, h hidden units; P
blocks of candidates, T blocks of rows, S walks over them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.absorbed_target_attention.blocks import Blocks
from kernels.absorbed_target_attention.reference import Weights
from kernels.absorbed_target_attention.unit import Shape, derivative
from kernels.triton import call, dot, load, power, store

NT, TN = (1, 1), (0, 0)  # axes that a product contracts
PROGRAMS, LEAST_PROGRAMS = 1024, 256  # a GPU has 132 multiprocessors, of a few programs each
LEAST_PAIRS = 512  # rows x candidates of a program


def refusal(candidates: int, dtype: Any) -> str | None:
    """Why the kernels cannot take these arguments, or None."""
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"it takes float32, bfloat16 and float16, got {jnp.dtype(dtype).name}"
    return None


def _rows(ref, before: tuple, t, shape: Shape):
    """Block t of ref[*before] [K, d], [k, padded d]: the part, and which of it exists."""
    rows = t * shape.row_block + jnp.arange(shape.row_block)[:, None]
    columns = jnp.arange(power(shape.width))[None]
    return ref.at[(*before, rows, columns)], (rows < shape.rows) & (columns < shape.width)


def _candidate(ref, before: tuple, i, exists, shape: Shape):
    """ref[*before, i] [d], padded: the part, and which of it exists."""
    columns = jnp.arange(power(shape.width))
    exists = (columns < shape.width) & (i < shape.candidates) & exists
    return ref.at[(*before, i, columns)], exists


def _kernel(ref, before: tuple, shape: Shape):
    """ref[*before] [h, d], padded: the part, and which of it exists."""
    units, columns = jnp.arange(power(shape.hidden))[:, None], jnp.arange(power(shape.width))[None]
    return ref.at[(*before, units, columns)], (units < shape.hidden) & (columns < shape.width)


def _out(ref, shape: Shape) -> jax.Array:
    """[padded h]."""
    units = jnp.arange(power(shape.hidden))
    return load((ref.at[units], units < shape.hidden))


def _weights(refs, dtype, shape: Shape) -> list[list[jax.Array]]:
    """Of W3, W2, W1 as far as x takes them, each [h, d] as one number of the keys' dtype, or as two
    narrower ones: what is rounded away is the second."""
    found = []
    for ref in refs[: 3 if shape.joint else 1]:
        exact = load(_kernel(ref, (), shape))
        high = exact.astype(dtype)
        rest = [] if dtype == jnp.float32 else [(exact - high.astype(jnp.float32)).astype(dtype)]
        found.append([high, *rest])
    return found


def _features(q, keys, shape: Shape) -> list[jax.Array]:
    """What W3, W2, W1 meet of a candidate [d] and rows: [k, d] each, in the keys' dtype."""
    scaled = (q[None] * keys.astype(jnp.float32)).astype(keys.dtype)
    if not shape.joint:
        return [scaled]
    return [scaled, keys, jnp.broadcast_to(q[None], keys.shape).astype(keys.dtype)]


def _products(features, weights) -> jax.Array:
    """x [k, h]."""
    pairs = [(x, part) for x, w in zip(features, weights, strict=True) for part in w]
    return functools.reduce(lambda x, pair: x + dot(*pair, NT), pairs[1:], dot(*pairs[0], NT))


def _scores(x, slope, out) -> jax.Array:
    """phi(x) W_o [k], given phi'(x)."""
    return jnp.sum(x * slope * out[None], axis=1)


def _alone(w2_ref, keys, out, shape: Shape):
    """The split form's second term, of rows alone: phi' [k, h] and the scores [k]."""
    x = _products([keys], _weights([w2_ref], keys.dtype, shape))
    slope = derivative(x, shape.slope)
    return slope, _scores(x, slope, out)


def _forward_kernel(
    out_ref,  # [h]
    w3_ref,  # [h, d]
    w2_ref,  # [h, d]
    w1_ref,  # [h, d]
    q_ref,  # [B, C, d]
    keys_ref,  # [B, K, d]
    values_ref,  # [B, K, d]
    result_ref,  # [B, T, C, d]
    *,
    shape: Shape,
    walk: int,
):
    part, split, b = (pl.program_id(axis) for axis in range(3))
    out = _out(out_ref, shape)
    weights = _weights((w3_ref, w2_ref, w1_ref), keys_ref.dtype, shape)

    def of_rows(n, _):
        t = split * walk + n
        keys, values = (load(_rows(ref, (b,), t, shape)) for ref in (keys_ref, values_ref))
        values = values.astype(jnp.float32)
        alone = 0.0 if shape.joint else _alone(w2_ref, keys, out, shape)[1]

        def of_candidate(n, _):
            i = part * shape.block + n
            q = load(_candidate(q_ref, (b,), i, True, shape)).astype(jnp.float32)
            x = _products(_features(q, keys, shape), weights)
            scores = _scores(x, derivative(x, shape.slope), out) + alone
            result = jnp.sum(scores[:, None] * values, axis=0)
            store(_candidate(result_ref, (b, t), i, t < shape.row_blocks, shape), result)

        jax.lax.fori_loop(0, shape.block, of_candidate, None)

    jax.lax.fori_loop(0, walk, of_rows, None)


def _backward_kernel(
    out_ref,  # [h]
    w3_ref,  # [h, d]
    w2_ref,  # [h, d]
    w1_ref,  # [h, d]
    q_ref,  # [B, C, d]
    keys_ref,  # [B, K, d]
    values_ref,  # [B, K, d]
    gradient_ref,  # [B, C, d]
    dq_ref,  # [B, T, C, d]
    dkeys_ref,  # [B, P, K, d]
    dvalues_ref,  # [B, P, K, d]
    *dkernel_refs,  # [B, S, P, h, d] of W3, W2 and, in the joint form, W1; all over W_o
    shape: Shape,
    walk: int,
):
    part, split, b = (pl.program_id(axis) for axis in range(3))
    out = _out(out_ref, shape)
    dtype = keys_ref.dtype
    weights = _weights((w3_ref, w2_ref, w1_ref), dtype, shape)
    w3_out, w2_out, w1_out = (
        (load(_kernel(ref, (), shape)) * out[:, None]).astype(dtype)
        for ref in (w3_ref, w2_ref, w1_ref)
    )

    def of_rows(n, dkernels):
        t = split * walk + n
        keys, values = (load(_rows(ref, (b,), t, shape)) for ref in (keys_ref, values_ref))
        values = values.astype(jnp.float32)
        alone = 0.0 if shape.joint else _alone(w2_ref, keys, out, shape)[1]

        def of_candidate(n, sums):
            dkeys, dvalues, of_alone, dkernels = sums
            i = part * shape.block + n
            q, gradient = (
                load(_candidate(ref, (b,), i, True, shape)).astype(jnp.float32)
                for ref in (q_ref, gradient_ref)
            )
            features = _features(q, keys, shape)
            x = _products(features, weights)
            slope = derivative(x, shape.slope)
            of_scores = jnp.sum(values * gradient[None], axis=1)
            g = (of_scores[:, None] * slope).astype(dtype)
            dvalues += (_scores(x, slope, out) + alone)[:, None] * gradient[None]
            of_scaled = dot(g, w3_out)
            dkeys += of_scaled * q[None]
            dq = of_scaled * keys.astype(jnp.float32)
            if shape.joint:
                dkeys += dot(g, w2_out)
                dq += dot(g, w1_out)
            else:
                of_alone += of_scores
            store(_candidate(dq_ref, (b, t), i, t < shape.row_blocks, shape), jnp.sum(dq, axis=0))
            own = [w + dot(g, x, TN) for w, x in zip(dkernels, features, strict=False)]
            return dkeys, dvalues, of_alone, (*own, *dkernels[len(own) :])

        zeros = jnp.zeros(keys.shape, jnp.float32)
        sums = (zeros, zeros, jnp.zeros(len(keys), jnp.float32), dkernels)
        sums = jax.lax.fori_loop(0, shape.block, of_candidate, sums)
        dkeys, dvalues, of_alone, dkernels = sums
        if not shape.joint:
            g = (of_alone[:, None] * _alone(w2_ref, keys, out, shape)[0]).astype(dtype)
            dkeys += dot(g, w2_out)
            dkernels = dkernels[0], dkernels[1] + dot(g, keys, TN)
        store(_rows(dkeys_ref, (b, part), t, shape), dkeys)
        store(_rows(dvalues_ref, (b, part), t, shape), dvalues)
        return dkernels

    start = (jnp.zeros(w3_out.shape, jnp.float32),) * len(dkernel_refs)
    dkernels = jax.lax.fori_loop(0, walk, of_rows, start)
    for ref, dkernel in zip(dkernel_refs, dkernels, strict=True):
        store(_kernel(ref, (b, split, part), shape), dkernel)


def _shape(query, keys, hidden: int, joint: bool, slope: float, block: int, blocks: Blocks):
    """What the kernels know, of `block` candidates per program, and blocks of rows of a walk."""
    batch, candidates, width = query.shape
    shape = Shape(
        candidates=candidates,
        block=block,
        rows=keys.shape[1],
        row_block=min(power(keys.shape[1]), power(blocks.rows)),
        width=width,
        hidden=hidden,
        joint=joint,
        slope=slope,
    )
    least = pl.cdiv(LEAST_PAIRS, shape.row_block * block)
    wanted = pl.cdiv(PROGRAMS, batch * shape.candidate_blocks)
    return shape, min(shape.row_blocks, max(least, pl.cdiv(shape.row_blocks, wanted)))


def _arrays(weights: Weights) -> tuple[jax.Array, ...]:
    """W_o [h] and W3, W2, W1 [h, d], float32."""
    weights = jax.tree.map(lambda x: x.astype(jnp.float32), weights)
    return weights.out, weights.of_product.T, weights.of_key.T, weights.of_query.T


def _call(kernel, grid, outputs, interpret, name: str):
    name = f"absorbed_target_attention_{name}"
    return call(kernel, outputs, name, interpret, warps=4, stages=2, grid=grid)


def _parts(dtype, *sizes: int) -> jax.ShapeDtypeStruct:
    """Of a sum over axis 1: float32 where it has more than one part."""
    return jax.ShapeDtypeStruct(sizes, dtype if sizes[1] == 1 else jnp.float32)


def _sum(parts) -> jax.Array:
    """Over axis 1."""
    return parts.sum(1) if parts.shape[1] > 1 else parts[:, 0]


def forward(query, keys, values, weights, *, joint, slope, blocks: Blocks, interpret: bool):
    """sum_k s_k values_k [B, C, d] of checked arguments, without the split form's first term."""
    out, *kernels = _arrays(weights)
    batch, candidates, width = query.shape
    block = min(candidates, blocks.candidates)
    shape, walk = _shape(query, keys, len(out), joint, slope, block, blocks)
    parts = _call(
        functools.partial(_forward_kernel, shape=shape, walk=walk),
        (shape.candidate_blocks, pl.cdiv(shape.row_blocks, walk), batch),
        _parts(query.dtype, batch, shape.row_blocks, candidates, width),
        interpret,
        "forward",
    )(out, *kernels, query, keys, values)
    return _sum(parts).astype(query.dtype)


def backward(query, keys, values, weights, dout, *, joint, slope, blocks: Blocks, interpret: bool):
    """Gradients of query, keys, values and weights, given that of the result."""
    out, *kernels = _arrays(weights)
    batch, candidates, width = query.shape
    shape, walk = _shape(query, keys, len(out), joint, slope, candidates, blocks)
    programs = batch * pl.cdiv(shape.row_blocks, walk)
    if programs < LEAST_PROGRAMS and candidates > blocks.candidates:
        most = pl.cdiv(candidates, blocks.candidates)
        block = pl.cdiv(candidates, min(most, pl.cdiv(LEAST_PROGRAMS, programs)))
        shape, walk = _shape(query, keys, len(out), joint, slope, block, blocks)
    splits = pl.cdiv(shape.row_blocks, walk)
    of_rows = _parts(keys.dtype, batch, shape.candidate_blocks, shape.rows, width)
    of_weights = (batch, splits, shape.candidate_blocks, shape.hidden, width)
    used = kernels if joint else kernels[:2]
    dq, dkeys, dvalues, *dkernels = _call(
        functools.partial(_backward_kernel, shape=shape, walk=walk),
        (shape.candidate_blocks, splits, batch),
        [
            _parts(query.dtype, batch, shape.row_blocks, candidates, width),
            of_rows,
            of_rows,
            *[jax.ShapeDtypeStruct(of_weights, jnp.float32) for _ in used],
        ],
        interpret,
        "backward",
    )(out, *kernels, query, keys, values, dout)
    dkernels = [x.sum((0, 1, 2)) for x in dkernels]
    dunits = sum(jnp.sum(w * x, axis=1) for w, x in zip(used, dkernels, strict=True))
    dw3, dw2, *dw1 = (x.T * out for x in dkernels)
    dw1 = dw1[0] if joint else jnp.zeros_like(dw2)
    return _sum(dq), _sum(dkeys), _sum(dvalues), Weights(dw1, dw2, dw3, dunits)
