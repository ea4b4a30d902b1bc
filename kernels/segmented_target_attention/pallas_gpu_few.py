"""The kernels for GPUs that take few candidates: elementwise, without products of matrices.

A row of the history meets so few candidates that memory bounds the op, and a block of 16 for the
matrix units would be padding for the most part. So a program holds several whole segments of one
head of values, and of the heads that share it, as [w, G, K]: threads go along K and G first, so
that a sum over a segment is one over a thread's own numbers and hardly over threads. It loads keys
and values once, and all candidates go over them. The backward pass makes the gates anew, in one
kernel that reads and writes everything once; gradients of candidates and of the bias leave it as
sums over the segments of a program, float32, which XLA adds up. No atomics: two runs give equal
bits. All arithmetic is float32.

Axis letters: B requests, C candidates, L history length, S segments, w rows of a segment, G
segments of a program, P programs along a history, H heads, Kq and Kv head widths. In a block w, G
and K are padded to powers of 2 by masked loads.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.segmented_target_attention.blocks import Static
from kernels.segmented_target_attention.pallas_gpu_parts import (
    Sizes,
    call,
    gates_of,
    gradient_of_logits,
    like,
    sizes_of,
)
from kernels.triton import load, store

MANY = 3  # candidates: from here on a padded block of 16 on the matrix units was faster on an H200
# Of keys and values of a program of NARROW warps, where one query alone meets a row, and half where
# gradients of several are summed in registers: of 2 warps none of the named shapes spills. More
# have fewer bytes on their way. A longer segment, of twice as many at most, takes WIDE warps.
NUMBERS = 6144
NARROW, WIDE = {2: 1, 4: 2}, 8  # by bytes of a number
STAGES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape(Sizes):
    """What a kernel knows when it is traced."""

    group: int  # G
    warps: int

    @property
    def programs(self) -> int:
        """Along a history."""
        return -(-self.segments // self.group)

    @property
    def rows(self) -> int:
        """Of a segment's block."""
        return pl.next_power_of_2(self.segment)


class Size(NamedTuple):
    """Of blocks of keys and values."""

    segment: int  # numbers of one
    most: int  # numbers of a program of several


