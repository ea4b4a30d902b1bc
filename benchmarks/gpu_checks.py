"""A kernel's results and each gradient, by name, against the XLA path.

In float64 on the host for small shapes, in float32 with full products on the device for the named
ones, of four requests: a full, a half, an empty history and one behaviour.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_timing import Bench
from benchmarks.histories import burst_times
from benchmarks.kernel_bytes import OPS
from kernels.dispatch import platform
from kernels.evo_attention import NEVER
from kernels.evo_attention import shapes as evo

EVO, STA, ABSORBED = OPS
DTYPES = ("bfloat16", "float32")
TF32 = "float32, products rounded to TF32"  # as a GPU takes them unless it is asked for more
TOLERANCE = {"float32": 2e-4, "bfloat16": 2e-2, TF32: 5e-3}  # of the largest value
VALID = (1.0, 0.5, 0.0, -1)  # of a check's requests: part of L, or minus the number of behaviours

BRANCHES = ("global", "transition", "local")
RESULTS = {
    EVO: [f"{queries}.{branch}" for queries in ("behaviours", "candidates") for branch in BRANCHES],
    STA: ["z"],
    ABSORBED: ["out"],
}
ARGUMENTS = {
    EVO: ("behaviours", "candidates"),
    STA: ("q", "k", "v", "mask", "bias"),
    ABSORBED: ("query", "memory", "weights"),
}
PARTS = {
    "behaviours": ("q", "global", "transition", "band", "slopes", "times", "mask"),
    "candidates": ("q", "global", "transition", "recent", "slopes", "request_time"),
}


def draw(op: str, shape: Any, dtype: str, strict: bool = False, ragged: bool = False) -> tuple:
    """Arrays for an op's call and its cotangents, last.

    Args:
      strict: for checks: numbers of four bits, so that bfloat16 products are exact and leaky
        ReLU's kink falls the same way for all. ragged: VALID histories, as strict ones are.
    """
    _, described = OPS[op].calls(shape, "xla", jnp.dtype(dtype))["backward"]
    wanted, structure = jax.tree.flatten(described)

    def array(key, x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.ones(x.shape, x.dtype)
        normal = jax.random.normal(key, x.shape)
        return (jnp.clip(jnp.round(8 * normal), -15, 15) / 8 if strict else normal).astype(x.dtype)

    @jax.jit
    def arrays(key):
        return [array(jax.random.fold_in(key, i), x) for i, x in enumerate(wanted)]

    drawn = structure.unflatten(arrays(jax.random.key(0, impl="rbg")))
    length = length_of(op, shape)
    parts = VALID if strict or ragged else (1.0,)
    valid = [round(part * length) if part >= 0 else -part for part in parts]
    mask = np.arange(length) >= length - np.resize(valid, shape.batch)[:, None]
    if op == EVO:
        return _with_times(drawn, shape, mask)
    mask = jnp.asarray(mask)
    if op == STA:
        return *drawn[:3], mask, *drawn[4:]
    query, memory, weights, d_out = drawn
    keys, values = (jnp.where(mask[..., None], x, 0) for x in (memory.keys, memory.values))
    return query, memory.replace(keys=keys, values=values), weights, d_out


def _with_times(drawn, shape: evo.Shape, mask: np.ndarray):
    """The integers of evo_attention's calls, and slopes as a model begins with."""
    behaviours, candidates, d_out = drawn
    q, *prefixes, band, _, _, _ = behaviours
    rng = np.random.default_rng(0)
    times = np.where(mask, burst_times(*mask.shape), 0)
    slopes = slopes_of(shape.heads)
    placed = []
    for prefix in prefixes:
        at = np.sort(rng.integers(-1, shape.length, prefix.time.shape), 1)
        unused = (rng.random(at.shape) < 0.2) | ~mask[:, -1:]
        placed.append(
            prefix._replace(
                time=np.take_along_axis(times, np.maximum(at, 0), 1),
                position=np.where(unused, NEVER, at).astype(np.int32),
            )
        )
    recent = candidates[3]
    last = slice(-recent.mask.shape[1], None)
    recent = recent._replace(time=times[:, last], mask=mask[:, last])
    return jax.tree.map(
        jnp.asarray,
        (
            (q, *placed, band, slopes, times, mask),
            (candidates[0], *placed, recent, slopes, times[:, -1] + 1000),
            d_out,
        ),
    )


