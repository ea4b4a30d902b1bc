"""LASER against DIN, HSTU and Transformer: time, memory and operations of one request.

    python -m benchmarks.laser [--lengths 500 1000 4000] [--candidates 1 100 500] [--rounds 5]
                               [--rows laser din ...] [--out FILE]

One request at the paper's size (d=128, 2 heads; LASER w=10, keys of 16, M=2; DIN [64] with Dice):
tokens [1, L, d] and [1, C, d] in, interest [1, C, d] out, forward, and forward with the gradients
of weights and tokens. Embedding, token projections, short branch and head are the same for all and
not in it. HSTU and Transformer read the history once for all candidates; "re-encoded" is their time
at C = 1 for each candidate anew, as pointwise serving has it.

Rounds go through all models in turn, so that a change of the machine's pace meets all; a figure is
the median over rounds, a ratio the median of the ratios within a round. Compilation is not in it.
Memory: temporaries of the compiled program, by XLA. Operations: ctr_jax.flops, of the forward pass.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.evo_attention import machine
from configs.laser_alibaba import ROWS
from ctr_jax import flops
from ctr_jax.batch import RequestBatch
from ctr_jax.features import DataColumn, DataSpec
from ctr_jax.history_model import Tokens

D, NOW = 128, 1_500_000_000
COMPARED = ("laser", "din", "hstu", "transformer")
LEAST_SECONDS = 0.05  # a measurement repeats until it has lasted that long


def request(length: int, candidates: int) -> Tokens:
    """One request with a full history of `length` behaviours."""
    rng = np.random.default_rng(length + candidates)
    normal = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    one = jnp.zeros(1, jnp.int32)
    times = np.sort(NOW - rng.integers(1, 10**7, (1, length)), 1)
    batch = RequestBatch(
        user_id=one, request_id=one, request_time=one + NOW, user={}, context={}, behaviour={},
        behaviour_time=jnp.asarray(times, jnp.int32), behaviour_mask=jnp.ones((1, length), bool),
        candidate={}, candidate_mask=jnp.ones((1, candidates), bool),
        label=jnp.zeros((1, candidates)),
    )  # fmt: skip
    return Tokens(normal(1, candidates, D), normal(1, length, D), normal(1, 64), batch)


class Case:
    """One model on one size, forward or forward and backward, and its times."""

    def __init__(self, row: str, length: int, candidates: int, train: bool):
        self.row, self.length, self.candidates, self.train = row, length, candidates, train
        module, tokens = interest(row, length), request(length, candidates)
        variables = jax.jit(lambda: module.init(jax.random.key(0), tokens, False))()

        def forward(variables, tokens):
            return module.apply(variables, tokens, False)

        def gradient(variables, tokens):
            def loss(params, candidates, behaviours):
                inputs = tokens.replace(candidates=candidates, behaviours=behaviours)
                state = {k: v for k, v in variables.items() if k != "params"}
                out, _ = module.apply(
                    {"params": params, **state}, inputs, True, mutable=["batch_stats"]
                )
                return jnp.sum(jnp.square(out))

            return jax.grad(loss, argnums=(0, 1, 2))(
                variables["params"], tokens.candidates, tokens.behaviours
            )

        jitted = jax.jit(gradient if train else forward)
        lowered = jitted.lower(variables, tokens)
        began = time.perf_counter()
        compiled = lowered.compile()
        self.compile_s = time.perf_counter() - began
        self.bytes = compiled.memory_analysis().temp_size_in_bytes
        self.operations = sum(flops.count(forward, variables, tokens).values())
        # Not `compiled`, whose arguments are unpacked in Python, which the shortest times show.
        self._run = lambda: jax.block_until_ready(jitted(variables, tokens))
        self._run()
        began = time.perf_counter()
        self._run()
        self.repeats = max(1, int(LEAST_SECONDS / (time.perf_counter() - began)))
        self.seconds: list[float] = []

    def measure(self) -> None:
        self._run()  # what ran before has emptied the caches
        began = time.perf_counter()
        for _ in range(self.repeats):
            self._run()
        self.seconds.append((time.perf_counter() - began) / self.repeats)

    def result(self) -> dict:
        return {
            "model": self.row,
            "L": self.length,
            "C": self.candidates,
            "pass": "forward+backward" if self.train else "forward",
            "ms": 1e3 * statistics.median(self.seconds),
            "temporary_bytes": self.bytes,
            "forward_mflop": self.operations / 1e6,
            "compile_s": round(self.compile_s, 2),
            "seconds": self.seconds,
        }


def interest(row: str, length: int):
    """The interest module of a row of the paper's table, at its default size."""
    module = importlib.import_module(ROWS[row])
    config = module.default_config()
    config.width = D
    if "length" in config:
        config.length = length
    spec = DataSpec(
        "request",
        (
            DataColumn("behaviour", "item", "id", "item"),
            DataColumn("candidate", "item", "id", "item"),
        ),
        {"item": 9},
        1,
    )
    return module.build(config, spec)[0].interest


