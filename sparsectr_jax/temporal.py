"""Initial slopes of RelTemporal (SparseCTR 3.5); its bias: kernels/evo_attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def slope_init(num_heads: int, form: str = "paper") -> jax.Array:
    """[3, H] initial slopes: (2^(-8/H))^(h-1) of SparseCTR, or ALiBi's own (2^(-8/H))^h."""
    if form not in ("paper", "alibi"):
        raise ValueError(f"slope_init must be 'paper' or 'alibi', got {form!r}")
    exponent = jnp.arange(num_heads) + (form == "alibi")
    return jnp.broadcast_to(2.0 ** (-8.0 / num_heads * exponent), (3, num_heads))
