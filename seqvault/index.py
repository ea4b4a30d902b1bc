"""The in-memory index: user -> newest part, counts, fresh tail. At most 48 bytes per user.

Users are arbitrary 64-bit numbers. Entries stand in order of arrival in one array that grows by an
eighth; an open-addressing table of their numbers (4 bytes a slot, at most 80 % full) finds them.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from seqvault.part import OFFSET_BITS

# user; place and bytes of the newest part (place -1: none); rows in all parts; newest time in
# parts; the newest row of the fresh tail + 1 (0: none).
ENTRY = np.dtype(
    [("user", "<i8"), ("place", "<i8"), ("bytes", "<u4"), ("rows", "<u4"), ("newest", "<i4"),
     ("tail", "<u4")]
)  # fmt: skip
_MIX = np.uint64(0x9E3779B97F4A7C15)


def place_of(segment: int, offset: int) -> int:
    """A part's place in one number."""
    return segment << OFFSET_BITS | offset


def segment_of(place):
    return place >> OFFSET_BITS


def offset_of(place):
    return place & ((1 << OFFSET_BITS) - 1)


@njit(cache=True, nogil=True, inline="always")
def _home(user, mask):
    key = np.uint64(user) * _MIX
    return np.int64((key ^ (key >> np.uint64(32))) & np.uint64(mask))


@njit(cache=True, nogil=True)
def _find(slots, entries, users, found):
    mask = len(slots) - 1
    for i in range(len(users)):
        slot = _home(users[i], mask)
        found[i] = -1
        while slots[slot]:
            if entries[slots[slot] - 1].user == users[i]:
                found[i] = slots[slot] - 1
                break
            slot = (slot + 1) & mask


@njit(cache=True, nogil=True)
def _look_up(slots, entries, users, found):
    numbers = np.empty(len(users), np.int64)
    _find(slots, entries, users, numbers)
    fresh = False
    for i in range(len(users)):
        if numbers[i] < 0:
            found[0, i], found[1:, i] = -1, 0
            continue
        entry = entries[numbers[i]]
        found[0, i], found[1, i], found[2, i] = entry.place, entry.bytes, entry.rows
        found[3, i], found[4, i] = entry.newest, entry.tail
        fresh |= entry.tail > 0
    return fresh


@njit(cache=True, nogil=True)
def _insert(slots, entries, first, count):
    mask = len(slots) - 1
    for i in range(first, count):
        slot = _home(entries[i].user, mask)
        while slots[slot]:
            slot = (slot + 1) & mask
        slots[slot] = i + 1


class Index:
    """The entries of one stream."""

    def __init__(self, entries: np.ndarray | None = None):
        """Indexes `entries` (dtype ENTRY), which it takes over."""
        self._entries = np.zeros(0, ENTRY) if entries is None else entries
        self.count = len(self._entries)
        self._slots = np.zeros(_slots_for(self.count), np.uint32)
        _insert(self._slots, self._entries, 0, self.count)

    @property
    def entries(self) -> np.ndarray:
        """[count] of dtype ENTRY, a view."""
        return self._entries[: self.count]

    @property
    def nbytes(self) -> int:
        """All that is resident."""
        return self._entries.nbytes + self._slots.nbytes

    def find(self, users: np.ndarray) -> np.ndarray:
        """Entry numbers of `users` [B] int64: [B] int64, -1 for one that is not there."""
        found = np.empty(len(users), np.int64)
        _find(self._slots, self._entries, users, found)
        return found

    def look_up(self, users: np.ndarray) -> tuple[np.ndarray, bool]:
        """([5, B] place, bytes, rows, newest and tail of `users` [B], whether any has a tail)."""
        found = np.empty((5, len(users)), np.int64)
        return found, _look_up(self._slots, self._entries, users, found)

    def find_or_add(self, users: np.ndarray) -> np.ndarray:
        """Like `find`, but adds empty entries for users that are not there."""
        found = self.find(users)
        if (found < 0).any():
            new = np.unique(users[found < 0])
            first, self.count = self.count, self.count + len(new)
            if self.count > len(self._entries):
                grown = np.zeros(self.count + max(64, self.count >> 3), ENTRY)
                grown[:first] = self._entries[:first]
                self._entries = grown
            self._entries["user"][first : self.count] = new
            self._entries["place"][first : self.count] = -1
            self._entries["newest"][first : self.count] = np.iinfo(np.int32).min
            if _slots_for(self.count) > len(self._slots):
                slots = np.zeros(_slots_for(self.count), np.uint32)
                _insert(slots, self._entries, 0, self.count)
                self._slots = slots
            else:
                _insert(self._slots, self._entries, first, self.count)
            found = self.find(users)
        return found

    def copy(self) -> Index:
        return Index(self.entries.copy())


def _slots_for(count: int) -> int:
    """The smallest power of two that `count` entries fill to at most 80 %."""
    size = 64
    while count > 0.8 * size:
        size *= 2
    return size
