"""Reading a part: checks, dictionaries, columns. Compiled; every length is checked before use."""

from __future__ import annotations

import numpy as np
from numba import njit

from seqvault.bits import checksum, load32, load64, packed_bytes, unpack
from seqvault.part import (
    CHUNK,
    DELTA,
    DICT,
    ENTRY,
    FOR,
    HEAD_MAGIC,
    MAX_DICT,
    NEVER,
    PREFIX,
    TAIL_MAGIC,
    TRAILER,
)

INLINES = "87e1adad9f595750"  # see part.py
DONE, SHORT, DAMAGED, MISSING = 0, 1, 2, 3
# Columns of a read's result.
STATUS, TAKEN, NEED, PREVIOUS, PREVIOUS_BYTES, REACHED, FIRST = range(7)
RESULTS = 7

_U = np.uint64


@njit(cache=True, nogil=True, inline="always")
def _load_base(buf, at, size):
    value = _U(0)
    for i in range(size):
        value |= _U(buf[at + i]) << _U(8 * i)
    if 0 < size < 8 and buf[at + size - 1] & 128:
        value |= ~_U(0) << _U(8 * size)
    return np.int64(value)


@njit(cache=True, nogil=True)
def _check_footer(buf, end, available, user, stream):
    """(status, bytes needed) of the part that ends at buf[end]; `available` bytes lie before."""
    if available < TRAILER:
        return SHORT, TRAILER
    at = end - TRAILER
    size, chunks, footer = load32(buf, at + 28), load32(buf, at + 32), load32(buf, at + 36)
    rows, columns = load32(buf, at + 24), np.int64(buf[at + 43])
    if (
        load32(buf, at + 52) != TAIL_MAGIC
        or np.int64(load64(buf, at)) != user
        or np.int64(buf[at + 42]) != stream
        or rows < 1
        or chunks != (rows + CHUNK - 1) // CHUNK
        or footer > size - PREFIX
        or footer < TRAILER + chunks * ENTRY + 2 * columns
    ):
        return DAMAGED, 0
    if available < footer:
        return SHORT, footer
    if checksum(buf, end - footer, at + 48) != load32(buf, at + 48):
        return DAMAGED, 0
    # The directory must rise from the prefix to the footer, whoever wrote it.
    begin, entry = np.int64(PREFIX), at - chunks * ENTRY
    for k in range(chunks):
        stop = load32(buf, entry + k * ENTRY)
        if stop < begin:
            return DAMAGED, 0
        begin = stop
    if begin != size - footer:
        return DAMAGED, 0
    return DONE, footer


@njit(cache=True, nogil=True)
def _find_dictionaries(buf, end, dictionaries):
    """Fills [columns, (size, base, width, at)]; False if they do not fit the footer."""
    at = end - load32(buf, end - TRAILER + 36)
    stop = end - TRAILER - load32(buf, end - TRAILER + 32) * ENTRY
    for c in range(np.int64(buf[end - TRAILER + 43])):
        if at + 2 > stop:
            return False
        size = np.int64(buf[at]) | (np.int64(buf[at + 1]) << 8)
        at += 2
        dictionaries[c, 0] = size
        if size:
            if at + 9 > stop:
                return False
            dictionaries[c, 1] = np.int64(load64(buf, at))
            dictionaries[c, 2] = np.int64(buf[at + 8])
            dictionaries[c, 3] = at + 9
            if dictionaries[c, 2] > 64 or size > MAX_DICT:
                return False
            at += 9 + packed_bytes(size, dictionaries[c, 2])
    return at == stop


@njit(cache=True, nogil=True)
def _column_end(buf, at, stop, m):
    """One past the packed column at `at`, or -1 if it is not one of `m` values within `stop`."""
    if at + 4 > stop:
        return -1
    size, width, extra = np.int64(buf[at] >> 4), np.int64(buf[at + 1]), np.int64(buf[at + 2])
    patches = np.int64(buf[at + 3])
    if size > 8 or width + extra > 64 or patches > m:
        return -1
    after = at + 4 + size + packed_bytes(m, width) + patches * (1 + ((extra + 7) >> 3))
    return after if after <= stop else -1


