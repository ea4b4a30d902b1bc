"""The kernels on one GPU or TPU: are they right, and how fast against what, in a few minutes.

    python -m benchmarks.gpu_suite [--out benchmarks/results/gpu_<device>.json] [--minutes 8]
                                   [--processes 6] [--resume] [--only TEXT] [--small]
                                   [--torch_python PATH]

Needs jax, flax and absl-py; `python -m benchmarks.report` makes tables of the files. Entries
(gpu_cases.py) run most important first until the time is up: every op's kernel against float64 and
the XLA path, then speeds. The file is written anew after each; what was not reached is in it as
left out; --resume goes on with a device's file.

They run in a process of their own, which is replaced when it crashes, loses the device or makes
nothing of one way for 90 seconds; that way is then left out of its entry. --small is what a host
without a device can run: interpreted kernels, tiny shapes, times that say nothing.

--processes: that many first compile beside each other, which the seconds of compiling are then of,
and run the checks; then one measures.

Times are medians of rounds over all ways of an entry, blocked at the end of each; ratios are
medians of the ratios within a round, per behaviour. Compiling is apart.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax

from benchmarks.gpu_cases import Entry, entries
from benchmarks.gpu_timing import TIME_UP, Bench, LeftOut, said
from benchmarks.report import has_changed
from kernels import dispatch

RESULTS = Path("benchmarks/results")
# At L = 1024, Sparsity-2, a million behaviours, 8 heads of 32, bfloat16 and float32.
GOALS = {"xla": 2.0, "same bias": 10.0, "given bias": 10.0, "no bias": 2.0}  # times as fast as
COPY_GOAL = 0.6  # of a copy's speed, where bytes are what an op waits for
START_SECONDS, WAY_SECONDS = 90, 90
SMALL = "not a device: interpreted kernels at tiny shapes, times that say nothing"
AHEAD = 0.45  # of the time, at most, for compiling ahead
WRAP_UP = 20  # seconds before the end in which nothing is begun; a tenth of shorter runs
ENVIRONMENT = {  # of the worker: torch's process needs room on the device beside it
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_CLIENT_MEM_FRACTION": "0.7",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # it starts a process for each, in each of ours
}


# ---- the worker --------------------------------------------------------------------------------


def serve(connection, options: dict, cache: str | None) -> None:
    """Runs (entry, without, compile_s, deadline) as they come; answers ("making", way), ("done",
    result). cache: folder of what was compiled before."""
    os.setsid()  # one group with torch's process, to be ended together
    os.environ.update(ENVIRONMENT)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_enable_compilation_cache", bool(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    bench = Bench(**options, tell=lambda way: connection.send(("making", way)))
    connection.send(("device", described()))
    while True:
        try:
            entry, bench.without, bench.compile_s, bench.deadline = connection.recv()
        except EOFError:
            return
        try:
            result = {"status": "ok", **entry.run(bench)}
        except LeftOut as reason:
            result = {"status": "left out", "error": str(reason)}
        except Exception as error:  # whatever it is, the others are to run
            result = {"status": "failed", "error": said(error)}
        connection.send(("done", result))


def described() -> dict:
    """The device and what it runs with."""
    device = jax.devices()[0]
    versions = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "torch"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True).stdout.split()
    except OSError:
        driver = []
    return {
        "device": device.device_kind,
        "platform": dispatch.platform(),
        "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "driver": driver[0] if driver else None,
        "runtime": device.client.platform_version,
        "versions": versions,
    }


class Died(Exception):
    """The worker ended, or had to be; with the way that it was at."""

    def __init__(self, reason: str, way: str | None):
        super().__init__(reason)
        self.way = way


class Worker:
    """The process that has the device, and what it said of it."""

    def __init__(self, options: dict, cache: str | None = None):
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(theirs, options, cache), daemon=True)
        self._process.start()
        theirs.close()
        self._way, self._patience = None, 600 if options["small"] else WAY_SECONDS
        self.device = self._receive(START_SECONDS)[1]

    def run(
        self,
        entry: Entry,
        without: dict[str, str],
        begin_until: float,
        until: float,
        compile_s: dict[str, float] | None = None,
    ) -> dict:
        """What the entry gives; it begins no way after `begin_until`, and has to end at `until`.

        Raises:
          Died: the worker is gone.
        """
        self._connection.send((entry, without, compile_s or {}, begin_until))
        self._way = None
        while True:
            kind, what = self._receive(min(self._patience, until - time.time()))
            if kind == "done":
                return what
            self._way = what

    def _receive(self, seconds: float):
        try:
            if self._connection.poll(max(0.0, seconds)):
                return self._connection.recv()
            reason = f"nothing came for {seconds:.0f} s"
        except (EOFError, ConnectionError):
            self._process.join()
            reason = f"the process ended with {self._process.exitcode}"
        self.stop()
        raise Died(reason, self._way)

    def stop(self) -> None:
        """Ends it, with torch's process."""
        self._connection.close()
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            self._process.kill()
        self._process.join()


