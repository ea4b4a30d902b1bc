"""The product that the kernels' blocks meet in."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def dot(x: jax.Array, y: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """float32 of two matrices over axes `contract`: narrower ones as they are, float32 ones without
    rounding them to what the matrix units like best (bfloat16, TF32)."""
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dims, precision=exact, preferred_element_type=jnp.float32)
