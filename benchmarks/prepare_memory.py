"""Peak memory and time of preparation: 5 million against 20 million behaviour rows.

    python -m benchmarks.prepare_memory [--rows=5000000,20000000] [--out=DIR]

Writes raw Tianchi 56 files of random rows (100 behaviours a user, 3 impressions per 100
behaviours), prepares each size in a process of its own, and prints peak resident memory
(ru_maxrss of that process, imports included) and wall time. The goal: 20 million rows under 2 GiB,
and no growth with rows once DuckDB's memory limit is reached.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

BLOCK = 1 << 19
FIRST_TIME, FIRST_IMPRESSION, END_TIME = 1492790400, 1494000000, 1494691200
PROFILE = (
    "cms_segid cms_group_id final_gender_code age_level pvalue_level shopping_level occupation"
)


def write_raw(directory: Path, behaviours: int, seed: int = 0) -> None:
    """The four raw files, in blocks."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    users, impressions = max(1, behaviours // 100), behaviours * 3 // 100

    def ids(n: int, rows: int) -> np.ndarray:
        return (n * rng.random(rows) ** 2).astype(np.int64)

    def log(rows: int) -> dict:
        tags = np.array(["pv", "cart", "fav", "buy"])
        return {
            "user": rng.integers(0, users, rows),
            "time_stamp": rng.integers(FIRST_TIME, END_TIME, rows),
            "btag": tags[(4 * rng.random(rows) ** 4).astype(int)],
            "cate": ids(10_000, rows),
            "brand": ids(100_000, rows),
        }

    def sample(rows: int) -> dict:
        click = (rng.random(rows) < 0.05).astype(np.int64)
        size = 4
        user = np.repeat(rng.integers(0, users, -(-rows // size)), size)[:rows]
        stamp = np.repeat(rng.integers(FIRST_IMPRESSION, END_TIME, -(-rows // size)), size)[:rows]
        return {
            "user": user,
            "time_stamp": stamp,
            "adgroup_id": ids(200_000, rows),
            "pid": np.full(rows, "430548_1007"),
            "nonclk": 1 - click,
            "clk": click,
        }

    _write(directory / "behavior_log.csv", behaviours, log)
    _write(directory / "raw_sample.csv", impressions, sample)
    ads = np.arange(200_000)
    _write(
        directory / "ad_feature.csv",
        len(ads),
        lambda rows: {
            "adgroup_id": ads,
            "cate_id": ads % 10_000,
            "campaign_id": ads // 2,
            "customer": ads // 4,
            "brand": ads % 100_000,
            "price": np.round(np.exp(rng.normal(5, 1, rows)), 2),
        },
        block=len(ads),
    )
    names = [*PROFILE.split(), "new_user_class_level "]
    _write(
        directory / "user_profile.csv",
        users,
        lambda rows: {
            "userid": np.arange(users),
            **{n: rng.integers(0, 5, rows) for n in names},
        },
        block=users,
    )


def _write(path: Path, rows: int, draw, block: int = BLOCK) -> None:
    with open(path, "wb") as file:
        for first in range(0, rows, block):
            table = pa.table(draw(min(block, rows - first)))
            header = pa.csv.WriteOptions(include_header=not first, quoting_style="none")
            pa.csv.write_csv(table, file, header)


def measure(directory: Path, memory_limit: str) -> dict[str, float]:
    """Runs in the child: prepares `directory`/raw and reports on its own process."""
    from ctr_jax.data.prepare import prepare

    start = time.perf_counter()
    path = prepare(
        {
            "builder": "alibaba",
            "raw_dir": str(directory / "raw"),
            "prepared_dir": str(directory / "prepared"),
            "memory_limit": memory_limit,
        }
    )
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) / (1 << 30)
    return {
        "peak_gib": round(peak, 3),
        "seconds": round(seconds, 1),
        "prepared_gib": round(size, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rows", default="5000000,20000000", help="behaviour rows, comma-separated"
    )
    parser.add_argument("--out", default="", help="scratch directory (default: a temporary one)")
    parser.add_argument("--memory_limit", default="", help="data.memory_limit (default: its own)")
    parser.add_argument("--measure", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure), arguments.memory_limit)))
        return
    for rows in map(int, arguments.rows.split(",")):
        directory = Path(tempfile.mkdtemp(dir=arguments.out or None))
        try:
            write_raw(directory / "raw", rows)
            command = [
                sys.executable,
                "-m",
                "benchmarks.prepare_memory",
                "--measure",
                str(directory),
            ]
            command += ["--memory_limit", arguments.memory_limit]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            print(f"{rows:>12,} behaviours: {output.splitlines()[-1]}", flush=True)
        finally:
            shutil.rmtree(directory)


if __name__ == "__main__":
    main()
