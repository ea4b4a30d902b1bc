"""What one program of pallas_gpu.py does: a tile of T queries of one request.

RelTemporal's terms of the slots, [T, S], are made once and stay in registers while the heads are
walked over. A head's rows are one matrix [T, K], or for widths below what the matrix unit takes K
vectors [T]: `Rows`. The band is w rows per query, read again for every shift: they lie in cache.

Axis letters: T queries of a tile, S slots, H heads, K head width, w, R parts of the bias.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.evo_attention.slots import CLOCK, FLAG, POSITION
from kernels.evo_attention.tiles import EMPTY, HIDDEN
from kernels.triton import dot

DOT = 16  # the shortest side of a product that Triton takes

Rows = jax.Array | list[jax.Array]  # [T, K], or its K columns


def _load(ref, rows, head) -> Rows:
    """Rows (an index array or a slice) of one head of [n, H, K]."""
    if ref.shape[-1] >= DOT:
        return ref[rows, head, :]
    return [ref[rows, head, i] for i in range(ref.shape[-1])]


def _store(ref, rows, head, x: Rows) -> None:
    x = _map(lambda a: a.astype(ref.dtype), x)
    if ref.shape[-1] >= DOT:
        ref[rows, head, :] = x
    else:
        for i, column in enumerate(x):
            ref[rows, head, i] = column


def _map(function, *rows: Rows) -> Rows:
    return jax.tree.map(function, *rows)


def _float(x: Rows) -> Rows:
    return _map(lambda a: a.astype(jnp.float32), x)


def _times(weights, x: Rows) -> Rows:
    """Row t times weights [T]."""
    return _map(lambda a: (weights if a.ndim == 1 else weights[:, None]) * a, x)


def _add(*rows: Rows) -> Rows:
    return _map(lambda *a: sum(a), *rows)


def _inner(a: Rows, b: Rows):
    """[T]: the product of each row with the same row."""
    if isinstance(a, list):
        return sum(x * y for x, y in zip(a, b, strict=True))
    return jnp.sum(a * b, 1)


def _sum(x: Rows) -> Rows:
    """The sum of all rows."""
    return _map(lambda a: jnp.sum(a, 0), x)


def _product(a: Rows, b: Rows):
    """[T, S]: rows of a with rows of b."""
    if isinstance(a, list):
        return sum(x[:, None] * y[None, :] for x, y in zip(_float(a), _float(b), strict=True))
    return dot(a, b, (1, 1))


def _over_second(weights, b: Rows) -> Rows:
    """Weights [T, S] and S rows -> T rows."""
    if isinstance(b, list):
        return [jnp.sum(weights * y[None, :], 1) for y in _float(b)]
    return dot(weights.astype(b.dtype), b, (1, 0))


def _over_first(weights, a: Rows) -> Rows:
    """Weights [T, S] and T rows -> S rows."""
    if isinstance(a, list):
        return [jnp.sum(weights * x[:, None], 0) for x in _float(a)]
    return dot(weights.astype(a.dtype), a, (0, 0))


class _Tile:
    """The tile's queries: their rows, which of them exist, their integers; the slots' terms."""

    def __init__(self, plan, width, integers_ref, slot_integers_ref):
        self.plan, self.integers_ref = plan, integers_ref
        self.n = integers_ref.shape[1]
        self.own = pl.ds(pl.program_id(1) * width, width)
        self.wanted = pl.program_id(1) * width + jnp.arange(width, dtype=jnp.int32)
        self.exists = self.wanted < self.n
        self.rows = jnp.minimum(self.wanted, self.n - 1)
        self.clock = self.clock_at(self.rows)
        position = integers_ref[POSITION, self.rows]
        self.soft = plan.groups[:-1] if plan.has_band else plan.groups
        self.terms, self.hidden = [], []
        for a, b in self.soft:
            columns = [slot_integers_ref[a:b, i] for i in range(FLAG + 1)]
            terms = plan.rel.terms(
                [x[:, None] for x in self.clock], [x[None, :] for x in columns[CLOCK]]
            )
            if plan.timeless:
                terms = [t * columns[FLAG].astype(jnp.float32)[None, :] for t in terms]
            self.terms.append(terms)
            visible = columns[POSITION][None, :] < position[:, None]
            self.hidden.append(jnp.where(visible, 0.0, HIDDEN))

    def clock_at(self, rows):
        return [self.integers_ref[i, rows] for i in range(4)]

    def logits(self, group, q, k, slopes):
        x = _product(q, k) + self.hidden[group]
        for slope, term in zip(slopes, self.terms[group], strict=True):
            x = x - slope * term
        return x

    def band_bias(self, query_clock, key_clock, visible, slopes):
        """RelTemporal and visibility of pairs of rows, [T], and the terms."""
        terms = self.plan.rel.terms(query_clock, key_clock)
        bias = jnp.where(visible, 0.0, HIDDEN)
        for slope, term in zip(slopes, terms, strict=True):
            bias = bias - slope * term
        return bias, terms

    def behind(self, s):
        """Rows s before the tile's, their clocks and which are visible."""
        wanted = self.wanted - s
        rows = jnp.clip(wanted, 0, self.n - 1)
        visible = (wanted >= 0) & (self.integers_ref[FLAG, rows] > 0)
        return rows, self.clock_at(rows), visible