@njit(cache=True, nogil=True)
def _decode_codes(buf, at, m, codes, wide):
    """Decodes the codes of a packed column of `m` into codes[:m] (uint32), or wide[:m] (uint64).

    Returns (base, whether they are in `wide`): those of more than 32 bits are.
    """
    size, width = np.int64(buf[at] >> 4), np.int64(buf[at + 1])
    extra, patches = np.int64(buf[at + 2]), np.int64(buf[at + 3])
    base = _load_base(buf, at + 4, size)
    at += 4 + size
    unpack(buf, at, m, min(width, 32), codes)
    over = width + extra > 32
    if over:
        for i in range(m):
            wide[i] = _U(codes[i])
        if width > 32:
            unpack(buf, at + packed_bytes(m, 32), m, width - 32, codes)
            for i in range(m):
                wide[i] |= _U(codes[i]) << _U(32)
    at += packed_bytes(m, width)
    if patches:
        step = (extra + 7) >> 3
        keep = ~_U(0) if extra == 64 else (_U(1) << _U(extra)) - _U(1)
        for _ in range(patches):
            position = np.uint64(buf[at])
            if position < m:
                high = (load64(buf, at + 1) & keep) << _U(width)
                if over:
                    wide[position] |= high
                else:
                    codes[position] |= np.uint32(high)
            at += 1 + step
    return base, over


@njit(cache=True, nogil=True)
def _open_dictionary(buf, dictionary, codes, table):
    """Fills table[:size] (uint64) with the entries of a dictionary (size, base, width, at)."""
    size, width, at = dictionary[0], dictionary[2], dictionary[3]
    base = _U(dictionary[1])
    unpack(buf, at, size, min(width, 32), codes)
    for i in range(size):
        table[i] = base + _U(codes[i])
    if width > 32:
        unpack(buf, at + packed_bytes(size, 32), size, width - 32, codes)
        for i in range(size):
            table[i] += _U(codes[i]) << _U(32)


@njit(cache=True, nogil=True)
def _decode_column(buf, at, m, size, entries, codes, wide, table):
    """Decodes a packed column of `m` values for an output of `size` bytes each.

    Returns (whether it is such a column, whether the values are in `wide`, not in `codes`); those
    in `codes` are modulo 2**32. `table` holds the `entries` of the column's dictionary.
    """
    kind = np.int64(buf[at] & 15)
    base, over = _decode_codes(buf, at, m, codes, wide)
    if kind == DICT:
        if over:
            return False, False
        last = np.uint32(0)
        for i in range(m):
            last = max(last, codes[i])
        if np.int64(last) >= entries:
            return False, False
        for i in range(m):
            wide[i] = table[codes[i]]
        return True, True
    if kind == FOR:
        if not over and size <= 4:
            low = np.uint32(base & 0xFFFFFFFF)
            for i in range(m):
                codes[i] += low
            return True, False
        for i in range(m):
            wide[i] = (wide[i] if over else _U(codes[i])) + _U(base)
        return True, True
    if kind != DELTA:
        return False, False
    value = _U(base)
    for i in range(m):
        value += wide[i] if over else _U(codes[i])
        wide[i] = value
    return True, True


@njit(cache=True, nogil=True)
def _put(out, offset, size, first, values, low, high):
    """Stores values[low:high] as values of `size` bytes at out[offset:], from value `first` on."""
    begin = offset + first * size
    end = begin + (high - low) * size
    source = values[low:high]
    if size == 1:
        one = out[begin:end]
        for i in range(len(source)):
            one[i] = np.uint8(source[i])
    elif size == 2:
        two = out[begin:end].view(np.uint16)
        for i in range(len(source)):
            two[i] = np.uint16(source[i])
    elif size == 4:
        four = out[begin:end].view(np.uint32)
        for i in range(len(source)):
            four[i] = np.uint32(source[i])
    else:
        eight = out[begin:end].view(np.uint64)
        for i in range(len(source)):
            eight[i] = source[i]


@njit(cache=True, nogil=True)
def _earlier(buf, end, start, before, codes, wide, table, available):
    """(status, rows of the part whose time is below `before`); SHORT gives the chunk instead."""
    at = end - TRAILER
    rows, chunks = load32(buf, at + 24), load32(buf, at + 32)
    entry = at - chunks * ENTRY
    low, high = 0, chunks
    while low < high:
        middle = (low + high) >> 1
        if np.int64(np.int32(load32(buf, entry + middle * ENTRY + 8))) < before:
            low = middle + 1
        else:
            high = middle
    if low == chunks:
        return DONE, rows
    begin = PREFIX if low == 0 else load32(buf, entry + (low - 1) * ENTRY)
    stop = load32(buf, entry + low * ENTRY)
    if start + begin < end - available:
        return SHORT, low
    if checksum(buf, start + begin, start + stop) != load32(buf, entry + low * ENTRY + 4):
        return DAMAGED, low
    m = min(CHUNK, rows - low * CHUNK)
    if _column_end(buf, start + begin, start + stop, m) < 0:
        return DAMAGED, low
    ok, in_wide = _decode_column(buf, start + begin, m, 8, 0, codes, wide, table)
    if not ok or not in_wide:
        return DAMAGED, low
    count = 0
    while count < m and np.int64(wide[count]) < before:
        count += 1
    return DONE, low * CHUNK + count


