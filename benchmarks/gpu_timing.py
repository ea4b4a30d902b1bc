"""How benchmarks/gpu_cases.py measures: ways to compute one thing, compiled, then timed in rounds.

A way that cannot be made is a row with its reason beside the others' figures. Rounds go through all
ways in turn, so that a change of the device's pace meets all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.dispatch import platform

TOO_LARGE = ("RESOURCE_EXHAUSTED", "out of memory")
DEVICE_LOST = 70  # the exit code of a worker whose device answers no more
TIME_UP = "the time was up"
MOST_REPEATS = 100
LONGEST_MESSAGE = 500


class LeftOut(Exception):
    """Not made, and why."""


@dataclasses.dataclass
class Bench:
    """What an entry is run with.

    Attributes:
      small: tiny shapes and few rounds, for a host without the device.
      torch_python: an interpreter that may have torch.
      compiles_only: ways are made and not timed: what is compiled stays in JAX's cache.
      compile_s: way -> seconds that it took to compile before, of those that the cache has.
      without: way -> why not to make it again. deadline: time.time() after which none is begun.
      tell: told the name of each way before it is made.
    """

    small: bool = False
    torch_python: str = sys.executable
    compiles_only: bool = False
    compile_s: dict[str, float] = dataclasses.field(default_factory=dict)
    without: dict[str, str] = dataclasses.field(default_factory=dict)
    deadline: float = float("inf")
    tell: Callable[[str], None] = lambda name: None
    _torch: Torch | LeftOut | None = None

    @property
    def rounds(self) -> int:
        return 2 if self.small else 7

    @property
    def least_seconds(self) -> float:
        """A measurement repeats until it has lasted that long."""
        return 0.0 if self.small else 0.02

    @property
    def compiler_options(self) -> dict | None:
        """Half of the time that a CPU's compiler takes."""
        return {"xla_backend_optimization_level": 0} if self.small else None

    @property
    def kernel(self) -> str:
        """The Pallas implementation of this device; on a CPU pallas_gpu's, interpreted."""
        return {"tpu": "pallas_tpu"}.get(platform(), "pallas_gpu")

    @property
    def interpret(self) -> bool:
        return platform() == "cpu"

    @property
    def memory(self) -> int:
        """Bytes that JAX may take on the device."""
        return (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 2 << 30)

    def once(self, draw: Callable) -> Callable:
        """Arguments that ways share are drawn once; where they are but traced, by each."""
        return draw if self.compiles_only else functools.cache(draw)

    def begin(self, way: str) -> None:
        if way in self.without:
            raise RuntimeError(self.without[way])
        if time.time() > self.deadline:
            raise LeftOut(TIME_UP)
        self.tell(way)

    @property
    def uses_torch(self) -> bool:
        return isinstance(self._torch, Torch) and self._torch.process.poll() is None

    def torch(self) -> Torch:
        if not isinstance(self._torch, LeftOut) and not self.uses_torch:
            try:
                self._torch = Torch(self.torch_python)
            except LeftOut as reason:
                self._torch = reason
        if isinstance(self._torch, LeftOut):
            raise LeftOut(str(self._torch))
        return self._torch


class Way(NamedTuple):
    """One way to compute something.

    name, role: role "kernel" is measured against all others. batch: requests of a call. length:
    behaviours of a request; times are compared per behaviour. make: batch -> (function, arguments);
    or torch: what gpu_torch.py is asked for. note: what a reader must know of the comparison. work:
    "bytes" and "operations" of a call.
    """

    name: str
    role: str
    batch: int
    length: int
    make: Callable[[int], tuple[Callable, tuple]] | None = None
    torch: dict | None = None
    note: str = ""
    work: dict = {}


