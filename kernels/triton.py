"""Pallas' Triton lowering: blocks (powers of 2, padded by masked loads), products, starting it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels import dispatch, products

LOG2_E = 1.4426950408889634
LEAST = 16  # of every side of a product, for the matrix units


def power(n: int) -> int:
    """The side of a block that holds n."""
    return max(LEAST, pl.next_power_of_2(n))


def load(where) -> jax.Array:
    """(part of a ref, which of it exists) -> the block, 0 where nothing does."""
    at, exists = where
    return plgpu.load(at, mask=exists, other=0.0)


def store(where, block) -> None:
    """What exists of the block, in the ref's dtype."""
    at, exists = where
    plgpu.store(at, block.astype(at.dtype), mask=exists)


def dot(x: jax.Array, y: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """float32 of two matrices over axes `contract`, narrower ones as they are.

    float32 ones on a GPU as XLA takes them there: rounded to TF32, or under
    `jax.default_matmul_precision("highest")` split in two TF32 numbers, whose three larger products
    the matrix units add. (Triton's own float32 product does without those units.)
    """
    if x.dtype != jnp.float32 or dispatch.platform() != "gpu":
        return products.dot(x, y, contract)
    exact = jax.config.jax_default_matmul_precision in ("highest", "float32")
    presets = jax.lax.DotAlgorithmPreset
    return jax.lax.dot_general(
        x,
        y,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=presets.TF32_TF32_F32_X3 if exact else presets.TF32_TF32_F32,
        preferred_element_type=jnp.float32,
    )


def fma(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    """x * y + z of float32, rounded once: as XLA calls Triton, it contracts nothing by itself."""
    instruction = "fma.rn.f32 $0, $1, $2, $3;"
    return _assembly(instruction, x, y, z, otherwise=lambda x, y, z: x * y + z)


def exp2(x: jax.Array) -> jax.Array:
    """2^x of float32 by the unit that approximates it, to 2^-22; jnp takes eight times as long."""
    return _assembly("ex2.approx.ftz.f32 $0, $1;", x, otherwise=jnp.exp2)


def log2(x: jax.Array) -> jax.Array:
    """As exp2, of x > 0; off by 2^-22."""
    return _assembly("lg2.approx.ftz.f32 $0, $1;", x, otherwise=jnp.log2)


def sin(x: jax.Array) -> jax.Array:
    """As exp2, of -pi to pi; off by 2^-20.9."""
    return _assembly("sin.approx.ftz.f32 $0, $1;", x, otherwise=jnp.sin)


def sigmoid(x: jax.Array) -> jax.Array:
    """Of float32, by the units that approximate powers and reciprocals; of itself off by 2^-21, and
    by |x| 2^-24 where x < 0."""
    instruction = "rcp.approx.ftz.f32 $0, $1;"
    return _assembly(instruction, 1 + exp2(x * -LOG2_E), otherwise=lambda x: 1 / x)


def barrier() -> None:
    """What the program's threads stored before it, all of them load after it."""
    if dispatch.platform() == "gpu":
        plgpu.debug_barrier()


def _assembly(instruction: str, *operands: jax.Array, otherwise: Callable) -> jax.Array:
    """The PTX instruction on each element; `otherwise` where a kernel is interpreted."""
    if dispatch.platform() != "gpu":
        return otherwise(*operands)
    operands = jnp.broadcast_arrays(*(jnp.asarray(x, jnp.float32) for x in operands))
    (result,) = plgpu.elementwise_inline_asm(
        instruction,
        args=operands,
        constraints=",".join(["=f"] + ["f"] * len(operands)),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(operands[0].shape, jnp.float32)],
    )
    return result


def call(
    kernel: Callable, outputs: Any, name: str, interpret: Any, warps: int, stages: int, **how: Any
) -> Callable:
    """pl.pallas_call, lowered by Triton."""
    # Deprecated from jax 0.11 on. It is lowering that warns, which a caller may start long after
    # this function is done: a filter that ends here would not hold.
    warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
    params = plgpu.CompilerParams(num_warps=warps, num_stages=stages)
    return pl.pallas_call(
        kernel, out_shape=outputs, name=name, interpret=interpret, compiler_params=params, **how
    )
