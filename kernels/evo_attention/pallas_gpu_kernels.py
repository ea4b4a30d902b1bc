"""What one program of pallas_gpu.py does: a tile of T queries of one request, or of T keys.

Every branch is a matrix of logits, the band's too: of a tile's T queries and the T + w - 1 rows
that some of them see. That is T times the products that the band needs, and they cost the matrix
units less than w passes over rows cost the others. RelTemporal's terms of a branch, [T, S], are
made once and stay on chip while the heads are walked over.

Axis letters: T queries or keys of a tile, S keys or queries that it meets, H heads, K head width,
w, R parts of the bias.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.evo_attention.slots import FLAG, HOLE, POSITION
from kernels.evo_attention.tiles import EMPTY, HIDDEN
from kernels.triton import LEAST, dot, exp2, fma, load, log2, power, sin, store

LEAST_TOTAL = 1e-30  # of a branch's weights, whose largest is 1; 0 where a query sees nothing


def _head(ref, rows, exists, head):
    """Rows of one head of [n, H, K]: [rows, padded K], and which of it exists."""
    columns = jnp.arange(power(ref.shape[-1]))[None]
    return ref.at[rows[:, None], head, columns], exists[:, None] & (columns < ref.shape[-1])


def _halvings(plan):
    """Of a logit: as products of q and k come, it is to be scaled, and powers are those of 2."""
    return plan.scale / math.log(2)


def _weights(plan, logits, halvings):
    return exp2(fma(logits, _halvings(plan), -halvings))


def _numbers(ref, *index, exists, other=0):
    """A vector of the ref; `other` where nothing exists."""
    return plgpu.load(ref.at[index], mask=exists, other=other)


def _half_sine(hours, dtype):
    """As rel_temporal.half_sine, in one instruction."""
    return sin(hours.astype(dtype) * dtype(math.pi / 24))


class Rows(NamedTuple):
    """Rows of a request: their indices, and which exist."""

    index: jax.Array
    exists: jax.Array

    def clock(self, integers_ref):
        return [_numbers(integers_ref, i, self.index, exists=self.exists) for i in range(4)]

    def flag(self, integers_ref):
        return _numbers(integers_ref, FLAG, self.index, exists=self.exists) > 0


def _rows(first, count: int, n: int) -> Rows:
    index = first + jnp.arange(count, dtype=jnp.int32)
    return Rows(index, (index >= 0) & (index < n))


class Bias(NamedTuple):
    """Of [T, S] pairs: RelTemporal's terms, and 0 or HIDDEN."""

    terms: list[jax.Array]
    hidden: jax.Array

    def of_head(self, slopes):
        """[T, S], of negative slopes: what a product is added to, so begins with."""
        bias = self.hidden
        for slope, term in zip(slopes, self.terms, strict=True):
            bias = fma(slope, term, bias)
        return bias

    def of_slopes(self, d_logits):
        """[T] of each."""
        return [jnp.sum(d_logits * term, 1) for term in self.terms]


def _bias(terms, visible) -> Bias:
    """Laid out over lanes as products are, since added to one. Otherwise Triton moves the bias of
    each head to where the products lie, through shared memory."""
    rows, columns = visible.shape
    none = dot(jnp.zeros((rows, LEAST), jnp.bfloat16), jnp.zeros((LEAST, columns), jnp.bfloat16))
    hidden = jnp.where(visible, 0.0, HIDDEN)
    return Bias([none + term for term in terms], none + hidden)


