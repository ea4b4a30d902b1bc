"""Schema: the columns of a behaviour and their logical types."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from seqvault.errors import VaultError

TIME = "time"
RESERVED = ("user", TIME, "mask", "offsets")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclasses.dataclass(frozen=True)
class Schema:
    """The columns of a behaviour beside its time (int32 seconds), which every schema has.

    A column's dtype is what reads return: bool, any integer of up to 64 bits, float32 or float64.
    On disk an integer takes the narrowest unsigned type that holds the column's largest value.

    Attributes:
      columns: {name: dtype}.
      version: the application's own number of this schema, kept in the manifest.
    Raises:
      VaultError: a name is reserved or cannot be a file name, or a dtype is not supported.
    """

    columns: Mapping[str, np.dtype]
    version: int = 1

    def __post_init__(self) -> None:
        columns = {name: np.dtype(dtype) for name, dtype in self.columns.items()}
        for name, dtype in columns.items():
            if name in RESERVED or not _NAME.fullmatch(name):
                raise VaultError(
                    f"column name {name!r} is not possible: use letters, digits, '_', '-' and '.', "
                    f"and none of {RESERVED}"
                )
            if dtype.kind not in "biuf" or dtype.itemsize > 8:
                raise VaultError(f"column {name!r} has dtype {dtype}; use bool, integers or floats")
        object.__setattr__(self, "columns", columns)

    @property
    def stored(self) -> dict[str, np.dtype]:
        """Every column on disk, the time first: {name: logical dtype}."""
        return {TIME: np.dtype(np.int32), **self.columns}

    def to_json(self) -> dict:
        return {"version": self.version, "columns": {k: v.name for k, v in self.columns.items()}}

    @classmethod
    def from_json(cls, fields: Mapping) -> Schema:
        return cls({k: np.dtype(v) for k, v in fields["columns"].items()}, fields["version"])


def narrowest_unsigned(largest: int) -> np.dtype:
    """The narrowest of uint8, uint16, uint32 and uint64 that holds `largest` (>= 0)."""
    return np.min_scalar_type(int(largest))
