"""Initial slopes of RelTemporal (SparseCTR 3.5); its bias: kernels/evo_attention.

The bias takes differences of times in int32: it is right where a request and the behaviours it sees
lie less than 2^31 s (68 years) apart, as any two times from 1970 to 2038 do.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

FORMS = ("paper", "alibi", "zero")


def slope_init(num_heads: int, form: str = "paper") -> jax.Array:
    """[3, H] initial slopes: (2^(-8/H))^(h-1) of SparseCTR, ALiBi's own (2^(-8/H))^h, or zeros.

    From zeros every head sees all times alike and learns what to forget. A slope of 1 takes
    log2(seconds) off the logits from the start, 24 for a year, and a run of one epoch may end
    before that is unlearned (docs/results.md, MovieLens).
    """
    if form not in FORMS:
        raise ValueError(f"slope_init must be one of {FORMS}, got {form!r}")
    if form == "zero":
        return jnp.zeros((3, num_heads))
    exponent = jnp.arange(num_heads) + (form == "alibi")
    return jnp.broadcast_to(2.0 ** (-8.0 / num_heads * exponent), (3, num_heads))