def ratios(cases: list[Case], one: str, other: str) -> dict[tuple, float]:
    """{(L, C, train): median over rounds of time of `one` / time of `other`}."""
    by = {(c.row, c.length, c.candidates, c.train): c.seconds for c in cases}
    return {
        key[1:]: statistics.median(a / b for a, b in zip(by[key], by[other, *key[1:]], strict=True))
        for key in by
        if key[0] == one and (other, *key[1:]) in by
    }


def break_even(cases: list[Case], other: str, length: int, train: bool) -> str:
    """The C from which `other`, whose history is read once, is faster than LASER: times are taken
    to be lines through the least and the largest C measured."""

    def line(row):
        points = sorted(
            (c.candidates, statistics.median(c.seconds))
            for c in cases
            if (c.row, c.length, c.train) == (row, length, train)
        )
        (c0, t0), (c1, t1) = points[0], points[-1]
        slope = (t1 - t0) / (c1 - c0)
        return t0 - slope * c0, slope

    (ours, our_slope), (theirs, their_slope) = line("laser"), line(other)
    if their_slope >= our_slope:
        return "never" if ours <= theirs else "always"
    return f"{max(1, round((theirs - ours) / (our_slope - their_slope)))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=(500, 1000, 4000))
    parser.add_argument("--candidates", type=int, nargs="+", default=(1, 100, 500))
    parser.add_argument("--rows", nargs="+", default=COMPARED, choices=ROWS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="benchmarks/results/laser.json")
    args = parser.parse_args()
    results, lines = [], []
    for length in args.lengths:
        cases = []
        for train in (False, True):
            # One pass of one length at a time: what is compiled for it and its tokens only.
            for c in args.candidates:
                here = [Case(row, length, c, train) for row in args.rows]
                for _ in range(args.rounds):
                    for case in here:
                        case.measure()
                for case in here:
                    results.append(case.result())
                    print(" ".join(f"{results[-1][k]}" for k in ("model", "L", "C", "pass", "ms")),
                          flush=True)  # fmt: skip
                cases += here
        lines += compare(cases, args, length)
    report = {"machine": machine(), "results": results, "ratios": lines}
    Path(args.out).write_text(json.dumps(report, indent=1) + "\n")
    print(table(results))
    for line in lines:
        print(json.dumps(line))


def compare(cases: list[Case], args, length: int) -> list[dict]:
    """Ratios of LASER to each other model at `length`, with what a pointwise encoder would pay."""
    lines = []
    for other in [row for row in args.rows if row != "laser"]:
        found = ratios(cases, "laser", other)
        for (_, c, train), ratio in found.items():
            line = {"L": length, "C": c, "pass": "forward+backward" if train else "forward",
                    "laser over": other, "ratio": round(ratio, 3)}  # fmt: skip
            if other in ("hstu", "transformer"):
                line["re-encoded per candidate"] = round(_pointwise(cases, other, c, train), 3)
                if len(args.candidates) > 1:
                    line["faster from C"] = break_even(cases, other, length, train)
            lines.append(line)
    return lines


def _pointwise(cases: list[Case], other: str, c: int, train: bool) -> float:
    """LASER's time at C over C times `other`'s at its least C."""
    median = {
        (k.row, k.candidates): statistics.median(k.seconds) for k in cases if k.train == train
    }
    least = min(k for row, k in median if row == other)
    return median["laser", c] / (c / least * median[other, least])


def table(results: list[dict]) -> str:
    lines = [
        "| L | C | pass | model | ms | temporaries, MB | MFLOP, forward |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(
            f"| {r['L']:,} | {r['C']} | {r['pass']} | {r['model']} | {r['ms']:.2f} | "
            f"{r['temporary_bytes'] / 1e6:.1f} | {r['forward_mflop']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
