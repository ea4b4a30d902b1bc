"""Times of generated histories; NumPy alone, for workers that have no JAX."""

from __future__ import annotations

import numpy as np


def burst_times(batch: int, length: int) -> np.ndarray:
    """[B, L] int32 seconds, ascending: bursts of behaviours with gaps of up to a day between."""
    rng = np.random.default_rng(0)
    gaps = np.minimum(np.exp(rng.normal(4, 3, (batch, length))), 10**5)
    return (1_490_000_000 + np.cumsum(gaps, 1)).astype(np.int32)
