"""Which implementation of an op runs, and in which block sizes.

An op says what cannot run here (`refusals`, each with its reason) and what has been shown to beat
XLA on which platform (`preferred`). A named implementation that cannot run raises; a choice left
open falls back to XLA.

All of it is asked while the caller is traced. The platform is the one that is compiled for, not the
one of this process: under `jax.set_mesh` of a topology's devices (kernels/ahead_of_time.py) a CPU
host compiles for a TPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

T = TypeVar("T")

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu")
RUNS_ON = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}
PLATFORMS = {"cuda": "gpu", "rocm": "gpu"}  # how a device names itself -> what it is


def platform() -> str:
    """ "cpu", "tpu" or "gpu": that of the mesh set at trace time, else the default backend's."""
    device = _mesh_device()
    name = device.platform if device is not None and device.platform else jax.default_backend()
    return PLATFORMS.get(name, name)


def device_kind() -> str:
    """The target's device kind, as "TPU v5 lite" or "NVIDIA H200"; found as `platform` is."""
    device = _mesh_device()
    return device.device_kind if device is not None else jax.devices()[0].device_kind


def _mesh_device() -> Any:
    """What the set mesh says of its devices: device_kind and platform; None without such a mesh.

    `jax.set_mesh` of a concrete mesh fills it in; an AbstractMesh may have been made without.
    """
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def cannot_run_here(interpret: Any) -> dict[str, str]:
    """The refusals that every op shares: another platform, or a mesh that XLA would partition.

    Args:
      interpret: the op's; interpreted kernels are plain XLA, so anything true refuses nothing.
    """
    if interpret:
        return {}
    here = platform()
    refusals = {
        name: f"it runs on a {target}, the target is a {here} (interpret=True runs anywhere)"
        for name, target in RUNS_ON.items()
        if target != here
    }
    mesh = jax.sharding.get_abstract_mesh()
    automatic = {a: mesh.shape[a] for a in (*mesh.auto_axes, *mesh.explicit_axes)}
    if any(size > 1 for size in automatic.values()):
        reason = f"XLA cannot partition a kernel over the mesh axes {automatic}: use jax.shard_map"
        refusals = {name: refusals.get(name, reason) for name in RUNS_ON}
    return refusals


def choose(
    op: str,
    implementation: str | None,
    refusals: Mapping[str, str],
    preferred: Mapping[str, Sequence[str]],
) -> str:
    """The implementation to run.

    Args:
      op: its name, for messages.
      implementation: one of IMPLEMENTATIONS; None takes the first of `preferred[platform()]` that
        is not refused, else "xla".
      refusals: implementation -> why it cannot run here on these arguments.
      preferred: platform -> implementations that were measured to beat XLA there, best first.
    Raises:
      ValueError: an unknown implementation, or a named one that is refused, with its reason.
    """
    if implementation is None:
        candidates = preferred.get(platform(), ())
        return next((name for name in candidates if name not in refusals), "xla")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{op}: implementation must be one of {IMPLEMENTATIONS} or None, got {implementation!r}"
        )
    if implementation in refusals:
        raise ValueError(
            f"{op}: implementation {implementation!r} cannot run: {refusals[implementation]}"
        )
    return implementation


def block_sizes(
    table: Mapping[tuple[str, str, int], T], device_kind: str, dtype: Any, length: int, default: T
) -> T:
    """The entry of the smallest shape bucket that holds `length`, else the default.

    Args:
      table: (device kind, name of a dtype, largest length of the bucket) -> block sizes.
      default: what compiles on every device.
    """
    name = np.dtype(dtype).name
    buckets = [n for kind, of, n in table if kind == device_kind and of == name and n >= length]
    return table[device_kind, name, min(buckets)] if buckets else default
