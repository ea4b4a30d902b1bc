"""EvoAttention's three sparse branches with RelTemporal (SparseCTR eqs. 6-8, 12-16).

The op between the projections and the fusion gate. It gives the branch outputs apart. Behaviours
and candidates are two calls: candidates are never keys, stand behind the whole history and share
one time, so the last block of a model makes the second call only.

Axis letters: B requests, C candidates, L history, S slots, w window, H heads, K head width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels.dispatch import cannot_run_here, choose, request_axes
from kernels.evo_attention import pallas_gpu, pallas_tpu, reference
from kernels.evo_attention.arguments import Band, Prefix, Recent, Static
from kernels.evo_attention.rel_temporal import RelTemporal

INTEGERS = ("times", "request_time", "time", "position")
KINDS = {"mask": jnp.bool_} | dict.fromkeys(INTEGERS, jnp.int32)
# By device kind, as benchmarks/report.py judges measurements; XLA elsewhere (docs/kernels.md), and
# for more slots of a request than PREFERRED_TO, the most that were measured: backward, the GPU's
# kernel leaves a partial sum of every slot for each tile of queries.
PREFERRED: dict[str, tuple[str, ...]] = {"NVIDIA H200": ("pallas_gpu",)}
PREFERRED_TO = 48
IMPLEMENTATIONS = {"xla": reference, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}


def behaviour_branches(
    q: jax.Array,
    global_keys: Prefix | None,
    transition_keys: Prefix | None,
    band: Band | None,
    slopes: jax.Array,
    times: jax.Array,
    mask: jax.Array,
    *,
    rel: RelTemporal,
    window: int,
    scale: float | None = None,
    tile_logits: int = 0,
    block: int = 0,
    implementation: str | None = None,
    interpret: Any = False,
) -> tuple[jax.Array | None, ...]:
    """The branches for the behaviours' queries.

    The behaviour at index i sees the slots whose position is below i, and in the local branch the
    user key and the valid behaviours in [i - w + 1, i]. RelTemporal is added to every logit but
    the user key's, which has no time. A branch with nothing to see gives 0. Rows of padding
    behaviours are finite and mean nothing.

    Args:
      q: [B, L, H, K] float. global_keys, transition_keys, band: None leaves the branch out.
      slopes: [3, H] of RelTemporal: time, hour, weekend.
      times: [B, L] int32 seconds. mask: [B, L] bool, right-aligned.
      rel: which parts of the bias are on. window: w. scale: of the logits; None is K^-1/2.
      tile_logits: logits of a tile of the XLA path. block: queries of a kernel's tile; 0 chooses.
      implementation: "xla", "pallas_tpu", "pallas_gpu"; None takes the best that was measured.
      interpret: as of pallas_call, for tests without the device.
    Returns:
      (global, transition, local), each [B, L, H, K] in q's dtype, or None if left out; L may be 0.
    Raises:
      ValueError: shapes do not fit, no branch is left, or the named implementation cannot run.
    """
    prefixes = {"global_keys": global_keys, "transition_keys": transition_keys}
    _check(q, prefixes, slopes, window, scale, block)
    for name, x in (("times", times), ("mask", mask)):
        _expect(name, x, q.shape[:2])
    if band is not None:
        _check_keys("band", band, q, q.shape[1])
    spec = Static(rel, window, scale, tile_logits, block, interpret, request_axes())
    used = [p for p in prefixes.values() if p is not None]
    module = _module(implementation, spec, q, used, band is not None)
    if 0 in q.shape:
        return _in_order([q] * (len(used) + (band is not None)), (*prefixes.values(), band))
    out = module.behaviour_branches(spec, q, used, band, slopes, times, mask)
    return _in_order(out, (*prefixes.values(), band))


def candidate_branches(
    q: jax.Array,
    global_keys: Prefix | None,
    transition_keys: Prefix | None,
    recent: Recent | None,
    slopes: jax.Array,
    request_time: jax.Array,
    *,
    rel: RelTemporal,
    scale: float | None = None,
    block: int = 0,
    implementation: str | None = None,
    interpret: Any = False,
) -> tuple[jax.Array | None, ...]:
    """The branches for the candidates' queries: all slots that are in use, and `recent`.

    Args:
      q: [B, C, H, K]. request_time: [B] int32 seconds, the candidates' time. The others are those
        of `behaviour_branches`.
    Returns:
      (global, transition, local), each [B, C, H, K] in q's dtype, or None if left out; C may be 0.
    Raises:
      ValueError: shapes do not fit, no branch is left, or the named implementation cannot run.
    """
    prefixes = {"global_keys": global_keys, "transition_keys": transition_keys}
    _check(q, prefixes, slopes, 1, scale, block)
    _expect("request_time", request_time, q.shape[:1])
    if recent is not None:
        _check_keys("recent", recent, q, recent.time.shape[-1])
    spec = Static(rel, 1, scale, 0, block, interpret, request_axes())
    used = [p for p in prefixes.values() if p is not None]
    module = _module(implementation, spec, q, used, recent is not None)
    if 0 in q.shape:
        return _in_order([q] * (len(used) + (recent is not None)), (*prefixes.values(), recent))
    out = module.candidate_branches(spec, q, used, recent, slopes, request_time)
    return _in_order(out, (*prefixes.values(), recent))


def _in_order(out, keys):
    """One output for each of the three branches: None where its keys were."""
    out = iter(out)
    return tuple(None if k is None else next(out) for k in keys)


def _module(implementation, spec, q, prefixes, local):
    """The implementation's module."""
    if not prefixes and not local:
        raise ValueError("evo_attention: no branch is left")
    refusals = cannot_run_here(spec.interpret, len(q))
    for name in ("pallas_tpu", "pallas_gpu"):
        reason = IMPLEMENTATIONS[name].refusal(q, local, spec.window, spec.block)
        if reason:
            refusals.setdefault(name, reason)
    slots = sum(p.time.shape[-1] for p in prefixes)
    preferred = PREFERRED if slots <= PREFERRED_TO else {}
    return IMPLEMENTATIONS[choose("evo_attention", implementation, refusals, preferred)]


