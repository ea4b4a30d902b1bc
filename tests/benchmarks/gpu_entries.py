"""Entries of a suite that behave badly; of a module, as the worker has to import them."""

import os
import time

import jax.numpy as jnp

from benchmarks.gpu_cases import Entry
from benchmarks.gpu_timing import Way, measure


def fine(bench):
    return {"kind": "fine"}


def raises(bench):
    raise RuntimeError("INTERNAL: of the compiler\nwith more lines")


def sleeps(bench):
    time.sleep(100)


def ways(bench):
    def adds(batch):
        return jnp.add, (jnp.ones(batch), jnp.ones(batch))

    def raises(batch):
        raise ValueError(f"not with {batch}")

    def is_too_large(batch):
        if batch > 2:
            raise MemoryError("RESOURCE_EXHAUSTED: out of memory")
        return adds(batch)

    made = [("crashes", lambda batch: os._exit(3)), ("fine", adds), ("raises", raises),
            ("hangs", lambda batch: time.sleep(100)), ("is too large", is_too_large)]  # fmt: skip
    rows, _ = measure(bench, [Way(name, "some", 8, 2, make) for name, make in made])
    return {"kind": "ways", "rows": rows}


FINE, RAISES, SLEEPS, WAYS = (Entry(f.__name__, f) for f in (fine, raises, sleeps, ways))
