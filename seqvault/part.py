"""A part: consecutive behaviours of one user and stream, packed column by column. Compiled.

    prefix     magic, bytes of the part                                          8 bytes
    chunks     256 behaviours each (the last: the rest), every column packed
    dicts      per column: its dictionary, or nothing
    directory  per chunk: end within the part, checksum, last time              12 bytes each
    trailer    user, previous part, counts, checksum of dicts to trailer        56 bytes

A user's history is a chain of parts, newest first: the trailer names the part before. Everything
that a read of the newest behaviours needs lies at the end, so that one positional read of the
file's bytes before the part's end fetches it. A column of a chunk is

    kind | bytes of base << 4, width w, width of patches, patches e, base, m codes of w bits,
    e times (position, high part in whole bytes)

where value = base + code (FOR), the running sum of codes (DELTA, for times), or the dictionary's
entry (DICT; entries are in falling frequency, so that frequent values have narrow codes). Codes
wider than w keep their high bits as patches; w is what makes the column smallest.

Values travel as int64 words: integers by value, floats as their bits.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from seqvault.bits import (
    SLACK,
    checksum,
    pack,
    store,
    width_of,
)

CHUNK = 256
PREFIX, ENTRY, TRAILER = 8, 12, 56
HEAD_MAGIC, TAIL_MAGIC = 0x50565153, 0x45565153
NO_PLACE = np.int64(-1)
MAX_DICT = 4096
PATCH_PENALTY = 8  # bits that a patch must save beyond its own: each costs a reader time
FOR, DELTA, DICT = 0, 1, 2
# A hash of the compiled files that Numba inlines here: its cache of this file does not see them
# change. tests/seqvault/test_part.py says what it must be.
INLINES = "e581a9cdb7ccffda"
NEVER = np.iinfo(np.int64).max  # a `before` later than every time

OFFSET_BITS = 40  # a place is segment << OFFSET_BITS | offset

_U = np.uint64


def bound(rows: int, columns: int) -> int:
    """Bytes that a part of `rows` behaviours can take at most, slack included."""
    chunks = -(-rows // CHUNK)
    lanes = 2 * 4 * 8  # what the packing of one column may round up
    column = chunks * (12 + lanes) + 9 * rows + 11 + lanes + 8 * min(rows, MAX_DICT)
    return PREFIX + TRAILER + SLACK + chunks * ENTRY + columns * column


@njit(cache=True, nogil=True)
def _base_bytes(base):
    """Bytes that hold `base` as a signed number; none for 0."""
    if base == 0:
        return 0
    size = 1
    while size < 8 and not (-(1 << (8 * size - 1)) <= base < (1 << (8 * size - 1))):
        size += 1
    return size


@njit(cache=True, nogil=True)
def _best_width(codes, histogram):
    """(w, full width, patches, bits) of the smallest packing of `codes` (uint64)."""
    histogram[:] = 0
    full = 0
    for code in codes:
        width = width_of(code)
        histogram[width] += 1
        full = max(full, width)
    best_width, best_patches, best_bits = full, 0, len(codes) * full
    above = 0
    for width in range(full - 1, -1, -1):
        above += histogram[width + 1]
        bits = len(codes) * width + above * (8 + ((full - width + 7) & ~7) + PATCH_PENALTY)
        if bits < best_bits and above < 256:
            best_width, best_patches, best_bits = width, above, bits
    return best_width, full, best_patches, best_bits


@njit(cache=True, nogil=True)
def _codes_of(values, kind, codes):
    """Fills `codes` (uint64) from a chunk's values (dictionary codes for DICT); the base."""
    base = np.int64(0)
    if kind == FOR:
        base = values.min()
        for i in range(len(values)):
            codes[i] = _U(values[i] - base)
    elif kind == DELTA:
        base = values[0]
        codes[0] = _U(0)
        for i in range(1, len(values)):
            codes[i] = _U(values[i] - values[i - 1])
    else:
        for i in range(len(values)):
            codes[i] = _U(values[i])
    return base


@njit(cache=True, nogil=True)
def _pack_column(out, at, values, kind, codes, histogram):
    m = len(values)
    base = _codes_of(values, kind, codes)
    width, full, patches, _ = _best_width(codes[:m], histogram)
    size = _base_bytes(base)
    out[at] = np.uint8(kind | (size << 4))
    out[at + 1] = np.uint8(width)
    out[at + 2] = np.uint8(full - width)
    out[at + 3] = np.uint8(patches)
    store(out, at + 4, base, size)
    at = pack(out, at + 4 + size, codes[:m], 0, width)
    if patches:
        for i in range(m):
            if width_of(codes[i]) > width:
                out[at] = np.uint8(i)
                store(out, at + 1, codes[i] >> _U(width), (full - width + 7) >> 3)
                at += 1 + ((full - width + 7) >> 3)
    return at


