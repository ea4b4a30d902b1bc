"""Block sizes of the kernels.

Entries of TABLE are to come from benchmarks/gpu_suite.py's sweeps; there are none yet. DEFAULT of
pallas_gpu was the best of trial runs on an H200.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from kernels import dispatch


class Blocks(NamedTuple):
    """Of one program: candidates (of pallas_gpu's backward pass: at least), and rows of a block (of
    that pass: half as many)."""

    candidates: int
    rows: int  # a power of 2 for pallas_gpu


DEFAULT = {"pallas_tpu": Blocks(128, 512), "pallas_gpu": Blocks(8, 128)}
TABLE: dict[str, dict[tuple[str, str, int], Blocks]] = {"pallas_tpu": {}, "pallas_gpu": {}}


def blocks_for(implementation: str, dtype: Any, rows: int) -> Blocks:
    """What a program of the implementation takes at a time, on the device that is compiled for."""
    return dispatch.block_sizes(
        TABLE[implementation], dispatch.device_kind(), dtype, rows, DEFAULT[implementation]
    )
