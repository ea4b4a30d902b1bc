"""Block sizes of the kernels.

Entries of TABLE are to come from measurements; there are none yet, so every device takes DEFAULT.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from kernels import dispatch


class Blocks(NamedTuple):
    """Of one program: candidates and rows. Powers of 2 for pallas_gpu."""

    candidates: int
    rows: int


DEFAULT = {"pallas_tpu": Blocks(128, 512), "pallas_gpu": Blocks(32, 64)}
TABLE: dict[str, dict[tuple[str, str, int], Blocks]] = {"pallas_tpu": {}, "pallas_gpu": {}}


def blocks_for(implementation: str, dtype: Any, rows: int) -> Blocks:
    """What a program of the implementation takes at a time, on the device that is compiled for."""
    return dispatch.block_sizes(
        TABLE[implementation], dispatch.device_kind(), dtype, rows, DEFAULT[implementation]
    )
