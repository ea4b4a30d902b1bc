"""What the store raises."""

from __future__ import annotations

import dataclasses


class VaultError(Exception):
    """A vault, a snapshot or a request that cannot be served; the message names what and where.

    Attributes:
      row: of the input that is at fault, if one is.
    """

    row: int | None = None

    def at_row(self, row: int) -> VaultError:
        """The error itself, with `row`."""
        self.row = row
        return self


class DamagedError(VaultError):
    """Bytes of a user's history are not what was written; other users stay readable.

    Attributes:
      users: the users whose parts are damaged.
    """

    def __init__(self, message: str, users: tuple[int, ...] = ()):
        super().__init__(message)
        self.users = users


class MissingError(VaultError):
    """A segment file is not there: lost, or reclaimed since the index was read.

    Attributes:
      users: the users who have a part there, where it was met by reading them.
    """

    def __init__(self, message: str, users: tuple[int, ...] = ()):
        super().__init__(message)
        self.users = users


@dataclasses.dataclass(frozen=True)
class Damage:
    """One place whose bytes are not what was written: file name, offset in bytes, what is wrong."""

    file: str
    offset: int
    problem: str

    def __str__(self) -> str:
        return f"{self.file}: damaged at byte {self.offset} ({self.problem})"
