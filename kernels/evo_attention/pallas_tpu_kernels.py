"""What one grid step of pallas_tpu.py does: a tile of T queries of one request.

Per head the slots' logits are [S, T]; RelTemporal's terms [S, T] are made once and shared by the
heads. The values of the branches are masked copies of a head's values, stacked to [3 K, S]: one
product gives the three outputs apart, at no more passes of the matrix unit while 3 K stays below
128. The band has its heads on sublanes, [H, T] per shift: shifts are rolls of the tile behind the
end of the tile before, and sums over a head's width are products with a matrix of ones.

Axis letters: T queries of a tile, S slots, H heads, K head width, w, R parts of the bias.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.evo_attention.slots import CLOCK, FLAG, POSITION
from kernels.evo_attention.tiles import EMPTY, HIDDEN
from kernels.products import dot

LANES = 128


def _head_of(rows: int, heads: int, axis: int):
    """Ones where a row of [H K] belongs to a head: [H, H K], or transposed for axis 1."""
    shape = (heads, rows) if axis == 0 else (rows, heads)
    head = jax.lax.broadcasted_iota(jnp.int32, shape, axis) * (rows // heads)
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 1 - axis)
    return ((row >= head) & (row < head + rows // heads)).astype(jnp.float32)


def _rows_of(integers):
    """The clock, as four [1, T], the position and the flag [1, T] of [ROWS, T]."""
    rows = [integers[i : i + 1] for i in range(FLAG + 1)]
    return rows[CLOCK], rows[POSITION], rows[FLAG]


def _slot_terms(plan, query, position, slot_integers):
    """RelTemporal's terms and the visibility 0 or HIDDEN, [S, T] each."""
    columns = [slot_integers[:, i : i + 1] for i in range(FLAG + 1)]
    terms = plan.rel.terms(query, columns[CLOCK])
    if plan.timeless:
        terms = [t * columns[FLAG].astype(jnp.float32) for t in terms]
    hidden = jnp.where(columns[POSITION] < position, 0.0, HIDDEN)
    return terms, hidden


def _stacked_values(plan, v):
    """[K, S] -> [branches K, S]: a copy per branch, zero outside its slots."""
    lane = jax.lax.broadcasted_iota(jnp.int32, v.shape, 1)
    copies = [jnp.where((lane >= a) & (lane < b), v, jnp.zeros_like(v)) for a, b in plan.groups]
    return jnp.concatenate(copies, 0)


class _Band:
    """A tile's band: per shift s = 0 .. w - 1 the key's bias [H, T] and its rolled rows."""

    def __init__(self, plan, query, position, slopes, tile_integers, halo_integers):
        self.window, self.halo = plan.window, halo_integers.shape[1]
        integers = [
            _rows_of(self.behind(halo_integers, tile_integers, s)) for s in range(plan.window)
        ]
        clock = [
            jnp.concatenate(rows, 0) for rows in zip(*(c for c, _, _ in integers), strict=True)
        ]
        self.terms = plan.rel.terms(query, clock)  # [w, T] each
        self.bias = []
        for s, (_, key_position, valid) in enumerate(integers):
            # The halo of the first tile holds some other positions.
            visible = (key_position == position - s) & (valid > 0)
            bias = jnp.where(visible, 0.0, HIDDEN)
            for part, term in zip(plan.rel.parts, self.terms, strict=True):
                bias = bias - slopes[:, part : part + 1] * term[s : s + 1]
            self.bias.append(bias)

    def behind(self, halo, tile, s):
        """A tile [.., T] as seen from s positions later."""
        both = jnp.concatenate([halo, tile], 1)
        return (pltpu.roll(both, s, 1) if s else both)[:, self.halo :]

    def ahead(self, x, s):
        """[.., T] given to the keys s positions before: [.., halo + T]."""
        both = jnp.concatenate([jnp.zeros((x.shape[0], self.halo), x.dtype), x], 1)
        return pltpu.roll(both, both.shape[1] - s, 1) if s else both


