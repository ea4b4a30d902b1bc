"""RequestBatch: the only thing that flows from data to models.

Axis letters, the same in every file of the library: B requests, C candidates, L history length.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax

Array = Any  # numpy on the host, jax.Array on the device: both flow through the same pytree


@flax.struct.dataclass
class RequestBatch:
    """A batch of requests; one row is one request of one user (SparseCTR 3.2, listwise).

    Pointwise data is C = 1. Histories are oldest first and right-aligned; masks, never a zero
    time, mark padding. A row whose candidate_mask is all False is padding and counts nowhere.

    Attributes:
      user_id: [B] int32, row of the user in the history store; the GAUC group.
      request_id: [B] int32; rows of a request that was split over several rows share it.
      request_time: [B] int32, seconds.
      user: {column: [B]} int32 ids or float32 values.
      context: {column: [B]} what is known of the request itself, such as the ad slot.
      behaviour: {column: [B, L]} int32 ids.
      behaviour_time: [B, L] int32 seconds.
      behaviour_mask: [B, L] bool.
      candidate: {column: [B, C]} int32 ids or float32 values.
      candidate_mask: [B, C] bool.
      label: [B, C] float32 in {0, 1}.
      weight: [B, C] float32, 0 or more: how many times a candidate counts in losses and metrics.
        None, of data without weights: once.
    """

    user_id: Array
    request_id: Array
    request_time: Array
    user: dict[str, Array]
    context: dict[str, Array]
    behaviour: dict[str, Array]
    behaviour_time: Array
    behaviour_mask: Array
    candidate: dict[str, Array]
    candidate_mask: Array
    label: Array
    weight: Array | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, L, C)."""
        b, c = self.candidate_mask.shape
        return b, self.behaviour_mask.shape[1], c

    def values(self, group: str, source: str) -> Array:
        """The ids or values of column `source` of `group`: [B], [B, L] or [B, C]."""
        return getattr(self, group)[source]


@flax.struct.dataclass
class EmbeddedBatch:
    """A RequestBatch with the vectors of its columns: all a model ever sees.

    Attributes:
      batch: the RequestBatch (ids, times, masks, labels).
      vectors: {Column.key: [B, width], [B, L, width] or [B, C, width]}; exactly zero at padding.
      rows, slots: {Column.key: [V, width]} and {Column.key: [B, L] int32} of behaviour columns that
        are not in `vectors`: their vectors are rows[key][slots[key]], zero where a slot is past the
        end. Empty for models that do not say `takes_rows = True`; `ctr_jax.tokens` reads both.
    """

    batch: RequestBatch
    vectors: dict[str, jax.Array]
    rows: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    slots: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
