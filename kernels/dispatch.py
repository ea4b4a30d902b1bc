"""Which implementation of an op runs, and in which block sizes.

An op says what cannot run here (`refusals`, each with its reason) and what has been shown to beat
XLA on which device (`preferred`). A named implementation that cannot run raises; a choice left
open falls back to XLA. `scope` sets the choice, and the mesh axes that hold the batch, for all ops
called in it.

All of it is asked while the caller is traced. The platform is the one that is compiled for, not the
one of this process: under `jax.set_mesh` of a topology's devices (kernels/ahead_of_time.py) a CPU
host compiles for a TPU.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from kernels import meshes

T = TypeVar("T")

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu")
RUNS_ON = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}
PLATFORMS = {"cuda": "gpu", "rocm": "gpu"}  # how a device names itself -> what it is
OTHER_GPUS = ("AMD", "Radeon", "gfx")  # how the kinds of devices begin that ROCm runs on
CHOICES = ("auto", "xla", "pallas")  # of a scope: what was measured, XLA, the platform's kernels


class CannotRun(ValueError):
    """The implementation that was asked for cannot run here; the message says why."""


@dataclasses.dataclass(frozen=True)
class _Scope:
    """kernels, batch_axes: as of `scope`. used: ops that ran as a kernel in it."""

    kernels: str = "auto"
    batch_axes: tuple[str, ...] = ()
    used: set[str] = dataclasses.field(default_factory=set)


_OUTSIDE = _Scope()
_SCOPE = contextvars.ContextVar("scope", default=_OUTSIDE)


@contextlib.contextmanager
def scope(kernels: str, batch_axes: Sequence[str] = ()) -> Iterator[None]:
    """For the ops that are called, so traced, within.

    Args:
      kernels: one of CHOICES, where a call names no implementation.
      batch_axes: mesh axes that the requests are split over: what lets kernels run under a mesh
        (kernels/meshes.py).
    Raises:
      ValueError, CannotRun: as of `check`.
      CannotRun: the choice is "pallas" and no op that has kernels was called.
    """
    check(kernels)
    scoped = _Scope(kernels, tuple(batch_axes))
    token = _SCOPE.set(scoped)
    try:
        yield
    finally:
        _SCOPE.reset(token)
    if kernels == "pallas" and not scoped.used:
        raise CannotRun("kernels 'pallas': what was called has no kernels; choose 'xla' or 'auto'")


def check(kernels: str) -> None:
    """Raises CannotRun if that is none of CHOICES, or the platform has no kernels."""
    if kernels not in CHOICES:
        raise CannotRun(f"kernels must be one of {', '.join(CHOICES)}, got {kernels!r}")
    if kernels == "pallas" and platform() not in RUNS_ON.values():
        raise CannotRun(
            f"kernels 'pallas' cannot run: they are for TPUs and GPUs, the target is a "
            f"{platform()}; choose 'xla' or 'auto'"
        )


def request_axes() -> tuple[str, ...]:
    """The axes over which a kernel called here has to be mapped, as meshes.over_requests takes
    them."""
    return meshes.axes_to_map(_SCOPE.get().batch_axes)


def requests_are_local(batch: int) -> bool:
    """Whether each device has all of its requests to itself, or can be given them by mapping over
    `request_axes`: only then may an op take requests apart without a transfer between devices."""
    return meshes.refusal(_SCOPE.get().batch_axes, batch, partitioned=False) is None


def requests_of_a_device(batch: int) -> int:
    """How many of B requests a device has, as `request_axes` split them."""
    mesh = jax.sharding.get_abstract_mesh()
    return batch // math.prod(mesh.shape[axis] for axis in request_axes())


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


def cannot_run_here(interpret: Any, batch: int) -> dict[str, str]:
    """The refusals that every op shares: another platform, or a mesh that a kernel cannot be
    mapped over.

    Args:
      interpret: the op's; interpreted kernels run on any platform, and XLA partitions them.
      batch: B.
    """
    refusals = {}
    if not interpret:
        here = platform()
        refusals = {
            name: f"it runs on a {target}, the target is a {here} (interpret=True runs anywhere)"
            for name, target in RUNS_ON.items()
            if target != here
        }
        if here == "gpu" and device_kind().startswith(OTHER_GPUS):
            reason = f"it is written for NVIDIA's GPUs, the target is an {device_kind()}"
            refusals["pallas_gpu"] = reason
    reason = meshes.refusal(_SCOPE.get().batch_axes, batch, partitioned=bool(interpret))
    return {name: reason for name in RUNS_ON if reason} | refusals


def choose(
    op: str,
    implementation: str | None,
    refusals: Mapping[str, str],
    preferred: Mapping[str, Sequence[str]],
) -> str:
    """The implementation to run.

    Args:
      op: its name, for messages.
      implementation: one of IMPLEMENTATIONS; None does as the scope says, of whose CHOICES "auto"
        takes the first of `preferred[device_kind()]` that is not refused, else "xla".
      refusals: implementation -> why it cannot run here on these arguments.
      preferred: device kind -> implementations that were measured to beat XLA there, best first.
    Raises:
      ValueError: an unknown implementation.
      CannotRun: a named one, or the scope's "pallas", that is refused; with its reason.
    """
    scoped = _SCOPE.get()
    named = implementation
    if named is None and scoped.kernels != "auto":
        kernel_of = {target: name for name, target in RUNS_ON.items()}
        named = "xla" if scoped.kernels == "xla" else kernel_of[platform()]
    if named is None:
        candidates = preferred.get(device_kind(), ())
        named = next((name for name in candidates if name not in refusals), "xla")
    if named not in IMPLEMENTATIONS:
        raise ValueError(
            f"{op}: implementation must be one of {IMPLEMENTATIONS} or None, got {named!r}"
        )
    if named in refusals:
        raise CannotRun(f"{op}: implementation {named!r} cannot run: {refusals[named]}")
    if named != "xla":
        scoped.used.add(op)
    return named


def checked_blocks(op: str, blocks: T) -> T:
    """The same. Raises ValueError where one of the sizes is no positive number."""
    if min(blocks) < 1:
        raise ValueError(f"{op}: blocks must be 1 or more, got {tuple(blocks)}")
    return blocks


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
