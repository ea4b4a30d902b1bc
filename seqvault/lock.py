"""The writer's lock on a vault: one process holds it, and none of its forks."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from seqvault.errors import VaultError

LOCK = "lock"
_held: set[WriterLock] = set()


class WriterLock:
    """An exclusive lock on the file `lock`; the kernel drops it when the process dies.

    A fork has the same open file, and with it the lock: it would write to the log beside its
    parent, and keep others out when the parent is dead. So forks let go of it.

    Attributes:
      pid: of the process that took it.
    """

    def __init__(self, directory: Path):
        """Raises VaultError if another process, or another `Vault` of this one, holds it."""
        self.pid = os.getpid()
        self._fd = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise VaultError(f"{directory}: another process writes to this vault") from None
        _held.add(self)

    @property
    def mine(self) -> bool:
        """Whether this process took it, and not one that this is a fork of."""
        return self.pid == os.getpid()

    def release(self) -> None:
        if self in _held:
            _held.remove(self)
            os.close(self._fd)  # the lock goes with the last descriptor, a fork's included


def _let_go() -> None:
    for lock in [*_held]:
        lock.release()


os.register_at_fork(after_in_child=_let_go)
