"""Plan: what a builder declares about its raw log, and how the shared preparation reads it.

A builder ingests raw files into a scratch DuckDB database and defines three views there:

    impressions  user_key, order_time (any number; sorts), time (int32 seconds), seq (file order),
                 request_key (only for request = "key"), range ("train", "valid", "test" or NULL =
                 not a target), label (0 or 1), weight (0 or more; only where weighted), one
                 "context/<name>" or "candidate/<name>" per field
    behaviours   user_key, order_time, time, seq, keep (BOOLEAN: belongs to the history), one
                 "behaviour/<name>" per field
    users        user_key (unique), one "user/<name>" per field

Everything else (vocabularies, splits, histories, requests, records) is the same for every builder.
"""

from __future__ import annotations

import dataclasses
import numbers

import numpy as np

import seqvault
from ctr_jax.data.errors import DataError, check_distinct
from ctr_jax.features import GROUPS, DataColumn

KINDS = ("id", "quantile", "standard")
DEFAULT_BUCKETS = 32


@dataclasses.dataclass(frozen=True)
class Field:
    """A column of the prepared data set and how its raw values become numbers.

    Attributes:
      group, name: as in DataColumn; the views hold the raw values as "<group>/<name>".
      kind: "id" (a vocabulary of values), "quantile" (a vocabulary of buckets fitted on training
        rows), or "standard" (float32, standardised on training rows; missing becomes 0).
      vocabulary: fields of one vocabulary are fitted together and share ids; "" = the name.
    """

    group: str
    name: str
    kind: str = "id"
    vocabulary: str = ""

    def __post_init__(self) -> None:
        if self.group not in GROUPS or self.kind not in KINDS:
            raise DataError(f"column {self.key!r} has kind {self.kind!r}; use one of {KINDS}")
        if self.kind == "standard" and self.group == "behaviour":
            raise DataError(f"column {self.key!r}: behaviours are ids; use kind 'quantile'")
        if not self.vocabulary:
            object.__setattr__(self, "vocabulary", self.name)
        if not self.name or '"' in self.name:
            raise DataError(f"column {self.key!r}: a name needs a character, and none may be '\"'")
        if "/" in self.vocabulary:
            raise DataError(f"vocabulary {self.vocabulary!r} names a file; use no '/' in it")

    @property
    def key(self) -> str:
        return f"{self.group}/{self.name}"

    @property
    def column(self) -> DataColumn:
        if self.kind == "standard":
            return DataColumn(self.group, self.name, "dense")
        return DataColumn(self.group, self.name, "id", self.vocabulary)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the views of a builder become a prepared data set.

    Attributes:
      fields: the columns, in record order within their group.
      max_candidates: C; larger requests go over several records.
      request: what one request is: "event" (each impression), "time" (impressions of one user at
        one order_time) or "key" (of one user with one request_key; its time is the earliest).
      ties: "strict" (history = behaviours strictly before the request's time) or "order" (before
        the impression in (order_time, seq) order; only with request = "event", where impressions
        and behaviours share seq).
      impressions_are_behaviours: every impression is also a behaviour, so that vocabularies count
        it once (the larger count of the two groups) instead of adding the groups up.
      fit_behaviours: SQL predicate over `behaviours` for those that vocabularies may count; "" =
        those before the first impression of valid or test.
      inline_history: L of histories that come with each impression and stay in its record; user
        columns are then columns of `impressions`. 0 = histories live in the store.
      buckets: number of quantile buckets.
      min_count: values seen less often in training are out-of-vocabulary.
      valid_fraction: the share of the training range's requests, its last by time, that become
        valid, unless the impressions name a valid range themselves.
      weighted: impressions have a weight.
      own_valid: the impressions must name it: without any of valid the log is refused.
    """

    fields: tuple[Field, ...]
    max_candidates: int
    request: str = "event"
    ties: str = "strict"
    impressions_are_behaviours: bool = False
    fit_behaviours: str = ""
    inline_history: int = 0
    buckets: int = DEFAULT_BUCKETS
    min_count: int = 2
    valid_fraction: float = 0.05
    own_valid: bool = False
    weighted: bool = False

    def __post_init__(self) -> None:
        if self.request not in ("event", "time", "key"):
            raise DataError(f"no such request {self.request!r}")
        if self.ties not in ("strict", "order"):
            raise DataError(f"ties is {self.ties!r}; use 'strict' or 'order'")
        if self.ties == "order" and self.request != "event":
            raise DataError("ties = 'order' needs request = 'event': the file's order is the time")
        for name in ("max_candidates", "min_count", "buckets"):
            if not isinstance(getattr(self, name), numbers.Integral):
                raise DataError(f"{name} is {getattr(self, name)!r}; use a whole number")
        if self.max_candidates < 1 or self.min_count < 1 or self.buckets < 2:
            raise DataError("max_candidates and min_count must be at least 1, buckets at least 2")
        if not (isinstance(self.valid_fraction, numbers.Real) and 0 < self.valid_fraction < 1):
            raise DataError(f"valid_fraction is {self.valid_fraction!r}; use a fraction in (0, 1)")
        keys = [f.key for f in self.fields]
        if twice := sorted({k for k in keys if keys.count(k) > 1}):
            raise DataError(f"columns {twice} are declared twice")
        kinds: dict[str, str] = {}
        for field in self.fields:
            if (
                field.kind != "standard"
                and kinds.setdefault(field.vocabulary, field.kind) != field.kind
            ):
                raise DataError(
                    f"vocabulary {field.vocabulary!r} is both {kinds[field.vocabulary]!r} and "
                    f"{field.kind!r}; give {field.key!r} a vocabulary of its own"
                )
        # DuckDB and some file systems take names that differ in case alone for one.
        check_distinct("columns", keys)
        check_distinct("vocabularies", kinds)
        if not self.inline_history:
            try:
                seqvault.Schema({f.name: np.int32 for f in self.group("behaviour")})
            except seqvault.VaultError as error:
                raise DataError(f"behaviour columns: {error}") from error

    def group(self, *groups: str) -> tuple[Field, ...]:
        return tuple(f for f in self.fields if f.group in groups)

    def vocabularies(self, kind: str) -> dict[str, list[Field]]:
        """{vocabulary: its fields} of one kind, in order of appearance."""
        found: dict[str, list[Field]] = {}
        for field in self.fields:
            if field.kind == kind:
                found.setdefault(field.vocabulary, []).append(field)
        return found