class SlotKeys:
    """The slots of a group, as a tile of queries sees them."""

    def __init__(self, plan, queries: Rows, integers_ref, refs):
        self.k_ref, self.v_ref, slot_integers_ref = refs
        number = self.k_ref.shape[0]
        index = jnp.arange(power(number), dtype=jnp.int32)
        self.slots = Rows(index, index < number)
        position = _numbers(integers_ref, POSITION, queries.index, exists=queries.exists)
        *clock, slot_position, flag = (
            _numbers(slot_integers_ref, index, i, exists=self.slots.exists, other=HOLE)
            for i in range(FLAG + 1)
        )
        terms = plan.rel.terms(
            [x[:, None] for x in queries.clock(integers_ref)],
            [x[None] for x in clock],
            hour_term=_half_sine,
        )
        if plan.timeless and not plan.has_band:  # the user key is one of the slots
            terms = [t * (flag == 1).astype(jnp.float32)[None] for t in terms]
        self.bias = _bias(terms, slot_position[None] < position[:, None])

    def keys(self, head):
        """[S, K]."""
        return load(_head(self.k_ref, *self.slots, head))

    def values(self, head):
        return load(_head(self.v_ref, *self.slots, head))


class BandKeys:
    """The band and, in the last column, the user key, as a tile of queries sees them."""

    def __init__(self, plan, first, width, queries: Rows, integers_ref, user_refs, refs):
        self.user_refs, self.refs = user_refs, refs
        count = power(width + plan.window)
        column = jnp.arange(count, dtype=jnp.int32)
        self.is_user = column == count - 1
        n = integers_ref.shape[1]
        rows = _rows(first + width - (count - 1), count, n)
        self.rows = Rows(rows.index, rows.exists & ~self.is_user)
        self.user = jnp.zeros(count, jnp.int32)
        terms = plan.rel.terms(
            [x[:, None] for x in queries.clock(integers_ref)],
            [x[None] for x in self.rows.clock(integers_ref)],
            hour_term=_half_sine,
        )
        away = queries.index[:, None] - rows.index[None]
        near = (away >= 0) & (away < plan.window) & self.rows.flag(integers_ref)[None]
        timed = 1.0 - self.is_user.astype(jnp.float32)
        self.bias = _bias([t * timed[None] for t in terms], near | self.is_user[None])

    def _of(self, i, head):
        rows = load(_head(self.refs[i], *self.rows, head))
        return rows + load(_head(self.user_refs[i], self.user, self.is_user, head))

    def keys(self, head):
        """[S, K]."""
        return self._of(0, head)

    def values(self, head):
        return self._of(1, head)


def _for_heads(number: int, of_head) -> None:
    def step(head, carry):
        of_head(head)
        return carry

    jax.lax.fori_loop(0, number, step, 0)


def _split(refs, *numbers: int):
    """So many, so many after them and so on, and the rest."""
    for number in numbers:
        yield refs[:number]
        refs = refs[number:]
    yield refs


def _slot_branches(plan) -> int:
    """Branches over slots; the user key's group is the band's."""
    return len(plan.groups) - plan.has_band


def _slot_keys(plan, queries: Rows, integers_ref, refs) -> list[SlotKeys]:
    """refs: k, v and integers of each branch."""
    return [SlotKeys(plan, queries, integers_ref, refs[i : i + 3]) for i in range(0, len(refs), 3)]


def _log_total(log_ref, rows: Rows, head):
    """Infinity where there is no row: its weights are 0."""
    return _numbers(log_ref, head, rows.index, exists=rows.exists, other=jnp.inf)


def _attend(plan, queries: Rows, q_ref, slopes_ref, branches: list, out_refs, log_refs) -> None:
    """The outputs [n, H, K] of branches, given as their keys, and the logs of their normalisers."""

    def of_head(head):
        slopes = [slopes_ref[part, head] for part in plan.rel.parts]
        q = load(_head(q_ref, *queries, head))
        for seen, out_ref, log_ref in zip(branches, out_refs, log_refs, strict=True):
            logits = dot(q, seen.keys(head), (1, 1)) + seen.bias.of_head(slopes)
            peak = jnp.maximum(jnp.max(logits, 1), EMPTY) * _halvings(plan)
            weights = _weights(plan, logits, peak[:, None])
            total = log2(jnp.maximum(jnp.sum(weights, 1), LEAST_TOTAL))
            v = seen.values(head)
            out = dot(weights.astype(v.dtype), v) * exp2(-total)[:, None]
            store(_head(out_ref, *queries, head), out)
            plgpu.store(log_ref.at[head, queries.index], peak + total, mask=queries.exists)

    _for_heads(q_ref.shape[1], of_head)