def _scaled(q: Rows, scale) -> Rows:
    return _map(lambda a: (a.astype(jnp.float32) * scale).astype(a.dtype), q)


def forward_kernel(plan, width, *refs):
    """Blocks of a request: q [n, H, K], integers [ROWS, n], slots [S, H, K] twice and [S, ROWS],
    with a band k, v [n, H, K]; slopes [3, H]. Outputs: [tiles T, H, K] per branch, log of the
    normalisers [branches, H, tiles T]."""
    branches = len(plan.groups)
    inputs, out_refs, log_total_ref = refs[: -branches - 1], refs[-branches - 1 : -1], refs[-1]
    q_ref, integers_ref, slot_k_ref, slot_v_ref, slot_integers_ref, *band_refs, slopes_ref = inputs
    tile = _Tile(plan, width, integers_ref, slot_integers_ref)

    def of_head(h, carry):
        slopes = [slopes_ref[part, h] for part in plan.rel.parts]
        q = _scaled(_load(q_ref, tile.rows, h), plan.scale)
        for group, (a, b) in enumerate(tile.soft):
            logits = tile.logits(group, q, _load(slot_k_ref, slice(a, b), h), slopes)
            peak = jnp.maximum(jnp.max(logits, 1), EMPTY)
            weights = jnp.exp(logits - peak[:, None])
            total = jnp.sum(weights, 1)
            some = total > 0
            total = jnp.where(some, total, 1.0)
            out = _over_second(weights, _load(slot_v_ref, slice(a, b), h))
            _store(out_refs[group], tile.own, h, _times(1 / total, out))
            log_total_ref[group, h, tile.own] = jnp.where(some, peak + jnp.log(total), jnp.inf)
        if plan.has_band:
            k_ref, v_ref = band_refs
            q = _float(q)
            user = plan.groups[-1][0] + jnp.zeros_like(tile.rows)
            start = _inner(q, _float(_load(slot_k_ref, user, h)))
            acc = _float(_load(slot_v_ref, user, h))

            def shift(s, carry):  # a softmax that goes along; the user key keeps it from empty
                peak, total, acc = carry
                rows, clock, visible = tile.behind(s)
                bias, _ = tile.band_bias(tile.clock, clock, visible, slopes)
                logits = _inner(q, _float(_load(k_ref, rows, h))) + bias
                higher = jnp.maximum(peak, logits)
                old, new = jnp.exp(peak - higher), jnp.exp(logits - higher)
                v = _float(_load(v_ref, rows, h))
                return higher, total * old + new, _add(_times(old, acc), _times(new, v))

            start = (start, jnp.ones_like(start), acc)
            peak, total, acc = jax.lax.fori_loop(0, plan.window, shift, start)
            _store(out_refs[-1], tile.own, h, _times(1 / total, acc))
            log_total_ref[branches - 1, h, tile.own] = peak + jnp.log(total)
        return carry

    jax.lax.fori_loop(0, q_ref.shape[1], of_head, 0)


def backward_kernel(plan, width, *refs):
    """Blocks of a request: q, integers, slots as in the forward kernel, log_total [branches, H,
    tiles T], cotangents [n, H, K] per branch, with a band k, v [n, H, K] and the local branch's
    product of output and cotangent [H, n]; slopes [3, H]. Outputs: dq [tiles T, H, K], with a band
    dk, dv; of the tile, the slots' gradients [S, H, K] twice and the slopes' [R, H]."""
    branches, number = len(plan.groups), 4 + 2 * plan.has_band
    inputs, outputs = refs[:-number], refs[-number:]
    q_ref, integers_ref, slot_k_ref, slot_v_ref, slot_integers_ref, log_total_ref = inputs[:6]
    d_out_refs, band_refs, slopes_ref = (
        inputs[6 : 6 + branches],
        inputs[6 + branches : -1],
        inputs[-1],
    )
    dq_ref, *d_band_refs, d_slot_k_ref, d_slot_v_ref, d_slopes_ref = outputs
    tile = _Tile(plan, width, integers_ref, slot_integers_ref)

    def of_head(h, carry):
        slopes = [slopes_ref[part, h] for part in plan.rel.parts]
        q = _scaled(_load(q_ref, tile.rows, h), plan.scale)
        dq, d_slopes = _map(lambda a: jnp.zeros_like(a, jnp.float32), q), [0.0] * len(slopes)
        for group, (a, b) in enumerate(tile.soft):
            k, v = (_load(r, slice(a, b), h) for r in (slot_k_ref, slot_v_ref))
            do = _load(d_out_refs[group], tile.rows, h)
            weights = tile.logits(group, q, k, slopes)
            weights = jnp.exp(weights - log_total_ref[group, h, tile.own][:, None])
            weights = jnp.where(tile.exists[:, None], weights, 0.0)
            product = _product(do, v)
            d_logits = weights * (product - jnp.sum(weights * product, 1)[:, None])
            dq = _add(dq, _over_second(d_logits, k))
            _store(d_slot_k_ref, slice(a, b), h, _over_first(d_logits, q))
            _store(d_slot_v_ref, slice(a, b), h, _over_first(weights, do))
            d_slopes = [
                d + jnp.sum(jnp.sum(d_logits * term, 1), 0)
                for d, term in zip(d_slopes, tile.terms[group], strict=True)
            ]
        if plan.has_band:
            k_ref, v_ref, product_ref = band_refs
            refs = (q_ref, k_ref, v_ref, log_total_ref, d_out_refs[-1])
            dk, dv = _band_keys(tile, h, slopes, *refs, product_ref)
            for ref, x in zip(d_band_refs, (dk, dv), strict=True):
                _store(ref, tile.own, h, x)
            added, more, dk, dv = _band_queries(tile, h, slopes, *refs, (slot_k_ref, slot_v_ref))
            for ref, x in ((d_slot_k_ref, dk), (d_slot_v_ref, dv)):
                _store(ref, plan.groups[-1][0], h, x)
            dq = _add(dq, added)
            d_slopes = [d + jnp.sum(x, 0) for d, x in zip(d_slopes, more, strict=True)]
        _store(dq_ref, tile.own, h, _map(lambda a: a * plan.scale, dq))
        for i, d in enumerate(d_slopes):
            d_slopes_ref[i, h] = d
        return carry

    jax.lax.fori_loop(0, q_ref.shape[1], of_head, 0)


