"""The file layer: everything the store writes goes through here, so that tests can break it.

A test passes its own `Files`: one that forgets what no fsync followed (power loss), one whose disk
is full. `kill_point(name)` ends the process at a named step when SEQVAULT_KILL=name[:n] asks for it
(at the n-th passage); it is how the kill tests hit the moments that random kills miss.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

KILL = "SEQVAULT_KILL"
KILL_POINTS = (
    "after_data_write",
    "after_fsync",
    "before_index",
    "before_rename",
    "during_merge",
)
_passed: dict[str, int] = {}


def kill_point(name: str) -> None:
    """Dies by SIGKILL here if the environment asks for it."""
    wanted = os.environ.get(KILL)
    if not wanted:
        return
    target, _, times = wanted.partition(":")
    if target == name:
        _passed[name] = _passed.get(name, 0) + 1
        if _passed[name] >= int(times or 1):
            os.kill(os.getpid(), signal.SIGKILL)


class File:
    """A file open for appending; `size` is where the next write goes."""

    def __init__(self, path: Path, size: int | None = None):
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.size = os.fstat(self.fd).st_size if size is None else size

    def write(self, data: bytes | memoryview) -> int:
        """Appends all of `data` and returns its offset; it survives the death of this process.

        Raises:
          OSError: the disk is full or fails; what was written in part is cut off again, or `size`
            counts it, if even that fails. Any other error (an interrupt) leaves what was written,
            which may be all of it and may have been read; `size` counts that too.
        """
        offset, view = self.size, memoryview(data)
        try:
            done = 0
            while done < len(view):
                done += os.pwrite(self.fd, view[done:], offset + done)
        except OSError:
            try:
                os.ftruncate(self.fd, offset)
            except OSError:
                self.size = os.fstat(self.fd).st_size
            raise
        except BaseException:
            self.size = os.fstat(self.fd).st_size
            raise
        self.size = offset + len(view)
        return offset

    def sync(self) -> None:
        """Makes what was written survive a power loss."""
        os.fdatasync(self.fd)

    def truncate(self, size: int) -> None:
        os.ftruncate(self.fd, size)
        self.size = size

    def close(self) -> None:
        os.close(self.fd)


class Files:
    """The real file system."""

    def open(self, path: Path) -> File:
        """The file at `path` for appending, created if need be; its name needs `sync_directory`."""
        return File(path)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def remove(self, path: Path) -> None:
        os.unlink(path)

    def sync_directory(self, path: Path) -> None:
        """Makes names that were created, renamed or removed in `path` survive a power loss."""
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def make_directory(self, path: Path) -> None:
        """Makes `path` and the directories above that are not there; all survive a power loss."""
        new = [made for made in (path, *path.parents) if not made.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for made in new:
            self.sync_directory(made.parent)

    def write_whole(self, path: Path, data: bytes) -> None:
        """Puts a file of exactly `data` at `path`, durable, in one step: the old one or the new."""
        part = path.with_name(path.name + ".part")
        file = self.open(part)
        try:
            file.truncate(0)
            file.write(data)
            file.sync()
        finally:
            file.close()
        kill_point("before_rename")
        self.rename(part, path)
        self.sync_directory(path.parent)