def _check(q, prefixes, slopes, window, scale, block) -> None:
    if q.ndim != 4 or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"evo_attention: q must be float [B, n, H, K], got {q.dtype}{q.shape}")
    if window < 1:
        raise ValueError(f"evo_attention: window must be >= 1, got {window}")
    if block < 0:
        raise ValueError(f"evo_attention: block must be 0 or more, got {block}")
    if scale is not None and scale <= 0:
        raise ValueError(f"evo_attention: scale must be above 0, got {scale}")
    _expect("slopes", slopes, (3, q.shape[2]))
    for name, keys in prefixes.items():
        if keys is not None:
            _check_keys(name, keys, q, keys.time.shape[-1])
            if not keys.time.shape[-1]:
                raise ValueError(f"evo_attention: {name} has no slot; None leaves the branch out")


def _check_keys(of, keys, q, number) -> None:
    """k, v [B, number, H, K] and user_k, user_v [B, H, K] in q's dtype, the others [B, number]."""
    batch, _, heads, width = q.shape
    for name, x in keys._asdict().items():
        shape = {
            "k": (batch, number, heads, width),
            "v": (batch, number, heads, width),
            "user_k": (batch, heads, width),
            "user_v": (batch, heads, width),
        }.get(name)
        _expect(f"{of}: {name}", x, shape or (batch, number))
        if shape and x.dtype != q.dtype:
            raise ValueError(
                f"evo_attention: {of}: {name} must be {q.dtype} as q is, got {x.dtype}"
            )


def _expect(name, x, shape) -> None:
    """The shape, and that times and positions are int32 and masks booleans."""
    if tuple(x.shape) != shape:
        raise ValueError(f"evo_attention: {name} must be {list(shape)}, got {list(x.shape)}")
    kind = KINDS.get(name.split(": ")[-1])
    if kind and x.dtype != kind:
        raise ValueError(f"evo_attention: {name} must be {jnp.dtype(kind)}, got {x.dtype}")
