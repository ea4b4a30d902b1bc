"""Segment files on a local disk: parts, one behind the other, and their positional reads."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from seqvault.errors import MissingError


def segment_path(directory: Path, segment: int) -> Path:
    return directory / f"blocks-{segment:06d}.sv"


class _Open:
    """A file descriptor that closes when the last reader lets go of it."""

    def __init__(self, path: Path):
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise MissingError(f"{path}: missing from the vault") from None
        if hasattr(os, "posix_fadvise"):  # a lookup wants one part, and no read-ahead behind it
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class Segments:
    """The segments of one vault, opened when first read.

    Attributes:
      reads: how many preads there were.
      source: what the compiled reads need of the files as they are open now.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._files: dict[int, _Open] = {}
        self.reads = 0
        self._adopt({})

    def open(self, segments: Iterable[int]) -> None:
        """Opens those of the segments that are not. Raises MissingError if a file is missing."""
        if all(segment in self._files for segment in segments):
            return
        files = dict(self._files)
        for segment in segments:
            if segment not in files:
                files[segment] = _Open(segment_path(self._directory, segment))
        self._adopt(files)

    def forget(self, keep: set[int]) -> None:
        """Closes all but the segments `keep`, once nobody reads them."""
        self._adopt({s: file for s, file in self._files.items() if s in keep})

    def _adopt(self, files: dict[int, _Open]) -> None:
        fds = np.full(max(files, default=0) + 1, -1, np.int32)
        for segment, file in files.items():
            fds[segment] = file.fd
        self._files = files
        self.source = FileSource(self, files, fds)  # replaced whole: readers keep what they have


class FileSource(NamedTuple):
    """Open segments; as long as somebody holds it, they stay open."""

    segments: Segments
    files: dict[int, _Open]
    fds: np.ndarray
    mapped = np.zeros(0, np.uint8)