@njit(cache=True, nogil=True)
def _dictionary(values, histogram, codes, dictionary, coded):
    """Fills `dictionary` and `coded` if a dictionary makes the column smaller; its size or 0."""
    m = len(values)
    ordered = np.sort(values)
    distinct = 1
    for i in range(1, m):
        distinct += ordered[i] != ordered[i - 1]
    if distinct > MAX_DICT or distinct * 2 > m or distinct < 2:
        return 0
    unique = np.empty(distinct, np.int64)
    counts = np.zeros(distinct, np.int64)
    at = -1
    for i in range(m):
        if i == 0 or ordered[i] != ordered[i - 1]:
            at += 1
            unique[at] = ordered[i]
        counts[at] += 1
    # Falling counts, equal ones by value: one key that sorts both.
    order = np.argsort(-counts * distinct + np.arange(distinct))
    rank = np.empty(distinct, np.int64)
    for place in range(distinct):
        rank[order[place]] = place
        dictionary[place] = unique[order[place]]
    for i in range(m):
        low, high = 0, distinct - 1
        while low < high:
            middle = (low + high) >> 1
            if unique[middle] < values[i]:
                low = middle + 1
            else:
                high = middle
        coded[i] = rank[low]
    plain, with_dictionary = 0, 8 * 15 + distinct * width_of(unique[-1] - unique[0])
    for start in range(0, m, CHUNK):
        stop = min(start + CHUNK, m)
        base = _codes_of(values[start:stop], FOR, codes)
        plain += _best_width(codes[: stop - start], histogram)[3] + 8 * _base_bytes(base)
        _codes_of(coded[start:stop], DICT, codes)
        with_dictionary += _best_width(codes[: stop - start], histogram)[3]
    return distinct if with_dictionary < plain else 0


@njit(cache=True, nogil=True)
def encode(words, out, at, user, stream, version, first_row, previous, previous_bytes):
    """Writes the part of behaviours `words` [columns, rows] (time first, sorted) to out[at:].

    Returns the end of the part, behind its trailer.
    """
    columns, rows = words.shape
    begin = at
    histogram = np.zeros(65, np.int64)
    codes = np.zeros(max(CHUNK, min(rows, MAX_DICT)), np.uint64)
    coded = np.empty((columns, rows), np.int64)
    dictionaries = np.empty((columns, min(rows, MAX_DICT)), np.int64)
    sizes = np.zeros(columns, np.int64)
    for c in range(1, columns):
        sizes[c] = _dictionary(words[c], histogram, codes, dictionaries[c], coded[c])
    store(out, at, HEAD_MAGIC, 4)
    at += PREFIX
    chunks = (rows + CHUNK - 1) // CHUNK
    ends = np.empty(chunks, np.int64)
    sums = np.empty(chunks, np.int64)
    for k in range(chunks):
        start, stop, begin_chunk = k * CHUNK, min((k + 1) * CHUNK, rows), at
        for c in range(columns):
            if sizes[c]:
                at = _pack_column(out, at, coded[c, start:stop], DICT, codes, histogram)
            else:
                kind = DELTA if c == 0 else FOR
                at = _pack_column(out, at, words[c, start:stop], kind, codes, histogram)
        ends[k] = at - begin
        sums[k] = checksum(out, begin_chunk, at)
    footer = at
    for c in range(columns):
        store(out, at, sizes[c], 2)
        at += 2
        if sizes[c]:
            values = dictionaries[c, : sizes[c]]
            base = values.min()
            for i in range(len(values)):
                codes[i] = _U(values[i] - base)
            width = width_of(values.max() - base)
            store(out, at, base, 8)
            out[at + 8] = np.uint8(width)
            at = pack(out, at + 9, codes[: len(values)], 0, width)
    for k in range(chunks):
        store(out, at, ends[k], 4)
        store(out, at + 4, sums[k], 4)
        store(out, at + 8, words[0, min((k + 1) * CHUNK, rows) - 1], 4)
        at += ENTRY
    end = at + TRAILER
    store(out, at, user, 8)
    store(out, at + 8, previous, 8)
    store(out, at + 16, previous_bytes, 4)
    store(out, at + 20, first_row, 4)
    store(out, at + 24, rows, 4)
    store(out, at + 28, end - begin, 4)
    store(out, at + 32, chunks, 4)
    store(out, at + 36, end - footer, 4)
    store(out, at + 40, version, 2)
    store(out, at + 42, stream, 1)
    store(out, at + 43, columns, 1)
    store(out, at + 44, 0, 4)
    store(out, at + 52, TAIL_MAGIC, 4)
    store(out, begin + 4, end - begin, 4)
    store(out, at + 48, checksum(out, footer, at + 48), 4)
    return end
