"""EvoAttention against dense attention: time and peak memory, forward and forward + backward.

    python -m benchmarks.evo_attention [--quick] [--out benchmarks/results/evo_attention.json]

The op is chunking + aggregation + the three branches + RelTemporal, projections excluded. Dense
attention is measured in several forms, each causal, with the same RelTemporal bias (its integer
terms made once and shared by the heads) and without; the table's ratio is against the fastest of
them. "n x n" is the plain masked form, "skip" leaves out the blocks above the diagonal, "tiled"
is the sparse op's own loop, layout and recomputing backward pass with every behaviour for a key.
The whole block (norms, projections, gate, W_O, SwiGLU) stands beside the op.

Every figure is the median of several runs after warm-up; dense and sparse runs are interleaved, so
that a change of the machine's pace meets both. Compile time is apart. Memory is XLA's count of
temporary bytes. Time and memory are per request.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from benchmarks.dense_attention import NO_BIAS, dense_blocks, dense_tiled
from benchmarks.histories import burst_times
from kernels.evo_attention import RelTemporal
from sparsectr_jax import evo_attention as evo
from sparsectr_jax import model
from sparsectr_jax.aggregate import Aggregate
from sparsectr_jax.block import SparseBlock
from sparsectr_jax.chunking import time_chunks

SPARSITY = {1: (8, 1, 2), 2: (16, 2, 5), 3: (16, 3, 10), 4: (32, 4, 20)}  # (P, m, w), Fig. 3
FLOOR = {1: 8.9, 2: 5.2, 3: 4.0, 4: 2.0}  # the paper's model-level speed-ups at L = 1024, A100


def inputs(batch: int, length: int, heads: int, width: int):
    """q, k, v [B, L, H, K], slopes, user k and v, times, mask: full histories with bursts."""
    rng = np.random.default_rng(0)
    times = burst_times(batch, length)
    q, k, v = (rng.normal(size=(batch, length, heads, width)).astype(np.float32) for _ in range(3))
    user = [rng.normal(size=(batch, heads, width)).astype(np.float32) for _ in range(2)]
    slopes = np.tile(2.0 ** (-8 / heads * np.arange(heads)), (3, 1)).astype(np.float32)
    arrays = (q, k, v, *user, slopes, times, np.ones((batch, length), bool))
    return tuple(jnp.asarray(x) for x in arrays)


def dense_forms(length: int, rel: RelTemporal, quick: bool) -> dict:
    """Name -> form (benchmarks/dense_attention.py)."""
    forms = {}
    if length <= 2048:
        forms["n x n"] = functools.partial(dense_blocks, length, rel)
    for block in (64,) if quick else (64, 256):
        if 1 < length // block <= 32:
            forms[f"skip {block}"] = functools.partial(dense_blocks, block, rel)
    for tile in (400_000,) if quick else (400_000, 1_600_000):
        forms[f"tiled {tile // 1000}k"] = functools.partial(dense_tiled, tile, rel)
    return forms


# ---- the sparse op and the whole block ---------------------------------------------------------


def sparse_op(sparsity, q, k, v, user_k, user_v, slopes, times, mask, mlps):
    num_chunks, m, w = sparsity
    chunks = time_chunks(times, mask, num_chunks)
    chunk_k, chunk_v = Aggregate("mean_mlp").apply(mlps, k, v, chunks)
    history = evo.History(chunks, times, mask, times[:, -1])
    spec = evo.EvoSpec(m=m, w=w)
    return evo.evo_attention(q, k, v, chunk_k, chunk_v, user_k, user_v, slopes, history, spec)


def block_of(sparsity, heads, d):
    config = model.default_config()
    config.width, config.num_heads = d, heads
    config.num_chunks, config.num_transition, config.local_window = sparsity
    return SparseBlock(config, last=False)


def whole_block(block, num_chunks, x, candidates, user, times, mask, variables):
    history = evo.History(time_chunks(times, mask, num_chunks), times, mask, times[:, -1])
    return block.apply(variables, x, candidates, user, history)


# ---- measuring -----------------------------------------------------------------------------------


class Case:
    """One compiled function and its runs."""

    def __init__(self, name, function, args, differentiate, backward):
        def total(*args):
            return sum(jnp.sum(x * x) for x in jax.tree.leaves(function(*args)))

        jitted = jax.jit(jax.grad(total, differentiate)) if backward else jax.jit(function)
        self.name, self.args, self.batch = name, args, args[0].shape[0]
        start = time.perf_counter()
        self.compiled = jitted.lower(*args).compile()
        self.compile_s = time.perf_counter() - start
        self.temp = self.compiled.memory_analysis().temp_size_in_bytes
        self.times = []

    def run(self, record=True):
        start = time.perf_counter()
        jax.block_until_ready(self.compiled(*self.args))
        if record:
            self.times.append(time.perf_counter() - start)

    def row(self) -> dict:
        return {
            "name": self.name,
            "ms": 1e3 * statistics.median(self.times) / self.batch,
            "fastest_ms": 1e3 * min(self.times) / self.batch,
            "temp_mib": self.temp / self.batch / 2**20,
            "batch": self.batch,
            "compile_s": self.compile_s,
        }


def measure(length, d, heads, backward, levels, repeats, quick):
    """Rows for one length and width; dense with a small batch, sparse with a larger one."""
    width = d // heads
    batch = max(1, min(8, 8192 // length))
    few, many = (inputs(b, length, heads, width) for b in (1, batch))
    of_dense = (*few[:3], *few[5:7])
    cases = []
    for label, rel in (("dense", RelTemporal()), ("dense, no bias", NO_BIAS)):
        for name, form in dense_forms(length, rel, quick).items():
            cases.append(Case(f"{label}: {name}", form, of_dense, (0, 1, 2, 3), backward))
    chunks = time_chunks(many[6], many[7], 4)
    mlps = Aggregate("mean_mlp").init(jax.random.key(0), many[1], many[2], chunks)
    for level in levels:
        op = functools.partial(sparse_op, SPARSITY[level])
        cases.append(Case(f"Sparsity-{level}", op, (*many, mlps), (0, 1, 2, 3, 4, 5, 8), backward))
    for level in levels:
        block = block_of(SPARSITY[level], heads, d)
        x = many[0].reshape(batch, length, d)
        history = evo.History(time_chunks(*many[6:8], 4), *many[6:8], many[6][:, -1])
        start = (x, x[:, :1], x[:, 0])
        variables = jax.jit(block.init)(jax.random.key(0), *start, history)
        function = functools.partial(whole_block, block, SPARSITY[level][0])
        args = (*start, *many[6:8], variables)
        cases.append(Case(f"block, Sparsity-{level}", function, args, (0, 1, 2, 5), backward))
    for round_ in range(repeats + 2):
        for case in cases:
            case.run(record=round_ >= 2)
    return [case.row() for case in cases]


def with_ratios(rows):
    """Adds to each sparse row its speed-up over the fastest dense form with bias and over n x n."""
    dense = [r for r in rows if r["name"].startswith("dense: ")]
    best = min(dense, key=lambda r: r["ms"])
    plain = next((r for r in dense if r["name"] == "dense: n x n"), None)
    for row in rows:
        if row["name"].startswith("Sparsity"):
            row["against"] = best["name"]
            row["speedup"] = best["ms"] / row["ms"]
            row["speedup_n_x_n"] = plain["ms"] / row["ms"] if plain else None
    return rows


def machine() -> dict:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="L = 256 and 1024, d = 32, few runs")
    parser.add_argument("--lengths", type=int, nargs="*", help="history lengths instead of all")
    parser.add_argument("--widths", type=int, nargs="*", help="model widths instead of 32 and 256")
    parser.add_argument("--levels", type=int, nargs="*", default=sorted(SPARSITY))
    parser.add_argument("--repeats", type=int, help="measured runs of each function")
    parser.add_argument("--out", default="benchmarks/results/evo_attention.json")
    args = parser.parse_args(argv)
    lengths = args.lengths or ([256, 1024] if args.quick else [256, 512, 1024, 2048, 4096, 8192])
    widths = args.widths or ([32] if args.quick else [32, 256])
    repeats = args.repeats or (5 if args.quick else 9)
    path = Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    results = []
    record = {
        "command": " ".join(["python -m benchmarks.evo_attention", *(argv or sys.argv[1:])]),
        "machine": machine(),
        "floor_at_1024": FLOOR,
        "goal_at_1024": {k: 0.75 * 1024 / (p + m * p + w + 1) for k, (p, m, w) in SPARSITY.items()},
        "results": results,
    }
    for d in widths:
        for backward in (False, True):
            what = "forward + backward" if backward else "forward"
            for length in lengths:
                rows = measure(length, d, 8, backward, args.levels, repeats, args.quick)
                print(f"\nL = {length}, d = {d}, H = 8, {what}", flush=True)
                print(f"{'':28}{'ms':>9}{'fastest':>9}{'temp MiB':>10}{'speed-up':>10}{'n x n':>8}")
                for row in with_ratios(rows):
                    ratio = f"{row['speedup']:9.1f}x" if "speedup" in row else ""
                    plain = row.get("speedup_n_x_n")
                    print(
                        f"{row['name']:28}{row['ms']:9.3f}{row['fastest_ms']:9.3f}"
                        f"{row['temp_mib']:10.2f}{ratio:>10}{f'{plain:7.1f}x' if plain else '':>8}",
                        flush=True,
                    )
                results.append({"L": length, "d": d, "H": 8, "backward": backward, "rows": rows})
                path.write_text(json.dumps(record, indent=1))  # at once: all of it takes long
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