def forward_kernel(plan, heads, *refs):
    """Blocks: q [H K, T], integers [ROWS, T], slots [H K, S] twice and [S, ROWS], slopes [H, 3];
    with a band k, v [H K, T], their halos and the integers' halo. Outputs: [H K, T] per branch,
    log of the normalisers [branches, H, T]."""
    inputs, outputs = refs[: -len(plan.groups) - 1], refs[-len(plan.groups) - 1 :]
    q_ref, integers_ref, slot_k_ref, slot_v_ref, slot_integers_ref, slopes_ref = inputs[:6]
    *out_refs, log_total_ref = outputs
    q, slopes = q_ref[...].astype(jnp.float32) * plan.scale, slopes_ref[...]
    rows, dtype, width = q.shape[0], q_ref.dtype, q.shape[0] // heads
    query, position, _ = _rows_of(integers_ref[...])
    terms, hidden = _slot_terms(plan, query, position, slot_integers_ref[...])
    slot_k, slot_v = slot_k_ref[...].astype(jnp.float32), slot_v_ref[...].astype(jnp.float32)

    local = user_weights = None
    if plan.has_band:
        k_ref, v_ref, k_halo_ref, v_halo_ref, integers_halo_ref = inputs[6:]
        band = _Band(plan, query, position, slopes, integers_ref[...], integers_halo_ref[...])
        k, v, k_halo, v_halo = (
            r[...].astype(jnp.float32) for r in (k_ref, v_ref, k_halo_ref, v_halo_ref)
        )
        of_heads, of_rows = _head_of(rows, heads, 0), _head_of(rows, heads, 1)
        user = plan.groups[-1][0]
        logits = [dot(of_heads, q * slot_k[:, user : user + 1])]
        logits += [
            dot(of_heads, q * band.behind(k_halo, k, s)) + band.bias[s] for s in range(plan.window)
        ]
        peak = functools.reduce(jnp.maximum, logits)
        weights = [jnp.exp(x - peak) for x in logits]
        total = sum(weights)  # the user key is always visible: never 0
        log_total_ref[len(plan.groups) - 1] = peak + jnp.log(total)
        user_weights = weights[0] / total
        local = sum(
            dot(of_rows, weights[s + 1] / total) * band.behind(v_halo, v, s)
            for s in range(plan.window)
        )

    soft = plan.groups[:-1] if plan.has_band else plan.groups
    outs, log_totals = [[] for _ in plan.groups], [[] for _ in soft]
    for h in range(heads):
        own = slice(h * width, (h + 1) * width)
        logits = dot(slot_k[own].astype(dtype), q[own].astype(dtype), (0, 0)) + hidden
        for part, term in zip(plan.rel.parts, terms, strict=True):
            logits = logits - slopes[h : h + 1, part : part + 1] * term
        weights = []
        for branch, (a, b) in enumerate(soft):
            peak = jnp.maximum(jnp.max(logits[a:b], 0, keepdims=True), EMPTY)
            x = jnp.exp(logits[a:b] - peak)
            total = jnp.sum(x, 0, keepdims=True)
            some = total > 0
            total = jnp.where(some, total, 1.0)
            weights.append(jnp.where(some, x / total, 0.0))
            log_totals[branch].append(jnp.where(some, peak + jnp.log(total), jnp.inf))
        if plan.has_band:
            weights.append(_first_row(user_weights[h : h + 1]))
        values = _stacked_values(plan, slot_v[own]).astype(dtype)
        out = dot(values, jnp.concatenate(weights, 0).astype(dtype))
        for branch in range(len(plan.groups)):
            outs[branch].append(out[branch * width : (branch + 1) * width])
    for branch, x in enumerate(log_totals):
        log_total_ref[branch] = jnp.concatenate(x, 0)
    for branch, x in enumerate(outs):
        result = jnp.concatenate(x, 0)
        if plan.has_band and branch == len(plan.groups) - 1:
            result = result + local
        out_refs[branch][...] = result.astype(dtype)


def _first_row(x):
    """[1, T] -> [8, T], zeros below: the user key's group."""
    row = jax.lax.broadcasted_iota(jnp.int32, (8, x.shape[1]), 0)
    return jnp.where(row == 0, x, 0.0)


