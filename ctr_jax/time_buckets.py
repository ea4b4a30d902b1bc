"""HSTU's buckets of time differences, for biases of attention (Zhai et al., ICML 2024)."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.softmax import widened

BUCKETS = 128  # the last bucket's index: a table has one row more


def bucket(seconds: jax.Array) -> jax.Array:
    """int32 time differences -> clip(int(ln(max(|seconds|, 1)) / 0.301), 0, 128), the logarithm in
    float32 like the published code."""
    log = jnp.log(jnp.maximum(jnp.abs(seconds), 1).astype(jnp.float32))
    return jnp.clip((log / 0.301).astype(jnp.int32), 0, BUCKETS)


def tables(param: Callable, length: int) -> tuple[jax.Array, jax.Array]:
    """A layer's p [length + 1] by distance, p[0] of an item itself, and w [129] by bucket, made by
    a module's `param`; float32 at least."""
    small = nn.initializers.normal(0.02)
    shapes = dict(position=(length + 1,), time=(BUCKETS + 1,))
    return tuple(widened(param(name, small, shape)) for name, shape in shapes.items())
