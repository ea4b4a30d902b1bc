"""Reading the chains of parts of many users in one compiled call: preads, checks and columns."""

from __future__ import annotations

import sys

import numpy as np
from numba import njit, types

from seqvault.bits import SLACK, address_of
from seqvault.part import CHUNK, MAX_DICT, NEVER, NO_PLACE, OFFSET_BITS, TRAILER
from seqvault.unpacking import (
    DAMAGED,
    DONE,
    FIRST,
    MISSING,
    NEED,
    PREVIOUS,
    PREVIOUS_BYTES,
    REACHED,
    RESULTS,
    SHORT,
    STATUS,
    TAKEN,
    read_part,
)

INLINES = "0e16b15e38b011ed"  # see part.py
FOUND = 7  # columns of what a chain gives

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


@njit(cache=True, nogil=True)
def read_parts(
    buf, ends, available, users, stream, limits, befores, wants, rights,
    wanted, plan, out, results,
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
      plan: [3, J + 1] of each output, and last of the mask: first byte in `out`, bytes per value,
        bits of what a version without the column reads as.
      out: uint8; every output is a column of values from its offset on, zero before.
      results: [k, RESULTS] int64, filled: status (SHORT asks for NEED bytes before the end), rows
        taken, the previous part, the position REACHED (rows seen), FIRST row of the part.
    """
    dictionaries = np.zeros((256, 4), np.int64)
    codes, wide = np.empty(MAX_DICT, np.uint32), np.empty(CHUNK, np.uint64)
    table = np.empty(MAX_DICT, np.uint64)
    offsets, sizes, defaults = plan[0], plan[1, :-1], plan[2]
    for i in range(len(ends)):
        read_part(
            buf, ends[i], available[i], users[i], stream, limits[i], befores[i], wants[i],
            wanted, sizes, offsets, defaults, rights[i], out, results[i], dictionaries,
            codes, wide, table,
        )  # fmt: skip


@njit(cache=True, nogil=True)
def _read_chain(
    mapped, fds, user, stream, place, size, limit, before, want, right, follow,
    wanted, sizes, offsets, defaults, out, found, scratch, result, dictionaries, codes, wide, table,
):  # fmt: skip
    """Fills `found` [FOUND] for one user; gives back `scratch`, longer if need be."""
    hint = TRAILER + 8192 + want * 16
    settled, first = False, np.int64(-1)
    while place != NO_PLACE:
        segment, offset = place >> OFFSET_BITS, place & ((np.int64(1) << OFFSET_BITS) - 1)
        if len(fds):
            got = min(size, hint)
            if segment < 0 or segment >= len(fds) or fds[segment] < 0:
                found[0] = MISSING
                break
            if got + SLACK > len(scratch):
                scratch = np.empty(got + SLACK, np.uint8)
            found[6] += 1
            if _pread(fds[segment], scratch, got, offset + size - got) != got:
                found[0] = DAMAGED
                break
            buf, end = scratch, got
        else:
            got, end = size, offset + size
            if place < 0 or end > len(mapped):
                found[0] = DAMAGED
                break
            buf = mapped
        read_part(
            buf, end, got, user, stream, limit, before, want, wanted, sizes, offsets, defaults,
            right, out, result, dictionaries, codes, wide, table,
        )  # fmt: skip
        if result[STATUS] == SHORT and hint < result[NEED] <= size:
            hint = result[NEED]
            continue
        if result[STATUS] != DONE or (first >= 0 and result[FIRST] >= first):
            found[0] = DAMAGED  # a chain must lead to older rows
            break
        first = result[FIRST]
        found[3] = first
        if not settled:
            found[2] = result[REACHED]
            settled = result[REACHED] > first
        found[1] += result[TAKEN]
        right -= result[TAKEN]
        want -= result[TAKEN]
        place, size = result[PREVIOUS], result[PREVIOUS_BYTES]
        hint = TRAILER + 8192 + want * 16
        if not follow or (want == 0 and settled):
            break
    found[4], found[5] = place, size
    return scratch


@njit(cache=True, nogil=True)
def read_chains(
    mapped, fds, users, stream, places, part_bytes, limits, befores, wants, rights, follow,
    wanted, plan, out, found,
):  # fmt: skip
    """Reads the newest behaviours of each user's chain of parts; see reading.read_rows.

    Args:
      mapped: uint8; the one segment's bytes, if `fds` is empty.
      fds: int32 file descriptors by segment number (-1: not open); one pread per part.
      places, part_bytes: [k] the newest part; place NO_PLACE: no rows.
      follow: whether to go on to older parts.
      found: [k, FOUND] int64, zero; filled: status, rows taken, position reached, first row of the
        oldest part read, the part before that and its bytes, preads.
      The others as in `read_parts`.
    """
    dictionaries = np.zeros((256, 4), np.int64)
    codes, wide = np.empty(MAX_DICT, np.uint32), np.empty(CHUNK, np.uint64)
    table, result = np.empty(MAX_DICT, np.uint64), np.zeros(RESULTS, np.int64)
    scratch = np.empty(1 << 15, np.uint8)
    offsets, sizes, defaults = plan[0], plan[1, :-1], plan[2]
    for i in range(len(users)):
        scratch = _read_chain(
            mapped, fds, users[i], stream, places[i], part_bytes[i], limits[i], befores[i],
            wants[i], rights[i], follow, wanted, sizes, offsets, defaults, out, found[i],
            scratch, result, dictionaries, codes, wide, table,
        )  # fmt: skip


@njit(cache=True, nogil=True)
def read_last(
    mapped, fds, users, stream, held, n, cut, by_time, wanted, plan, out, found
):  # fmt: skip
    """Reads each user's last `n` behaviours into [k, n] outputs, and their mask behind these.

    The common case of `read_chains`, with less to prepare.

    Args:
      held: [3 or more, k] place and bytes of the newest part, and behaviours in all parts.
      cut: [k] times before which (`by_time`) or positions below which rows are seen; empty: all
        are.
    Returns:
      (users that cannot be read, preads).
    """
    dictionaries = np.zeros((256, 4), np.int64)
    codes, wide = np.empty(MAX_DICT, np.uint32), np.empty(CHUNK, np.uint64)
    table, result = np.empty(MAX_DICT, np.uint64), np.zeros(RESULTS, np.int64)
    scratch = np.empty(1 << 15, np.uint8)
    offsets, sizes, defaults = plan[0], plan[1, :-1], plan[2]
    failed = reads = 0
    for i in range(len(users)):
        limit, before = held[2, i], NEVER
        if len(cut) and by_time:
            before = cut[i]
        elif len(cut):
            limit = min(limit, cut[i])
        scratch = _read_chain(
            mapped, fds, users[i], stream, held[0, i], held[1, i], limit, before, n,
            (i + 1) * n, True, wanted, sizes, offsets, defaults, out, found[i],
            scratch, result, dictionaries, codes, wide, table,
        )  # fmt: skip
        end = offsets[len(sizes)] + (i + 1) * n
        out[end - found[i, 1] : end] = 1
        failed += found[i, 0] != 0
        reads += found[i, 6]
    return failed, reads
