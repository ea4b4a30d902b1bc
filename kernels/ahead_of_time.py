"""Compiling for accelerators that this host does not have.

    tpu_bytes("v5e:2x2", function, *arguments)       -> Bytes of one device; a real TPU compile
    cuda_text(function, *arguments)                  -> StableHLO text, Triton kernels inside
    cuda_bytes(target_config, function, *arguments)  -> Bytes; a real compile, wants jax[cuda13]

Arguments are arrays or `jax.ShapeDtypeStruct`s, in any tree. Without a sharding they are whole on
one device; to compile over several, make the mesh (`tpu_mesh`), give arguments shardings on it and
call `compile_on`. `dispatch.platform()` sees the target.

A compile shows that a kernel is accepted and what memory it takes; it says nothing about speed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

# What libtpu looks for on a TPU host: without it, it asks a metadata server, complains on stderr,
# and refuses a second process.
HOST_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
TPU_SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}  # the smallest of each
# XLA's O0: SparseCTR's step compiles in two fifths of the time, and its temporaries are a tenth
# larger.
LEAST_EFFORT = {"optimization_level": 9}


class Bytes(NamedTuple):
    """Memory of one device, bytes, as the compiler counts it."""

    arguments: int
    outputs: int
    temporaries: int
    code: int


def can_compile_for_tpu() -> bool:
    """Whether the TPU compiler (libtpu, of the extra `test` or `tpu`) is installed."""
    return importlib.util.find_spec("libtpu") is not None


def tpu_mesh(
    topology: str, shape: Sequence[int] = (1,), axes: Sequence[str] = ("data",)
) -> jax.sharding.Mesh:
    """A mesh over the first devices of a named slice, as "v5e:4x4"; axes are Auto.

    Raises:
      RuntimeError: no TPU compiler, or no such topology.
    """
    if jax.default_backend() != "tpu":
        for name, value in HOST_WITHOUT_TPU.items():
            os.environ.setdefault(name, value)
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    devices = np.array(devices[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(shape))


def compile_on(mesh: Mesh, function: Callable, *arguments: Any) -> jax.stages.Compiled:
    """`jax.jit(function)` compiled for the mesh; arguments without a sharding are replicated."""
    replicated = NamedSharding(mesh, PartitionSpec())

    def described(x):
        sharding = getattr(x, "sharding", None)
        sharding = sharding if isinstance(sharding, NamedSharding) else replicated
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*jax.tree.map(described, arguments)).compile()


def bytes_of(compiled: jax.stages.Compiled) -> Bytes:
    """What one device holds while the compiled function runs."""
    stats = compiled.memory_analysis()
    return Bytes(
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.generated_code_size_in_bytes,
    )


def tpu_bytes(topology: str, function: Callable, *arguments: Any) -> Bytes:
    """Compiles for one device of the slice; raises what the TPU compiler raises."""
    return bytes_of(compile_on(tpu_mesh(topology), function, *arguments))


def cuda_text(function: Callable, *arguments: Any, device_kind: str = "NVIDIA H200") -> str:
    """Lowers for CUDA without a device: what XLA would be given."""
    with _cuda_mesh(device_kind):
        traced = jax.jit(function).trace(*jax.tree.map(_shape, arguments))
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def cuda_bytes(
    target_config: str, function: Callable, *arguments: Any, device_kind: str = "NVIDIA H200"
) -> Bytes:
    """Compiles for the GPU that a text-format XLA target description tells of (jax >= 0.11)."""
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    devices = topologies.get_topology_desc(
        platform="cuda", target_config=target_config, topology="1x1x1"
    ).devices
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    with _cuda_mesh(device_kind):
        return bytes_of(jax.jit(function).lower(*arguments).compile())


def _cuda_mesh(device_kind: str):
    device = AbstractDevice(device_kind=device_kind, num_cores=None, platform="cuda")
    return jax.sharding.use_abstract_mesh(
        AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    )


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
