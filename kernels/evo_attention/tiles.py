"""The behaviours' part of EvoAttention, tile by tile, with its own backward pass.

A tile is a few requests times a run of consecutive queries, small enough that its logits stay in
cache; a loop over tiles makes time linear in L and temporary memory independent of B and L. Arrays
are [G, H, keys, T] or [G, H, K, T]: the long query axis is the minor one, so that every
elementwise pass is a vector loop, softmax reduces over a major axis, and products with K = 4 run
at full speed.

RelTemporal's bias and the visibility are one product [H, 4] x [4, S T] of the slopes with terms
that are made once for all heads. (As the operand of a product they are kept; as an elementwise
expression XLA would make them anew for every head.) The backward pass saves the branches' outputs
and the logarithms of their normalisers, and makes the weights anew.

Axis letters: G requests of a tile, T queries of a tile, S keys of a branch, P chunks, m, w,
H heads, K head width, R parts of RelTemporal in use.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.dispatch import platform
from kernels.evo_attention.arguments import Band, Prefix, scale_of
from kernels.evo_attention.layout import (
    ZERO,
    Tiling,
    choose_tiling,
    long,
    loop,
    pad_last,
    put,
    put_with_halo,
    take,
    take_with_halo,
    unlong,
)
from kernels.softmax import accumulation_dtype

HIDDEN = -1e30  # a logit that is not visible; EMPTY is larger: no visible logit is below it
EMPTY = -1e29


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tiled_branches(spec, q, prefixes, band, slopes, times, mask):
    """The branches for behaviours' queries.

    Args:
      spec: Static; tile_logits 0 chooses.
      q: [B, L, H, K]. prefixes: tuple of Prefix. band: Band or None. slopes: [3, H].
      times, mask: [B, L].
    Returns:
      one [B, L, H, K] per prefix, then one for the band, in q's dtype.
    """
    out, _ = _forward(spec, q, prefixes, band, slopes, times, mask)
    return tuple(unlong(o, q.shape[1]) for o in out)


class _Inputs(NamedTuple):
    """The op's inputs cut into request groups, in the layouts that tiles read."""

    tiling: Tiling
    halo: int
    q: jax.Array  # [B, H, K, n]; of a tile, scaled
    prefixes: tuple  # of (k [B, H, S, K], v, clock, position)
    band: tuple | None  # (k [B, H, K, n], v, user_k, user_v); of a tile with its halo
    clock: tuple  # of four [B, halo + n]
    mask: jax.Array  # [B, halo + n]
    coefficients: jax.Array  # [H, R + 1]


def _prepare(spec, q, prefixes, band, slopes, times, mask) -> _Inputs:
    dtype = accumulation_dtype(q.dtype)
    keys = [p.k.shape[1] for p in prefixes] + [0 if band is None else spec.window + 1]
    halo = 0 if band is None else spec.window - 1
    batch, length, heads, _ = q.shape
    budget = _budget(spec, batch * length * heads * max(keys))
    tiling = choose_tiling(batch, length, heads, max(keys), halo, budget, bool(spec.axes))

    def heads_first(x):  # [B, S, H, K] -> [B, H, S, K]
        return jnp.swapaxes(x, 1, 2)

    negative = [-slopes[part].astype(dtype) for part in spec.rel.parts]
    return _Inputs(
        tiling,
        halo,
        long(q, tiling),
        tuple(
            (
                heads_first(p.k),
                heads_first(p.v),
                spec.rel.clock(p.time),
                p.position,
            )
            for p in prefixes
        ),
        band
        and (
            long(band.k, tiling),
            long(band.v, tiling),
            band.user_k,
            band.user_v,
        ),
        tuple(pad_last(x, tiling, halo) for x in spec.rel.clock(times)),
        pad_last(mask, tiling, halo),
        jnp.stack([*negative, jnp.ones_like(slopes[0], dtype)], 1),
    )


