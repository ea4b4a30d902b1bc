"""Small random event logs, written as CSV or parquet, with the same rows as Python dicts."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TEST_FROM = 1_000_600
COLUMNS = ("user", "item", "ts", "rating", "tab", "session")


def draw(seed: int, events: int = 400, users: int = 12, items: int = 25) -> dict[str, list[dict]]:
    """{"events", "items", "users", "prior"}: ties in time, rare ids, missing values, lone users."""
    rng = np.random.default_rng(seed)
    times = np.sort(rng.integers(1_000_000, 1_000_800, events))
    log = []
    for t in times.tolist():
        log.append(
            {
                "user": int(rng.integers(0, users)) * 7,
                "item": int(items * rng.random() ** 2),
                "ts": t,
                "rating": int(rng.integers(1, 6)),
                "tab": None if rng.random() < 0.1 else "abc"[int(rng.integers(0, 3))],
                "session": t // 100,
            }
        )
    table = [
        {
            "item": i,
            "author": None if i % 9 == 0 else i // 3,
            "length": None if i % 7 == 0 else round(float(rng.gamma(2.0)), 3),
        }
        for i in range(items)
        if i % 11
    ]
    people = [
        {"user": 7 * u, "age": int(rng.integers(0, 4)) * 10, "fans": int(rng.integers(0, 1000))}
        for u in range(users)
        if u % 5
    ]
    prior = [
        {
            "user": 7 * u,
            "seen": rng.integers(0, items, int(rng.integers(0, 5))).tolist(),
            "liked": rng.integers(0, items, 2).tolist(),
            "last": 1_000_000 + int(rng.integers(-50, 20)),
        }
        for u in range(users + 2)
        if u % 4
    ]
    return {"events": log, "items": table, "users": people, "prior": prior}


def write(directory: Path, log: dict[str, list[dict]], kind: str, parts: int = 1) -> None:
    """Writes events-<n>.<kind>, items.<kind>, users.<kind> and prior.parquet (it holds lists)."""
    directory.mkdir(parents=True, exist_ok=True)
    size = -(-len(log["events"]) // parts)
    for part in range(parts):
        write_rows(
            directory / f"events-{part}.{kind}", log["events"][part * size : (part + 1) * size]
        )
    for name in ("items", "users"):
        write_rows(directory / f"{name}.{kind}", log[name])
    write_rows(directory / "prior.parquet", log["prior"])


def write_rows(path: Path, rows: list[dict]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=50)
        return
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