def slopes_of(heads: int) -> jax.Array:
    """[3, H]."""
    return jnp.tile(2.0 ** (-8 / heads * jnp.arange(heads, dtype=jnp.float32)), (3, 1))


def length_of(op: str, shape: Any) -> int:
    """Behaviours of a request."""
    return shape.rows if op == ABSORBED else shape.length


def call_of(
    op: str, shape: Any, implementation: str, dtype: Any, both: bool, **options: Any
) -> Callable:
    """The op's call as {name: array}: the results, and with `both` each gradient.

    Of what `draw` gives, with `both`; else of all but the cotangents.
    """
    forward, _ = OPS[op].calls(shape, implementation, dtype, **options)["forward"]

    def results(*arguments):
        return dict(zip(RESULTS[op], jax.tree.leaves(forward(*arguments)), strict=True))

    def results_and_gradients(*arguments):
        *arguments, cotangents = arguments
        out, pull = jax.vjp(forward, *arguments)
        gradients = dict(zip(ARGUMENTS[op], pull(cotangents), strict=True))
        for name in gradients.keys() & PARTS.keys():
            gradients[name] = dict(zip(PARTS[name], gradients[name], strict=True))
        named = dict(zip(RESULTS[op], jax.tree.leaves(out), strict=True))
        for path, x in jax.tree_util.tree_leaves_with_path(gradients):
            if x.dtype != jax.dtypes.float0:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                named[f"gradient of {name}"] = x
        return named

    return results_and_gradients if both else results


def check(op: str, shape: Any, exact: bool, bench: Bench) -> dict:
    """The kernel's errors by name, relative to the largest value.

    Args:
      exact: the reference is computed in float64, on the host.
    """
    result = {
        "kind": "check",
        "op": op,
        "shape": shape._asdict(),
        "against": "XLA path, " + ("float64" if exact else "float32, full products"),
        "dtypes": {},
    }
    wide = np.float64 if exact else np.float32
    jit = functools.partial(jax.jit, compiler_options=bench.compiler_options)
    reference = jit(call_of(op, shape, "xla", wide, True))
    for name in (*DTYPES, *[TF32] * (platform() == "gpu")):
        dtype = name.split(",")[0]
        arguments = draw(op, shape, dtype, strict=True)
        with contextlib.ExitStack() as stack:
            if exact:
                stack.enter_context(jax.enable_x64(True))
                stack.enter_context(jax.default_device(jax.devices("cpu")[0]))
            stack.enter_context(jax.default_matmul_precision("highest"))
            wanted = jax.tree.map(np.asarray, reference(*jax.tree.map(_cast(wide), arguments)))
        bench.begin(f"{bench.kernel}, {name}")
        call = call_of(op, shape, bench.kernel, dtype, True, interpret=bench.interpret)
        with jax.default_matmul_precision("default" if name == TF32 else "highest"):
            got = jit(call)(*arguments)
        least = {"gradient of bias": 1.0} if getattr(shape, "activation", "") == "softmax" else {}
        errors = {n: _error(got[n], x, least.get(n, 1e-3)) for n, x in wanted.items()}
        worst = max(errors, key=lambda n: errors[n] if errors[n] == errors[n] else 1e9)
        result["dtypes"][name] = {
            "tolerance": TOLERANCE[name],
            "worst": worst,
            "errors": errors,
            "ok": errors[worst] <= TOLERANCE[name],
        }
    result["ok"] = all(x["ok"] for x in result["dtypes"].values())
    return result


def _cast(dtype):
    def cast(x):
        x = np.asarray(x)
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return cast


def _error(got, wanted, least: float) -> float:
    """Relative to the largest value, or to `least`: a softmax's bias has a gradient of 0, of which
    sums over a history leave their rounding."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    size = max(np.abs(wanted).max(initial=0), least)
    return float(np.abs(got - wanted).max(initial=0) / size)
