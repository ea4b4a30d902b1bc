"""Segmented target attention, LASER's STA: gates and segment sums of all candidates in one pass.

    logit[b, c, l, h] = scale q[b, c, h] . k[b, l, h] + bias[h]
    z[b, c, s, h]     = sum_{l in segment s} mask[b, l] sigmoid(logit[b, c, l, h]) v[b, l, h]

A segment is `segment` rows in a row, and L a multiple of it. Sum, not mean: a segment of irrelevant
behaviours gives nearly 0, one of padding alone exactly 0. `v` with a head axis of 1 is shared by
the heads: pooling x instead of x W_V and projecting the S pooled rows is the same function, with
S rows to project instead of L. Without `v` the rows of `k` are keys and values of all heads: x
meets q W_Q W_K^T, and nothing of the history is projected, which pays for few candidates.

No kernel keeps B C L H numbers, but a block on chip. The XLA path (reference.py) makes a tile of
them at a time, of one segment at least; without `v` (pooled.py) it does keep them.

Axis letters: B requests, C candidates, L history length, S segments, H heads,
Kq and Kv head widths.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels import dispatch, meshes
from kernels.segmented_target_attention import pallas_gpu, pallas_tpu, reference
from kernels.segmented_target_attention.blocks import Blocks, Static, blocks_for
from kernels.segmented_target_attention.pooled import pooled_sums

OP = "segmented_target_attention"
ACTIVATIONS = ("sigmoid", "softmax")
KERNELS = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
# By device kind, as benchmarks/report.py judges measurements; XLA elsewhere (docs/kernels.md), and
# for fewer candidates than PREFERRED_FROM, where either way waits for the history's bytes.
PREFERRED: dict[str, tuple[str, ...]] = {}
PREFERRED_FROM = 3  # where pallas_gpu's matrix form begins


def segmented_target_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    mask: jax.Array,
    bias: jax.Array,
    *,
    segment: int,
    activation: str = "sigmoid",
    scale: float | None = None,
    implementation: str | None = None,
    interpret: Any = False,
    tile_bytes: int = 0,
    blocks: Blocks | None = None,
) -> jax.Array:
    """z of the module's equations: [B, C, S, H, Kv], S = L / segment, in q's dtype; C may be 0.

    Args:
      q: [B, C, H, Kq] projected candidates.
      k: [B, L, H, Kq], or [B, L, 1, Kq] without v.
      v: [B, L, H, Kv], or [B, L, 1, Kv] shared by the heads; None takes k, of all heads.
      mask: [B, L] bool, False for padding.
      bias: [H].
      segment: w, rows per segment.
      activation: "sigmoid", or "softmax" within the segment (LASER's ablation).
      scale: of the products; None is 1 / sqrt(Kq).
      implementation: None or one of dispatch.IMPLEMENTATIONS.
      interpret: of a Pallas implementation: run anywhere; for pallas_tpu a pltpu.InterpretParams
        too.
      tile_bytes: of "xla": size of the logits of a tile; 0 = 4 MiB on a CPU, 64 MiB elsewhere.
      blocks: of a Pallas implementation: None takes those of the table in blocks.py.
    Raises:
      ValueError: shapes or dtypes that do not fit, or an implementation that cannot run here.
    """
    _check(q, k, v, mask, bias, segment, activation)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    refusals = dispatch.cannot_run_here(interpret, len(q)) | _refusals(q, segment, activation)
    preferred = PREFERRED if q.shape[1] >= PREFERRED_FROM else {}
    chosen = dispatch.choose(OP, implementation, refusals, preferred)
    if 0 in q.shape[:2]:
        heads, width = q.shape[2], (k if v is None else v).shape[3]
        return jnp.zeros((*q.shape[:2], k.shape[1] // segment, heads, width), q.dtype)
    if chosen == "xla":
        how = dict(segment=segment, activation=activation, scale=scale)
        if v is None:
            return pooled_sums(q, k.reshape(*k.shape[:2], -1), mask, bias, **how)
        return reference.segmented(q, k, v, mask, bias, **how, tile_bytes=tile_bytes)
    blocks = dispatch.checked_blocks(OP, blocks or blocks_for(chosen, q.dtype, k.shape[1]))
    static = Static(segment, activation, scale, blocks, interpret)
    return _kernel((chosen, dispatch.request_axes(), static), q, k, v, mask, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel(how, q, k, v, mask, bias):
    implementation, axes, static = how

    def forward(requests, bias):
        return KERNELS[implementation].forward(static, *requests, bias), ()

    return meshes.over_requests(axes, forward, (q, k, v, mask), bias)[0]


def _kernel_forward(how, *arguments):
    return _kernel(how, *arguments), arguments


def _kernel_backward(how, arguments, dz):
    implementation, axes, static = how
    *requests, bias = arguments

    def backward(requests, bias):
        (q, k, v, mask), dz = requests
        *gradients, dbias = KERNELS[implementation].backward(static, q, k, v, mask, bias, dz)
        return gradients, dbias

    gradients, dbias = meshes.over_requests(axes, backward, (requests, dz), bias)
    return *gradients, None, dbias.astype(bias.dtype)


_kernel.defvjp(_kernel_forward, _kernel_backward)


def _refusals(q, segment, activation) -> dict[str, str]:
    """What the kernels cannot do of what the XLA path can."""
    found = {
        name: kernel.refusal(q.shape[1], q.dtype, segment if activation == "softmax" else 0)
        for name, kernel in KERNELS.items()
    }
    return {name: reason for name, reason in found.items() if reason}


def _check(q, k, v, mask, bias, segment, activation):
    if activation not in ACTIVATIONS:
        raise ValueError(f"{OP}: activation must be one of {ACTIVATIONS}, got {activation!r}")
    tied, v = v is None, k if v is None else v
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"{OP}: q, k, v need 4 axes, got {q.shape}, {k.shape}, {v.shape}")
    batch, _, heads, width = q.shape
    length = k.shape[1]
    wanted = {
        "k": (k.shape, (batch, length, 1 if tied else heads, width)),
        "v": (v.shape, (batch, length, v.shape[2] if v.shape[2] == 1 else heads, v.shape[3])),
        "mask": (mask.shape, (batch, length)),
        "bias": (bias.shape, (heads,)),
    }
    for name, (shape, expected) in wanted.items():
        if shape != expected:
            raise ValueError(f"{OP}: {name} must be {expected} for q {q.shape}, got {shape}")
    if segment < 1 or length < 1 or length % segment:
        raise ValueError(f"{OP}: L = {length} is no multiple of the segment size {segment}")
    if mask.dtype != jnp.bool_:
        raise ValueError(f"{OP}: mask must be bool, got {mask.dtype}")
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(
            f"{OP}: q, k, v must share a dtype, a float, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
