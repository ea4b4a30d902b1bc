"""The error that a user's files or options can cause."""


class DataError(ValueError):
    """Bad input data: one line that names the file, the place, the value and what to do.

    Attributes:
      order: (kind of check, raw table, row) of a row's error, to tell the first of several.
    """

    def __init__(self, message: str, order: tuple[int, str, int] | None = None):
        super().__init__(message)
        self.order = order
