"""Compiled bit packing and checksums on byte buffers.

Buffers are uint8 arrays. Readers may load up to 8 bytes beyond what they want: every buffer
carries `SLACK` bytes behind its last packed value (in a part, the trailer does).
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

SLACK = 16
LANES = 8
_P1 = np.uint64(0x9E3779B185EBCA87)
_P2 = np.uint64(0xC2B2AE3D27D4EB4F)
_P3 = np.uint64(0x165667B19E3779F9)
_P4 = np.uint64(0x85EBCA77C2B2AE63)
_P5 = np.uint64(0x27D4EB2F165667C5)
_U = np.uint64


def _unaligned_load(bits: int):
    """An intrinsic load(buf, at) of a little-endian unsigned number: one machine instruction.

    Eight byte loads and shifts mean the same, but LLVM does not join them here.
    """

    @intrinsic
    def load(typingctx, buf, at):
        def generate(context, builder, signature, arguments):
            array = context.make_array(signature.args[0])(context, builder, arguments[0])
            pointer = builder.gep(array.data, [arguments[1]])
            kind = ir.IntType(bits)
            value = builder.load(builder.bitcast(pointer, kind.as_pointer()))
            value.align = 1
            return builder.zext(value, ir.IntType(64)) if bits < 64 else value

        return types.uint64(buf, types.intp), generate

    return load


_load64, _load32 = _unaligned_load(64), _unaligned_load(32)


@intrinsic
def address_of(typingctx, buf, at):
    """The address of buf[at], for C functions."""

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        pointer = builder.gep(array.data, [arguments[1]])
        return builder.bitcast(pointer, ir.IntType(8).as_pointer())

    return types.voidptr(buf, types.intp), generate


@njit(cache=True, nogil=True, inline="always")
def load64(buf, at):
    """The 8 bytes at `at` as uint64."""
    return _load64(buf, at)


@njit(cache=True, nogil=True, inline="always")
def load32(buf, at):
    """The 4 bytes at `at` as a non-negative int64."""
    return np.int64(_load32(buf, at))


@njit(cache=True, nogil=True, inline="always")
def store(buf, at, value, size):
    """Writes the low `size` bytes of `value`."""
    bits = _U(value)
    for i in range(size):
        buf[at + i] = np.uint8(bits & _U(255))
        bits >>= _U(8)


@njit(cache=True, nogil=True, inline="always")
def _rotate(x, bits):
    return (x << _U(bits)) | (x >> _U(64 - bits))


@njit(cache=True, nogil=True, inline="always")
def _round(lane, word):
    return _rotate(lane + word * _P2, 31) * _P1


@njit(cache=True, nogil=True)
def checksum(buf, start, stop):
    """The low 32 bits of XXH64 (seed 0) of buf[start:stop], as zstd frames use it.

    A table-driven CRC runs at a fifth of the speed in compiled Python, and every read pays it.
    """
    size = stop - start
    at = start
    if size >= 32:
        a, b, c, d = _P1 + _P2, _P2, _U(0), _U(0) - _P1
        while at + 32 <= stop:
            a = _round(a, load64(buf, at))
            b = _round(b, load64(buf, at + 8))
            c = _round(c, load64(buf, at + 16))
            d = _round(d, load64(buf, at + 24))
            at += 32
        h = _rotate(a, 1) + _rotate(b, 7) + _rotate(c, 12) + _rotate(d, 18)
        h = (h ^ _round(_U(0), a)) * _P1 + _P4
        h = (h ^ _round(_U(0), b)) * _P1 + _P4
        h = (h ^ _round(_U(0), c)) * _P1 + _P4
        h = (h ^ _round(_U(0), d)) * _P1 + _P4
    else:
        h = _P5
    h += _U(size)
    while at + 8 <= stop:
        h = _rotate(h ^ _round(_U(0), load64(buf, at)), 27) * _P1 + _P4
        at += 8
    if at + 4 <= stop:
        h = _rotate(h ^ (_load32(buf, at) * _P1), 23) * _P2 + _P3
        at += 4
    while at < stop:
        h = _rotate(h ^ (_U(buf[at]) * _P5), 11) * _P1
        at += 1
    h = (h ^ (h >> _U(33))) * _P2
    h = (h ^ (h >> _U(29))) * _P3
    return np.int64((h ^ (h >> _U(32))) & _U(0xFFFFFFFF))


@njit(cache=True, nogil=True, inline="always")
def width_of(value):
    """Bits of an unsigned value: 0 .. 64."""
    bits = _U(value)
    width = 0
    if bits >> _U(32):
        width, bits = width + 32, bits >> _U(32)
    if bits >> _U(16):
        width, bits = width + 16, bits >> _U(16)
    if bits >> _U(8):
        width, bits = width + 8, bits >> _U(8)
    while bits:
        width, bits = width + 1, bits >> _U(1)
    return width


@njit(cache=True, nogil=True, inline="always")
def packed_bytes(count, width):
    """Bytes of `count` packed values of `width` bits."""
    groups = (count + LANES - 1) // LANES
    low, high = min(width, 32), max(width - 32, 0)
    return 4 * LANES * (((groups * low + 31) >> 5) + ((groups * high + 31) >> 5))


@njit(cache=True, nogil=True)
def _pack_plane(buf, at, values, shift, width):
    """Packs `width` <= 32 bits, from bit `shift` on, of each value; the end."""
    groups = (len(values) + LANES - 1) // LANES
    words = (groups * width + 31) >> 5
    mask = (_U(1) << _U(width)) - _U(1)
    buf[at : at + 4 * LANES * words] = 0
    for i in range(len(values)):
        bit = (i // LANES) * width
        code = ((values[i] >> _U(shift)) & mask) << _U(bit & 31)
        where = at + 4 * (LANES * (bit >> 5) + i % LANES)
        store(buf, where, _U(load32(buf, where)) | (code & _U(0xFFFFFFFF)), 4)
        if (bit & 31) + width > 32:
            store(buf, where + 4 * LANES, code >> _U(32), 4)
    return at + 4 * LANES * words


@njit(cache=True, nogil=True)
def pack(buf, at, values, shift, width):
    """Packs `width` bits, from bit `shift` on, of each of `values` (uint64); the end.

    Eight lanes of 32-bit words side by side, value i in lane i mod 8: eight neighbours are shifted
    alike, which is what vector units do. Bits above 32 follow in a plane of their own.
    """
    if width:
        at = _pack_plane(buf, at, values, shift, min(width, 32))
    if width > 32:
        at = _pack_plane(buf, at, values, shift + 32, width - 32)
    return at


@njit(cache=True, nogil=True)
def unpack(buf, at, count, width, out):
    """Fills out[:count] (uint32, a multiple of LANES long) with values of `width` <= 32 bits."""
    groups = (count + LANES - 1) // LANES
    if width == 0:
        out[: groups * LANES] = 0
        return
    mask = np.uint32((1 << width) - 1)
    for group in range(groups):
        bit = group * width
        shift, where = np.uint32(bit & 31), at + 4 * LANES * (bit >> 5)
        first = group * LANES  # unsigned below: a signed index would be tested for being negative
        if shift + width > 32:
            left = np.uint32(32 - shift)
            for lane in range(LANES):
                low = np.uint32(_load32(buf, where + 4 * lane)) >> shift
                high = np.uint32(_load32(buf, where + 4 * LANES + 4 * lane)) << left
                out[_U(first + lane)] = (low | high) & mask
        else:
            for lane in range(LANES):
                low = np.uint32(_load32(buf, where + 4 * lane)) >> shift
                out[_U(first + lane)] = low & mask
