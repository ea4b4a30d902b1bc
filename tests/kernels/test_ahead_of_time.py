"""Compiling for what this host does not have: the target is seen, and the bytes are its own."""

import jax
import jax.numpy as jnp
import pytest

from kernels import ahead_of_time, dispatch

needs_tpu_compiler = pytest.mark.skipif(
    not ahead_of_time.can_compile_for_tpu(), reason="libtpu is not installed"
)
MATRIX = jax.ShapeDtypeStruct((256, 128), jnp.float32)


@needs_tpu_compiler
@pytest.mark.parametrize("topology", ahead_of_time.TPU_SLICES.values())
def test_a_tpu_compile_names_its_target_and_counts_bytes(topology):
    seen = []

    def double(tree):
        seen.append((dispatch.platform(), dispatch.device_kind()))
        return 2 * tree["x"]

    counted = ahead_of_time.tpu_bytes(topology, double, {"x": MATRIX})
    assert counted.arguments == counted.outputs == 256 * 128 * 4
    assert seen[0][0] == "tpu" and seen[0][1].startswith("TPU v")


@needs_tpu_compiler
def test_arguments_may_be_sharded_over_a_slice():
    mesh = ahead_of_time.tpu_mesh("v5e:2x2", (4,), ("data",))
    rows = jax.ShapeDtypeStruct(
        MATRIX.shape, MATRIX.dtype, sharding=jax.NamedSharding(mesh, jax.P("data"))
    )
    compiled = ahead_of_time.compile_on(mesh, lambda x, y: x @ y.T, rows, MATRIX)
    counted = ahead_of_time.bytes_of(compiled)
    assert counted.arguments == MATRIX.size * 4 // 4 + MATRIX.size * 4
    assert counted.outputs == 256 * 256 * 4 // 4


def test_a_lowering_for_cuda_sees_a_gpu():
    seen = []

    def double(x):
        seen.append((dispatch.platform(), dispatch.device_kind()))
        return 2 * x

    assert "stablehlo.multiply" in ahead_of_time.cuda_text(double, MATRIX)
    assert seen == [("gpu", "NVIDIA H200")]
