"""What one program of pallas_gpu.py does: some candidates of a request, and a walk over its rows.

A candidate t is a matrix that rows meet, and a constant that XLA makes,

    x = keys M^T + t W1       [k, h], M = W2 + diag(t) W3 [h, d]
    scores = phi(x) W_o       [k]

so a product has k, h and d as its sides, whole tiles of the matrix units however few candidates
there are, and M is made once for all rows of a walk. phi and the sum over h, which no matrix unit
does, take the time: they are two fused multiply-adds a number,

    phi(x) w = (1 + slope) / 2 * w (x + (1 - slope) / (1 + slope) |x|)

The backward pass makes x anew. With g [k, h] = phi'(x) times the gradient of the scores,

    dkeys     g (W_o * M)                 [k, d]
    dM        W_o * g^T keys              [h, d]: dW2; t * dM of dW3, sum_h dM * W3 of dt
    d(t W1)   W_o * g^T 1                 [h]: t d(t W1) of dW1, W1 d(t W1) of dt
    dW_o      phi(x) = phi'(x) x, so sums of W_i * dW_i / W_o: XLA's

One candidate's dM is added up over a walk; several are walked over in each block of rows, so that
the rows' gradients are added up on chip.

Narrow products round g and W_o * M; M is two numbers, and rows are taken as they are. Blocks are
padded to powers of 2 (16 at least, for the matrix units) by masked loads, so nothing is padded in
memory. A padded unit has W_o = 0; a padded row has values of 0 and a padded candidate a gradient
of 0, so both have g = 0.

Axis letters: B requests, C candidates, K rows, k of a block, d model width, h hidden units, u of a
product; P blocks of candidates, S walks over blocks of rows; T walks too, or blocks of rows where
there are several candidates.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.triton import dot, fma, load, power, store

NT, TN = (1, 1), (0, 0)  # axes that a product contracts
UNITS = 64  # hidden units of a product, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What a kernel knows when it is traced."""

    candidates: int  # C
    block: int  # of them, of a program
    rows: int  # K
    row_block: int  # k
    walk: int  # blocks of rows of a program
    width: int  # d
    hidden: int  # h
    slope: float

    @property
    def units(self) -> int:
        """Of a product."""
        return min(UNITS, power(self.hidden))

    @property
    def products(self) -> int:
        """That a block's units take."""
        return pl.cdiv(self.hidden, self.units)

    @property
    def candidate_blocks(self) -> int:
        return pl.cdiv(self.candidates, self.block)

    @property
    def row_blocks(self) -> int:
        return pl.cdiv(self.rows, self.row_block)

    @property
    def walks(self) -> int:
        return pl.cdiv(self.row_blocks, self.walk)


def _rows(ref, before: tuple, t, shape: Shape):
    """Block t of ref[*before] [K, d], [k, padded d]: the part, and which of it exists."""
    rows = t * shape.row_block + jnp.arange(shape.row_block)[:, None]
    columns = jnp.arange(power(shape.width))[None]
    return ref.at[(*before, rows, columns)], (rows < shape.rows) & (columns < shape.width)


def _vector(ref, before: tuple, first: int, count: int, last: int, exists=True):
    """ref[*before, first : first + count]: the part, and which of it exists, as `last` do."""
    at = first + jnp.arange(count)
    return ref.at[(*before, at)], (at < last) & exists


def _candidate(ref, before: tuple, i, shape: Shape):
    """ref[*before, i] [padded d]: the part, and which of it exists."""
    before, exists = (*before, i), i < shape.candidates
    return _vector(ref, before, 0, power(shape.width), shape.width, exists)


def _kernel(ref, before: tuple, n: int, shape: Shape):
    """Units of product n of ref[*before] [d, h]: [u, padded d], the part and which of it exists."""
    units = n * shape.units + jnp.arange(shape.units)[:, None]
    columns = jnp.arange(power(shape.width))[None]
    return ref.at[(*before, columns, units)], (units < shape.hidden) & (columns < shape.width)


class Units(NamedTuple):
    """Weights of one product's hidden units."""

    out: jax.Array  # W_o [u]
    of_product: jax.Array  # W3 [u, d]
    of_key: jax.Array  # W2
    of_query: jax.Array  # W1


def _units(out_ref, *kernel_refs, shape: Shape) -> list[Units]:
    """Of each product."""
    found = []
    for n in range(shape.products):
        out = load(_vector(out_ref, (), n * shape.units, shape.units, shape.hidden))
        found.append(Units(out, *(load(_kernel(ref, (), n, shape)) for ref in kernel_refs)))
    return found


