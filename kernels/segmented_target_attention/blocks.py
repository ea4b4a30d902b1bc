"""Block sizes of the kernels, and how blocks tile a history.

Entries of TABLE are to come from benchmarks/gpu_suite.py's sweeps; there are none yet. DEFAULT of
pallas_gpu was the best of trial runs on an H200.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from kernels import dispatch

MOST_SEGMENTS = 16  # of a block: each sums over all of its rows
SUBLANES = 8


class Blocks(NamedTuple):
    """Of one program: candidates, and rows of the history at most. Powers of 2 for pallas_gpu."""

    candidates: int
    rows: int


class Static(NamedTuple):
    """What a call of the kernels is told beside arrays; as of the op."""

    segment: int
    activation: str
    scale: float
    blocks: Blocks
    interpret: Any

    @property
    def softmax(self) -> bool:
        return self.activation == "softmax"


DEFAULT = {"pallas_tpu": Blocks(128, 256), "pallas_gpu": Blocks(32, 64)}
TABLE: dict[str, dict[tuple[str, str, int], Blocks]] = {"pallas_tpu": {}, "pallas_gpu": {}}


def blocks_for(implementation: str, dtype: Any, length: int) -> Blocks:
    """What a program of the implementation takes at a time, on the device that is compiled for."""
    return dispatch.block_sizes(
        TABLE[implementation], dispatch.device_kind(), dtype, length, DEFAULT[implementation]
    )


class Tiling(NamedTuple):
    """[B, L] seen as [B, groups, group rows], with blocks of `rows` along the last axis.

    Either the history is one group and a block holds `segments` whole segments (`whole`), or a
    segment is a group of one or more blocks. The last block of a group may be ragged.
    """

    groups: int
    group_rows: int
    rows: int
    segments: int
    whole: bool

    @property
    def blocks(self) -> int:
        """Per group."""
        return -(-self.group_rows // self.rows)


def tiling(length: int, segment: int, most_rows: int) -> Tiling:
    """Whole segments in a block, in a number that fills whole sublanes, where `most_rows` allow."""
    if length <= most_rows and length // segment <= MOST_SEGMENTS:
        return Tiling(1, length, length, length // segment, True)
    unit = next(n for n in range(1, SUBLANES + 1) if n * segment % SUBLANES == 0)
    if unit * segment <= most_rows:
        segments = unit * max(1, min(MOST_SEGMENTS // unit, most_rows // (unit * segment)))
        return Tiling(1, length, segments * segment, segments, True)
    rows = segment if segment <= most_rows else max(SUBLANES, most_rows // SUBLANES * SUBLANES)
    return Tiling(length // segment, segment, rows, 1, False)
