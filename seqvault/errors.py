"""The one error of the store that bad data or bad files can cause."""


class VaultError(ValueError):
    """Input that cannot be stored, or files that are not a whole, unharmed snapshot."""