class Scorer(NamedTuple):
    """What a candidate makes of one product's hidden units."""

    kernel: list[jax.Array]  # M [u, d] of the keys' dtype: one number, or two narrower ones
    start: jax.Array  # t W1 [1, u]
    out: jax.Array  # W_o [1, u]
    kernel_out: jax.Array  # W_o * M


def _scorers(units: list[Units], q, start_ref, b, i, dtype, shape: Shape) -> list[Scorer]:
    """Of each product, for candidate i, q [d]."""
    found = []
    for n, some in enumerate(units):
        exact = some.of_key + some.of_product * q[None]
        high = exact.astype(dtype)
        rest = [] if dtype == jnp.float32 else [(exact - high.astype(jnp.float32)).astype(dtype)]
        first, exists = n * shape.units, i < shape.candidates
        start = load(_vector(start_ref, (b, i), first, shape.units, shape.hidden, exists))
        of_out = (exact * some.out[:, None]).astype(dtype)
        found.append(Scorer([high, *rest], start[None], some.out[None], of_out))
    return found


def _activate(scorer: Scorer, keys, sums, slope: float):
    """x [k, u], and sums [k, u] with these units' part of the scores added, of _scores."""
    x = functools.reduce(lambda x, part: x + dot(keys, part, NT), scorer.kernel[::-1], scorer.start)
    return x, fma(scorer.out, fma(jnp.abs(x), (1 - slope) / (1 + slope), x), sums)


def _scores(sums, slope: float) -> jax.Array:
    """[k, 1]."""
    return jnp.sum(sums, axis=1)[:, None] * ((1 + slope) / 2)


def _laid_out_as_products(rows) -> jax.Array:
    """float32: or Triton moves each block's scores through shared memory to where the rows are."""
    columns = jnp.arange(rows.shape[1])
    return dot(rows, (columns[:, None] == columns[None]).astype(rows.dtype))


def _memory(keys_ref, values_ref, b, t, shape: Shape):
    """Keys and values of block t."""
    return tuple(load(_rows(ref, (b,), t, shape)) for ref in (keys_ref, values_ref))


def forward_kernel(
    out_ref,  # [h]
    w3_ref,  # [d, h]
    w2_ref,  # [d, h]
    w1_ref,  # [d, h]
    start_ref,  # [B, C, h]
    q_ref,  # [B, C, d]
    keys_ref,  # [B, K, d]
    values_ref,  # [B, K, d]
    result_ref,  # [B, S, C, d]
    *,
    shape: Shape,
):
    part, split, b = (pl.program_id(axis) for axis in range(3))
    units = _units(out_ref, w3_ref, w2_ref, w1_ref, shape=shape)

    def memory(n):
        return _memory(keys_ref, values_ref, b, split * shape.walk + n, shape)

    held = memory(0) if shape.walk == 1 else None

    def of_candidate(n, _):
        i = part * shape.block + n
        q = load(_candidate(q_ref, (b,), i, shape)).astype(jnp.float32)
        scorers = _scorers(units, q, start_ref, b, i, keys_ref.dtype, shape)

        def of_rows(n, result):
            keys, values = held or memory(n)
            sums = jnp.zeros((shape.row_block, shape.units), jnp.float32)
            for scorer in scorers:
                _, sums = _activate(scorer, keys, sums, shape.slope)
            return fma(_scores(sums, shape.slope), _laid_out_as_products(values), result)

        zeros = jnp.zeros((shape.row_block, power(shape.width)), jnp.float32)
        result = jax.lax.fori_loop(0, shape.walk, of_rows, zeros)
        store(_candidate(result_ref, (b, split), i, shape), jnp.sum(result, axis=0))

    jax.lax.fori_loop(0, shape.block, of_candidate, None)


