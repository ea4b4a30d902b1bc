"""Parts to read: columns of every shape, packed, and a read of one part."""

from __future__ import annotations

import numpy as np

import seqvault
from seqvault import chains, part, unpacking
from seqvault.bits import SLACK
from seqvault.reading import Layout

DTYPES = {"a": np.int64, "b": np.uint8, "c": np.float64, "d": np.int16, "e": np.uint64}
SCHEMA = seqvault.Schema(DTYPES)
ROWS = 300  # of a hostile part: two chunks


def columns(rng, rows):
    """Words of every shape that the encodings treat differently."""
    skewed = rng.zipf(1.3, rows) % 10**6
    extreme = rng.choice([-(2**63), 2**63 - 1, 0, -1], rows)
    few = rng.choice(rng.integers(-(2**62), 2**62, 7), rows)
    constant = np.full(rows, rng.integers(-9, 9))
    choices = [skewed, extreme, few, constant, rng.integers(-5, 300, rows)]
    return {
        "time": np.sort(rng.integers(-(2**31), 2**31, rows)).astype(np.int32),
        "a": choices[rng.integers(len(choices))].astype(np.int64),
        "b": rng.choice([0, 255, 3], rows).astype(np.uint8),
        "c": np.where(rng.random(rows) < 0.5, 0, rng.normal(size=rows)),
        "d": choices[rng.integers(4)].astype(np.int16),
        "e": rng.integers(0, 2**64, rows, np.uint64) >> np.uint64(rng.integers(0, 64)),
    }


def encoded(values, schema=SCHEMA, user=7):
    words = seqvault.schema.words_of(values, schema)
    buf = np.full(part.bound(*words.shape[::-1]), 170, np.uint8)
    end = part.encode(words, buf, 0, user, 0, 0, 5, -1, 0)
    assert end + SLACK <= len(buf)
    return buf, end


def read(buf, end, limit, before, want, n, available=None, user=7, layout=None):
    layout = layout or Layout([SCHEMA], None)
    out, plan, views = layout.zeros(n)
    results = np.zeros((1, unpacking.RESULTS), np.int64)
    one = lambda value: np.array([value], np.int64)  # noqa: E731
    chains.read_parts(
        buf, one(end), one(end if available is None else available), one(user), 0, one(limit),
        one(before), one(want), one(n), layout.wanted, plan,
        out, results,
    )  # fmt: skip
    return results[0], views