def backward_kernel(plan, heads, *refs):
    """Blocks as of the forward kernel, then log_total and the cotangents [H K, T] per branch.
    Outputs: dq, the slots' gradients [H K, S] twice and the slopes' [R, H, LANES], added to by all
    tiles of a request; with a band dk, dv [H K, T]. Scratch: [H K, halo] twice."""
    branches = len(plan.groups)
    number = 6 + 5 * plan.has_band
    inputs, log_total_ref, refs = refs[:number], refs[number], refs[number + 1 :]
    d_out_refs, refs = refs[:branches], refs[branches:]
    dq_ref, d_slot_k_ref, d_slot_v_ref, d_slopes_ref = refs[:4]
    q_ref, integers_ref, slot_k_ref, slot_v_ref, slot_integers_ref, slopes_ref = inputs[:6]
    q, slopes = q_ref[...].astype(jnp.float32) * plan.scale, slopes_ref[...]
    rows, dtype, width = q.shape[0], q_ref.dtype, q.shape[0] // heads
    query, position, _ = _rows_of(integers_ref[...])
    terms, hidden = _slot_terms(plan, query, position, slot_integers_ref[...])
    slot_k, slot_v = slot_k_ref[...].astype(jnp.float32), slot_v_ref[...].astype(jnp.float32)
    d_out = [r[...].astype(jnp.float32) for r in d_out_refs]

    @pl.when(pl.program_id(1) == 0)
    def _():
        for ref in (d_slot_k_ref, d_slot_v_ref, d_slopes_ref):
            ref[...] = jnp.zeros_like(ref)

    d_slopes = [jnp.zeros((heads, q.shape[1]), jnp.float32) for _ in plan.rel.parts]
    dq = user_weights = user_d_logits = None
    if plan.has_band:
        k_ref, v_ref, k_halo_ref, v_halo_ref, integers_halo_ref = inputs[6:]
        dk_ref, dv_ref, k_wait_ref, v_wait_ref = refs[4:]
        band = _Band(plan, query, position, slopes, integers_ref[...], integers_halo_ref[...])
        k, v, k_halo, v_halo = (
            r[...].astype(jnp.float32) for r in (k_ref, v_ref, k_halo_ref, v_halo_ref)
        )
        of_heads, of_rows = _head_of(rows, heads, 0), _head_of(rows, heads, 1)
        user, do, log_total = plan.groups[-1][0], d_out[-1], log_total_ref[branches - 1]
        user_weights = jnp.exp(dot(of_heads, q * slot_k[:, user : user + 1]) - log_total)
        user_product = dot(of_heads, do * slot_v[:, user : user + 1])
        weights, products = [], []
        for s in range(plan.window):
            logits = dot(of_heads, q * band.behind(k_halo, k, s)) + band.bias[s]
            weights.append(jnp.exp(logits - log_total))
            products.append(dot(of_heads, do * band.behind(v_halo, v, s)))
        mean = user_weights * user_product
        mean = mean + sum(x * y for x, y in zip(weights, products, strict=True))
        user_d_logits = user_weights * (user_product - mean)
        dq, dk, dv = jnp.zeros_like(q), 0.0, 0.0
        for s in range(plan.window):
            d_logits = weights[s] * (products[s] - mean)
            wide = dot(of_rows, d_logits)
            dq = dq + wide * band.behind(k_halo, k, s)
            dk = dk + band.ahead(wide * q, s)
            dv = dv + band.ahead(dot(of_rows, weights[s]) * do, s)
            d_slopes = [
                d + d_logits * term[s : s + 1] for d, term in zip(d_slopes, band.terms, strict=True)
            ]

        @pl.when(pl.program_id(1) == 0)
        def _():
            for ref in (k_wait_ref, v_wait_ref):
                ref[...] = jnp.zeros_like(ref)

        tail = band.halo  # columns of this tile that the tile behind has given to
        for d, out_ref, wait_ref in ((dk, dk_ref, k_wait_ref), (dv, dv_ref, v_wait_ref)):
            own, given = d[:, band.halo :], wait_ref[...]
            if own.shape[1] > tail:
                given = jnp.concatenate(
                    [jnp.zeros((rows, own.shape[1] - tail), jnp.float32), given], 1
                )
            out_ref[...] = (own + given).astype(out_ref.dtype)
            wait_ref[...] = d[:, : band.halo]

    soft = plan.groups[:-1] if plan.has_band else plan.groups
    dq_rows, dk_rows, dv_rows = [], [], []
    slope_rows = [[] for _ in plan.rel.parts]
    for h in range(heads):
        own = slice(h * width, (h + 1) * width)
        q_own, k_own = q[own].astype(dtype), slot_k[own].astype(dtype)
        do = jnp.concatenate([d[own] for d in d_out], 0).astype(dtype)  # [branches K, T]
        values = _stacked_values(plan, slot_v[own]).astype(dtype)
        logits = dot(k_own, q_own, (0, 0)) + hidden
        for part, term in zip(plan.rel.parts, terms, strict=True):
            logits = logits - slopes[h : h + 1, part : part + 1] * term
        products = dot(values, do, (0, 0))
        weights, d_logits = [], []
        for branch, (a, b) in enumerate(soft):
            x = jnp.exp(logits[a:b] - log_total_ref[branch, h : h + 1])
            mean = jnp.sum(x * products[a:b], 0, keepdims=True)
            weights.append(x)
            d_logits.append(x * (products[a:b] - mean))
        if plan.has_band:
            weights.append(_first_row(user_weights[h : h + 1]))
            d_logits.append(_first_row(user_d_logits[h : h + 1]))
        weights, d_logits = jnp.concatenate(weights, 0), jnp.concatenate(d_logits, 0)
        for row, term in zip(slope_rows, terms, strict=True):
            row.append(jnp.sum(d_logits * term, 0, keepdims=True))
        weights, d_logits = weights.astype(dtype), d_logits.astype(dtype)
        dq_rows.append(dot(k_own, d_logits))
        dk_rows.append(dot(q_own, d_logits, (1, 1)))
        dv_stacked = dot(do, weights, (1, 1))  # [branches K, S]
        lane = jax.lax.broadcasted_iota(jnp.int32, (width, dv_stacked.shape[1]), 1)
        dv_rows.append(
            sum(
                jnp.where((lane >= a) & (lane < b), dv_stacked[i * width : (i + 1) * width], 0.0)
                for i, (a, b) in enumerate(plan.groups)
            )
        )
    prefix = jnp.concatenate(dq_rows, 0)
    dq_ref[...] = ((prefix if dq is None else prefix + dq) * plan.scale).astype(dq_ref.dtype)
    d_slot_k_ref[...] += jnp.concatenate(dk_rows, 0)
    d_slot_v_ref[...] += jnp.concatenate(dv_rows, 0)
    for r, (d, x) in enumerate(zip(d_slopes, slope_rows, strict=True)):
        d = d + jnp.concatenate(x, 0)
        d_slopes_ref[r] += sum(d[:, i : i + LANES] for i in range(0, d.shape[1], LANES))
