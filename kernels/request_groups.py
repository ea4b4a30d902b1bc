"""The requests of a batch in groups of equal size, for loops that take a few at a time.

Axis letter: B requests.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def size_of_groups(b: int, most: int) -> int:
    """Requests of a group, at most `most`: a divisor of B if one is above half of that, so that
    nothing is filled up (a copy of everything); else what leaves the fewest zeros."""
    most = max(1, min(most, b))
    for size in range(most, most // 2, -1):
        if b % size == 0:
            return size
    return -(-b // -(-b // most))


def cut(tree: Any, size: int) -> Any:
    """[B, ...] -> [groups, size, ...], zeros at the end."""

    def of_array(x):
        groups = -(-len(x) // size)
        x = jnp.pad(x, ((0, groups * size - len(x)), *[(0, 0)] * (x.ndim - 1)))
        return x.reshape(groups, size, *x.shape[1:])

    return jax.tree.map(of_array, tree)


def whole(tree: Any, b: int) -> Any:
    """[groups, size, ...] -> [B, ...] without what `cut` added."""

    def of_array(x):  # not by -1, which cannot be told where an axis is 0: no profile, no history
        return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])[:b]

    return jax.tree.map(of_array, tree)
