"""The kernels for GPUs, through Pallas' Triton lowering; few candidates: pallas_gpu_few.py.

Blocks of rows never cross a segment's end; they are padded to powers of 2 (16 at least, for the
matrix units) by masked loads, so nothing is padded in memory. A softmax takes blocks that hold a
whole segment.

Forward, a program is a segment and a block of candidates. Backward it is some segments and all
candidates, so that dz, by far the most of what is read, is read once and the gates are made anew
once: dk and dv of a block of rows are summed on chip, and dq in the program's own part of a float32
array in memory (16 KB at 128 candidates of 2 heads of 16, which a cache holds), summed by XLA. No
atomics: two runs give equal bits.

Axis letters: B requests, C candidates, c of a block, L history length, l rows of a block, S
segments, H heads, Kq and Kv head widths, P programs of the backward pass along a history.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.segmented_target_attention import pallas_gpu_few as few
from kernels.segmented_target_attention.blocks import Static
from kernels.segmented_target_attention.pallas_gpu_parts import (
    Sizes,
    call,
    gates_of,
    gradient_of_logits,
    like,
    sizes_of,
)
from kernels.triton import barrier, dot, load, power, store

PROGRAMS = 512  # backward, where a history can be split: a GPU has 132 multiprocessors, of about 4
WARPS, STAGES = 2, 3  # of blocks of 32 candidates; with 4 and 2 of 64 it was slower in every trial
MOST_SOFTMAX_ROWS = 128  # of a segment, which has to fit shared memory: an H200 has none for 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape(Sizes):
    """What a kernel knows when it is traced."""

    block: int  # c
    rows: int  # l
    per_program: int  # segments of a program of the backward pass

    @property
    def candidate_blocks(self) -> int:
        return -(-self.candidates // self.block)

    @property
    def programs(self) -> int:
        """P of the backward pass, along a history."""
        return -(-self.segments // self.per_program)

    def of_key(self, h: Any) -> Any:
        return jnp.int32(0) if self.tied else h

    @property
    def parts(self) -> int:
        """Blocks of rows per segment."""
        return -(-self.segment // self.rows)


def refusal(candidates: int, dtype: Any, softmax_rows: int) -> str | None:
    """Why the kernels cannot take these arguments, or None; softmax_rows: of a segment."""
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"it takes float32, bfloat16 and float16, got {jnp.dtype(dtype).name}"
    if softmax_rows > MOST_SOFTMAX_ROWS:
        return f"its softmax takes segments of {MOST_SOFTMAX_ROWS} rows at most, got {softmax_rows}"
    return None


def _block(ref, before, first, count: int, last, after, width: int):
    """Rows first ... first + count of ref[*before, :, *after, :width]: [count, padded width].

    Returns the part of the ref, and which of its numbers exist: rows before `last`.
    """
    rows = first + jnp.arange(count)[:, None]
    columns = jnp.arange(power(width))[None]
    return ref.at[(*before, rows, *after, columns)], (rows < last) & (columns < width)


def _candidates(ref, b, i, after, shape: Shape, width: int):
    """Block i of [B, C, ..., K]: [c, padded K]."""
    return _block(ref, (b,), i * shape.block, shape.block, shape.candidates, after, width)


def _rows(ref, b, s, part, h, shape: Shape, width: int):
    """Block `part` of segment s of [B, L, H, K]: [l, padded K]."""
    start = s * shape.segment
    last = start + shape.segment
    return _block(ref, (b,), start + part * shape.rows, shape.rows, last, (h,), width)


def _visible(mask_ref, b, s, part, shape: Shape) -> jax.Array:
    """[l]."""
    row = part * shape.rows + jnp.arange(shape.rows)
    at = mask_ref.at[b, s * shape.segment + row]
    return plgpu.load(at, mask=row < shape.segment, other=0) > 0


def _gates(q, k, bias, visible, shape: Shape):
    """q [c, Kq], k [l, Kq], visible [l] -> gates [c, l] and their derivative, of gates_of."""
    return gates_of(dot(q, k.T) * shape.scale + bias, visible[None], 1, shape.softmax)


def _forward_kernel(
    q_ref,  # [B, C, H, Kq]
    k_ref,  # [B, L, H, Kq]
    v_ref,  # [B, L, H or 1, Kv]
    mask_ref,  # [B, L]
    bias_ref,  # [H]
    z_ref,  # [B, C, S, H, Kv]
    *,
    shape: Shape,
):
    s, i = pl.program_id(0) // shape.candidate_blocks, pl.program_id(0) % shape.candidate_blocks
    h, b = pl.program_id(1), pl.program_id(2)
    of_value = h if shape.value_heads > 1 else jnp.int32(0)
    q, bias = load(_candidates(q_ref, b, i, (h,), shape, shape.key_width)), bias_ref[h]

    def of_part(part, sums):
        k = load(_rows(k_ref, b, s, part, shape.of_key(h), shape, shape.key_width))
        v = load(_rows(v_ref, b, s, part, of_value, shape, shape.value_width))
        gates, _ = _gates(q, k, bias, _visible(mask_ref, b, s, part, shape), shape)
        return sums + dot(gates.astype(v.dtype), v)

    sums = jnp.zeros((shape.block, power(shape.value_width)), jnp.float32)
    sums = jax.lax.fori_loop(0, shape.parts, of_part, sums)
    store(_candidates(z_ref, b, i, (s, h), shape, shape.value_width), sums)


def _of_logits(q, k, v, dz, bias, visible, shape: Shape):
    """The gates, and the gradient of the logits without their scale: both [c, l]."""
    gates, slope = _gates(q, k, bias, visible, shape)
    return gates, gradient_of_logits(gates, slope, dot(dz, v.T), 1, shape.softmax)


def _backward_kernel(
    q_ref,  # [B, C, H, Kq]
    k_ref,  # [B, L, H, Kq]
    v_ref,  # [B, L, H or 1, Kv]
    mask_ref,  # [B, L]
    bias_ref,  # [H]
    dz_ref,  # [B, C, S, H, Kv]
    dq_ref,  # [B, P, C, H, Kq]
    dbias_ref,  # [B, P, H]
    dk_ref,  # [B, L, H, Kq]; [B, L, 1, Kq] of keys that are the values, and no dv_ref
    dv_ref=None,  # [B, L, H or 1, Kv]
    *,
    shape: Shape,
):
    """The rows of `per_program` segments, the heads that share their values, all candidates."""
    p, of_value, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    first = p * shape.per_program * shape.parts
    last = jnp.minimum(first + shape.per_program * shape.parts, shape.segments * shape.parts)

    def of_rows(n, dbiases):
        barrier()  # dq of a block was stored by threads that need not be those that load it
        s, part = n // shape.parts, n % shape.parts
        v = load(_rows(v_ref, b, s, part, of_value, shape, shape.value_width))
        visible = _visible(mask_ref, b, s, part, shape)
        dv = jnp.zeros(v.shape, jnp.float32)
        sums = []
        for offset, dbias in enumerate(dbiases):
            h = of_value * shape.sharing + offset
            k = load(_rows(k_ref, b, s, part, shape.of_key(h), shape, shape.key_width))
            bias = bias_ref[h]

            def of_block(i, sums, k=k, h=h, bias=bias):
                dk, dv, dbias = sums
                q = load(_candidates(q_ref, b, i, (h,), shape, shape.key_width))
                dz = load(_candidates(dz_ref, b, i, (s, h), shape, shape.value_width))
                row, c = i * shape.block, shape.candidates
                at, exists = _block(dq_ref, (b, p), row, shape.block, c, (h,), shape.key_width)
                dq = load((at, exists & (n > first)))  # early: it is not needed until the end
                gates, of_logits = _of_logits(q, k, v, dz, bias, visible, shape)
                dbias += jnp.sum(of_logits, 0)
                of_logits = (of_logits * shape.scale).astype(q.dtype)
                store((at, exists), dq + dot(of_logits, k))
                dk += dot(of_logits.T, q)
                return dk, dv + dot(gates.astype(dz.dtype).T, dz), dbias

            start = (jnp.zeros(k.shape, jnp.float32), dv, jnp.zeros(k.shape[:1], jnp.float32))
            dk, dv, rows = jax.lax.fori_loop(0, shape.candidate_blocks, of_block, start)
            sums.append(dbias + jnp.sum(rows))
            if shape.tied:
                dv += dk
            else:
                store(_rows(dk_ref, b, s, part, h, shape, shape.key_width), dk)
        of_values = dk_ref if shape.tied else dv_ref
        store(_rows(of_values, b, s, part, of_value, shape, shape.value_width), dv)
        return tuple(sums)

    dbiases = jax.lax.fori_loop(first, last, of_rows, (jnp.float32(0),) * shape.sharing)
    for offset, dbias in enumerate(dbiases):
        dbias_ref[b, p, of_value * shape.sharing + offset] = dbias


def _shape(static: Static, q, k, v) -> Shape:
    sizes, blocks = sizes_of(static, q, k, v), static.blocks
    segment, candidates = static.segment, sizes["candidates"]
    block = min(power(candidates), power(blocks.candidates))
    programs = -(-PROGRAMS // (len(q) * sizes["value_heads"]))
    return Shape(
        **sizes,
        block=block,
        rows=power(segment) if static.softmax else min(power(segment), power(blocks.rows)),
        per_program=-(-sizes["segments"] // programs),
    )


def forward(static: Static, q, k, v, mask, bias) -> jax.Array:
    """z [B, C, S, H, Kv] of checked arguments."""
    bias = bias.astype(jnp.float32)
    if few.takes(static, q, k, v):
        return few.forward(static, q, k, v, mask, bias)
    shape = _shape(static, q, k, v)
    sums = (len(q), shape.candidates, shape.segments, shape.heads, shape.value_width)
    return call(
        _forward_kernel,
        shape,
        (shape.segments * shape.candidate_blocks, shape.heads, len(q)),
        jax.ShapeDtypeStruct(sums, q.dtype),
        static,
        "forward",
        WARPS,
        STAGES,
    )(q, k, k if v is None else v, mask.astype(jnp.int8), bias)


def backward(static: Static, q, k, v, mask, bias, dz):
    """Gradients of q, k, v (None without it) and bias, given that of z."""
    bias = bias.astype(jnp.float32)
    if few.takes(static, q, k, v):
        return few.backward(static, q, k, v, mask, bias, dz)
    shape = _shape(static, q, k, v)
    arguments = (q, k, k if v is None else v, mask.astype(jnp.int8), bias, dz)
    partial = (len(q), shape.programs, *q.shape[1:])
    dq, dbias, dk, *dv = call(
        _backward_kernel,
        shape,
        (shape.programs, shape.value_heads, len(q)),
        [
            jax.ShapeDtypeStruct(partial, jnp.float32),
            jax.ShapeDtypeStruct((len(q), shape.programs, shape.heads), jnp.float32),
            *like(k, v),
        ],
        static,
        "backward",
        WARPS,
        STAGES,
    )(*arguments)
    return dq.sum(1).astype(q.dtype), dk, dv[0] if dv else None, dbias.sum((0, 1))
