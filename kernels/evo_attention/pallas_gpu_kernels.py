"""What one program of pallas_gpu.py does: a tile of T queries of one request, or of T keys.

Every branch is a matrix of logits, the band's too: of a tile's T queries and the T + w - 1 rows
that some of them see. That is T times the products that the band needs, and they cost the matrix
units less than w passes over rows cost the others. RelTemporal's terms of a branch, [T, S], are
made once and stay on chip while the heads are walked over, a branch after the other.

Axis letters: T queries or keys of a tile, S keys or queries that it meets, H heads, K head width,
w, R parts of the bias.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.evo_attention.slots import CLOCK, FLAG, POSITION
from kernels.evo_attention.tiles import EMPTY, HIDDEN
from kernels.triton import dot, load, power, store


def _head(ref, rows, exists, head):
    """Rows of one head of [n, H, K]: [rows, padded K], and which of it exists."""
    columns = jnp.arange(power(ref.shape[-1]))[None]
    return ref.at[rows[:, None], head, columns], exists[:, None] & (columns < ref.shape[-1])


def _numbers(ref, *index, exists, other=0):
    """A vector of the ref; `other` where nothing exists."""
    return plgpu.load(ref.at[index], mask=exists, other=other)


def _scaled(q, scale):
    return (q.astype(jnp.float32) * scale).astype(q.dtype)


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

    def logits(self, products, slopes):
        for slope, term in zip(slopes, self.terms, strict=True):
            products = products - slope * term
        return products + self.hidden

    def of_slopes(self, d_logits):
        """[T] of each."""
        return [jnp.sum(d_logits * term, 1) for term in self.terms]


class Slots:
    """The slots of one group, as a tile of queries sees them."""

    def __init__(self, plan, group, queries: Rows, integers_ref, refs):
        self.k_ref, self.v_ref, slot_integers_ref = refs
        (a, b), self.queries = group, queries
        self.slots = Rows(a + jnp.arange(b - a, dtype=jnp.int32), jnp.full(b - a, True))
        columns = [slot_integers_ref[a:b, i] for i in range(FLAG + 1)]
        position = _numbers(integers_ref, POSITION, queries.index, exists=queries.exists)
        terms = plan.rel.terms(
            [x[:, None] for x in queries.clock(integers_ref)], [x[None] for x in columns[CLOCK]]
        )
        if plan.timeless and not plan.has_band:  # the user key is one of the slots
            terms = [t * columns[FLAG].astype(jnp.float32)[None] for t in terms]
        visible = columns[POSITION][None] < position[:, None]
        self.bias = Bias(terms, jnp.where(visible, 0.0, HIDDEN))

    def keys(self, head):
        """[S, K]."""
        return load(_head(self.k_ref, *self.slots, head))

    def values(self, head):
        return load(_head(self.v_ref, *self.slots, head))


class Band:
    """The band and, in the last column, the user key, as a tile of queries sees them."""

    def __init__(self, plan, first, width, queries: Rows, integers_ref, refs, slot_refs):
        self.refs, self.slot_refs = refs, slot_refs
        count = power(width + plan.window)
        column = jnp.arange(count, dtype=jnp.int32)
        self.is_user = column == count - 1
        n = integers_ref.shape[1]
        rows = _rows(first + width - (count - 1), count, n)
        self.rows = Rows(rows.index, rows.exists & ~self.is_user)
        self.user = jnp.full(count, plan.groups[-1][0], jnp.int32)
        terms = plan.rel.terms(
            [x[:, None] for x in queries.clock(integers_ref)],
            [x[None] for x in self.rows.clock(integers_ref)],
        )
        away = queries.index[:, None] - rows.index[None]
        near = (away >= 0) & (away < plan.window) & self.rows.flag(integers_ref)[None]
        timed = 1.0 - self.is_user.astype(jnp.float32)
        self.bias = Bias(
            [t * timed[None] for t in terms],
            jnp.where(near | self.is_user[None], 0.0, HIDDEN),
        )

    def _of(self, i, head):
        rows = load(_head(self.refs[i], *self.rows, head))
        return rows + load(_head(self.slot_refs[i], self.user, self.is_user, head))

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


def forward_kernel(plan, width, *refs):
    """Blocks of a request: q [n, H, K], integers [ROWS, n], slots [S, H, K] twice and [S, ROWS],
    with a band k, v [n, H, K]; slopes [3, H]. Outputs: [n, H, K] per branch, log of the
    normalisers [branches, H, n]."""
    branches = len(plan.groups)
    inputs, out_refs, log_total_ref = refs[: -branches - 1], refs[-branches - 1 : -1], refs[-1]
    q_ref, integers_ref, *slot_refs, slopes_ref = inputs
    slot_refs, band_refs = slot_refs[:3], slot_refs[3:]
    first = pl.program_id(0) * width
    queries = _rows(first, width, integers_ref.shape[1])

    for branch, group in enumerate(plan.groups):
        if plan.has_band and branch == branches - 1:
            seen = Band(plan, first, width, queries, integers_ref, band_refs, slot_refs[:2])
        else:
            seen = Slots(plan, group, queries, integers_ref, slot_refs)

        def of_head(head, branch=branch, seen=seen):
            slopes = [slopes_ref[part, head] for part in plan.rel.parts]
            q = _scaled(load(_head(q_ref, *queries, head)), plan.scale)
            logits = seen.bias.logits(dot(q, seen.keys(head), (1, 1)), slopes)
            peak = jnp.maximum(jnp.max(logits, 1), EMPTY)
            weights = jnp.exp(logits - peak[:, None])
            total = jnp.sum(weights, 1)
            some = total > 0
            total = jnp.where(some, total, 1.0)
            v = seen.values(head)
            out = dot(weights.astype(v.dtype), v) * (1 / total)[:, None]
            store(_head(out_refs[branch], *queries, head), out)
            log_total = jnp.where(some, peak + jnp.log(total), jnp.inf)
            at = log_total_ref.at[branch, head, queries.index]
            plgpu.store(at, log_total, mask=queries.exists)

        _for_heads(q_ref.shape[1], of_head)


def slots_kernel(plan, width, *refs):
    """The backward pass of the branches over slots. Blocks of a request: q, integers, slots as in
    the forward kernel, log_total [branches, H, n], cotangents [n, H, K] per branch, with a band
    its part of dq [n, H, K]; slopes [3, H]. Outputs: dq [n, H, K]; of the tile, the slots'
    gradients [S, H, K] twice and the slopes' [R, H]."""
    soft = plan.groups[:-1] if plan.has_band else plan.groups
    q_ref, integers_ref, *slot_refs, log_total_ref = refs[:6]
    d_out_refs, band_dq_ref = refs[6 : 6 + len(soft)], refs[6 + len(soft) : -5]
    slopes_ref, dq_ref, d_slot_k_ref, d_slot_v_ref, d_slopes_ref = refs[-5:]
    queries = _rows(pl.program_id(0) * width, width, integers_ref.shape[1])
    groups = [Slots(plan, group, queries, integers_ref, slot_refs) for group in soft]

    def of_head(head):
        slopes = [slopes_ref[part, head] for part in plan.rel.parts]
        q = _scaled(load(_head(q_ref, *queries, head)), plan.scale)
        dq = jnp.zeros(q.shape, jnp.float32)
        d_slopes = [jnp.zeros(width, jnp.float32)] * len(slopes)
        for branch, seen in enumerate(groups):
            k, v = seen.keys(head), seen.values(head)
            do = load(_head(d_out_refs[branch], *queries, head))
            logits = seen.bias.logits(dot(q, k, (1, 1)), slopes)
            at = branch, head, queries.index
            log_total = _numbers(log_total_ref, *at, exists=queries.exists, other=jnp.inf)
            weights = jnp.exp(logits - log_total[:, None])
            product = dot(do, v, (1, 1))
            d_logits = weights * (product - jnp.sum(weights * product, 1)[:, None])
            narrow = d_logits.astype(q.dtype)
            dq += dot(narrow, k)
            store(_head(d_slot_k_ref, *seen.slots, head), dot(narrow, q, (0, 0)))
            store(_head(d_slot_v_ref, *seen.slots, head), dot(weights.astype(q.dtype), do, (0, 0)))
            added = seen.bias.of_slopes(d_logits)
            d_slopes = [d + x for d, x in zip(d_slopes, added, strict=True)]
        dq *= plan.scale
        if plan.has_band:
            dq += load(_head(band_dq_ref[0], *queries, head)).astype(jnp.float32)
        store(_head(dq_ref, *queries, head), dq)
        for i, d in enumerate(d_slopes):
            d_slopes_ref[i, head] = jnp.sum(d, 0)

    _for_heads(q_ref.shape[1], of_head)