def _tile(x: _Inputs, scale, row, start) -> _Inputs:
    """The inputs of a tile: of its request group, and of its positions where an array has them."""

    def of(a, start=None):
        return take(a, x.tiling, row, start)

    return x._replace(
        tiling=None,
        halo=None,
        q=of(x.q, start) * scale,
        prefixes=jax.tree.map(of, x.prefixes),
        band=x.band
        and (
            *(take_with_halo(a, x.tiling, row, start, x.halo) for a in x.band[:2]),
            *map(of, x.band[2:]),
        ),
        clock=tuple(of(a, start) for a in x.clock),
        mask=of(x.mask, start),
        coefficients=None,
    )


def _budget(spec, logits: int) -> int:
    """Logits of a tile: what stays in a CPU's cache; on accelerators, 256 MB of float32.

    On a CPU two tiles at least: only a loop's carry gives a tile memory of its own (layout.loop).
    """
    if spec.tile_logits or platform() != "cpu":
        return spec.tile_logits or 64_000_000
    return min(400_000, logits // 2)


# ---- one branch of one tile ------------------------------------------------------------------


def _product(k, q):
    """[G, H, S, K] and [G, H, K, T] -> [G, H, S, T]."""
    dtype = accumulation_dtype(q.dtype)
    return jnp.einsum("ghsk,ghkt->ghst", k, q, preferred_element_type=dtype)


def _over_keys(k, x):
    """[G, H, K, S] and weights [G, H, S, T] -> [G, H, K, T]."""
    return jnp.einsum("ghks,ghst->ghkt", k, x.astype(k.dtype), preferred_element_type=x.dtype)


def _over_queries(x, q):
    """Weights [G, H, S, T] and [G, H, K, T] -> [G, H, S, K]."""
    return jnp.einsum("ghst,ghkt->ghsk", x.astype(q.dtype), q, preferred_element_type=x.dtype)


def _bias(coefficients, terms):
    """Slopes [H, R + 1] and terms [G, R + 1, S, T] -> RelTemporal and visibility [G, H, S, T].

    With the slopes repeated per request this is a batch of products whose result has the queries
    minor; as one product XLA would have the heads minor and transpose.
    """
    g, _, s, t = terms.shape
    slopes = jnp.broadcast_to(coefficients, (g,) + coefficients.shape)
    flat = jnp.einsum("ghr,grx->ghx", slopes, terms.reshape(g, -1, s * t), precision="highest")
    return flat.reshape(g, -1, s, t)


def _exp_of(logits):
    """exp(logits - peak) and the peak [G, H, T]; an empty set of keys has weights 0."""
    peak = jnp.maximum(jnp.max(logits, 2), EMPTY)
    return jnp.exp(logits - peak[:, :, None]), peak


def _log_total(total, peak):
    """log of the softmax's denominator; +inf for an empty set, so that exp(x - it) is 0."""
    return jnp.where(total > 0, peak + jnp.log(jnp.where(total > 0, total, 1)), jnp.inf)


def _softmax_gradient(weights, d_weights):
    """[G, H, S, T]: that of the logits."""
    return weights * (d_weights - jnp.sum(weights * d_weights, 2, keepdims=True))


def _slope_gradients(d_logits, terms):
    """[H, R + 1] from d_logits [G, H, S, T] and terms [G, R + 1, S, T]."""
    g, h = d_logits.shape[:2]
    flat, terms = d_logits.reshape(g, h, -1), terms.reshape(g, terms.shape[1], -1)
    return jnp.einsum("ghx,grx->ghr", flat, terms, precision="highest").sum(0)


def _prefix_terms(spec, query_clock, query_position, clock, position, dtype):
    """[G, R + 1, S, T]; clocks of [G, T] and [G, S], positions [T] and [G, S]."""
    query, key = (x[:, None] for x in query_clock), (x[..., None] for x in clock)
    visible = position[:, :, None] < query_position
    return _terms(spec, query, key, visible, 0, dtype)


def _terms(spec, query, key, visible, before: int, dtype):
    """RelTemporal's terms and the visibility [G, S, T] as [G, R + 1, before + S, T], 0 in front.

    One write each: as a concatenation XLA on a CPU may make every element with a choice among the
    operands, and with padding it does so element by element.
    """
    hidden = jnp.where(visible, dtype(0), dtype(HIDDEN))
    terms = (*spec.rel.terms(query, key, dtype), hidden)
    g, s, t = visible.shape
    out = jnp.zeros((g, len(terms), before + s, t), dtype)
    for i, term in enumerate(terms):
        at = (ZERO, np.int32(i), np.int32(before), ZERO)
        out = jax.lax.dynamic_update_slice(out, term[:, None], at)
    return out


def _shifted(x, s: int, w: int):
    """x [..., T + w - 1] as seen from s positions later: [..., T]."""
    return x[..., w - 1 - s : x.shape[-1] - s]


def _band_terms(spec, clock, mask, dtype):
    """[G, R + 1, w + 1, T] from a clock of [G, T + w - 1] and mask [G, T + w - 1]."""
    w = spec.window

    def shifts(x):
        return jnp.stack([_shifted(x, s, w) for s in range(w)], 1)

    query = (_shifted(x, 0, w)[:, None] for x in clock)
    # The user key comes first: no bias, always visible.
    return _terms(spec, query, map(shifts, clock), shifts(mask), 1, dtype)


def _band_products(q, k, user_k, w: int):
    """Logits of the user key, then of the behaviours 0, 1 .. w - 1 positions back.

    q [G, H, K, T], k [G, H, K, T + w - 1], user_k [G, H, K] -> [G, H, w + 1, T]. Unrolled over K:
    one vector loop without a reduction.
    """

    def product(other):
        return sum(q[:, :, i] * other(i) for i in range(q.shape[2]))

    rows = [product(lambda i: user_k[:, :, i, None])]
    rows += [product(lambda i, s=s: _shifted(k[:, :, i], s, w)) for s in range(w)]
    return jnp.stack(rows, 2)


def _band_over_keys(x, v, user_v, w: int):
    """Weights [G, H, w + 1, T] times v [G, H, K, T + w - 1] and user_v -> [G, H, K, T]."""
    out = x[:, :, :1] * user_v[..., None]
    return out + sum(x[:, :, s + 1, None] * _shifted(v, s, w) for s in range(w))


def _band_over_queries(x, q, w: int):
    """Weights [G, H, w, T] and q [G, H, K, T] -> [G, H, K, T + w - 1], the keys' gradients."""
    edges = ((w - 1 - s, s) for s in range(w))
    return sum(
        jnp.pad(x[:, :, s, None] * q, ((0, 0),) * 3 + (edge,)) for s, edge in enumerate(edges)
    )


# ---- forward and backward over all tiles -----------------------------------------------------


def _forward(spec, q, prefixes, band, slopes, times, mask):
    """The branches [B, H, K, n] and the logarithms of their normalisers [B, H, n], by branch."""
    x = _prepare(spec, q, prefixes, band, slopes, times, mask)
    dtype, w, halo, width = accumulation_dtype(q.dtype), spec.window, x.halo, x.tiling.width
    branches = len(prefixes) + (band is not None)
    out = (jnp.zeros_like(x.q),) * branches
    log_total = (jnp.zeros(x.q.shape[:2] + x.q.shape[3:], dtype),) * branches

    def body(tile, row, start, buffers):
        out, log_total = (list(b) for b in buffers)
        query_clock = tuple(c[..., halo:] for c in tile.clock)
        position = start + jnp.arange(width, dtype=jnp.int32)

        def finish(branch, unscaled, total, peak):
            result = unscaled * (1 / jnp.where(total > 0, total, 1))[:, :, None]
            out[branch] = put(out[branch], x.tiling, result, row, start)
            log_total[branch] = put(
                log_total[branch], x.tiling, _log_total(total, peak), row, start
            )

        for branch, (k, v, key_clock, key_position) in enumerate(tile.prefixes):
            terms = _prefix_terms(spec, query_clock, position, key_clock, key_position, dtype.type)
            weights, peak = _exp_of(_product(k, tile.q) + _bias(x.coefficients, terms))
            # A row of ones among the values sums the weights in the same product.
            v_one = jnp.concatenate([jnp.swapaxes(v, 2, 3), jnp.ones_like(v[:, :, None, :, 0])], 2)
            unscaled = _over_keys(v_one, weights)
            # Of rounded weights that is no normaliser: the gradients would see a sum beside 1.
            total = unscaled[:, :, -1] if q.dtype == dtype else jnp.sum(weights, 2)
            finish(branch, unscaled[:, :, :-1], total, peak)
        if x.band is not None:
            k, v, user_k, user_v = (a.astype(dtype) for a in tile.band)
            terms = _band_terms(spec, tile.clock, tile.mask, dtype.type)
            logits = _band_products(tile.q.astype(dtype), k, user_k, w)
            weights, peak = _exp_of(logits + _bias(x.coefficients, terms))
            unscaled = _band_over_keys(weights, v, user_v, w)
            finish(branches - 1, unscaled, jnp.sum(weights, 2), peak)
        return tuple(out), tuple(log_total)

    read = functools.partial(_tile, x, scale_of(q, spec))
    return loop(x.tiling, read, body, (out, log_total))


def _forward_rule(spec, q, prefixes, band, slopes, times, mask):
    out, log_total = _forward(spec, q, prefixes, band, slopes, times, mask)
    residuals = q, prefixes, band, slopes, times, mask, out, log_total
    return tuple(unlong(o, q.shape[1]) for o in out), residuals


def _backward_rule(spec, residuals, d_out):
    q, prefixes, band, slopes, times, mask, out, log_total = residuals
    x = _prepare(spec, q, prefixes, band, slopes, times, mask)
    dtype, w, halo, width = accumulation_dtype(q.dtype), spec.window, x.halo, x.tiling.width
    batch, length = q.shape[:2]
    # do . out is the weights' mean of do . v, unless out was rounded: the error would not sum to 0
    # over the keys, and the slopes' gradients multiply it by a time's logarithm.
    exact = q.dtype == dtype
    scale = scale_of(q, spec)
    d_out = [long(o, x.tiling) for o in d_out]
    # do . out [B, H, n]
    dots = [(do.astype(dtype) * o.astype(dtype)).sum(2) for do, o in zip(d_out, out, strict=True)]

    def zeros(a):
        return jnp.zeros(a.shape, dtype)

    grads = {
        "q": jnp.zeros_like(x.q),
        "prefixes": tuple((zeros(p[0]), zeros(p[1])) for p in x.prefixes),
        "band": band and tuple(zeros(a) for a in x.band),
        "coefficients": zeros(x.coefficients),
    }

    def read(row, start):
        """The inputs; of each branch the cotangent [G, H, K, T], do . out and the log
        normaliser, [G, H, T]."""
        branches = ((take(a, x.tiling, row, start) for a in y) for y in (d_out, dots, log_total))
        return _tile(x, scale, row, start), list(zip(*branches, strict=True))

    def body(tile, row, start, grads):
        tile, cotangents = tile
        grads = dict(grads)
        query_clock = tuple(c[..., halo:] for c in tile.clock)
        position = start + jnp.arange(width, dtype=jnp.int32)
        dq = []
        d_prefixes = list(grads["prefixes"])

        for branch, (k, v, key_clock, key_position) in enumerate(tile.prefixes):
            do, product, total = cotangents[branch]
            terms = _prefix_terms(spec, query_clock, position, key_clock, key_position, dtype.type)
            logits = _product(k, tile.q) + _bias(x.coefficients, terms)
            weights = jnp.exp(logits - total[:, :, None])
            if exact:
                # A column of -1 among the values subtracts do . out in the same product.
                v_one = jnp.concatenate([v, -jnp.ones_like(v[..., :1])], -1)
                do_one = jnp.concatenate([do, product[:, :, None]], 2)
                d_logits = weights * _product(v_one, do_one)
            else:
                d_logits = _softmax_gradient(weights, _product(v, do))
            # Made before the product, which as one of a transposed k is no fast one on a CPU.
            dq.append(_over_keys(jax.lax.optimization_barrier(jnp.swapaxes(k, 2, 3)), d_logits))
            dk, dv = d_prefixes[branch]
            dk = put(dk, x.tiling, _over_queries(d_logits, tile.q), row, add=True)
            dv = put(dv, x.tiling, _over_queries(weights, do), row, add=True)
            d_prefixes[branch] = (dk, dv)
            grads["coefficients"] += _slope_gradients(d_logits, terms)
        if x.band is not None:
            k, v, user_k, user_v = (a.astype(dtype) for a in tile.band)
            q_wide = tile.q.astype(dtype)
            do, product, total = cotangents[-1]
            do = do.astype(dtype)
            terms = _band_terms(spec, tile.clock, tile.mask, dtype.type)
            logits = _band_products(q_wide, k, user_k, w) + _bias(x.coefficients, terms)
            weights = jnp.exp(logits - total[:, :, None])
            d_weights = _band_products(do, v, user_v, w)
            if exact:
                d_logits = weights * (d_weights - product[:, :, None])
            else:
                d_logits = _softmax_gradient(weights, d_weights)
            dq.append(_band_over_keys(d_logits, k, user_k, w))
            dk, dv, d_user_k, d_user_v = grads["band"]
            dk_tile = _band_over_queries(d_logits[:, :, 1:], q_wide, w)
            dv_tile = _band_over_queries(weights[:, :, 1:], do, w)
            grads["band"] = (
                put_with_halo(dk, x.tiling, dk_tile, row, start, halo),
                put_with_halo(dv, x.tiling, dv_tile, row, start, halo),
                put(
                    d_user_k,
                    x.tiling,
                    _over_queries(d_logits[:, :, :1], q_wide)[:, :, 0],
                    row,
                    add=True,
                ),
                put(
                    d_user_v, x.tiling, _over_queries(weights[:, :, :1], do)[:, :, 0], row, add=True
                ),
            )
            grads["coefficients"] += _slope_gradients(d_logits, terms)
        grads["prefixes"] = tuple(d_prefixes)
        grads["q"] = put(grads["q"], x.tiling, sum(dq) * scale, row, start)
        return grads

    grads = loop(x.tiling, read, body, grads)

    def short(a, like):  # [B, H, S, K] -> [B, S, H, K]
        return jnp.swapaxes(a, 1, 2).astype(like.dtype)

    d_prefixes = tuple(
        Prefix(short(dk, p.k), short(dv, p.v), None, None)
        for p, (dk, dv) in zip(prefixes, grads["prefixes"], strict=True)
    )
    d_band = None
    if band is not None:
        dk, dv, d_user_k, d_user_v = grads["band"]
        d_band = Band(
            unlong(dk, length).astype(band.k.dtype),
            unlong(dv, length).astype(band.v.dtype),
            d_user_k.reshape(band.user_k.shape).astype(band.user_k.dtype),
            d_user_v.reshape(band.user_v.shape).astype(band.user_v.dtype),
        )
    d_slopes = jnp.zeros_like(slopes)
    for i, part in enumerate(spec.rel.parts):
        d_slopes = d_slopes.at[part].set(-grads["coefficients"][:, i].astype(slopes.dtype))
    dq = unlong(grads["q"], length)
    return dq.astype(q.dtype), d_prefixes, d_band, d_slopes, None, None


tiled_branches.defvjp(_forward_rule, _backward_rule)