def slots_forward(plan, width, *refs):
    """The branches over slots. Blocks of a request: q [n, H, K], integers [ROWS, n], of each branch
    its slots [S, H, K] twice and [S, ROWS]; slopes [3, H]. Outputs: [n, H, K] of each branch, then
    the logs of the normalisers [H, n] of each."""
    number = _slot_branches(plan)
    (q_ref, integers_ref), slot_refs, (slopes_ref,), out_refs, log_refs = _split(
        refs, 2, 3 * number, 1, number
    )
    queries = _rows(pl.program_id(0) * width, width, integers_ref.shape[1])
    branches = _slot_keys(plan, queries, integers_ref, slot_refs)
    _attend(plan, queries, q_ref, slopes_ref, branches, out_refs, log_refs)


def band_forward(plan, width, *refs):
    """The local branch. Blocks of a request: q, integers, the user's key and value [1, H, K], k and
    v [n, H, K]; slopes. Outputs: [n, H, K], the log of its normalisers [H, n]."""
    q_ref, integers_ref, *key_refs, slopes_ref, out_ref, log_ref = refs
    first = pl.program_id(0) * width
    queries = _rows(first, width, integers_ref.shape[1])
    seen = BandKeys(plan, first, width, queries, integers_ref, key_refs[:2], key_refs[2:])
    _attend(plan, queries, q_ref, slopes_ref, [seen], [out_ref], [log_ref])


def slots_backward(plan, width, *refs):
    """The gradients of the branches over slots. Blocks of a request: those of slots_forward, of
    each branch its cotangent, then the logs of the normalisers of each; with a band its part of dq;
    slopes. Outputs: dq [n, H, K]; of the tile, the gradients of each branch's slots [S, H, K] twice
    and of the slopes [branches, R, H]."""
    number = _slot_branches(plan)
    (q_ref, integers_ref), slot_refs, d_out_refs, log_refs, band_dq_refs, rest = _split(
        refs, 2, 3 * number, number, number, plan.has_band
    )
    slopes_ref, dq_ref, *d_slot_refs, d_slopes_ref = rest
    queries = _rows(pl.program_id(0) * width, width, integers_ref.shape[1])
    branches = _slot_keys(plan, queries, integers_ref, slot_refs)

    def of_head(head):
        slopes = [slopes_ref[part, head] for part in plan.rel.parts]
        q = load(_head(q_ref, *queries, head))
        dq = jnp.zeros(q.shape, jnp.float32)
        for i, seen in enumerate(branches):
            k, v = seen.keys(head), seen.values(head)
            do = load(_head(d_out_refs[i], *queries, head))
            logits = dot(q, k, (1, 1)) + seen.bias.of_head(slopes)
            log_total = _log_total(log_refs[i], queries, head)
            weights = _weights(plan, logits, log_total[:, None])
            product = dot(do, v, (1, 1))
            d_logits = weights * (product - jnp.sum(weights * product, 1)[:, None])
            for part, d in enumerate(seen.bias.of_slopes(d_logits)):
                d_slopes_ref[i, part, head] = jnp.sum(d, 0)
            d_logits, weights = _made(d_logits, q.dtype), _made(weights, q.dtype)
            dq += dot(d_logits, k)
            dk, dv = dot(d_logits, q, (0, 0)) * plan.scale, dot(weights, do, (0, 0))
            store(_head(d_slot_refs[2 * i], *seen.slots, head), dk)
            store(_head(d_slot_refs[2 * i + 1], *seen.slots, head), dv)
        dq *= plan.scale
        for ref in band_dq_refs:
            dq += load(_head(ref, *queries, head)).astype(jnp.float32)
        store(_head(dq_ref, *queries, head), dq)

    _for_heads(q_ref.shape[1], of_head)


def _made(x, dtype):
    """x [T, S] in the dtype, by a product with 1. Without it Triton makes x again from the logits
    on, once for each way in which a product takes it: its rows here, its columns there."""
    same = jnp.arange(x.shape[1])
    one = (same[:, None] == same[None]).astype(dtype)
    return dot(x.astype(dtype), one).astype(dtype)