def backward_kernel(
    out_ref,  # [h]
    w3_ref,  # [d, h]
    w2_ref,  # [d, h]
    w1_ref,  # [d, h]
    start_ref,  # [B, C, h]
    q_ref,  # [B, C, d]
    keys_ref,  # [B, K, d]
    values_ref,  # [B, K, d]
    gradient_ref,  # [B, C, d]
    dq_ref,  # [B, T, C, d]
    dkeys_ref,  # [B, P, K, d]
    dvalues_ref,  # [B, P, K, d]
    *dkernel_refs,  # [B, S, P, d, h] of W3, W2, W1, over W_o
    shape: Shape,
):
    part, split, b = (pl.program_id(axis) for axis in range(3))
    dtype = keys_ref.dtype
    # Of no constant: Triton would write one to shared memory anew for each product.
    ones = (jnp.arange(power(shape.width))[None] < shape.width).astype(dtype)
    ones = jnp.broadcast_to(ones, (shape.row_block, power(shape.width)))

    def candidate(i):
        q, gradient = (
            load(_candidate(ref, (b,), i, shape)).astype(jnp.float32)
            for ref in (q_ref, gradient_ref)
        )
        units = _units(out_ref, w3_ref, w2_ref, w1_ref, shape=shape)
        return _scorers(units, q, start_ref, b, i, dtype, shape), gradient

    def memory(t):
        keys, values = _memory(keys_ref, values_ref, b, t, shape)
        return keys, _laid_out_as_products(values)

    def meet(scorers, gradient, keys, values, dkeys, dvalues, sums):
        """One candidate and one block of rows; sums: of each product dM, and d(t W1) in each
        column."""
        of_scores = jnp.sum(values * gradient[None], axis=1)[:, None]
        scores, added = jnp.zeros((shape.row_block, shape.units), jnp.float32), []
        for scorer, (dkernel, dstart) in zip(scorers, sums, strict=True):
            x, scores = _activate(scorer, keys, scores, shape.slope)
            g = jnp.where(x > 0, of_scores, shape.slope * of_scores).astype(dtype)
            dkeys += dot(g, scorer.kernel_out)
            added.append((dkernel + dot(g, keys, TN), dstart + dot(g, ones, TN)))
        return dkeys, fma(_scores(scores, shape.slope), gradient[None], dvalues), added

    def leave(t, i, sums, dkernels):
        """Stores the candidate's gradient; those of the weights with the candidate's added."""
        q = load(_candidate(q_ref, (b,), i, shape)).astype(jnp.float32)
        units = _units(out_ref, w3_ref, w2_ref, w1_ref, shape=shape)
        dq, added = jnp.zeros_like(q), []
        for some, (dkernel, dstart), (dw3, dw2, dw1) in zip(units, sums, dkernels, strict=True):
            of_units = dkernel * some.of_product + dstart * some.of_query
            dq += jnp.sum(of_units * some.out[:, None], axis=0)
            added.append((dw3 + dkernel * q[None], dw2 + dkernel, dw1 + dstart * q[None]))
        store(_candidate(dq_ref, (b, t), i, shape), dq)
        return added

    of_rows = jnp.zeros((shape.row_block, power(shape.width)), jnp.float32)
    of_kernel = jnp.zeros((shape.units, power(shape.width)), jnp.float32)
    no_sums = [(of_kernel, of_kernel)] * shape.products
    no_dkernels = [(of_kernel,) * 3] * shape.products

    if shape.block == 1:
        own = candidate(part)

        def step(n, sums):
            t = split * shape.walk + n
            dkeys, dvalues, sums = meet(*own, *memory(t), of_rows, of_rows, sums)
            store(_rows(dkeys_ref, (b, part), t, shape), dkeys)
            store(_rows(dvalues_ref, (b, part), t, shape), dvalues)
            return sums

        sums = jax.lax.fori_loop(0, shape.walk, step, no_sums)
        dkernels = leave(split, part, sums, no_dkernels)
    else:

        def step(n, dkernels):
            t = split * shape.walk + n
            keys, values = memory(t)

            def of_candidate(n, carry):
                dkeys, dvalues, dkernels = carry
                i = part * shape.block + n
                dkeys, dvalues, sums = meet(*candidate(i), keys, values, dkeys, dvalues, no_sums)
                return dkeys, dvalues, leave(t, i, sums, dkernels)

            start = (of_rows, of_rows, dkernels)
            dkeys, dvalues, dkernels = jax.lax.fori_loop(0, shape.block, of_candidate, start)
            store(_rows(dkeys_ref, (b, part), t, shape), dkeys)
            store(_rows(dvalues_ref, (b, part), t, shape), dvalues)
            return dkernels

        dkernels = jax.lax.fori_loop(0, shape.walk, step, no_dkernels)
    for n, of_units in enumerate(dkernels):
        for ref, dkernel in zip(dkernel_refs, of_units, strict=True):
            store(_kernel(ref, (b, split, part), n, shape), dkernel)
