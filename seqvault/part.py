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
    e positions, e high halves

where value = base + code (FOR), the running sum of codes (DELTA, for times), or the dictionary's
entry (DICT; entries are in falling frequency, so that frequent values have narrow codes). Codes
wider than w keep their high bits as patches; w is what makes the column smallest.

Values travel as int64 words: integers by value, floats as their bits.
"""

from __future__ import annotations

import sys

import numpy as np
from numba import njit, types

from seqvault.bits import (
    SLACK,
    address_of,
    checksum,
    load32,
    load64,
    pack,
    packed_bytes,
    store,
    unpack,
    width_of,
)

CHUNK = 256
PREFIX, ENTRY, TRAILER = 8, 12, 56
HEAD_MAGIC, TAIL_MAGIC = 0x50565153, 0x45565153
NO_PLACE = np.int64(-1)
MAX_DICT = 4096
FOR, DELTA, DICT = 0, 1, 2
BITS = "e1ab8705db3eb5de"  # of bits.py: a changed name makes Numba compile this file anew
NEVER = np.iinfo(np.int64).max  # a `before` later than every time

DONE, SHORT, DAMAGED, MISSING = 0, 1, 2, 3
# Columns of a read's result.
STATUS, TAKEN, NEED, PREVIOUS, PREVIOUS_BYTES, REACHED, FIRST = range(7)
RESULTS = FOUND = 7

OFFSET_BITS = 40  # a place is segment << OFFSET_BITS | offset

_U = np.uint64
_libc_pread = types.ExternalFunction(
    "pread64" if sys.platform == "linux" else "pread",
    types.intp(types.int32, types.voidptr, types.uintp, types.int64),
)


@njit(cache=True, nogil=True)
def _pread(fd, buf, size, offset):
    """Reads `size` bytes at `offset` of the file into `buf`; the bytes that came, or -1."""
    done = 0
    while done < size:
        got = _libc_pread(fd, address_of(buf, done), size - done, offset + done)
        if got <= 0:
            break
        done += got
    return done


def bound(rows: int, columns: int) -> int:
    """Bytes that a part of `rows` behaviours can take at most, slack included."""
    chunks = -(-rows // CHUNK)
    return (
        PREFIX + TRAILER + SLACK + chunks * (ENTRY + columns * 20) + columns * (rows * 9 + 16)
    ) + columns * (16 + 8 * min(rows, MAX_DICT))


@njit(cache=True, nogil=True)
def _base_bytes(base):
    """Bytes that hold `base` as a signed number; none for 0."""
    if base == 0:
        return 0
    size = 1
    while size < 8 and not (-(1 << (8 * size - 1)) <= base < (1 << (8 * size - 1))):
        size += 1
    return size


@njit(cache=True, nogil=True, inline="always")
def _load_base(buf, at, size):
    value = _U(0)
    for i in range(size):
        value |= _U(buf[at + i]) << _U(8 * i)
    if 0 < size < 8 and buf[at + size - 1] & 128:
        value |= ~_U(0) << _U(8 * size)
    return np.int64(value)


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
        bits = len(codes) * width + above * (8 + full - width)
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
        kept = 0
        for i in range(m):
            if width_of(codes[i]) > width:
                out[at + kept] = np.uint8(i)
                codes[kept] = codes[i]  # codes before i are not needed any more
                kept += 1
        at = pack(out, at + kept, codes[:kept], width, full - width)
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
            if dictionaries[c, 2] > 64:
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
    after = at + 4 + size + packed_bytes(m, width) + patches + packed_bytes(patches, extra)
    return after if after <= stop else -1


@njit(cache=True, nogil=True)
def _decode_column(buf, at, m, low, high, dictionaries, c, codes):
    """Decodes values low .. high - 1 of a packed column of `m` into codes[low:high] (uint64)."""
    kind, size, width = np.int64(buf[at] & 15), np.int64(buf[at] >> 4), np.int64(buf[at + 1])
    extra, patches = np.int64(buf[at + 2]), np.int64(buf[at + 3])
    base = _U(_load_base(buf, at + 4, size))
    data = at + 4 + size
    first = 0 if kind == DELTA else low
    if width == 0:
        codes[first:high] = _U(0)
    elif width <= 56:
        mask = (_U(1) << _U(width)) - _U(1)
        bit = first * width
        for i in range(first, high):
            codes[i] = (load64(buf, data + (bit >> 3)) >> _U(bit & 7)) & mask
            bit += width
    else:
        for i in range(first, high):
            codes[i] = unpack(buf, data, i, width)
    data += packed_bytes(m, width)
    for k in range(patches):
        position = np.int64(buf[data + k])
        if first <= position < high:
            codes[position] |= unpack(buf, data + patches, k, extra) << _U(width)
    if kind == FOR:
        for i in range(low, high):
            codes[i] += base
    elif kind == DELTA:
        value = base
        for i in range(high):
            value += codes[i]
            codes[i] = value
    elif kind == DICT:
        entries, values = _U(dictionaries[c, 0]), dictionaries[c, 3]
        base, width = _U(dictionaries[c, 1]), dictionaries[c, 2]
        for i in range(low, high):
            if codes[i] >= entries:
                return False
            codes[i] = base + unpack(buf, values, np.int64(codes[i]), width)
    else:
        return False
    return True


@njit(cache=True, nogil=True)
def _put(out, offset, size, first, codes, low, high):
    """Stores codes[low:high] as values of `size` bytes at out[offset:], from value `first` on."""
    begin = offset + first * size
    end = begin + (high - low) * size
    if size == 1:
        for i in range(low, high):
            out[begin + i - low] = np.uint8(codes[i])
    elif size == 2:
        two = out[begin:end].view(np.uint16)
        for i in range(low, high):
            two[i - low] = np.uint16(codes[i])
    elif size == 4:
        four = out[begin:end].view(np.uint32)
        for i in range(low, high):
            four[i - low] = np.uint32(codes[i])
    else:
        eight = out[begin:end].view(np.uint64)
        for i in range(low, high):
            eight[i - low] = codes[i]


@njit(cache=True, nogil=True)
def _earlier(buf, end, start, before, dictionaries, codes, available):
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
    if _column_end(buf, start + begin, start + stop, m) < 0 or not _decode_column(
        buf, start + begin, m, 0, m, dictionaries, 0, codes
    ):
        return DAMAGED, low
    count = 0
    while count < m and np.int64(codes[count]) < before:
        count += 1
    return DONE, low * CHUNK + count


@njit(cache=True, nogil=True)
def _read(
    buf, end, available, user, stream, limit, before, want, wanted, sizes, offsets, defaults,
    right, out, result, dictionaries, codes,
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
        status, earlier = _earlier(buf, end, start, before, dictionaries, codes, available)
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
    for k in range(low_chunk, high_chunk + 1):
        stop = load32(buf, entry + k * ENTRY)
        if checksum(buf, start + begin, start + stop) != load32(buf, entry + k * ENTRY + 4):
            result[STATUS], result[TAKEN] = DAMAGED, 0
            return
        m = min(CHUNK, rows - k * CHUNK)
        from_row, to_row = max(low - k * CHUNK, 0), min(high - k * CHUNK, m)
        target = first + k * CHUNK + from_row - low
        column = start + begin
        for c in range(columns):
            after = _column_end(buf, column, start + stop, m)
            if after < 0:
                result[STATUS], result[TAKEN] = DAMAGED, 0
                return
            j = wanted[version, c]
            if j >= 0:
                if not _decode_column(buf, column, m, from_row, to_row, dictionaries, c, codes):
                    result[STATUS], result[TAKEN] = DAMAGED, 0
                    return
                _put(out, offsets[j], sizes[j], target, codes, from_row, to_row)
            column = after
        begin = stop
    for j in range(len(sizes)):
        stored = False
        for c in range(columns):
            stored |= wanted[version, c] == j
        if not stored and defaults[j]:
            codes[0] = _U(defaults[j])
            for i in range(taken):
                _put(out, offsets[j], sizes[j], first + i, codes, 0, 1)


@njit(cache=True, nogil=True)
def read_parts(
    buf, ends, available, users, stream, limits, befores, wants, rights,
    wanted, sizes, offsets, defaults, out, results,
):  # fmt: skip
    """Reads the newest behaviours of one part per user into right-aligned columns.

    Args:
      buf: uint8; the parts' bytes, and SLACK more.
      ends: [k] one past each part's last byte in `buf`; `available` [k] bytes before it are there.
      users: [k] int64 whose part it must be; `stream` likewise.
      limits: [k] positions in the user's history; rows below are seen.
      befores: [k] times; rows earlier are seen (NEVER: all).
      wants: [k] how many rows to take at most.
      rights: [k] the cell before which each user's rows end.
      wanted: [versions, columns] which output a stored column of a schema version fills, or -1.
      sizes, offsets, defaults: [J] of each output: bytes per value, first byte in `out`, bits of
        what a version without the column reads as.
      out: uint8; every output is a column of values from its offset on, zero before.
      results: [k, RESULTS] int64, filled: status (SHORT asks for NEED bytes before the end), rows
        taken, the previous part, the position REACHED (rows seen), FIRST row of the part.
    """
    dictionaries = np.zeros((256, 4), np.int64)
    codes = np.empty(CHUNK, np.uint64)
    for i in range(len(ends)):
        _read(
            buf, ends[i], available[i], users[i], stream, limits[i], befores[i], wants[i],
            wanted, sizes, offsets, defaults, rights[i], out, results[i], dictionaries, codes,
        )  # fmt: skip


@njit(cache=True, nogil=True)
def read_chains(
    mapped, fds, users, stream, places, part_bytes, limits, befores, wants, rights, follow,
    wanted, sizes, offsets, defaults, out, found,
):  # fmt: skip
    """Reads the newest behaviours of each user's chain of parts; see reading.read_rows.

    Args:
      mapped: uint8; the one segment's bytes, if `fds` is empty.
      fds: int32 file descriptors by segment number (-1: not open); one pread per part.
      places, part_bytes: [k] the newest part; place NO_PLACE: no rows.
      follow: whether to go on to older parts.
      found: [k, FOUND] int64, zero; filled: status, rows taken, position reached, first row of the
        newest part, the part before the oldest one read and its bytes, preads.
      The others as in `read_parts`.
    """
    dictionaries = np.zeros((256, 4), np.int64)
    codes = np.empty(CHUNK, np.uint64)
    result = np.zeros(RESULTS, np.int64)
    scratch = np.empty(1 << 15, np.uint8)
    for i in range(len(users)):
        place, size, want, right = places[i], np.int64(part_bytes[i]), wants[i], rights[i]
        hint = TRAILER + 8192 + want * 16
        settled = newest = False
        while place != NO_PLACE:
            segment, offset = place >> OFFSET_BITS, place & ((np.int64(1) << OFFSET_BITS) - 1)
            if len(fds):
                got = min(size, hint)
                if segment < 0 or segment >= len(fds) or fds[segment] < 0:
                    found[i, 0] = MISSING
                    break
                if got + SLACK > len(scratch):
                    scratch = np.empty(got + SLACK, np.uint8)
                read = _pread(fds[segment], scratch, got, offset + size - got)
                found[i, 6] += 1
                if read != got:
                    found[i, 0] = DAMAGED
                    break
                buf, end = scratch, got
            else:
                got, end = size, offset + size
                if place < 0 or end > len(mapped):
                    found[i, 0] = DAMAGED
                    break
                buf = mapped
            _read(
                buf, end, got, users[i], stream, limits[i], befores[i], want,
                wanted, sizes, offsets, defaults, right, out, result, dictionaries, codes,
            )  # fmt: skip
            if result[STATUS] == SHORT and hint < result[NEED] <= size:
                hint = result[NEED]
                continue
            if result[STATUS] != DONE:
                found[i, 0] = DAMAGED
                break
            if not newest:
                newest = True
                found[i, 3] = result[FIRST]
            if not settled:
                found[i, 2] = result[REACHED]
                settled = result[REACHED] > result[FIRST]
            found[i, 1] += result[TAKEN]
            right -= result[TAKEN]
            want -= result[TAKEN]
            place, size = result[PREVIOUS], result[PREVIOUS_BYTES]
            if not follow or (want == 0 and settled):
                break
        found[i, 4], found[i, 5] = place, size


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
