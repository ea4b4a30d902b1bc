"""How products of GPU kernels round: on a GPU as asked of JAX, exactly where interpreted; and the
instructions that a GPU is given for what has one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from kernels.triton import dot, exp2, fma, log2, sigmoid, sin

TF32 = jax.lax.DotAlgorithmPreset.TF32_TF32_F32
GPU = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="cuda")


@pytest.mark.parametrize(
    ("asked", "taken"),
    [(None, TF32), ("default", TF32), ("highest", jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3)],
)
def test_float32_on_a_gpu_is_rounded_to_tf32_unless_more_is_asked_for(asked, taken):
    x = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    mesh = AbstractMesh((1,), ("data",), abstract_device=GPU)
    with jax.sharding.use_abstract_mesh(mesh), jax.default_matmul_precision(asked):
        (product,) = jax.make_jaxpr(dot)(x, x).eqns
    assert product.params["precision"] == taken


def test_float32_is_exact_elsewhere_and_narrow_numbers_are_as_they_are():
    x = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    (product,) = jax.make_jaxpr(dot)(x, x).eqns
    assert product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2
    narrow = jax.ShapeDtypeStruct((16, 16), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=GPU)):
        (product,) = jax.make_jaxpr(dot)(narrow, narrow).eqns
    assert product.params["precision"] is None
    assert product.outvars[0].aval.dtype == jnp.float32


@pytest.mark.parametrize(
    ("function", "wanted", "instruction"),
    [
        (fma, lambda x, y, z: x * y + z, "fma.rn.f32"),
        (exp2, np.exp2, "ex2.approx.ftz.f32"),
        (log2, np.log2, "lg2.approx.ftz.f32"),
        (sin, np.sin, "sin.approx.ftz.f32"),
        (sigmoid, lambda x: 1 / (1 + np.exp(-x)), "rcp.approx.ftz.f32"),
    ],
)
def test_an_instruction_on_a_gpu_is_the_function_elsewhere(function, wanted, instruction):
    number = 3 if function is fma else 1
    x = np.random.default_rng(0).uniform(0.1, 3, (number, 16)).astype(np.float32)
    np.testing.assert_allclose(function(*map(jnp.asarray, x)), wanted(*x), rtol=1e-6)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=GPU)):
        text = str(jax.make_jaxpr(function)(*x))
    assert instruction in text


def test_numbers_meet_blocks_in_a_gpus_instruction():
    """Python's numbers and shapes that broadcast: the instruction itself takes equal shapes."""
    x = jax.ShapeDtypeStruct((16, 4), jnp.float32), jax.ShapeDtypeStruct((16, 1), jnp.float32)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=GPU)):
        result = jax.eval_shape(lambda x, z: fma(x, 0.5, z), *x)
    assert result.shape == (16, 4) and result.dtype == jnp.float32
