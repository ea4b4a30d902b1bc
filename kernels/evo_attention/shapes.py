"""Real shapes, shared by tests and benchmarks."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.evo_attention.arguments import Band, Prefix, Recent


class Shape(NamedTuple):
    """B, L, C, H, K of api.py; chunks P, m transition behaviours of each, the window w."""

    batch: int
    length: int
    candidates: int
    heads: int
    width: int
    chunks: int = 16
    transition: int = 2
    window: int = 5


SHAPES = {
    # The paper's d = 32 and H = 8 (Fig. 3); P, m and w of its four sparsities.
    "sparsity_1": Shape(256, 1024, 16, 8, 4, 8, 1, 2),
    "sparsity_2": Shape(256, 1024, 16, 8, 4, 16, 2, 5),
    "sparsity_3": Shape(256, 1024, 16, 8, 4, 16, 3, 10),
    "sparsity_4": Shape(256, 1024, 16, 8, 4, 32, 4, 20),
    # Sparsity-2 at a head's width that full attention's kernels are made for; 1 M behaviours.
    "wide": Shape(1024, 1024, 16, 8, 32),
    # configs/sparsectr_movielens.py
    "movielens": Shape(1024, 200, 1, 8, 8, 16, 2, 50),
    "long_4096": Shape(64, 4096, 16, 8, 4),
    "long_16384": Shape(16, 16384, 16, 8, 4),
}


def behaviour_arguments(shape: Shape, dtype: Any = jnp.float32) -> tuple:
    """The positional arguments of `behaviour_branches`, as ShapeDtypeStructs."""
    b, length, _, h, k, *_ = shape
    x, user = _struct(dtype, b, length, h, k), _struct(dtype, b, h, k)
    integers, mask = _struct(jnp.int32, b, length), _struct(jnp.bool_, b, length)
    slopes = _struct(jnp.float32, 3, h)
    return x, *_prefixes(shape, dtype), Band(x, x, user, user), slopes, integers, mask


def candidate_arguments(shape: Shape, dtype: Any = jnp.float32) -> tuple:
    """The positional arguments of `candidate_branches`, as ShapeDtypeStructs."""
    b, length, c, h, k, *_ = shape
    last = min(shape.window, length)
    x, user = _struct(dtype, b, last, h, k), _struct(dtype, b, h, k)
    recent = Recent(x, x, user, user, _struct(jnp.int32, b, last), _struct(jnp.bool_, b, last))
    q, slopes = _struct(dtype, b, c, h, k), _struct(jnp.float32, 3, h)
    return q, *_prefixes(shape, dtype), recent, slopes, _struct(jnp.int32, b)


def _prefixes(shape, dtype):
    """The global and the transition keys."""
    out = []
    for slots in (shape.chunks, shape.chunks * shape.transition):
        x = _struct(dtype, shape.batch, slots, shape.heads, shape.width)
        integers = _struct(jnp.int32, shape.batch, slots)
        out.append(Prefix(x, x, integers, integers))
    return out


def _struct(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)
