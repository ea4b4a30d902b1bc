"""A training step with tokens from projected rows against one with tokens from vectors.

    python -m benchmarks.token_rows --raw_dir=DIR [--pages sparsectr_movielens laser_movielens:din]

One core, one CPU device, one batch of the page's training split; the two compiled steps take turns.
Printed: the median seconds of both, the median of the rounds' ratios, and XLA's temporaries.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from unittest import mock

import jax

from benchmarks.lrea_gap import load_page
from ctr_jax import embedding, sharding, steps
from ctr_jax.data import open_data, pipeline
from ctr_jax.reports import format_table

PAGES = (
    "sparsectr_movielens",
    "lrea_movielens:L500",
    "laser_movielens",
    "laser_movielens:din",
    "laser_movielens:hstu",
)


def compiled_steps(config) -> tuple[dict, object]:
    """{"vectors": (compiled step, state), "rows": the same}, and a batch."""
    data, mesh = open_data(config), sharding.make_mesh(1, 1)
    batches = pipeline.train_batches(
        data.split("train"),
        batch_size=config.batch_size,
        history_length=config.history_length,
        seed=0,
    )
    found = {}
    with jax.set_mesh(mesh):
        batch = sharding.put_batch(next(batches), mesh)
        experiment = steps.bind(config, data.spec, mesh, 1000)
        for name, reads_rows in (("vectors", lambda part: False), ("rows", embedding.reads_rows)):
            state = steps.init_state(experiment, 0)
            with mock.patch.object(embedding, "reads_rows", reads_rows):
                found[name] = steps.train_step(experiment).lower(state, batch).compile(), state
    return found, batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw_dir", required=True, help="of MovieLens")
    parser.add_argument("--pages", nargs="+", default=PAGES)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    jax.config.update("jax_num_cpu_devices", 1)
    rows = []
    for page in args.pages:
        name, _, variant = page.partition(":")
        config = load_page(f"configs/{name}.py:{variant}")
        config.data.raw_dir = args.raw_dir
        found, batch = compiled_steps(config)
        states = {name: state for name, (_, state) in found.items()}
        seconds = {name: [] for name in found}
        for _ in range(args.rounds + 1):
            for name, (step, _) in found.items():
                began = time.perf_counter()
                states[name] = jax.block_until_ready(step(states[name], batch))[0]
                seconds[name].append(time.perf_counter() - began)
        seconds = {name: s[1:] for name, s in seconds.items()}  # the first warms up
        row = {"page": page}
        for name, (step, _) in found.items():
            row[f"{name}, ms"] = round(1e3 * statistics.median(seconds[name]))
            row[f"{name}, MiB"] = round(step.memory_analysis().temp_size_in_bytes / 2**20)
        pairs = zip(seconds["rows"], seconds["vectors"], strict=True)
        row["time, rows / vectors"] = round(statistics.median(a / b for a, b in pairs), 2)
        rows.append(row)
        print(row, flush=True)
    print(format_table(rows, markdown=True))


if __name__ == "__main__":
    main()
