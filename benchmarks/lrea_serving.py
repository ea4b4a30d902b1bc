"""Serving cost of the long branch: DIN-long, LREA decompressed, LREA absorbed, FuxiCTR's DIN.

    python -m benchmarks.lrea_serving [--lengths 500 10000] [--candidates 100 1000] [--ranks 128]
                                      [--fuxictr_python=PATH] [--out FILE]

One request: one user, his history as tokens [L, d] (DIN-long, decompressed) or his cache [2, r, d]
(absorbed), and the tokens of B candidates; what comes out is the interest [B, d]. Embedding, short
branch and head are the same for all and not in it. All three sides are absorbed_target_attention of
kernels/, the same code on other rows: DIN-long is LREA's unit at full rank with tiles over L, and
what depends on the history alone is computed once per request.

Rounds go through all sides in turn, so that a change of the machine's pace meets all; a figure is
the median over rounds, a ratio the median of the ratios within a round. Counted operations (two per
product term) stand beside Table 1's O().
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.evo_attention import machine
from ctr_jax.long_short import FullRank
from kernels.absorbed_target_attention import FORMS, Weights, absorbed_target_attention
from lrea_jax import low_rank

D, H = 16, 64
LENGTHS, CANDIDATES, RANKS = (500, 1000, 10_000, 100_000), (100, 500, 1000, 5000), (32, 64, 128)
FULL, DECOMPRESSED, ABSORBED, FUXICTR = "DIN-long", "decompressed", "absorbed", "FuxiCTR DIN"
COUNTED = {FULL: "full", DECOMPRESSED: "decompressed", ABSORBED: "absorbed"}
SHARE_OF_RATIO = 0.7  # of L / r: the goal at L = 10,000, r = 128, 1000 candidates
GROWTH = 1.1  # absorbed, longest history : shortest
LEAST_SECONDS = 0.04  # a measurement repeats until it has lasted that long


class Side:
    """One way to answer a request of one size, and its times."""

    def __init__(self, name, length, candidates, rank, run):
        self.name, self.length, self.candidates, self.rank = name, length, candidates, rank
        self.run, self.seconds = run, []
        start = time.perf_counter()
        run()
        self.first_s = time.perf_counter() - start
        if self.first_s < 1:  # else compilation hardly counts
            start = time.perf_counter()
            run()
        self.repeats = max(1, int(LEAST_SECONDS / (time.perf_counter() - start)))

    def measure(self):
        if self.repeats > 1:  # what ran before has emptied the caches
            self.run()
        start = time.perf_counter()
        for _ in range(self.repeats):
            self.run()
        self.seconds.append((time.perf_counter() - start) / self.repeats)

    def row(self) -> dict:
        median = statistics.median(self.seconds)
        return {
            "side": self.name,
            "L": self.length,
            "B": self.candidates,
            "r": self.rank,
            "ms": 1e3 * median,
            "fastest_ms": 1e3 * min(self.seconds),
            "us_per_candidate": 1e6 * median / self.candidates,
            "seconds": self.seconds,
            **counted(self.name, self.length, self.candidates, self.rank),
        }


def counted(name, length, candidates, rank) -> dict:
    """Our count of a request's operations, and Table 1's serving term without its O()."""
    if name not in COUNTED:
        return {}
    rank_or_any = rank or 1
    mflop = low_rank.counted_flops(length, rank_or_any, D, H, candidates, COUNTED[name])
    terms = low_rank.table_1(length, rank_or_any, D, candidates)
    request = mflop["request"] + (mflop["per_history"] if name == DECOMPRESSED else 0)
    return {
        "mflop": request / 1e6,
        "table_1": terms["LREA" if name == ABSORBED else "DIN"] if name != DECOMPRESSED else None,
    }


def weights(rng) -> Weights:
    normal = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32) * s[0] ** -0.5  # noqa: E731
    return Weights(normal(D, H), normal(D, H), normal(D, H), normal(H))


def low_rank_of(length: int, rank: int):
    """(module, variables) of random matrices, made on the host."""
    rng = np.random.default_rng(length + rank)
    params = {
        "w_comp": jnp.asarray(rng.normal(size=(length, rank)) / length, jnp.float32),
        "w_decomp": jnp.asarray(rng.normal(size=(rank, length)) / rank, jnp.float32),
    }
    return low_rank.LowRank(length, rank), {"params": params}


def sides(lengths, candidates, ranks, form, decompressed_rank):
    """The measured sides; caches are made beforehand, as in serving."""
    rng = np.random.default_rng(0)
    unit = weights(rng)
    request = jax.jit(
        lambda query, memory: absorbed_target_attention(
            query, memory, unit, form=form, tiling="hidden"
        )
    )

    def from_history(module, path):
        def run(variables, query, tokens):
            memory = module.apply(variables, tokens, path, method="memory")
            return absorbed_target_attention(query, memory, unit, form=form, tiling="hidden")

        return jax.jit(run)

    found, refreshes = [], []
    for length in lengths:
        tokens = jnp.asarray(rng.normal(size=(1, length, D)), jnp.float32)
        whole = FullRank(length).memory(tokens)
        low = {rank: low_rank_of(length, rank) for rank in ranks if rank < length}
        caches = {}
        for rank, (module, variables) in low.items():
            make = jax.jit(
                lambda v, t, m=module: m.apply(v, t, "absorbed", method="memory")
            )  # fmt: skip
            caches[rank] = make(variables, tokens)
            refreshes.append(Side("refresh", length, 1, rank, _blocking(make, variables, tokens)))
        for number in candidates:
            query = jnp.asarray(rng.normal(size=(1, number, D)), jnp.float32)
            found.append(Side(FULL, length, number, 0, _blocking(request, query, whole)))
            for rank, (module, variables) in low.items():
                if rank == decompressed_rank:
                    run = _blocking(from_history(module, "decompressed"), variables, query, tokens)
                    found.append(Side(DECOMPRESSED, length, number, rank, run))
                run = _blocking(request, query, caches[rank])
                found.append(Side(ABSORBED, length, number, rank, run))
    return found, refreshes


def _blocking(function, *args):
    return lambda: jax.block_until_ready(function(*args))


class Torch:
    """FuxiCTR's layer in its own interpreter."""

    def __init__(self, python: str):
        script = Path(__file__).with_name("lrea_torch_din.py")
        options = json.dumps({"width": D, "hidden": H, "threads": os.cpu_count()})
        self._process = subprocess.Popen(
            [python, str(script), options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.version = json.loads(self._process.stdout.readline())["torch"]

    def run(self, length: int, candidates: int) -> float:
        self._process.stdin.write(json.dumps({"length": length, "candidates": candidates}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())["seconds"]

    def close(self):
        self._process.stdin.close()
        self._process.wait()


def torch_rows(python, lengths, candidates, rounds, most_pairs):
    """Rows of FuxiCTR's DIN, where candidates x behaviours are at most `most_pairs`."""
    worker, rows = Torch(python), []
    for length in lengths:
        for number in candidates:
            if length * number > most_pairs:
                continue
            worker.run(length, number)
            seconds = [worker.run(length, number) for _ in range(rounds)]
            rows.append(
                {
                    "side": FUXICTR,
                    "L": length,
                    "B": number,
                    "r": 0,
                    "ms": 1e3 * statistics.median(seconds),
                    "fastest_ms": 1e3 * min(seconds),
                    "us_per_candidate": 1e6 * statistics.median(seconds) / number,
                    "seconds": seconds,
                }
            )
    worker.close()
    return rows


def ratio(slow: Side, fast: Side) -> float:
    """Median over rounds of slow / fast within the round."""
    return statistics.median(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True))


def verdicts(found: list[Side]) -> dict:
    """The two goals, where the sizes they speak of were measured."""
    at = {(s.name, s.length, s.candidates, s.rank): s for s in found}
    goals = {}
    key = (10_000, 1000)
    if (FULL, *key, 0) in at and (ABSORBED, *key, 128) in at:
        goals["DIN-long : absorbed at L=10,000, r=128, B=1000"] = {
            "ratio": ratio(at[FULL, *key, 0], at[ABSORBED, *key, 128]),
            "goal": SHARE_OF_RATIO * 10_000 / 128,
        }
    lengths = sorted({s.length for s in found})
    for side in found:
        longest = at.get((ABSORBED, lengths[-1], side.candidates, side.rank))
        if side.name == ABSORBED and side.length == lengths[0] != lengths[-1] and longest:
            name = f"absorbed L={lengths[-1]:,} : L={lengths[0]:,}, r={side.rank}, B="
            goals[f"{name}{side.candidates}"] = {"ratio": ratio(longest, side), "at_most": GROWTH}
    return goals


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--candidates", type=int, nargs="*", default=CANDIDATES)
    parser.add_argument("--ranks", type=int, nargs="*", default=RANKS)
    parser.add_argument("--decompressed_rank", type=int, default=128, help="its one rank; 0: none")
    parser.add_argument("--form", choices=FORMS, default="joint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fuxictr_python", help="an interpreter with torch and fuxictr")
    parser.add_argument("--fuxictr_pairs", type=int, default=10**7, help="largest B x L of it")
    parser.add_argument("--out", default="benchmarks/results/lrea_serving.json")
    args = parser.parse_args(argv)
    before = machine()
    found, refreshes = sides(
        args.lengths, args.candidates, args.ranks, args.form, args.decompressed_rank
    )
    # The same side at all lengths in a row, so that growth with L is measured side by side.
    order = sorted(found + refreshes, key=lambda s: (s.name, s.candidates, s.rank, s.length))
    for _ in range(args.rounds):
        for side in order:
            side.measure()
    rows = [side.row() for side in found]
    torch = "FuxiCTR is not measured: pass --fuxictr_python"
    if args.fuxictr_python:
        rows += torch_rows(
            args.fuxictr_python, args.lengths, args.candidates, args.rounds, args.fuxictr_pairs
        )
        torch = "FuxiCTR's layer: q - e term and Dice, [C, L, 4d] inputs, candidates in parts"

    print(f"\nd = {D}, h = {H}, {args.form}; per request\n")
    print(f"{'':14}{'L':>8}{'B':>6}{'r':>5}{'ms':>10}{'us/cand':>9}{'MFLOP':>10}{'GFLOP/s':>9}"
          f"{'Table 1':>15}")  # fmt: skip
    for row in sorted(rows, key=lambda r: (r["B"], r["L"], r["side"], r["r"])):
        counted_columns = ""
        if "mflop" in row:
            term = f"{row['table_1']:15,}" if row["table_1"] else ""
            counted_columns = f"{row['mflop']:10.1f}{row['mflop'] / row['ms']:9.1f}{term}"
        print(f"{row['side']:14}{row['L']:8}{row['B']:6}{row['r'] or '':>5}{row['ms']:10.3f}"
              f"{row['us_per_candidate']:9.2f}{counted_columns}")  # fmt: skip
    print("\nrefresh of one user (precompute), and his cache\n")
    for side in refreshes:
        mflop = low_rank.counted_flops(side.length, side.rank, D, H, 1, "absorbed")["per_history"]
        size = 4 * low_rank.cache_floats(side.rank, D, args.form)
        print(f"L {side.length:7}  r {side.rank:4}  {side.row()['ms']:9.3f} ms {mflop / 1e6:9.2f} "
              f"MFLOP  {size:6} bytes kept of {4 * side.length * D}")  # fmt: skip
    goals = verdicts(found)
    for name, goal in goals.items():
        met = goal["ratio"] >= goal["goal"] if "goal" in goal else goal["ratio"] <= goal["at_most"]
        bound = f">= {goal['goal']:.1f}" if "goal" in goal else f"<= {goal['at_most']}"
        print(f"{name}: {goal['ratio']:.2f} ({bound}: {'met' if met else 'MISSED'})")
    print(f"\n{torch}")
    print(
        "Table 1 leaves out h: every term costs h times more. Its training O(BLrd) is "
        "O(Lrd + BLdh) here, since W_d^T C does not depend on the candidate."
    )
    command = " ".join(["python -m benchmarks.lrea_serving", *(argv or sys.argv[1:])])
    record = {
        "command": command.replace(args.fuxictr_python or "PATH", "PATH"),
        "machine": before,
        "load_average_after": os.getloadavg(),
        "rows": rows,
        "refreshes": [side.row() for side in refreshes],
        "goals": goals,
    }
    path = Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
