"""Real shapes, shared by tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.evo_attention.api import behaviour_branches, candidate_branches
from kernels.evo_attention.arguments import Band, Prefix, Recent
from kernels.evo_attention.rel_temporal import RelTemporal


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


def of_length(length: int, name: str = "sparsity_2") -> Shape:
    """A named shape at another length, with about as many behaviours."""
    shape = SHAPES[name]
    return shape._replace(batch=shape.batch * shape.length // length, length=length)


def calls(
    shape: Shape,
    implementation: str | None,
    dtype: Any = jnp.float32,
    *,
    block: int = 0,
    interpret: Any = False,
) -> dict[str, tuple[Callable, tuple]]:
    """{"forward", "backward"}: a function and what it takes; the latter gives all gradients.

    Both calls of a block together: the behaviours', in kernels' tiles of `block`, and the
    candidates'.
    """
    b, length, c, h, k, chunks, transition, window = shape

    def floats(*shape):
        return jax.ShapeDtypeStruct((b, *shape, h, k), dtype)

    def integers(*shape):
        return jax.ShapeDtypeStruct((b, *shape), jnp.int32)

    def mask(n):
        return jax.ShapeDtypeStruct((b, n), jnp.bool_)

    last = min(window, length)
    prefixes = [
        Prefix(floats(n), floats(n), integers(n), integers(n))
        for n in (chunks, chunks * transition)
    ]
    user, slopes = floats(), jax.ShapeDtypeStruct((3, h), jnp.float32)
    recent = Recent(floats(last), floats(last), user, user, integers(last), mask(last))
    band = Band(floats(length), floats(length), user, user)
    behaviours = (floats(length), *prefixes, band, slopes, integers(length), mask(length))
    candidates = (floats(c), *prefixes, recent, slopes, integers())
    d_out = (floats(length),) * 3 + (floats(c),) * 3

    def forward(behaviours, candidates):
        options = dict(rel=RelTemporal(), implementation=implementation, interpret=interpret)
        out = behaviour_branches(*behaviours, window=window, block=block, **options)
        return out + candidate_branches(*candidates, **options)

    def backward(behaviours, candidates, d_out):
        return jax.vjp(forward, behaviours, candidates)[1](d_out)

    arguments = (behaviours, candidates)
    return {"forward": (forward, arguments), "backward": (backward, (*arguments, d_out))}
