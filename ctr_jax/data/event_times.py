"""Times of a raw log as SQL: read in the unit of the config, stored as int32 seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import duckdb

from ctr_jax.data.expressions import type_of
from ctr_jax.data.raw_types import FLOATS

UNITS = {"s": 1, "ms": 1000, "us": 1_000_000}


def time_value(
    con: duckdb.DuckDBPyConnection, options: Mapping[str, Any], time: str, source: str
) -> str:
    """SQL of a time in `time_unit`, as BIGINT or DOUBLE; NULL where it cannot be read."""
    time, unit, kind = f"({time})", UNITS[options["time_unit"]], type_of(con, time, source)
    if kind.startswith(("TIMESTAMP", "DATE")):
        return f"CAST(floor(epoch_us(CAST({time} AS TIMESTAMP)) / {1_000_000 // unit}) AS BIGINT)"
    if kind in ("VARCHAR", *FLOATS) or kind.startswith("DECIMAL"):
        number = f"TRY_CAST({time} AS DOUBLE)"
        return f"CASE WHEN isfinite({number}) THEN {number} END"
    return f"TRY_CAST({time} AS BIGINT)"


def seconds(time: str, options: Mapping[str, Any]) -> str:
    """SQL of whole seconds from a time in `time_unit`."""
    return f"CAST(floor({time} / {UNITS[options['time_unit']]}) AS BIGINT)"


def stored_time(time: str, options: Mapping[str, Any]) -> str:
    """SQL of the int32 seconds that are stored, from a time in `time_unit`."""
    whole, floor = seconds(time, options), options["time_floor"]
    return (
        f"CAST({whole} // {floor} * {floor} AS INTEGER)" if floor else f"CAST({whole} AS INTEGER)"
    )


def too_late(time: str, shown: str, options: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The row check of times that int32 seconds do not hold."""
    unit = options["time_unit"]
    largest = (2**31 - 1) * UNITS[unit]
    return {f"time after 2038 in unit {unit}": (f"{time} > {largest}", shown)}