def band_kernel(plan, width, *refs):
    """The backward pass of the band. Blocks of a request: q, integers, slots, the band's k, v, the
    log_total of the branches, the local branch's cotangent [n, H, K] and its product with the
    output [H, n]; slopes [3, H]. Outputs: dq, dk, dv [n, H, K]; of the tile, the user key's
    gradients [H, K] twice and the slopes' [R, H]."""
    q_ref, integers_ref, *slot_refs, k_ref, v_ref, log_total_ref, d_out_ref, product_ref = refs[:10]
    slopes_ref, dq_ref, dk_ref, dv_ref, d_user_k_ref, d_user_v_ref, d_slopes_ref = refs[10:]
    branch, n, heads = len(plan.groups) - 1, integers_ref.shape[1], q_ref.shape[1]
    first = pl.program_id(0) * width
    own = _rows(first, width, n)

    def of_queries(head, rows):
        """q [rows, K], its cotangent and log_total."""
        log_total = _numbers(
            log_total_ref, branch, head, rows.index, exists=rows.exists, other=jnp.inf
        )
        q = _scaled(load(_head(q_ref, *rows, head)), plan.scale)
        return q, load(_head(d_out_ref, *rows, head)), log_total

    seen = Band(plan, first, width, own, integers_ref, (k_ref, v_ref), slot_refs[:2])

    def own_queries(head):
        """The gradients of the tile's queries, with them the user key's and the slopes'.

        do . out, where out was rounded, is no mean of the products: it is made anew.
        """
        slopes = [slopes_ref[part, head] for part in plan.rel.parts]
        q, do, log_total = of_queries(head, own)
        k = seen.keys(head)
        logits = seen.bias.logits(dot(q, k, (1, 1)), slopes)
        weights = jnp.exp(logits - log_total[:, None])
        product = dot(do, seen.values(head), (1, 1))
        d_logits = weights * (product - jnp.sum(weights * product, 1)[:, None])
        store(_head(dq_ref, *own, head), dot(d_logits.astype(q.dtype), k) * plan.scale)
        for i, d in enumerate(seen.bias.of_slopes(d_logits)):
            d_slopes_ref[i, head] = jnp.sum(d, 0)
        for ref, of_user, rows in ((d_user_k_ref, d_logits, q), (d_user_v_ref, weights, do)):
            of_user = jnp.sum(jnp.where(seen.is_user[None], of_user, 0.0), 1)
            columns = jnp.arange(rows.shape[1])
            total = jnp.sum(of_user[:, None] * rows.astype(jnp.float32), 0)
            store((ref.at[head, columns], columns < ref.shape[-1]), total)

    _for_heads(heads, own_queries)

    rows = _rows(first, power(width + plan.window - 1), n)
    away = rows.index[None] - own.index[:, None]
    near = (away >= 0) & (away < plan.window) & own.flag(integers_ref)[:, None]
    terms = plan.rel.terms(
        [x[None] for x in rows.clock(integers_ref)], [x[:, None] for x in own.clock(integers_ref)]
    )
    bias = Bias(terms, jnp.where(near, 0.0, HIDDEN))

    def own_keys(head):
        """The gradients of the tile's rows as keys, from the queries that see them: [T, S]."""
        slopes = [slopes_ref[part, head] for part in plan.rel.parts]
        q, do, log_total = of_queries(head, rows)
        k, v = (load(_head(ref, *own, head)) for ref in (k_ref, v_ref))
        weights = jnp.exp(bias.logits(dot(k, q, (1, 1)), slopes) - log_total[None])
        mean = _numbers(product_ref, head, rows.index, exists=rows.exists)
        d_logits = weights * (dot(v, do, (1, 1)) - mean[None])
        store(_head(dk_ref, *own, head), dot(d_logits.astype(q.dtype), q))
        store(_head(dv_ref, *own, head), dot(weights.astype(q.dtype), do))

    _for_heads(heads, own_keys)
