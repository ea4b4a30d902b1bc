"""HSTU's buckets of time differences, for biases of attention (Zhai et al., ICML 2024)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

BUCKETS = 128  # the last bucket's index: a table has one row more


def bucket(seconds: jax.Array) -> jax.Array:
    """int32 time differences -> clip(int(ln(max(|seconds|, 1)) / 0.301), 0, 128), the logarithm in
    float32 like the published code."""
    log = jnp.log(jnp.maximum(jnp.abs(seconds), 1).astype(jnp.float32))
    return jnp.clip((log / 0.301).astype(jnp.int32), 0, BUCKETS)