# ---- all entries, in a time --------------------------------------------------------------------


def run_all(
    todo: list[Entry],
    record: dict,
    path: Path,
    seconds: float,
    options: dict,
    worker: Worker | None = None,
    cache: str | None = None,
    ahead: dict[str, dict] | None = None,
) -> None:
    """Fills `record` entry by entry, and the file.

    Args:
      record: what goes into the file; "entries" is added to.
      options: of a Bench. worker: one that has been started with them.
      cache, ahead: of `compile_ahead`.
    """
    began = time.time()
    before = record.pop("ahead_minutes", 0.0)
    until, begin_until = began + seconds, began + seconds - min(WRAP_UP, seconds / 10)
    record["minutes_used"].append(0.0)
    try:
        for entry in todo:
            start, without, known = time.time(), {}, (ahead or {}).get(entry.name, {})
            result = known if known.get("kind") == "check" else None
            compile_s = {
                r["name"]: r["compile_s"] for r in known.get("rows", []) if "compile_s" in r
            }
            while result is None:
                if time.time() > begin_until:
                    result = {"status": "left out", "error": TIME_UP}
                    break
                try:
                    worker = worker or Worker(options, cache)
                    result = worker.run(entry, without, begin_until, until, compile_s)
                except Died as error:
                    worker, reason = None, f"{error} at {error.way or 'the start'}"
                    if error.way and error.way not in without:
                        without[error.way] = reason
                    elif time.time() < begin_until:
                        result = {"status": "failed", "error": reason}
            result = {"name": entry.name, "wall_s": round(time.time() - start, 1), **result}
            if result.get("kind") == "speed":
                result["ratios"] = ratios(result, rates(record["entries"]))
            record["entries"].append(result)
            record["minutes_used"][-1] = round(before + (time.time() - began) / 60, 2)
            write(record, path)
            print("\n".join(lines(result)), flush=True)
    finally:
        if worker:
            worker.stop()


