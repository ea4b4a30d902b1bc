"""Block sizes of the kernels.

Entries of TABLE are to come from measurements; there are none yet, so every device takes DEFAULT.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from kernels import dispatch


class Blocks(NamedTuple):
    """Of one program: candidates (of pallas_gpu's backward pass: at least) and rows of a block."""

    candidates: int
    rows: int  # a power of 2 for pallas_gpu


DEFAULT = {"pallas_tpu": Blocks(128, 512), "pallas_gpu": Blocks(8, 64)}
# Three TF32 products each: twice the registers of a row, of which the backward pass has too few.
OF_FLOAT32 = {"pallas_tpu": Blocks(128, 512), "pallas_gpu": Blocks(8, 32)}
TABLE: dict[str, dict[tuple[str, str, int], Blocks]] = {"pallas_tpu": {}, "pallas_gpu": {}}


def blocks_for(implementation: str, dtype: Any, rows: int) -> Blocks:
    """What a program of the implementation takes at a time, on the device that is compiled for."""
    default = (OF_FLOAT32 if dtype == jnp.float32 else DEFAULT)[implementation]
    return dispatch.block_sizes(TABLE[implementation], dispatch.device_kind(), dtype, rows, default)
