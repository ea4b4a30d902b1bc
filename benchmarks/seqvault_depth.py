"""What a read deep into long histories costs, and what keeping them so costs in writes.

    python -m benchmarks.seqvault_depth [--users=100] [--mean_length=12000] [--dead=0.6]

Two vaults of the same users: `loaded` in bulk, and `grown` by appends alone, in batches of 1000
behaviours of unequally active users, with the merges of benchmarks/seqvault.py, and after every
100 batches a reclaim of segments (of 8 MB) that are dead by more than `--dead`. Reported per depth:
positional reads and CPU microseconds of `last_n(n)` for one user, over the users who have n
behaviours; and of the grown vault the bytes written (log, parts, checkpoints) per byte given, with
and without those of the reclaims, and the bytes of parts on disk per behaviour.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.seqvault import Generator, SeqVaultStore
from benchmarks.seqvault_rivals import STORED

DEPTHS = (1000, 4000, 10_000)


def depths(vault) -> dict[str, dict]:
    users = vault.users()
    lengths = vault.lengths(users)
    out = {}
    for n in DEPTHS:
        deep = users[lengths >= n]
        before, start = vault.stats()["preads"], time.process_time()
        for user in deep:
            assert vault.last_n(np.array([user]), n)["mask"].all()
        seconds = time.process_time() - start
        out[f"n={n}"] = {
            "users": len(deep),
            "reads_per_lookup": round((vault.stats()["preads"] - before) / len(deep), 2),
            "cpu_us": round(1e6 * seconds / len(deep), 1),
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=100)
    parser.add_argument("--mean_length", type=int, default=12_000)
    parser.add_argument("--fresh_per_user", type=int, default=200)
    parser.add_argument("--dead", type=float, default=0.6, help="of a reclaim, as its default")
    args = parser.parse_args()
    generator = Generator(args.users, args.mean_length)
    with tempfile.TemporaryDirectory() as directory:
        loaded = SeqVaultStore(Path(directory) / "loaded")
        loaded.load(generator.blocks())
        print(f"loaded: {json.dumps(depths(loaded.vault))}", flush=True)
        grown = SeqVaultStore(Path(directory) / "grown", segment_bytes=8 << 20)
        grown.fresh_limit = args.fresh_per_user * args.users
        rows = args.users * args.mean_length
        start = time.process_time()
        reclaimed = 0
        for i, (users, columns) in enumerate(generator.stream(rows, 1000)):
            grown.append(users, columns)
            if i % 100 == 99:
                reclaimed += grown.vault.reclaim(dead=args.dead)
        cpu = time.process_time() - start
        grown.settle()
        stats = grown.vault.stats()
        given = rows * (8 + sum(d.itemsize for d in STORED.values()))
        written = sum(stats["written_bytes"].values())
        figures = depths(grown.vault) | {
            "write_amplification": round((written - reclaimed) / given, 3),
            "with_reclaim": round(written / given, 3),
            "bytes_per_behaviour": round(stats["block_bytes"] / rows, 2),
            "cpu_us_per_row": round(1e6 * cpu / rows, 2),
        }
        print(f"grown: {json.dumps(figures)}", flush=True)
        loaded.close()
        grown.close()


if __name__ == "__main__":
    main()
