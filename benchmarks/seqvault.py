"""SeqVault against RocksDB and LMDB: all stores in one process, on the same data.

    python -m benchmarks.seqvault [--users=3000] [--mean_length=2000] [--out=FILE.json]

Needs the extra `bench`. Every store gets the same generated histories (sessions, Zipf items of a
user's own categories, revisits) and must give the same answers. Reported per store:

  warm     `last_n(1000)` of one user, and of 256 at once: P50, P99, CPU seconds per million lookups
           (all threads of the process)
  cold     the same single lookups with no page cached: before each one, posix_fadvise(DONTNEED) on
           all files of the store (SeqVault) or direct reads with a block cache of a quarter of the
           store's files (RocksDB), or closing and reopening after DONTNEED (LMDB maps its file).
           I/Os are the read system calls of the process (syscr of /proc/self/io), or the major
           page faults for LMDB.
  disk     bytes per behaviour after the bulk load (RocksDB: fully compacted)
  writes   a stream of appends by unequally active users in batches of 1000: bytes written (wchar
           of /proc/self/io) per byte given (user id and columns). All stores take the first
           `--append_rows_all` rows; SeqVault and RocksDB per behaviour go on to `--append_rows`,
           where SeqVault, which holds `--fresh_per_user` fresh behaviours per user in DRAM, merges
  fresh    seconds from the call of append until another process reads the behaviour (SeqVault)

and for SeqVault the index's bytes per user and the time to reopen `--many_users` users.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import seqvault
from benchmarks.seqvault_measures import (
    N,
    appends,
    cold,
    forget,
    machine,
    many_users,
    visibility,
    warm,
)
from benchmarks.seqvault_rivals import COLUMNS, STORED, LmdbBlobs, RocksChunks, RocksRows

BATCH = 256
START = 1_600_000_000


class SeqVaultStore:
    name = "seqvault"

    def __init__(self, path: Path, **options):
        """`options` of `Vault.create`."""
        self.path = path
        self.vault = seqvault.Vault.create(path, seqvault.Schema(COLUMNS), **options)
        self.fresh_limit = self._appends = 0

    def load(self, blocks) -> None:
        self.vault.bulk_load(blocks)

    def append(self, users, columns) -> None:
        """As a serving process would: short tails stay in DRAM, the longest are merged."""
        self.vault.append_many(users, {name: columns[name] for name in STORED})
        self._appends += 1
        if self._appends % 20:
            return
        fresh = self.vault.stats()["streams"]["default"]["fresh_behaviours"]
        while fresh > self.fresh_limit:
            self.vault.merge(1 << 20)
            fresh = self.vault.stats()["streams"]["default"]["fresh_behaviours"]

    def last_n(self, users, n):
        return self.vault.last_n(users, n)

    def files(self) -> list[Path]:
        return [p for p in self.path.iterdir() if p.is_file()]

    def settle(self) -> None:
        self.vault.checkpoint()

    def close(self) -> None:
        self.vault.close()


class Generator:
    """Histories of `users` users; the same for the same seed."""

    ITEMS, CATEGORIES = 500_000, 4_000

    def __init__(self, users: int, mean_length: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.ids = rng.permutation(users * 10)[:users].astype(np.int64)
        self.lengths = np.maximum(rng.lognormal(np.log(mean_length) - 0.125, 0.5, users), 50)
        self.lengths = self.lengths.astype(int)
        self.item_category = rng.zipf(1.1, self.ITEMS) % self.CATEGORIES
        self.item_shop = rng.integers(0, 60_000, self.ITEMS)
        self.item_price = rng.integers(0, 32, self.ITEMS)
        order = np.argsort(self.item_category, kind="stable")
        self._items, self._edges = order, np.searchsorted(
            self.item_category[order], np.arange(self.CATEGORIES + 1)
        )  # fmt: skip
        sizes = np.diff(self._edges)
        self._known = np.flatnonzero(sizes > 20)

    def history(self, user: int, length: int, start: int, part: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([user, part])
        liked = np.random.default_rng(user).choice(self._known, 25)
        category = liked[np.minimum(rng.geometric(0.15, length) - 1, 24)]
        low, size = self._edges[category], self._edges[category + 1] - self._edges[category]
        item = self._items[low + (rng.zipf(1.4, length) - 1) % size]
        again = np.flatnonzero(rng.random(length) < 0.25)
        item[again] = item[np.maximum(again - rng.geometric(0.1, len(again)), 0)]
        gap = np.where(
            rng.random(length) < 0.9,
            rng.geometric(1 / 25, length),
            rng.geometric(1 / 30_000, length),
        )
        return {
            "time": start + np.cumsum(gap),
            "item": item,
            "category": self.item_category[item],
            "shop": self.item_shop[item],
            "action": rng.choice(4, length, p=[0.89, 0.06, 0.04, 0.01]),
            "price": self.item_price[item],
        }

    def blocks(self) -> Iterator[dict[str, np.ndarray]]:
        for some in np.array_split(np.argsort(self.ids), max(1, len(self.ids) // 64)):
            parts = []
            for i in some.tolist():
                rows = self.history(int(self.ids[i]), int(self.lengths[i]), START, 0)
                parts.append({"user": np.full(self.lengths[i], self.ids[i]), **rows})
            yield {
                name: np.concatenate([p[name] for p in parts]).astype(STORED.get(name, np.int64))
                for name in parts[0]
            }

    def stream(self, rows: int, batch: int) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Appends: active users more often, times after everything that was loaded."""
        rng = np.random.default_rng(7)
        activity = rng.lognormal(0, 1, len(self.ids))
        clock = 2_100_000_000
        for k in range(rows // batch):
            who = rng.choice(len(self.ids), batch, p=activity / activity.sum())
            rows_ = self.history(k % 1000, batch, 0, k + 1)
            clock += 60
            rows_["time"] = np.full(batch, clock)
            columns = {name: values.astype(STORED[name]) for name, values in rows_.items()}
            yield self.ids[who], columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=3000)
    parser.add_argument("--mean_length", type=int, default=2000)
    parser.add_argument("--single", type=int, default=2000)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--cold", type=int, default=1000)
    parser.add_argument("--append_rows", type=int, default=2_000_000)
    parser.add_argument("--append_rows_all", type=int, default=60_000, help="of all stores")
    parser.add_argument("--fresh_per_user", type=int, default=200)
    parser.add_argument("--many_users", type=int, default=1_000_000)
    parser.add_argument("--directory", help="where the stores go; a temporary one by default")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    generator = Generator(args.users, args.mean_length)
    data = list(generator.blocks())
    rows = int(generator.lengths.sum())
    rng = np.random.default_rng(1)
    single = [rng.choice(generator.ids, 1) for _ in range(args.single)]
    batches = [rng.choice(generator.ids, BATCH) for _ in range(args.batches)]
    lone = rng.choice(generator.ids, args.cold)
    report: dict = {
        "command": "python -m benchmarks.seqvault " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "data": {
            "users": args.users, "behaviours": rows, "n": N, "batch": BATCH,
            "bytes_per_behaviour_given": sum(d.itemsize for d in STORED.values()),
        },
        "stores": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        root = Path(directory)
        kinds = {k.name: k for k in (SeqVaultStore, RocksRows, RocksChunks, LmdbBlobs)}
        stores, found = {}, {}
        for name, kind in kinds.items():
            store = stores[name] = kind(root / name)
            start, cpu = time.perf_counter(), time.process_time()
            store.load(data)
            figures = found[name] = {
                "bulk_load_rows_per_s": round(rows / (time.perf_counter() - start)),
                "bulk_load_rows_per_cpu_s": round(rows / (time.process_time() - cpu)),
            }
            size = sum(p.stat().st_size for p in store.files())
            figures["bytes_per_behaviour"] = round(size / rows, 3)
            show(name, figures)
        asked = batches[0]
        expected = stores["lmdb_blob"].last_n(asked, N)
        for name, store in stores.items():
            answer = store.last_n(asked, N)
            for column, values in expected.items():
                assert (answer[column] == values).all(), (name, column)
        for kind, users in (("warm_single", single), ("warm_batch", batches)):
            for name, figures in warm(stores, users).items():
                found[name][kind] = figures
                show(f"{name} {kind}", figures)
        for name in ("rocksdb_per_behaviour", "rocksdb_chunked"):
            stores[name].close()
            size = sum(p.stat().st_size for p in stores[name].files())
            allowed = {"cache_bytes": size // 4, "direct": True}
            if name == "rocksdb_chunked":
                allowed["counts"] = stores[name].counts
            stores[name] = kinds[name](root / name, **allowed)

        def dropped(store):
            forget(store.files())
            return store

        def reopened(store):
            store.close()
            forget(store.files())
            return LmdbBlobs(store.path)

        prepare = {"seqvault": dropped, "lmdb_blob": reopened}
        for name, figures in cold(stores, lone, prepare).items():
            found[name]["cold_single"] = figures
            show(f"{name} cold", figures)
        for name in ("rocksdb_per_behaviour", "rocksdb_chunked"):
            stores[name].close()
            more = {"counts": stores[name].counts} if name == "rocksdb_chunked" else {}
            stores[name] = kinds[name](root / name, **more)
        stores["seqvault"].fresh_limit = args.fresh_per_user * args.users
        stream = generator.stream(args.append_rows, 1000)
        first = list(itertools.islice(stream, args.append_rows_all // 1000))
        rest = list(stream)
        for name, store in stores.items():
            found[name]["appends"] = appends(store, first)
            show(f"{name} appends", found[name]["appends"])
        expected = stores["lmdb_blob"].last_n(asked, N)
        for name, store in stores.items():
            answer = store.last_n(asked, N)
            for column, values in expected.items():
                assert (answer[column] == values).all(), (name, column)
        for name in ("seqvault", "rocksdb_per_behaviour"):
            found[name]["more_appends"] = appends(stores[name], rest)
            show(f"{name} more appends", found[name]["more_appends"])
        vault = stores["seqvault"].vault
        stats = vault.stats()
        found["seqvault"]["fresh_tail"] = {
            key: stats["streams"]["default"][key] for key in ("fresh_behaviours", "tail_bytes")
        }
        ours = {"seqvault": stores["seqvault"]}
        found["seqvault"]["warm_batch_after_appends"] = warm(ours, batches)["seqvault"]
        found["seqvault"]["visibility"] = visibility(vault, int(generator.ids[0]), 200)
        for store in stores.values():
            store.close()
        found["seqvault"]["many_users"] = many_users(root / "many", args.many_users)
        show("seqvault", {k: found["seqvault"][k] for k in ("visibility", "many_users")})
    report["stores"] = found
    report["goals"] = goals(found)
    print(json.dumps(report["goals"], indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def goals(found: dict) -> dict:
    """Each goal of the issue: [reached, bound]; ratios to another store of the same run."""
    ours, rows, fair = (found[n] for n in ("seqvault", "rocksdb_per_behaviour", "rocksdb_chunked"))
    out = {}
    for kind in ("warm_single", "warm_batch"):
        cpu = "cpu_s_per_million_lookups"
        out[f"{kind} cpu / per behaviour"] = [ours[kind][cpu] / rows[kind][cpu], 0.1]
        out[f"{kind} cpu / chunked"] = [ours[kind][cpu] / fair[kind][cpu], 1.0]
    for kind in ("warm_single", "warm_batch", "cold_single"):
        out[f"{kind} p99 / per behaviour"] = [ours[kind]["p99_us"] / rows[kind]["p99_us"], 0.25]
        out[f"{kind} p99 / chunked"] = [ours[kind]["p99_us"] / fair[kind]["p99_us"], 1.0]
    for kind in ("warm_single", "warm_batch"):
        p99 = "p99_cpu_us"
        out[f"{kind} p99 of CPU / per behaviour"] = [ours[kind][p99] / rows[kind][p99], 0.25]
        out[f"{kind} p99 of CPU / chunked"] = [ours[kind][p99] / fair[kind][p99], 1.0]
    size = "bytes_per_behaviour"
    out["bytes / per behaviour"] = [ours[size] / rows[size], 0.5]
    out["bytes / chunked"] = [ours[size] / fair[size], 0.8]
    out["reads per cold lookup"] = [ours["cold_single"]["reads_per_lookup"], 1.1]
    out["write amplification"] = [ours["more_appends"]["write_amplification"], 3.0]
    out["index bytes per user"] = [ours["many_users"]["index_bytes_per_user"], 48.0]
    return {
        name: {"reached": round(reached, 3), "goal": goal, "met": bool(reached <= goal)}
        for name, (reached, goal) in out.items()
    }


def show(name: str, figures: dict) -> None:
    print(f"{name}: {json.dumps(figures)}", flush=True)


if __name__ == "__main__":
    main()
