"""Reads parts that must not be trusted, so that a byte too far ends the process.

    NUMBA_BOUNDSCHECK=1 python -m tests.seqvault.guarded PARTS.npz

Every array of the file is a part and its slack. Each is put before a page that nobody may touch,
as reads of whole words are not bound-checked, and read. Prints how many reads ended how.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections import Counter

import numpy as np

from seqvault import unpacking
from seqvault.bits import SLACK
from tests.seqvault.parts import ROWS, read


def before_a_wall(data):
    """(memory to keep, a copy of `data` that ends where a page without access begins)."""
    room = -(-len(data) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    whole = np.frombuffer(memory, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(whole.ctypes.data + room), mmap.PAGESIZE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    guarded = whole[room - len(data) : room]
    guarded[:] = data
    return memory, guarded


if __name__ == "__main__":
    ends = Counter()
    with np.load(sys.argv[1]) as parts:
        for name in parts.files:
            memory, part = before_a_wall(parts[name])
            for before in (2**63 - 1, 0):
                result, _ = read(part, len(part) - SLACK, 10**6, before, ROWS, ROWS)
                ends[int(result[unpacking.STATUS])] += 1
    print(dict(ends))
