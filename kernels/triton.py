"""Blocks in Pallas' Triton lowering: powers of 2, padded by masked loads."""

from __future__ import annotations

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

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
