"""Schema: the columns of a behaviour, their types, and how schemas may change."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from seqvault.errors import VaultError

TIME = "time"
DEFAULT = "default"  # the stream of a vault that has one
RESERVED = ("user", TIME, "mask", "stream")
MAX_COLUMNS, MAX_VERSIONS = 200, 65_535
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclasses.dataclass(frozen=True)
class Schema:
    """The columns of a behaviour beside its time (int32 seconds), which every schema has.

    A column's dtype is what reads return: bool, any integer of up to 64 bits, float32 or float64.
    On disk a column takes the bits that its values need.

    Attributes:
      columns: {name: dtype}.
      version: the application's own number of this schema. A newer schema may add columns, drop
        columns and widen integers; older records then read as its `defaults`, or widened.
      event_id: an integer column that names an event: appends are then idempotent, a second event
        of the same user, stream and id is dropped. None keeps duplicates.
      defaults: {column: what a record without the column reads as}; 0 if not given.
    Raises:
      VaultError: a name is not possible, a dtype is not supported, or a default does not fit.
    """

    columns: Mapping[str, np.dtype]
    version: int = 1
    event_id: str | None = None
    defaults: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            columns = {n: np.dtype(d).newbyteorder("=") for n, d in self.columns.items()}
        except TypeError as error:
            raise VaultError(f"a column's dtype is not possible: {error}") from None
        for name, dtype in columns.items():
            if name in RESERVED or not _NAME.fullmatch(name):
                raise VaultError(
                    f"column name {name!r} is not possible: use letters, digits, '_', '-' and '.', "
                    f"and none of {RESERVED}"
                )
            if dtype.kind not in "biuf" or dtype.itemsize > 8 or dtype.name == "float16":
                raise VaultError(
                    f"column {name!r} has dtype {dtype}; use bool, integers, float32 or float64"
                )
        if len(columns) > MAX_COLUMNS:
            raise VaultError(f"{len(columns)} columns; a schema has at most {MAX_COLUMNS}")
        if not 0 <= self.version <= MAX_VERSIONS:
            raise VaultError(f"version {self.version} is not one of 0 .. {MAX_VERSIONS}")
        if (
            self.event_id is not None
            and columns.get(self.event_id, np.dtype("f4")).kind not in "iu"
        ):
            raise VaultError(f"event_id {self.event_id!r} is not an integer column")
        for name, value in self.defaults.items():
            if name not in columns:
                raise VaultError(f"a default for {name!r}, which is no column")
            check_values(name, np.asarray([value]), columns[name])
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "defaults", dict(self.defaults))

    @property
    def stored(self) -> dict[str, np.dtype]:
        """Every column on disk, the time first: {name: dtype}."""
        return {TIME: np.dtype(np.int32), **self.columns}

    def check_successor(self, newer: Schema) -> None:
        """Raises VaultError unless `newer` can read what was written under this schema."""
        if newer.version <= self.version:
            raise VaultError(f"schema version {newer.version} is not above {self.version}")
        if newer.event_id != self.event_id:
            raise VaultError(f"event_id {self.event_id!r} cannot become {newer.event_id!r}")
        for name, dtype in self.columns.items():
            wide = newer.columns.get(name, dtype)
            if dtype != wide and (dtype.kind not in "biu" or not np.can_cast(dtype, wide)):
                raise VaultError(f"column {name!r} cannot go from {dtype} to {wide}")
            if wide.kind == "f" and dtype != wide:
                raise VaultError(f"column {name!r} cannot go from {dtype} to {wide}")

    def to_json(self) -> dict:
        return {
            "version": self.version,
            "columns": [[name, dtype.name] for name, dtype in self.columns.items()],
            "event_id": self.event_id,
            "defaults": {k: np.asarray(v).item() for k, v in self.defaults.items()},
        }

    @classmethod
    def from_json(cls, fields: Mapping) -> Schema:
        """Raises VaultError if `fields` is not what `to_json` gives."""
        try:
            columns = {str(name): str(dtype) for name, dtype in fields["columns"]}
            for dtype in columns.values():
                if not re.fullmatch(r"bool|u?int\d+|float\d+", dtype):
                    raise VaultError(f"unknown column type {dtype!r}")
            defaults = dict(fields["defaults"])
            return cls(columns, int(fields["version"]), fields["event_id"], defaults)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise VaultError(f"not a schema ({error!r})") from None


def check_evolution(known: Sequence[Schema], newer: Schema) -> None:
    """Raises VaultError unless `newer` can read what was written under any schema `known` so far.

    A column that was dropped is still in older records, and reads again if it comes back.
    """
    for older in reversed(known):
        older.check_successor(newer)


def check_values(name: str, values: np.ndarray, dtype: np.dtype) -> None:
    """Raises VaultError, with the first index, unless every value can be stored as `dtype`."""
    kinds = "biuf" if dtype.kind == "f" else "biu"
    if not values.size:
        return
    if values.dtype.kind not in kinds:
        raise VaultError(f"column {name!r} is {values.dtype}, the schema says {dtype}")
    if values.dtype == dtype and dtype.kind != "f":
        return
    if dtype.kind == "f":
        bad, why = ~np.isfinite(values), "is not finite"
        if values.dtype != dtype:
            with np.errstate(over="ignore"):  # nor is what float32 would make of 1e300
                bad, why = ~np.isfinite(values.astype(dtype)), f"is not finite as {dtype}"
    else:
        info = np.iinfo(dtype) if dtype.kind != "b" else None
        least, largest = (info.min, info.max) if info else (0, 1)
        if int(values.max()) <= largest and int(values.min()) >= least:
            return
        bad = (values > largest) | (values < least)
        why = f"does not fit {least} .. {largest} ({dtype})"
    if bad.any():
        i = int(bad.argmax())
        raise VaultError(f"column {name!r} has value {values[i]}, which {why}").at_row(i)


def checked_columns(
    schema: Schema, users: np.ndarray, behaviours: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """`behaviours` of `users` [N] in the schema's types.

    Raises:
      VaultError: they do not fit; of a value, the message and `row` say which.
    """
    stored = schema.stored
    if set(behaviours) != set(stored):
        raise VaultError(f"columns {sorted(behaviours)}, the schema wants {sorted(stored)}")
    columns = {}
    for name, dtype in stored.items():
        values = np.asarray(behaviours[name])
        if values.shape != (len(users),):
            raise VaultError(
                f"column {name!r} has shape {values.shape}, there are {len(users)} users"
            )
        try:
            check_values(name, values, dtype)
        except VaultError as error:
            if error.row is None:
                raise
            where = f"row {error.row}, user {users[error.row]}"
            raise VaultError(f"{where}: {error}").at_row(error.row) from None
        columns[name] = values.astype(dtype, copy=False)
    return columns


def words_of(columns: Mapping[str, np.ndarray], schema: Schema) -> np.ndarray:
    """The columns as int64 words [columns, rows], in the schema's order: what a part packs."""
    stored = schema.stored
    words = np.empty((len(stored), len(columns[TIME])), np.int64)
    for row, (name, dtype) in zip(words, stored.items(), strict=True):
        values = np.asarray(columns[name]).astype(dtype, copy=False)
        if dtype.kind == "f":
            values = np.ascontiguousarray(values).view(f"u{dtype.itemsize}")
        row[:] = values.astype(np.int64, copy=False)  # 64 unsigned bits wrap, and wrap back
    return words
