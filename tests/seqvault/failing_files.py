"""File layers that break: power loss, a full disk; and one that saves the tests' fsyncs."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from seqvault.files import File, Files


class UnsyncedFile(File):
    def sync(self):
        pass


class UnsyncedFiles(Files):
    """Fsyncs nothing: tests that lose no power need not wait for a busy disk."""

    def open(self, path):
        return UnsyncedFile(path)

    def sync_directory(self, path):
        pass


class _TrackedFile(UnsyncedFile):
    def __init__(self, layer, path, key):
        super().__init__(path)
        self._layer, self._key = layer, key

    def write(self, data):
        self._layer.before_write(self, len(memoryview(data).cast("B")))
        return super().write(data)

    def sync(self):
        self._layer.before_sync(self)
        self._layer.durable_data[self._key] = self.path.read_bytes()


class LossyFiles(UnsyncedFiles):
    """Remembers what fsyncs made durable: the content of files, and the names in directories."""

    def __init__(self):
        self.durable_data: dict[int, bytes] = {}
        self.durable_names: dict[Path, int] = {}
        self._names: dict[Path, int] = {}

    def before_write(self, file, size):
        pass

    def before_sync(self, file):
        pass

    def open(self, path):
        if path not in self._names:
            self._names[path] = key = len(self.durable_data)
            self.durable_data[key] = path.read_bytes() if path.exists() else b""
            if path.exists():  # from before this layer: durable
                self.durable_names[path] = key
        return _TrackedFile(self, path, self._names[path])

    def rename(self, source, target):
        super().rename(source, target)
        self._names[target] = self._names.pop(source)

    def remove(self, path):
        super().remove(path)
        self._names.pop(path, None)

    def sync_directory(self, path):
        for name in [n for n in self.durable_names if n.parent == path and n not in self._names]:
            del self.durable_names[name]
        self.durable_names |= {n: key for n, key in self._names.items() if n.parent == path}

    def lose_power(self, source: Path, target: Path, rng=None) -> None:
        """Puts what a power loss leaves of directory `source` at `target`.

        Without `rng` all that was not fsynced is gone; with it, each file and each name may also
        have reached the disk, in part or whole.
        """
        target.mkdir()
        names = dict(self.durable_names)
        if rng is not None:
            for name, key in self._names.items():
                if rng.random() < 0.5:
                    names[name] = key
        now = {key: name for name, key in self._names.items()}
        for name, key in names.items():
            if name.parent != source:
                continue
            data = self.durable_data[key]
            if rng is not None and key in now and rng.random() < 0.7:
                written = now[key].read_bytes()
                if len(written) > len(data):
                    data = written[: rng.integers(len(data), len(written) + 1)]
            (target / name.name).write_bytes(data)


class FullDisk(LossyFiles):
    """Writes fail once `room` bytes are used; half of the failing write still reaches the file."""

    def __init__(self, room: int, of: str = ""):
        """`of`: only files whose names start so need room."""
        super().__init__()
        self.room, self._of = room, of

    def before_write(self, file, size):
        if not file.path.name.startswith(self._of):
            return
        if size > self.room:
            os.pwrite(file.fd, bytes(size // 2), file.size)
            os.ftruncate(file.fd, file.size)  # as File.write does when the system fails it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= size


class FailingSync(LossyFiles):
    """The next fsync fails once `fail` is set."""

    fail = False

    def before_sync(self, file):
        if self.fail:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
