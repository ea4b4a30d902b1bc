"""The error that a user's files or options can cause, and a check that files and options share."""

from __future__ import annotations

from collections.abc import Iterable


class DataError(ValueError):
    """Bad input data: one line that names the file, the place, the value and what to do.

    Attributes:
      order: (kind of check, raw table, row) of a row's error, to tell the first of several.
    """

    def __init__(self, message: str, order: tuple[int, str, int] | None = None):
        super().__init__(message)
        self.order = order


def check_distinct(what: str, names: Iterable[str]) -> None:
    """Raises DataError if two names are equal, case not counting."""
    seen: dict[str, str] = {}
    for name in names:
        if (key := name.lower()) in seen:
            raise DataError(
                f"{what} {seen[key]!r} and {name!r} have one name, case not counting; rename one"
            )
        seen[key] = name
