"""Real shapes, shared by tests and benchmarks."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Shape(NamedTuple):
    """Axis letters of api.py; `shared`: values without a head axis."""

    batch: int
    candidates: int
    length: int
    segment: int
    heads: int
    key_width: int
    value_width: int
    shared: bool

    @property
    def segments(self) -> int:
        return self.length // self.segment


SHAPES = {
    # The paper's L, w, heads and widths, d = 128; one candidate per row, as it trains.
    "paper": Shape(256, 1, 1000, 10, 2, 16, 64, False),
    # The same, all candidates of a request at once, the value projection after the sums.
    "paper_serving": Shape(8, 128, 1000, 10, 2, 16, 128, True),
    "movielens": Shape(256, 1, 200, 10, 2, 8, 32, False),
    "long_16k": Shape(8, 32, 16384, 16, 2, 16, 64, False),
}


def of_length(length: int, name: str = "paper_serving") -> Shape:
    """A named shape at another length, filled up to whole segments as the model pads it."""
    shape = SHAPES[name]
    return shape._replace(length=-(-length // shape.segment) * shape.segment)


def arguments(shape: Shape, dtype: jnp.dtype = jnp.float32) -> list[jax.ShapeDtypeStruct]:
    """q, k, v, mask and bias of segmented_target_attention."""
    b, c, length, _, h, kq, kv, shared = shape
    return [
        jax.ShapeDtypeStruct((b, c, h, kq), dtype),
        jax.ShapeDtypeStruct((b, length, h, kq), dtype),
        jax.ShapeDtypeStruct((b, length, 1 if shared else h, kv), dtype),
        jax.ShapeDtypeStruct((b, length), jnp.bool_),
        jax.ShapeDtypeStruct((h,), jnp.float32),
    ]


def gradient_of_output(shape: Shape, dtype: jnp.dtype = jnp.float32) -> jax.ShapeDtypeStruct:
    b, c, _, _, h, _, kv, _ = shape
    return jax.ShapeDtypeStruct((b, c, shape.segments, h, kv), dtype)