def band_backward(plan, width, *refs):
    """The gradients of the local branch. Blocks of a request: those of band_forward, its cotangent,
    the log of its normalisers, the cotangent times the output [H, n]; slopes. Outputs: dq, dk, dv
    [n, H, K]; of the tile, the gradients of the user's key and value [H, K] and of the slopes
    [R, H]."""
    q_ref, integers_ref, *user_refs, k_ref, v_ref, d_out_ref, log_ref, product_ref = refs[:9]
    slopes_ref, dq_ref, dk_ref, dv_ref, d_user_k_ref, d_user_v_ref, d_slopes_ref = refs[9:]
    n, heads = integers_ref.shape[1], q_ref.shape[1]
    first = pl.program_id(0) * width
    own = _rows(first, width, n)

    def of_queries(head, rows):
        """q [rows, K], its cotangent and log_total."""
        log_total = _log_total(log_ref, rows, head)
        return load(_head(q_ref, *rows, head)), load(_head(d_out_ref, *rows, head)), log_total

    seen = BandKeys(plan, first, width, own, integers_ref, user_refs, (k_ref, v_ref))

    def own_queries(head):
        """The gradients of the tile's queries, with them the user key's and the slopes'.

        do . out, where out was rounded, is no mean of the products: it is made anew.
        """
        slopes = [slopes_ref[part, head] for part in plan.rel.parts]
        q, do, log_total = of_queries(head, own)
        k = seen.keys(head)
        logits = dot(q, k, (1, 1)) + seen.bias.of_head(slopes)
        weights = _weights(plan, logits, log_total[:, None])
        product = dot(do, seen.values(head), (1, 1))
        d_logits = weights * (product - jnp.sum(weights * product, 1)[:, None])
        store(_head(dq_ref, *own, head), dot(d_logits.astype(q.dtype), k) * plan.scale)
        for i, d in enumerate(seen.bias.of_slopes(d_logits)):
            d_slopes_ref[i, head] = jnp.sum(d, 0)
        of_both = ((d_user_k_ref, d_logits * plan.scale, q), (d_user_v_ref, weights, do))
        for ref, of_user, rows in of_both:
            of_user = jnp.sum(jnp.where(seen.is_user[None], of_user, 0.0), 1)
            # A product, each of whose rows is the sum: adding up [T, K] by lanes takes longer.
            alike = jnp.broadcast_to(of_user[None], (LEAST, len(of_user)))
            total = dot(alike.astype(rows.dtype), rows)
            at = jnp.full((LEAST, 1), head), jnp.arange(rows.shape[1])[None]
            store((ref.at[at], at[1] < ref.shape[-1]), total)

    _for_heads(heads, own_queries)

    rows = _rows(first, power(width + plan.window - 1), n)
    away = rows.index[None] - own.index[:, None]
    near = (away >= 0) & (away < plan.window) & own.flag(integers_ref)[:, None]
    terms = plan.rel.terms(
        [x[None] for x in rows.clock(integers_ref)],
        [x[:, None] for x in own.clock(integers_ref)],
        hour_term=_half_sine,
    )
    bias = _bias(terms, near)

    def own_keys(head):
        """The gradients of the tile's rows as keys, from the queries that see them: [T, S]."""
        slopes = [slopes_ref[part, head] for part in plan.rel.parts]
        q, do, log_total = of_queries(head, rows)
        k, v = (load(_head(ref, *own, head)) for ref in (k_ref, v_ref))
        logits = dot(k, q, (1, 1)) + bias.of_head(slopes)
        weights = _weights(plan, logits, log_total[None])
        mean = _numbers(product_ref, head, rows.index, exists=rows.exists)
        d_logits = weights * (dot(v, do, (1, 1)) - mean[None])
        store(_head(dk_ref, *own, head), dot(d_logits.astype(q.dtype), q) * plan.scale)
        store(_head(dv_ref, *own, head), dot(weights.astype(q.dtype), do))

    _for_heads(heads, own_keys)
