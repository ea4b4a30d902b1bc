"""What the tests of all ops share."""

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels import ahead_of_time

CHECKED = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
IMPLEMENTATIONS = {
    "xla": dict(implementation="xla"),
    "pallas_tpu": dict(implementation="pallas_tpu", interpret=True),
    "pallas_gpu": dict(implementation="pallas_gpu", interpret=True),
}

# (slice, history length, dtype) to compile for; one of them in the fast tests.
FIRST = ("v5e", 1024, jnp.float32)
TARGETS = [
    pytest.param(tpu, n, dtype, marks=() if (tpu, n, dtype) == FIRST else pytest.mark.slow)
    for tpu in ahead_of_time.TPU_SLICES
    for n in (50, 128, 1024, 4096, 16384)
    for dtype in (jnp.float32, jnp.bfloat16)
    if dtype == jnp.float32 or n == 1024
]
needs_tpu_compiler = pytest.mark.skipif(
    not ahead_of_time.can_compile_for_tpu(), reason="libtpu is not installed"
)


def sizes(jaxpr):
    """Of all arrays that a jaxpr makes, loops and calls included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)
