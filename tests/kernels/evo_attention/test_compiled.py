"""The kernels through the compilers of devices that are not here: no run, no speed."""

import jax.numpy as jnp
import pytest

from kernels import ahead_of_time
from kernels.evo_attention.shapes import SHAPES, calls, of_length
from tests.kernels.cases import needs_tpu_compiler

slow = pytest.mark.slow
FAST = [("v5e", 1024)]
TARGETS = [
    (name, length)
    for name in ahead_of_time.TPU_SLICES
    for length in (50, 128, 1024, 4096, 16384)
    if (name, length) not in FAST
]


def compile_for_tpu(slice_name, shape, dtype=jnp.float32):
    for function, arguments in calls(shape, "pallas_tpu", dtype).values():
        bytes_ = ahead_of_time.tpu_bytes(ahead_of_time.TPU_SLICES[slice_name], function, *arguments)
        # Beside arguments and results, a dozen arrays as large as q, padded to whole tiles, and
        # half a dozen as large as the slots' keys, which short histories pad as much.
        row = shape.batch * max(shape.heads * shape.width, 8) * 4
        q, keys = row * -(-shape.length // 128) * 128, row * 128
        assert bytes_.temporaries < 12 * q + 6 * keys + 2**25


@needs_tpu_compiler
@pytest.mark.parametrize(
    "slice_name, length", FAST + [pytest.param(*target, marks=slow) for target in TARGETS]
)
def test_compiles_for_tpu(slice_name, length):
    compile_for_tpu(slice_name, of_length(length))


@slow
@needs_tpu_compiler
@pytest.mark.parametrize("name", ["sparsity_1", "sparsity_3", "sparsity_4", "wide", "movielens"])
def test_named_shapes_compile_for_tpu(name):
    compile_for_tpu("v5e", SHAPES[name], jnp.bfloat16)


def lower_for_cuda(name, dtype):
    lowered = calls(SHAPES[name], "pallas_gpu", dtype)
    for way, kernels in (("forward", 3), ("backward", 6)):
        function, arguments = lowered[way]
        text = ahead_of_time.cuda_text(function, *arguments)
        assert text.count("__gpu$xla.gpu.triton") == kernels


def test_lowers_for_cuda():
    lower_for_cuda("sparsity_2", jnp.float32)


@slow
@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes_lower_for_cuda(name):
    lower_for_cuda(name, jnp.bfloat16)


@pytest.mark.parametrize(("kind", "kernels"), [("NVIDIA H200", 3), ("a GPU of another kind", 0)])
def test_the_kernel_is_the_default_of_the_gpu_that_it_was_measured_on(kind, kernels):
    function, arguments = calls(of_length(64), None)["forward"]
    text = ahead_of_time.cuda_text(function, *arguments, device_kind=kind)
    assert text.count("__gpu$xla.gpu.triton") == kernels


def test_what_was_not_measured_is_no_default():
    for name, kernels in (("sparsity_2", 3), ("sparsity_3", 0), ("sparsity_4", 0)):
        function, arguments = calls(of_length(64, name), None)["forward"]
        text = ahead_of_time.cuda_text(function, *arguments, device_kind="NVIDIA H200")
        assert text.count("__gpu$xla.gpu.triton") == kernels


@needs_tpu_compiler
def test_no_kernel_is_a_default_on_a_tpu():
    function, arguments = calls(of_length(64)._replace(batch=1), None)["forward"]
    mesh = ahead_of_time.tpu_mesh("v5e:2x2")
    compiled = ahead_of_time.compile_on(mesh, function, *arguments)
    assert "tpu_custom_call" not in compiled.as_text()
