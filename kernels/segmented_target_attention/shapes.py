"""Real shapes, shared by tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.segmented_target_attention.api import segmented_target_attention


class Shape(NamedTuple):
    """Axis letters of api.py; `shared`: values without a head axis; `tied`: keys, which are the
    values."""

    batch: int
    candidates: int
    length: int
    segment: int
    heads: int
    key_width: int
    value_width: int
    shared: bool
    tied: bool = False
    activation: str = "sigmoid"

    @property
    def segments(self) -> int:
        return self.length // self.segment


SHAPES = {
    # The paper's L, w, heads and widths, d = 128; one candidate per row, as it trains.
    "paper": Shape(256, 1, 1000, 10, 2, 16, 64, False),
    # The same, all candidates of a request at once, the value projection after the sums.
    "paper_serving": Shape(8, 128, 1000, 10, 2, 16, 128, True),
    # One candidate per row and nothing of the history projected; the softmax of the ablation.
    "paper_tied": Shape(256, 1, 1000, 10, 2, 128, 128, True, tied=True),
    "paper_softmax": Shape(256, 1, 1000, 10, 2, 16, 64, False, activation="softmax"),
    "paper_tied_softmax": Shape(256, 1, 1000, 10, 2, 128, 128, True, True, "softmax"),
    "movielens": Shape(256, 1, 200, 10, 2, 8, 32, False),
    "long_16k": Shape(8, 32, 16384, 16, 2, 16, 64, False),
}


def of_length(length: int, name: str = "paper_serving") -> Shape:
    """A named shape at another length, filled up to whole segments as the model pads it."""
    shape = SHAPES[name]
    return shape._replace(length=-(-length // shape.segment) * shape.segment)


def calls(
    shape: Shape, implementation: str | None, dtype: jnp.dtype = jnp.float32, **options: Any
) -> dict[str, tuple[Callable, tuple]]:
    """{"forward", "backward"}: a function and what it takes; the latter gives all gradients.

    Options are the op's, as `blocks` and `interpret`.
    """
    b, c, length, segment, h, kq, kv, shared, tied, activation = shape
    q = jax.ShapeDtypeStruct((b, c, h, kq), dtype)
    k = jax.ShapeDtypeStruct((b, length, 1 if tied else h, kq), dtype)
    v = None if tied else jax.ShapeDtypeStruct((b, length, 1 if shared else h, kv), dtype)
    mask = jax.ShapeDtypeStruct((b, length), jnp.bool_)
    bias = jax.ShapeDtypeStruct((h,), jnp.float32)
    dz = jax.ShapeDtypeStruct((b, c, shape.segments, h, kv), dtype)

    def forward(q, k, v, mask, bias):
        how = dict(segment=segment, activation=activation, implementation=implementation)
        return segmented_target_attention(q, k, v, mask, bias, **how, **options)

    def backward(q, k, v, mask, bias, dz):
        return jax.vjp(lambda q, k, v, bias: forward(q, k, v, mask, bias), q, k, v, bias)[1](dz)

    arguments = (q, k, v, mask, bias)
    return {"forward": (forward, arguments), "backward": (backward, (*arguments, dz))}