class JaxRun:
    """A compiled function and its arguments. Compiling counts tracing and lowering too."""

    def __init__(self, bench: Bench, way: Way, batch: int):
        function, self.arguments = way.make(batch)
        start = time.perf_counter()
        self.compiled = jax.jit(function).lower(*self.arguments).compile(bench.compiler_options)
        self.compile_s = time.perf_counter() - start
        self.temporary_bytes = self.compiled.memory_analysis().temp_size_in_bytes

    def outputs(self) -> Any:
        return self.compiled(*self.arguments)

    def seconds(self, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            out = self.outputs()
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / repeats


class TorchRun:
    """A function of torch's process."""

    def __init__(self, bench: Bench, way: Way, batch: int):
        self._ask, self._name = bench.torch().ask, way.name
        question = {"make": way.name, "batch": batch, "length": way.length, **way.torch}
        self.compile_s = self._ask(question)["seconds"]

    def seconds(self, repeats: int) -> float:
        return self._ask({"run": self._name, "repeats": repeats})["seconds"]


class Torch:
    """gpu_torch.py in a process of its own: torch's CUDA libraries are not JAX's.

    Raises:
      LeftOut: no torch, or one without CUDA beside a GPU.
    """

    def __init__(self, python: str):
        command = [python, "-m", "benchmarks.gpu_torch", "cpu" if platform() == "cpu" else "cuda"]
        self._errors = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would fill up
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors)
        root = Path(__file__).parent.parent
        self.process = subprocess.Popen(command, text=True, cwd=root, **pipes)
        line = self.process.stdout.readline()
        if not line:
            raise LeftOut(f"torch: {self._last_words()}")
        self.version = json.loads(line)["torch"]

    def ask(self, question: dict) -> dict:
        """One line of JSON there, one back."""
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"torch's process ended: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def _last_words(self) -> str:
        code = self.process.wait()
        self._errors.seek(0)
        return (self._errors.read().splitlines() or [f"it ended with {code} and said nothing"])[-1]


def measure(bench: Bench, ways: list[Way]) -> tuple[list[dict], dict[str, Any]]:
    """A row for each way, and the runs that could be made, by name."""
    rows, runs = [], {}
    for way in ways:
        row = {"name": way.name, "role": way.role, "note": way.note} | way.work
        rows.append(row)
        try:
            bench.begin(way.name)
            if bench.compiles_only:
                run = JaxRun if way.make else TorchRun
                row["compile_s"] = run(bench, _undrawn(way), way.batch).compile_s
                continue
            runs[way.name] = _made(bench, way, row)
            row["compile_s"] = bench.compile_s.get(way.name, row["compile_s"])
        except LeftOut as reason:
            row["left out"] = str(reason)
        except Exception as error:  # of any compiler or library; all are to be seen
            row["error"] = said(error)
    for _ in range(bench.rounds):
        for row in rows:
            if row["name"] in runs:
                try:
                    row["seconds"].append(runs[row["name"]].seconds(row["repeats"]))
                except Exception as error:
                    row["error"] = said(error)
                    del runs[row["name"]], row["seconds"]
    for way, row in zip(ways, rows, strict=True):
        if "seconds" in row:
            median = statistics.median(row["seconds"])
            row["ms"] = 1e3 * median
            row["ns_per_behaviour"] = 1e9 * median / (row["batch"] * way.length)
            row["seconds_per_behaviour"] = [
                s / (row["batch"] * way.length) for s in row.pop("seconds")
            ]
    if bench.uses_torch:
        bench.torch().ask({"drop": True})
    return rows, runs


def _undrawn(way: Way) -> Way:
    """The way with shapes for arguments: processes that only compile share the device's memory."""

    def make(batch):
        functions = []

        def arguments():
            function, arguments = way.make(batch)
            functions.append(function)
            return arguments

        shapes = jax.eval_shape(arguments)
        return functions[0], shapes

    return way._replace(make=make) if way.make else way


def _made(bench: Bench, way: Way, row: dict) -> Any:
    """The way's run, warmed up; with fewer requests where memory does not hold all of them."""
    batch, make = way.batch, JaxRun if way.make else TorchRun
    while True:
        try:
            run = make(bench, way, batch)
            run.seconds(1)
            once = run.seconds(1)
            break
        except Exception as error:
            if batch < 4 or not any(words in str(error) for words in TOO_LARGE):
                raise
        batch //= 4
    repeats = min(MOST_REPEATS, 1 + int(bench.least_seconds / once))
    row |= {"batch": batch, "repeats": repeats, "compile_s": run.compile_s, "seconds": []}
    if batch < way.batch:
        row["note"] = f"{way.batch} requests do not fit; {way.note}".strip("; ")
    if make is JaxRun:
        row["temporary_bytes"] = run.temporary_bytes
    else:
        row["torch"] = bench.torch().version
    return run


def said(error: Exception) -> str:
    """What an exception says, in one short line; a device that is lost takes the process with it.

    After some errors, as an illegal address, every later call of the process fails.
    """
    try:
        jnp.zeros(8).sum().block_until_ready()
    except Exception:
        print(error, file=sys.stderr, flush=True)
        os._exit(DEVICE_LOST)
    return " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_MESSAGE]
