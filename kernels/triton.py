"""Blocks and products in Pallas' Triton lowering: powers of 2, padded by masked loads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels import dispatch, products

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
    """products.dot; on a GPU float32 is split in two TF32 numbers, whose three larger products the
    matrix units add: Triton's float32 product does without them."""
    if x.dtype != jnp.float32 or dispatch.platform() != "gpu":
        return products.dot(x, y, contract)
    return jax.lax.dot_general(
        x,
        y,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3,
        preferred_element_type=jnp.float32,
    )
