"""How products of GPU kernels round: on a GPU as asked of JAX, exactly where interpreted."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from kernels.triton import dot

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
