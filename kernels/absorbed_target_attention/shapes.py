"""Real shapes, shared by tests and benchmarks."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.absorbed_target_attention.api import Memory
from kernels.absorbed_target_attention.reference import Weights


class Shape(NamedTuple):
    """Axis letters of api.py: B, C, K, d, h."""

    batch: int
    candidates: int
    rows: int
    width: int
    hidden: int


SHAPES = {
    # The paper's L = 10,000, r = 128 and d = 16; h = 64 is ours.
    "paper_serving": Shape(8, 512, 128, 16, 64),
    "paper_training": Shape(64, 1, 10_000, 16, 64),
    "movielens": Shape(256, 1, 200, 16, 64),
    "long_16k": Shape(8, 32, 16384, 16, 64),
}


def of_rows(rows: int, name: str = "long_16k") -> Shape:
    """A named shape with another number of rows."""
    return SHAPES[name]._replace(rows=rows)


def arguments(shape: Shape, dtype: jnp.dtype = jnp.float32):
    """query, memory and weights of absorbed_target_attention."""
    b, c, k, d, h = shape

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    def weight(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    memory = Memory(array(b, k, d), array(b, k, d), array(b, d))
    return array(b, c, d), memory, Weights(weight(d, h), weight(d, h), weight(d, h), weight(h))
