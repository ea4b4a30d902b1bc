"""Segment files on a local disk: parts, one behind the other, and their positional reads."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from seqvault.errors import MissingError, VaultError

MAX_SEGMENT = (1 << 23) - 1  # a place has 23 bits for the segment
_NAME = re.compile(r"blocks-(\d{6,})\.sv")


def segment_path(directory: Path, segment: int) -> Path:
    return directory / f"blocks-{segment:06d}.sv"


def segment_number(name: str) -> int | None:
    """The segment whose file has that name; None if it is not a segment's."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


def committed_bytes(manifest: Mapping) -> dict[int, int]:
    """{segment: bytes that hold whole parts} of a manifest.

    Raises:
      VaultError: a number is not possible.
      ValueError, TypeError, LookupError, AttributeError: it is no such manifest.
    """
    committed = {int(s): int(b) for s, b in manifest["segments"].items()}
    for segment, size in committed.items():
        if not 0 <= segment <= MAX_SEGMENT or size < 0:
            raise VaultError(f"the manifest names a segment {segment} of {size} bytes")
    return committed


class _Open:
    """A file descriptor that closes when the last reader lets go of it."""

    def __init__(self, path: Path):
        try:
            self.fd = _open_many(path)
        except FileNotFoundError:
            raise MissingError(f"{path}: missing from the vault") from None
        if hasattr(os, "posix_fadvise"):  # a lookup wants one part, and no read-ahead behind it
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


def _open_many(path: Path) -> int:
    """Opens a segment for reading; every segment stays open, so they may be many.

    Raises:
      VaultError: the process has as many files open as it may have.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise VaultError(
            f"{path}: too many open files; a vault keeps its segments open, and this process may "
            f"open {hard} files (RLIMIT_NOFILE, `ulimit -n`)"
        ) from error


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
