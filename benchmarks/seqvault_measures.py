"""What benchmarks/seqvault.py measures: warm and cold lookups, appends, visibility, many users."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import seqvault
from benchmarks.seqvault_rivals import COLUMNS, STORED

N = 1000


def io_counts() -> dict[str, int]:
    with open("/proc/self/io") as file:
        return {key: int(value) for key, value in (line.split(": ") for line in file)}


def percentiles(seconds: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(np.array(seconds) * 1e6, [50, 99])
    return {"p50_us": round(float(p50), 1), "p99_us": round(float(p99), 1)}


def warm(stores: dict, users: list[np.ndarray]) -> dict[str, dict]:
    """Lookups of the user batches, after one pass over all of them; the stores take turns.

    Taking turns, what else runs on the machine hits all of them alike; the first lookup of a turn
    is not counted, as the store before has emptied the processor's caches. `p99_cpu_us` is of the
    CPU time of each call, which leaves out what the scheduler gave to others.
    """
    for store in stores.values():
        for some in users:
            store.last_n(some, N)
    seconds, cpu, total = ({name: [] for name in stores} for _ in range(3))
    for turn in np.array_split(np.arange(len(users)), max(1, len(users) // 20)):
        for name, store in stores.items():
            store.last_n(users[turn[-1]], N)
            process = time.process_time()
            for i in turn:
                start, thread = time.perf_counter(), time.thread_time()
                store.last_n(users[i], N)
                cpu[name].append(time.thread_time() - thread)
                seconds[name].append(time.perf_counter() - start)
            total[name].append(time.process_time() - process)
    lookups = sum(map(len, users))
    return {
        name: percentiles(seconds[name])
        | {
            "p99_cpu_us": percentiles(cpu[name])["p99_us"],
            "lookups": lookups,
            "cpu_s_per_million_lookups": round(1e6 * sum(total[name]) / lookups, 2),
        }
        for name in stores
    }


def forget(paths: list[Path]) -> None:
    """Drops the files' pages from the page cache (they must be clean)."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def cold(stores: dict, users: np.ndarray, prepare: dict[str, Callable]) -> dict[str, dict]:
    """Single lookups, the stores taking turns; prepare[name](store) runs before each of them."""
    seconds = {name: [] for name in stores}
    counts = {name: np.zeros(3) for name in stores}
    cost = -io_counts()["syscr"] + io_counts()["syscr"]  # of counting
    for user in users:
        for name in stores:
            if name in prepare:
                stores[name] = prepare[name](stores[name])
            before, fault = io_counts(), resource.getrusage(resource.RUSAGE_SELF).ru_majflt
            start = time.perf_counter()
            stores[name].last_n(np.array([user]), N)
            seconds[name].append(time.perf_counter() - start)
            after = io_counts()
            counts[name] += [
                after["syscr"] - before["syscr"] - cost,
                resource.getrusage(resource.RUSAGE_SELF).ru_majflt - fault,
                after["read_bytes"] - before["read_bytes"],
            ]
    names = ("reads_per_lookup", "major_faults_per_lookup", "device_bytes_per_lookup")
    return {
        name: percentiles(seconds[name])
        | {"lookups": len(users)}
        | dict(zip(names, np.round(counts[name] / len(users), 3).tolist(), strict=True))
        for name in stores
    }


VISIBLE = """
import sys, time, numpy as np, seqvault
vault = seqvault.Vault.open(sys.argv[1])
user, last = np.array([int(sys.argv[2])]), int(sys.argv[3])
known = vault.last_n(user, 1)["item"][0, 0]
print("ready", flush=True)
while known != last:
    item = vault.last_n(user, 1)["item"][0, 0]
    if item != known:
        print(time.monotonic(), flush=True)
        known = item
"""


def visibility(vault, user: int, repeats: int) -> dict:
    """Seconds from the call of append to a read that has it, here and in another process."""
    here = []
    for i in range(repeats):
        start = time.perf_counter()
        item = i + repeats + 1
        vault.append(user, {"time": 2_140_000_000, **dict.fromkeys(COLUMNS, 1), "item": item})
        assert vault.last_n(np.array([user]), 1)["item"][0, 0] == item
        here.append(time.perf_counter() - start)
    child = subprocess.Popen(
        [sys.executable, "-c", VISIBLE, str(vault.path), str(user), str(repeats)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    child.stdout.readline()
    there = []
    for item in range(1, repeats + 1):
        time.sleep(0.003)
        start = time.monotonic()
        vault.append(user, {"time": 2_140_000_001, **dict.fromkeys(COLUMNS, 1), "item": item})
        there.append(float(child.stdout.readline()) - start)
    child.wait()
    return {"append_and_read_here": percentiles(here), "other_process": percentiles(there)}


def many_users(directory: Path, users: int) -> dict:
    """Index and reopening of a vault of `users` users, of whom some have fresh rows."""
    vault = seqvault.Vault.create(directory, seqvault.Schema({"item": np.uint32}))
    step = 1 << 16

    def blocks():
        for first in range(0, users, step):
            some = np.repeat(np.arange(first, min(first + step, users)), 4)
            yield {"user": some * 7919, "time": np.tile([1, 2, 3, 4], len(some) // 4), "item": some}

    start = time.perf_counter()
    vault.bulk_load(blocks())
    loaded = time.perf_counter() - start
    some = np.arange(0, users, 10) * 7919
    vault.append_many(some, {"time": np.full(len(some), 9), "item": some % 97})
    stats = vault.stats()["streams"]["default"]
    vault.close()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        vault = seqvault.Vault.open(directory)
        vault.last_n(np.array([7919]), 1)
        seconds.append(time.perf_counter() - start)
        vault.close()
    vault = seqvault.Vault.open(directory, write=True)
    checkpoints = []
    for _ in range(5):
        start, cpu = time.perf_counter(), time.process_time()
        vault.checkpoint()
        checkpoints.append((time.perf_counter() - start, time.process_time() - cpu))
    vault.close()
    return {
        "users": stats["users"],
        "index_bytes_per_user": round(stats["index_bytes_per_user"], 2),
        "reopen_seconds": round(min(seconds), 3),
        "bulk_load_seconds": round(loaded, 1),
        "checkpoint_seconds": round(min(seconds for seconds, _ in checkpoints), 3),
        "checkpoint_cpu_seconds": round(min(cpu for _, cpu in checkpoints), 3),
    }


def appends(store, stream: list) -> dict:
    """Appends all batches; bytes written (wchar) per byte given, everything settled at the end."""
    rows = sum(len(users) for users, _ in stream)
    before, start, cpu = io_counts()["wchar"], time.perf_counter(), time.process_time()
    for users, columns in stream:
        store.append(users, columns)
    store.settle()
    given = rows * (8 + sum(d.itemsize for d in STORED.values()))
    return {
        "rows": rows,
        "write_amplification": round((io_counts()["wchar"] - before) / given, 3),
        "rows_per_s": round(rows / (time.perf_counter() - start)),
        "cpu_us_per_row": round((time.process_time() - cpu) / rows * 1e6, 2),
    }


def machine() -> dict:
    with open("/proc/cpuinfo") as file:
        model = next((x.split(": ")[1].strip() for x in file if x.startswith("model name")), "")
    return {
        "cpu": model, "cores": os.cpu_count(), "system": platform.platform(),
        "python": platform.python_version(), "numpy": np.__version__,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }  # fmt: skip
