"""Real shapes, shared by tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.absorbed_target_attention.api import Memory, absorbed_target_attention
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


def of_length(rows: int, name: str = "long_16k") -> Shape:
    """A named shape with another number of rows."""
    return SHAPES[name]._replace(rows=rows)


def calls(
    shape: Shape,
    implementation: str,
    dtype: jnp.dtype = jnp.float32,
    form: str = "joint",
    **options: Any,
) -> dict[str, tuple[Callable, tuple]]:
    """{"forward", "backward"}: a function and what it takes; the latter gives all gradients.

    Options are the op's, as `blocks` and `interpret`.
    """
    b, c, k, d, h = shape
    query, rows = jax.ShapeDtypeStruct((b, c, d), dtype), jax.ShapeDtypeStruct((b, k, d), dtype)
    memory = Memory(rows, rows, jax.ShapeDtypeStruct((b, d), dtype))
    weight = jax.ShapeDtypeStruct((d, h), jnp.float32)
    weights = Weights(weight, weight, weight, jax.ShapeDtypeStruct((h,), jnp.float32))

    def forward(query, memory, weights):
        return absorbed_target_attention(
            query, memory, weights, form=form, implementation=implementation, **options
        )

    def backward(query, memory, weights, dout):
        return jax.vjp(forward, query, memory, weights)[1](dout)

    arguments = (query, memory, weights)
    return {"forward": (forward, arguments), "backward": (backward, (*arguments, query))}
