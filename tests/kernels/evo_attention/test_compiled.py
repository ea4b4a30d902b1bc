"""The kernels through the compilers of devices that are not here: no run, no speed."""

import jax
import jax.numpy as jnp
import pytest

from kernels import ahead_of_time
from kernels.evo_attention import RelTemporal, behaviour_branches, candidate_branches
from kernels.evo_attention.shapes import SHAPES, behaviour_arguments, candidate_arguments

needs_tpu_compiler = pytest.mark.skipif(
    not ahead_of_time.can_compile_for_tpu(), reason="no TPU compiler (libtpu) is installed"
)
slow = pytest.mark.slow
LENGTHS = (50, 128, 1024, 4096, 16384)
FAST = [("v5e", 1024)]
TARGETS = [(t, n) for t in ahead_of_time.TPU_SLICES for n in LENGTHS if (t, n) not in FAST]


def both(shape, implementation, backward):
    """The two calls of a model's block, or their gradients, as a function of their arguments."""

    def forward(behaviours, candidates):
        options = dict(rel=RelTemporal(), implementation=implementation)
        out = behaviour_branches(*behaviours, window=shape.window, **options)
        return out + candidate_branches(*candidates, **options)

    def loss(behaviours, candidates):
        return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in forward(behaviours, candidates))

    return jax.grad(loss, (0, 1), allow_int=True) if backward else forward


def arguments(shape, dtype):
    return behaviour_arguments(shape, dtype), candidate_arguments(shape, dtype)


def compile_for_tpu(slice_name, shape, dtype=jnp.float32):
    for backward in (False, True):
        function = both(shape, "pallas_tpu", backward)
        bytes_ = ahead_of_time.tpu_bytes(
            ahead_of_time.TPU_SLICES[slice_name], function, *arguments(shape, dtype)
        )
        # Beside arguments and results, at most a dozen arrays as large as q, padded to whole tiles.
        padded = -(-shape.length // 128) * 128
        largest = shape.batch * padded * max(shape.heads * shape.width, 8) * 4
        assert 0 <= bytes_.temporaries < 12 * largest + 2**25


@needs_tpu_compiler
@pytest.mark.parametrize(
    "slice_name, length", FAST + [pytest.param(*target, marks=slow) for target in TARGETS]
)
def test_compiles_for_tpu(slice_name, length):
    compile_for_tpu(slice_name, SHAPES["sparsity_2"]._replace(batch=4, length=length))


@slow
@needs_tpu_compiler
@pytest.mark.parametrize("name", ["sparsity_1", "sparsity_3", "sparsity_4", "wide", "movielens"])
def test_named_shapes_compile_for_tpu(name):
    compile_for_tpu("v5e", SHAPES[name], jnp.bfloat16)


def lower_for_cuda(name, dtype):
    for backward, kernels in ((False, 2), (True, 4)):
        function = both(SHAPES[name], "pallas_gpu", backward)
        text = ahead_of_time.cuda_text(function, *arguments(SHAPES[name], dtype))
        assert text.count("__gpu$xla.gpu.triton") == kernels


def test_lowers_for_cuda():
    lower_for_cuda("sparsity_2", jnp.float32)


@slow
@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes_lower_for_cuda(name):
    lower_for_cuda(name, jnp.bfloat16)


def test_no_kernel_is_a_default_on_a_gpu():
    shape = SHAPES["sparsity_2"]._replace(batch=1, length=64)
    text = ahead_of_time.cuda_text(both(shape, None, False), *arguments(shape, jnp.float32))
    assert "triton" not in text


@needs_tpu_compiler
def test_no_kernel_is_a_default_on_a_tpu():
    shape = SHAPES["sparsity_2"]._replace(batch=1, length=64)
    mesh = ahead_of_time.tpu_mesh("v5e:2x2")
    compiled = ahead_of_time.compile_on(
        mesh, both(shape, None, False), *arguments(shape, jnp.float32)
    )
    assert "tpu_custom_call" not in compiled.as_text()


def main():
    """The table of compiled bytes: about 262,144 behaviours, float32, Sparsity-2."""
    print("| target | L | B | arguments | forward: temporaries | gradients: temporaries |")
    print("|---|---|---|---|---|---|")
    for slice_name, topology in ahead_of_time.TPU_SLICES.items():
        for length in LENGTHS:
            shape = SHAPES["sparsity_2"]._replace(batch=2**18 // length, length=length)
            given = arguments(shape, jnp.float32)
            forward, gradients = (
                ahead_of_time.tpu_bytes(topology, both(shape, "pallas_tpu", backward), *given)
                for backward in (False, True)
            )
            row = (forward.arguments, forward.temporaries, gradients.temporaries)
            row = " | ".join(f"{x / 2**20:,.1f}" for x in row)
            print(f"| {slice_name} | {length:,} | {shape.batch:,} | {row} |", flush=True)
    print("MiB on one device, one block's two calls together.")


if __name__ == "__main__":
    main()