def _band_queries(tile, h, slopes, q_ref, k_ref, v_ref, log_total_ref, do_ref, slot_refs):
    """The band's part of dq, the slopes' gradients per query, and the user key's dk and dv.

    d_logits = weights (product - mean of the products), and the mean is known at the end: sums with
    and without the products go along. (do . out, where out was rounded, is no mean.)
    """
    plan = tile.plan
    q = _float(_scaled(_load(q_ref, tile.rows, h), plan.scale))
    do = _float(_load(do_ref, tile.rows, h))
    log_total = log_total_ref[len(plan.groups) - 1, h, tile.own]

    def pair(k, v, bias):
        weights = jnp.where(tile.exists, jnp.exp(_inner(q, k) + bias - log_total), 0.0)
        return weights, weights * _inner(do, v)

    user = plan.groups[-1][0] + jnp.zeros_like(tile.rows)
    user_k, user_v = (_float(_load(ref, user, h)) for ref in slot_refs)
    user_weights, user_products = pair(user_k, user_v, 0.0)

    def shift(s, carry):
        mean, rows_plain, rows, terms_plain, terms = carry
        at, clock, visible = tile.behind(s)
        bias, own = tile.band_bias(tile.clock, clock, visible, slopes)
        k = _float(_load(k_ref, at, h))
        weights, products = pair(k, _float(_load(v_ref, at, h)), bias)
        return (
            mean + products,
            _add(rows_plain, _times(weights, k)),
            _add(rows, _times(products, k)),
            [x + weights * term for x, term in zip(terms_plain, own, strict=True)],
            [x + products * term for x, term in zip(terms, own, strict=True)],
        )

    zeros = [jnp.zeros_like(log_total)] * len(slopes)
    start = (user_products, _times(user_weights, user_k), _times(user_products, user_k), zeros,
             zeros)  # fmt: skip
    mean, rows_plain, rows, terms_plain, terms = jax.lax.fori_loop(0, plan.window, shift, start)
    dq = _add(rows, _times(-mean, rows_plain))
    d_slopes = [x - mean * y for x, y in zip(terms, terms_plain, strict=True)]
    d_user = user_products - user_weights * mean
    return dq, d_slopes, _sum(_times(d_user, q)), _sum(_times(user_weights, do))


def _band_keys(tile, h, slopes, q_ref, k_ref, v_ref, log_total_ref, do_ref, product_ref):
    """dk and dv of the tile's own rows, from the w queries that see them."""
    plan, branch = tile.plan, len(tile.plan.groups) - 1
    k, v = (_float(_load(ref, tile.rows, h)) for ref in (k_ref, v_ref))
    valid = tile.exists & (tile.integers_ref[FLAG, tile.rows] > 0)

    def shift(s, carry):
        dk, dv = carry
        wanted = tile.wanted + s
        rows = jnp.minimum(wanted, tile.n - 1)
        visible = valid & (wanted < tile.n)
        bias, _ = tile.band_bias(tile.clock_at(rows), tile.clock, visible, slopes)
        q = _float(_scaled(_load(q_ref, rows, h), plan.scale))
        do = _float(_load(do_ref, rows, h))
        weights = jnp.exp(_inner(q, k) + bias - log_total_ref[branch, h, rows])
        d_logits = weights * (_inner(do, v) - product_ref[h, rows])
        return _add(dk, _times(d_logits, q)), _add(dv, _times(weights, do))

    zero = _map(jnp.zeros_like, k)
    return jax.lax.fori_loop(0, plan.window, shift, (zero, zero))