def _size(static: Static, q, k, v) -> Size:
    widths = k.shape[3:] if v is None else (k.shape[3], v.shape[3])
    numbers = pl.next_power_of_2(static.segment) * sum(map(pl.next_power_of_2, widths))
    queries = q.shape[1] * q.shape[2] // (k if v is None else v).shape[2]
    return Size(numbers, NUMBERS if queries == 1 else NUMBERS // 2)


def takes(static: Static, q, k, v) -> bool:
    """Whether candidates are few and a segment fits."""
    size = _size(static, q, k, v)
    return q.shape[1] < MANY and size.segment <= 2 * size.most


def _group(size: Size, static: Static, segments: int) -> int:
    """G, a power of 2: what fits, of blocks.rows rows at most, and no more than are."""
    rows = pl.next_power_of_2(static.segment)
    most = max(1, min(size.most // size.segment, static.blocks.rows // rows))
    return min(pl.next_power_of_2(segments), pl.next_power_of_2(most + 1) // 2)


class Place(NamedTuple):
    """Of a program, which asks for it once: a loop's body cannot when it is interpreted."""

    b: jax.Array
    segments: jax.Array  # [G]


def _place(shape: Shape) -> Place:
    return Place(pl.program_id(2), pl.program_id(1) * shape.group + jnp.arange(shape.group))


def _rows(place: Place, shape: Shape):
    """Rows of the segments in [B, L, ...], and which exist, the others L: both [w, G].

    An interpreted store writes what it is not to change as it was: never where another writes.
    """
    segments, row = place.segments[None], jnp.arange(shape.rows)[:, None]
    exists = (segments < shape.segments) & (row < shape.segment)
    rows = segments * shape.segment + row
    return jnp.where(exists, rows, shape.segments * shape.segment), exists


def _columns(width: int):
    """Of a head, and which exist."""
    columns = jnp.arange(pl.next_power_of_2(width))
    return columns, columns < width


def _history(ref, place: Place, h, shape: Shape, width: int):
    """Head h of the rows of [B, L, H, K]: [w, G, K]."""
    (rows, some), (columns, others) = _rows(place, shape), _columns(width)
    at = ref.at[place.b, rows[:, :, None], h, columns[None, None]]
    return at, some[:, :, None] & others[None, None]


def _sums(ref, place: Place, c, h, shape: Shape):
    """Of the segments, in [B, C, S, H, Kv]: [G, Kv]."""
    segments, (columns, exist) = place.segments[:, None], _columns(shape.value_width)
    at = ref.at[place.b, c, segments, h, columns[None]]
    return at, (segments < shape.segments) & exist[None]


def _query(ref, *at, shape: Shape):
    """ref[*at] of [..., Kq]: [Kq]."""
    columns, exist = _columns(shape.key_width)
    return ref.at[(*at, columns)], exist


def _visible(mask_ref, place: Place, shape: Shape):
    """[w, G]."""
    rows, exists = _rows(place, shape)
    return plgpu.load(mask_ref.at[place.b, rows], mask=exists, other=0) > 0


def _gates(q, k, bias, visible, shape: Shape):
    """q [Kq], k [w, G, Kq], visible [w, G] -> gates and their derivative, of gates_of."""
    products = jnp.sum(k.astype(jnp.float32) * q.astype(jnp.float32)[None, None], 2)
    return gates_of(products * shape.scale + bias, visible, 0, shape.softmax)


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
    of_value, place = pl.program_id(0), _place(shape)
    v = load(_history(v_ref, place, of_value, shape, shape.value_width))
    visible = _visible(mask_ref, place, shape)
    for offset in range(shape.sharing):
        h = of_value * shape.sharing + offset
        k = v if shape.tied else load(_history(k_ref, place, h, shape, shape.key_width))
        bias = bias_ref[h]

        def of_candidate(c, _, k=k, h=h, bias=bias):
            q = load(_query(q_ref, place.b, c, h, shape=shape))
            gates = _gates(q, k, bias, visible, shape)[0]
            z = jnp.sum(gates[:, :, None] * v.astype(jnp.float32), 0)
            store(_sums(z_ref, place, c, h, shape), z)

        jax.lax.fori_loop(0, shape.candidates, of_candidate, None)


def _backward_kernel(
    q_ref,  # [B, C, H, Kq]
    k_ref,  # [B, L, H, Kq]
    v_ref,  # [B, L, H or 1, Kv]
    mask_ref,  # [B, L]
    bias_ref,  # [H]
    dz_ref,  # [B, C, S, H, Kv]
    dq_ref,  # [B, P, C, H, Kq]
    dbias_ref,  # [B, P, C, H]
    dk_ref,  # [B, L, H, Kq]; [B, L, 1, Kq] of keys that are the values, and no dv_ref
    dv_ref=None,  # [B, L, H or 1, Kv]
    *,
    shape: Shape,
):
    of_value, p, place = pl.program_id(0), pl.program_id(1), _place(shape)
    v = load(_history(v_ref, place, of_value, shape, shape.value_width))
    visible = _visible(mask_ref, place, shape)
    dv = jnp.zeros(v.shape, jnp.float32)
    for offset in range(shape.sharing):
        h = of_value * shape.sharing + offset
        k = v if shape.tied else load(_history(k_ref, place, h, shape, shape.key_width))
        bias = bias_ref[h]

        def of_candidate(c, sums, k=k, h=h, bias=bias):
            q = load(_query(q_ref, place.b, c, h, shape=shape)).astype(jnp.float32)
            dz = load(_sums(dz_ref, place, c, h, shape)).astype(jnp.float32)
            gates, slope = _gates(q, k, bias, visible, shape)
            of_gates = jnp.sum(v.astype(jnp.float32) * dz[None], 2)
            logits = gradient_of_logits(gates, slope, of_gates, 0, shape.softmax)
            dq = jnp.sum(jnp.sum(logits[:, :, None] * k.astype(jnp.float32), 0) * shape.scale, 0)
            store(_query(dq_ref, place.b, p, c, h, shape=shape), dq)
            dbias_ref[place.b, p, c, h] = jnp.sum(jnp.sum(logits, 0), 0)
            dk = logits[:, :, None] * (q * shape.scale)[None, None]
            dv = gates[:, :, None] * dz[None]
            return (sums[0] + dk + dv,) if shape.tied else (sums[0] + dv, sums[1] + dk)

        start = (dv,) if shape.tied else (dv, jnp.zeros(k.shape, jnp.float32))
        dv, *dk = jax.lax.fori_loop(0, shape.candidates, of_candidate, start)
        if dk:
            store(_history(dk_ref, place, h, shape, shape.key_width), dk[0])
    of_values = dk_ref if shape.tied else dv_ref
    store(_history(of_values, place, of_value, shape, shape.value_width), dv)


def _shape(static: Static, q, k, v) -> Shape:
    sizes, size = sizes_of(static, q, k, v), _size(static, q, k, v)
    return Shape(
        **sizes,
        group=_group(size, static, sizes["segments"]),
        warps=NARROW[q.dtype.itemsize] if size.segment <= size.most else WIDE,
    )


def forward(static: Static, q, k, v, mask, bias) -> jax.Array:
    """As pallas_gpu.forward, of arguments that are taken."""
    shape = _shape(static, q, k, v)
    sums = (len(q), shape.candidates, shape.segments, shape.heads, shape.value_width)
    return call(
        _forward_kernel,
        shape,
        (shape.value_heads, shape.programs, len(q)),
        jax.ShapeDtypeStruct(sums, q.dtype),
        static,
        "few_forward",
        shape.warps,
        STAGES,
    )(q, k, k if v is None else v, mask.astype(jnp.int8), bias)


def backward(static: Static, q, k, v, mask, bias, dz):
    """As pallas_gpu.backward, of arguments that are taken."""
    shape = _shape(static, q, k, v)
    partial = (len(q), shape.programs, *q.shape[1:])
    dq, dbias, dk, *dv = call(
        _backward_kernel,
        shape,
        (shape.value_heads, shape.programs, len(q)),
        [
            jax.ShapeDtypeStruct(partial, jnp.float32),
            jax.ShapeDtypeStruct(partial[:-1], jnp.float32),
            *like(k, v),
        ],
        static,
        "few_backward",
        shape.warps,
        STAGES,
    )(q, k, k if v is None else v, mask.astype(jnp.int8), bias, dz)
    return dq.sum(1).astype(q.dtype), dk, dv[0] if dv else None, dbias.sum((0, 1, 2))
