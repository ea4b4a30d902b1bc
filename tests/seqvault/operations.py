"""A random sequence of operations on a vault, the same for whoever knows the seed.

    python -m tests.seqvault.operations PATH SEED FIRST

runs them on the vault at PATH from operation FIRST on and prints the number of each that was
acknowledged, until it is killed. The tests replay the sequence on lists.
"""

from __future__ import annotations

import sys

import numpy as np

import seqvault
from tests.seqvault.oracle import Oracle, draw


def operation(seed, number):
    """(kind, arguments): what operation `number` does."""
    rng = np.random.default_rng([seed, number])
    kinds = ["append", "merge", "some", "checkpoint", "reclaim"]
    kind = rng.choice(kinds, p=[0.7, 0.1, 0.1, 0.06, 0.04])
    if kind == "append":
        users, columns = draw(rng, int(rng.integers(1, 30)))
        return kind, (users, columns, bool(rng.random() < 0.3))
    return kind, ()


def run(vault, seed, number):
    kind, arguments = operation(seed, number)
    if kind == "append":
        users, columns, sync = arguments
        vault.append_many(users, columns, sync=sync)
    elif kind == "merge":
        vault.merge()
    elif kind == "some":
        vault.merge(500, min_rows=2)
    elif kind == "reclaim":
        vault.reclaim(dead=0.1)
    else:
        vault.checkpoint()


def oracle_after(seed, count):
    """Lists after the first `count` operations."""
    oracle = Oracle()
    for number in range(count):
        kind, arguments = operation(seed, number)
        if kind == "append":
            oracle.append(*arguments[:2])
    return oracle


def holds(vault, oracle):
    """Whether the vault has exactly what the lists have."""
    try:
        oracle.check_scan(vault)
    except AssertionError:
        return False
    return True


if __name__ == "__main__":
    opened = seqvault.Vault.open(sys.argv[1], write=True)
    for at in range(int(sys.argv[3]), 10**6):
        run(opened, int(sys.argv[2]), at)
        print(at, flush=True)
