"""Writing parts: packing users' rows, cutting long histories, filling segments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from seqvault.errors import VaultError
from seqvault.files import File, Files
from seqvault.index import place_of
from seqvault.part import NO_PLACE, bound, encode
from seqvault.segments import segment_path

BLOCK_ROWS = 1024
LARGEST = 64  # blocks of the largest part: bounds what one merge rewrites
SEGMENT_BYTES = 256 << 20
# More rows than a read can want, and half of what a place's OFFSET_BITS can reach.
MOST_ROWS, MOST_BYTES = 1 << 20, 1 << 39
_BUFFER_BYTES = 4 << 20


def check_sizes(block_rows: int, segment_bytes: int) -> None:
    """Raises VaultError unless a vault can have such blocks and segments."""
    for name, value, most in (
        ("block_rows", block_rows, MOST_ROWS),
        ("segment_bytes", segment_bytes, MOST_BYTES),
    ):
        if not isinstance(value, (int, np.integer)) or not 1 <= value <= most:
            raise VaultError(f"{name} is {value!r}; it must be an integer of 1 .. {most}")


class PartWriter:
    """Appends parts to segments from `segment`, byte `size` on; buffers until `flush`.

    Attributes:
      segment, size: where the next part goes.
      written: bytes of parts so far.
      sizes: {segment: bytes} of every segment that this writer touched.
    """

    def __init__(
        self,
        files: Files,
        directory: Path,
        segment: int,
        size: int,
        segment_bytes: int = SEGMENT_BYTES,
    ):
        self._files, self._directory = files, directory
        self._segment_bytes = segment_bytes
        self._file: File | None = None
        self._buffer = np.zeros(_BUFFER_BYTES, np.uint8)
        self._held = 0
        self.segment, self.size = segment, size
        self.sizes = {segment: size}
        self.written = 0

    def write(
        self,
        words: np.ndarray,
        user: int,
        stream: int,
        version: int,
        first_row: int = 0,
        previous: int = NO_PLACE,
        previous_bytes: int = 0,
    ) -> tuple[int, int]:
        """Packs rows `words` [columns, rows] of one user into one part: (its place, its bytes)."""
        need = bound(words.shape[1], words.shape[0])
        if self._held + need > len(self._buffer):
            self.flush()
            if need > len(self._buffer):
                self._buffer = np.zeros(need, np.uint8)
        if self.size >= self._segment_bytes:
            self.flush()
            self.sync()
            self._close()
            self.segment, self.size = self.segment + 1, 0
        end = encode(
            words, self._buffer, self._held, user, stream, version, first_row, previous,
            previous_bytes,
        )  # fmt: skip
        place, length = place_of(self.segment, self.size), end - self._held
        self._held, self.size = end, self.size + length
        self.sizes[self.segment] = self.size
        self.written += length
        return place, length

    def write_chain(
        self,
        words: np.ndarray,
        user: int,
        stream: int,
        version: int,
        block_rows: int,
        first_row: int = 0,
        previous: int = NO_PLACE,
        previous_bytes: int = 0,
    ) -> tuple[int, int]:
        """Writes rows from `first_row` to the newest, in parts as `cuts` says: the newest's place.

        `first_row` is where one of the history's parts starts, and `previous` the part before it.
        The newest part alone serves reads of `block_rows` behaviours.
        """
        for start, stop in cuts(first_row + words.shape[1], block_rows):
            start = max(start, first_row)
            if start < stop:
                previous, previous_bytes = self.write(
                    words[:, start - first_row : stop - first_row], user, stream, version, start,
                    previous, previous_bytes,
                )  # fmt: skip
        return previous, previous_bytes

    def flush(self) -> None:
        """Hands what is buffered to the operating system."""
        if self._held:
            if self._file is None:
                self._file = self._files.open(segment_path(self._directory, self.segment))
                self._file.truncate(self.size - self._held)
                self._files.sync_directory(self._directory)
            self._file.write(self._buffer[: self._held].data)
            self._held = 0

    def sync(self) -> None:
        """Makes every part written so far survive a power loss."""
        self.flush()
        if self._file is not None:
            self._file.sync()

    def cut(self, segment: int, size: int) -> None:
        """Forgets what was written behind byte `size` of `segment`; newer segments are left."""
        self._held = 0
        if segment != self.segment:
            self._close()
        elif self._file is not None:
            self._file.truncate(size)
        self.sizes = {s: b for s, b in self.sizes.items() if s < segment} | {segment: size}
        self.segment, self.size = segment, size

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self) -> None:
        self._close()


def cuts(rows: int, block_rows: int) -> Iterator[tuple[int, int]]:
    """Row ranges of a history's parts, oldest first.

    The newest part has one to two blocks of rows. The blocks before it lie in parts of falling
    powers of two, like the digits of their number: a read of n rows meets about log2 of n parts,
    and a growing history joins a block with its elders once per digit.
    """
    older, at, blocks = max(rows // block_rows, 1) - 1, 0, LARGEST
    while older:
        while blocks > older:
            blocks //= 2
        yield at, at + blocks * block_rows
        at, older = at + blocks * block_rows, older - blocks
    yield at, rows


def kept_rows(before: int, after: int, block_rows: int) -> int:
    """Rows in the oldest parts that stay when a history of `before` rows grows to `after`."""
    kept = 0
    for (old, _), (new, _) in zip(cuts(before, block_rows), cuts(after, block_rows), strict=False):
        if old != new:
            break
        kept = old
    return kept
