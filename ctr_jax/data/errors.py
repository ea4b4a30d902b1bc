"""The error that a user's files or options can cause."""


class DataError(ValueError):
    """Bad input data: one line that names the file, the place, the value and what to do."""
