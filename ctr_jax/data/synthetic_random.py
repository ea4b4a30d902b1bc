"""Random numbers that are pure functions of what they are for, in any order and any block size."""

from __future__ import annotations

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio, odd


def hashed_uniform(key: np.ndarray, stream: str, index: np.ndarray | int) -> np.ndarray:
    """Uniform [0, 1) numbers, float64, a pure function of (key, stream, index); all broadcast."""
    salt = np.uint64(int.from_bytes(stream.encode()[:8].ljust(8, b"\0"), "little"))
    with np.errstate(over="ignore"):
        index = np.asarray(index).astype(np.uint64) * np.uint64(GOLDEN)
        return (mix(mix(key ^ salt) + index) >> np.uint64(11)) * 2.0**-53


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea and Flood, 2014): uint64 of any shape, wrapping arithmetic."""
    x = x + np.uint64(GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def normal(key: np.ndarray, stream: str, index: np.ndarray | int) -> np.ndarray:
    """Standard normal numbers (Box and Muller), likewise."""
    radius = np.sqrt(-2 * np.log1p(-hashed_uniform(key, stream + "0", index)))
    return radius * np.cos(2 * np.pi * hashed_uniform(key, stream + "1", index))


def gumbel(key: np.ndarray, stream: str, index: np.ndarray | int) -> np.ndarray:
    """Gumbel numbers, likewise: the arg max of log weights plus these draws by weight."""
    return -np.log(-np.log(hashed_uniform(key, stream, index) * (1 - 1e-12) + 1e-13))
