"""Segment files on a local disk: parts, one behind the other, and their positional reads."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from seqvault.bits import SLACK
from seqvault.errors import VaultError
from seqvault.index import offset_of, segment_of


def segment_path(directory: Path, segment: int) -> Path:
    return directory / f"blocks-{segment:06d}.sv"


class _Open:
    """A file descriptor that closes when the last reader lets go of it."""

    def __init__(self, path: Path):
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise VaultError(f"{path}: missing from the vault") from None

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class Segments:
    """The segments of one vault, opened when first read. Attribute `reads` counts preads."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._open: dict[int, _Open] = {}
        self.reads = 0

    def file(self, segment: int) -> _Open:
        """Raises VaultError if the file is missing."""
        found = self._open.get(segment)
        if found is None:
            found = self._open[segment] = _Open(segment_path(self._directory, segment))
        return found

    def forget(self, keep: set[int]) -> None:
        """Closes all but the segments `keep`, once nobody reads them."""
        self._open = {s: file for s, file in self._open.items() if s in keep}

    def fetch(
        self, users: np.ndarray, places: np.ndarray, sizes: np.ndarray, hints: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`reading.Fetch`: one pread per part, of its last `hints` bytes."""
        del users
        wanted = np.minimum(sizes, hints)
        ends = np.cumsum(wanted)
        buf = np.empty(int(ends[-1]) + SLACK, np.uint8)
        view = memoryview(buf)
        starts = (ends - wanted).tolist()
        offsets = (offset_of(places) + sizes - wanted).tolist()
        got = []
        for segment, at, end, offset in zip(
            segment_of(places).tolist(), starts, ends.tolist(), offsets, strict=True
        ):
            got.append(os.preadv(self.file(segment).fd, [view[at:end]], offset))
        self.reads += len(got)
        # A file that ends too early leaves unset bytes, which no checksum will pass.
        return buf, ends, wanted