@njit(cache=True, nogil=True)
def read_part(
    buf, end, available, user, stream, limit, before, want, wanted, sizes, offsets, defaults,
    right, out, result, dictionaries, codes, wide, table,
):  # fmt: skip
    status, need = _check_footer(buf, end, available, user, stream)
    result[STATUS], result[TAKEN], result[NEED] = status, 0, need
    if status:
        return
    at = end - TRAILER
    rows, size, chunks = load32(buf, at + 24), load32(buf, at + 28), load32(buf, at + 32)
    first_row, columns = load32(buf, at + 20), np.int64(buf[at + 43])
    version = np.int64(buf[at + 40]) | (np.int64(buf[at + 41]) << 8)
    start, entry = end - size, at - chunks * ENTRY
    result[PREVIOUS] = np.int64(load64(buf, at + 8))
    result[PREVIOUS_BYTES] = load32(buf, at + 16)
    result[FIRST] = first_row
    if version >= wanted.shape[0] or columns > wanted.shape[1] or columns < 1:
        result[STATUS] = DAMAGED
        return
    if not _find_dictionaries(buf, end, dictionaries):
        result[STATUS] = DAMAGED
        return
    high = min(rows, limit - first_row)
    if before != NEVER and high > 0:
        status, earlier = _earlier(buf, end, start, before, codes, wide, table, available)
        if status == SHORT:
            chunk = max(0, (earlier * CHUNK - want) // CHUNK)
            begin = PREFIX if chunk == 0 else load32(buf, entry + (chunk - 1) * ENTRY)
            result[NEED] = size - begin
        if status:
            result[STATUS] = status
            return
        high = min(high, earlier)
    result[REACHED] = first_row + max(high, 0)
    taken = min(max(high, 0), want)
    result[TAKEN] = taken
    if taken == 0:
        return
    low, first = high - taken, right - taken
    low_chunk, high_chunk = low // CHUNK, (high - 1) // CHUNK
    begin = PREFIX if low_chunk == 0 else load32(buf, entry + (low_chunk - 1) * ENTRY)
    if size - begin > available:
        result[STATUS], result[TAKEN], result[NEED] = SHORT, 0, size - begin
        return
    cursors = np.empty(high_chunk - low_chunk + 1, np.int64)  # the next column of each chunk
    for k in range(low_chunk, high_chunk + 1):
        stop = load32(buf, entry + k * ENTRY)
        if checksum(buf, start + begin, start + stop) != load32(buf, entry + k * ENTRY + 4):
            result[STATUS], result[TAKEN] = DAMAGED, 0
            return
        cursors[k - low_chunk] = start + begin
        begin = stop
    found = 0
    for c in range(columns):
        j = wanted[version, c]
        if j >= 0:
            found += 1
            if dictionaries[c, 0]:
                _open_dictionary(buf, dictionaries[c], codes, table)
        for k in range(low_chunk, high_chunk + 1):
            m = min(CHUNK, rows - k * CHUNK)
            stop = load32(buf, entry + k * ENTRY)
            column = cursors[k - low_chunk]
            after = _column_end(buf, column, start + stop, m)
            ok = after >= 0
            if ok and j >= 0:
                ok, in_wide = _decode_column(
                    buf, column, m, sizes[j], dictionaries[c, 0], codes, wide, table
                )
                from_row, to_row = max(low - k * CHUNK, 0), min(high - k * CHUNK, m)
                target = first + k * CHUNK + from_row - low
                if in_wide:
                    _put(out, offsets[j], sizes[j], target, wide, from_row, to_row)
                else:
                    _put(out, offsets[j], sizes[j], target, codes, from_row, to_row)
            if not ok:
                result[STATUS], result[TAKEN] = DAMAGED, 0
                return
            cursors[k - low_chunk] = after
        if found == len(sizes):
            return
    for j in range(len(sizes)):
        stored = False
        for c in range(columns):
            stored |= wanted[version, c] == j
        if not stored and defaults[j]:
            wide[0] = _U(defaults[j])
            for i in range(taken):
                _put(out, offsets[j], sizes[j], first + i, wide, 0, 1)


@njit(cache=True, nogil=True)
def check_part(buf, end):
    """Checks every byte of the part buf[:end]; where it is wrong, or -1."""
    at = end - TRAILER
    user, stream = np.int64(load64(buf, at)), np.int64(buf[at + 42])
    status, footer = _check_footer(buf, end, end, user, stream)
    if status:
        return at
    if load32(buf, 0) != HEAD_MAGIC or load32(buf, 4) != end or load32(buf, at + 28) != end:
        return 0
    begin, entry = np.int64(PREFIX), at - load32(buf, at + 32) * ENTRY
    for k in range(load32(buf, at + 32)):
        stop = load32(buf, entry + k * ENTRY)
        if checksum(buf, begin, stop) != load32(buf, entry + k * ENTRY + 4):
            return begin
        begin = stop
    return np.int64(-1)