def compile_ahead(
    todo: list[Entry], processes: int, seconds: float, options: dict, cache: str
) -> dict[str, dict]:
    """What entries gave, by name, whose ways were compiled in several processes, or checks run.

    Compilers take most of the suite's time, a core at a time.
    """
    until, queue, found = time.time() + seconds, list(reversed(todo)), {}

    def work():
        worker = None
        while queue and time.time() < until:
            entry, start = queue.pop(), time.time()
            try:
                worker = worker or Worker({**options, "compiles_only": True}, cache)
                result = worker.run(entry, {}, until, until + WRAP_UP)
                found[entry.name] = {**result, "wall_s": round(time.time() - start, 1)}
            except Died as error:  # the run that measures it will say so
                print(f"compiling {entry.name}: {error}", file=sys.stderr)
                worker = None
        if worker:
            worker.stop()

    threads = [threading.Thread(target=work) for _ in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def write(record: dict, path: Path) -> None:
    """At once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=1))
    partial.replace(path)


# ---- what the rows say -------------------------------------------------------------------------


def rates(done: list[dict]) -> dict[str, float]:
    """Per second: bytes of "copy", operations of "product, <dtype>"."""
    return {
        row["name"]: row.get("bytes", row.get("operations")) / (row["ms"] / 1e3)
        for result in done
        if result.get("kind") == "device"
        for row in result["rows"]
        if "ms" in row
    }


def ratio(slow: dict, fast: list[dict]) -> float:
    """Median over rounds of `slow`'s time for a behaviour by that of all of `fast` together."""
    rounds = zip(slow["seconds_per_behaviour"],
                 *(row["seconds_per_behaviour"] for row in fast), strict=True)  # fmt: skip
    return statistics.median(s / sum(f) for s, *f in rounds)


def ratios(result: dict, device: dict[str, float]) -> dict[str, dict]:
    """How many times as fast as each the kernel is, by what it is compared with.

    Against full attention, of which the fastest counts, the making of keys is added to the
    kernel's time. Against a copy: the part of the speed that a large one has.
    """
    by_role: dict[str, list[dict]] = {}
    for row in result["rows"]:
        if "ms" in row:
            by_role.setdefault(row["role"], []).append(row)
    if "kernel" not in by_role:
        return {}
    (kernel,), out = by_role["kernel"], {}
    for role in GOALS:
        if role in by_role:
            keys = by_role.get("keys", []) if role != "xla" else []
            best = min(by_role[role], key=lambda row: row["ns_per_behaviour"])
            out[role] = {"against": best["name"], "ratio": ratio(best, [kernel, *keys])}
            if result["is_goal"]:
                out[role] |= {"goal": GOALS[role], "met": out[role]["ratio"] >= GOALS[role]}
    product = device.get(f"product, {result['dtype']}")
    if product and "copy" in device and "bytes" in kernel:
        seconds = kernel["ms"] / 1e3
        of_bytes = kernel["bytes"] / device["copy"]
        of_operations = kernel["operations"] / product
        waits_for = "bytes" if of_bytes >= of_operations else "operations"
        out["copy"] = {"against": "copy", "ratio": of_bytes / seconds, "waits_for": waits_for}
        if waits_for == "bytes":
            out["copy"] |= {"goal": COPY_GOAL, "met": out["copy"]["ratio"] >= COPY_GOAL}
    return out


def lines(result: dict):
    """What is printed of an entry."""
    yield f"\n{result['name']}: {result['status']} ({result['wall_s']} s) {result.get('error', '')}"
    for dtype, checked in result.get("dtypes", {}).items():
        worst = checked["worst"]
        yield (
            f"  {dtype}: largest error {checked['errors'][worst]:.1e} ({worst}), allowed "
            f"{checked['tolerance']:.0e}: {'ok' if checked['ok'] else 'WRONG'}"
        )
    for row in result.get("rows", []):
        if "ms" in row:
            yield (
                f"  {row['name']:32}{row['ms']:10.3f} ms {row['ns_per_behaviour']:11.4f} ns a row"
                f"{rate_of(row)}, compiled in {row['compile_s']:.1f} s  {row['note']}"
            )
        else:
            yield f"  {row['name']:32} {row.get('left out') or row['error']}"
    for role, found in result.get("ratios", {}).items():
        goal = ""
        if "goal" in found:
            goal = f" (goal {found['goal']}: {'met' if found['met'] else 'MISSED'})"
        waits = f", waits for {found['waits_for']}" if "waits_for" in found else ""
        yield f"  against {role} ({found['against']}): {found['ratio']:.2f}{goal}{waits}"
    if result.get("agrees") is False:
        yield f"  kernel and XLA path DISAGREE: {result['differences']}"


def rate_of(row: dict) -> str:
    """Bytes and operations per second, where they are known."""
    second = row["ms"] / 1e3
    bytes_ = f"  {row['bytes'] / second / 1e9:.0f} GB/s" if "bytes" in row else ""
    return bytes_ + (
        f"  {row['operations'] / second / 1e9:.0f} GFLOP/s" if "operations" in row else ""
    )


def record_of(path: Path, command: str, small: bool, device: dict, resume: bool) -> dict:
    """What goes into the file before anything has run; with `resume`, what was whole in it, of
    kernels that are what they were."""
    record = {
        "commands": [command],
        "date": datetime.date.today().isoformat(),
        "measures": None if small else device["device"],
        "note": SMALL if small else "",
        **device,
        "minutes_used": [],
        "entries": [],
    }
    if resume and path.exists():
        old = json.loads(path.read_text())
        record["commands"] = [*old["commands"], command]
        record["minutes_used"] = old["minutes_used"]
        record["entries"] = [
            entry for entry in old["entries"] if is_whole(entry) and not has_changed(entry, old)
        ]
    return record


def is_whole(entry: dict) -> bool:
    """Whether it ran, with all its rows."""
    rows = entry.get("rows", [])
    return entry["status"] == "ok" and all(row.get("left out") != TIME_UP for row in rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu_<device>.json")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--resume", action="store_true", help="run what is not in the file yet")
    parser.add_argument("--only", default="", help="entries with this in their name")
    parser.add_argument("--small", action="store_true", help="tiny; for a host without a device")
    parser.add_argument("--processes", type=int, default=0, help="that compile before it measures")
    parser.add_argument("--torch_python", default=sys.executable, help="an interpreter with torch")
    args = parser.parse_args(argv)
    options = {"small": args.small, "torch_python": args.torch_python}
    began, worker = time.time(), Worker(options)
    device = worker.device
    if device["platform"] == "cpu" and not args.small:
        worker.stop()
        sys.exit("JAX sees no accelerator here; --small runs on a CPU, and measures nothing")
    slug = re.sub(r"[^a-z0-9]+", "_", device["device"].lower()).strip("_")
    path = args.out or (Path("runs") if args.small else RESULTS) / f"gpu_{slug}.json"
    command = f"python -m benchmarks.gpu_suite --minutes {args.minutes:g}"
    command += " --small" * args.small + " --resume" * args.resume
    command += f" --processes {args.processes}" * bool(args.processes)
    command += f" --only '{args.only}'" * bool(args.only)
    record = record_of(path, command, args.small, device, args.resume)
    print(record["device"], record["versions"], record["note"], flush=True)
    have = {entry["name"] for entry in record["entries"]}
    todo = [e for e in entries(args.small) if args.only in e.name and e.name not in have]
    with tempfile.TemporaryDirectory() as cache:
        ahead = {}
        if args.processes:
            worker.stop()
            worker, seconds = None, AHEAD * 60 * args.minutes
            ahead = compile_ahead(todo, args.processes, seconds, options, cache)
            record["compiled_by"] = args.processes
            record["ahead_minutes"] = (time.time() - began) / 60
        seconds = 60 * args.minutes + began - time.time()
        how = dict(cache=cache, ahead=ahead) if args.processes else dict(worker=worker)
        run_all(todo, record, path, seconds, options, **how)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
