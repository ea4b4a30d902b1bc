"""What a training step gains on a CPU by what it does there only.

    python -m benchmarks.cpu_steps rows  --raw_dir=DIR    tokens of rows, not vectors
    python -m benchmarks.cpu_steps tiles --raw_dir=DIR    requests not all together
    python -m benchmarks.cpu_steps once  --raw_dir=DIR    LASER's normalised behaviours made once
    ... [--pages sparsectr_movielens laser_movielens:din]

One core, one CPU device, one batch of the page's training split; the step with and the step without
take turns. Printed: the median seconds of both, the median of the rounds' ratios, and XLA's
temporaries. Without tiles, the scoring units still take the rows of all requests in tiles: they did
before.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from unittest import mock

import jax

from benchmarks.lrea_gap import load_page
from ctr_jax import din_attention, embedding, history_model, sharding, steps
from ctr_jax.data import open_data, pipeline
from ctr_jax.reports import format_table
from kernels.absorbed_target_attention import row_tiles
from laser_jax import behaviour_norm

LASER = [f"laser_movielens{row}" for row in ("", ":base", ":din", ":twin", ":hstu", ":transformer")]
PAGES = {
    "rows": ["sparsectr_movielens", "lrea_movielens:L500", *LASER],
    "once": ["laser_movielens"],
    "tiles": ["lrea_movielens", "lrea_movielens:L500", "din_long_movielens", *LASER],
}


@contextlib.contextmanager
def without(what: str):
    """Steps compiled here do without."""
    with contextlib.ExitStack() as stack:
        put = lambda *of: stack.enter_context(mock.patch.object(*of))  # noqa: E731
        if what == "rows":
            put(embedding, "reads_rows", lambda part: False)
        elif what == "once":
            put(behaviour_norm, "at_elements", lambda sigma, x: sigma)
        else:
            put(history_model, "TILE_BYTES", {})
            put(din_attention, "TILE_BYTES", {"cpu": 1 << 40})
            put(row_tiles, "TILE_BYTES", {"cpu": 4 << 20})
            put(row_tiles, "size_of_groups", lambda b, most: b)
        yield


def compiled_steps(config, what: str) -> tuple[dict, object]:
    """{"with": (compiled step, state), "without": the same}, and a batch."""
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
        for name in ("without", "with"):
            state = steps.init_state(experiment, 0)
            with without(what) if name == "without" else contextlib.nullcontext():
                found[name] = steps.train_step(experiment).lower(state, batch).compile(), state
    return found, batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=PAGES)
    parser.add_argument("--raw_dir", help="of MovieLens")
    parser.add_argument("--pages", nargs="+")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    jax.config.update("jax_num_cpu_devices", 1)
    rows = []
    for page in args.pages or PAGES[args.what]:
        name, _, variant = page.partition(":")
        config = load_page(f"configs/{name}.py:{variant}")
        if args.raw_dir:
            config.data.raw_dir = args.raw_dir
        found, batch = compiled_steps(config, args.what)
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
        pairs = zip(seconds["with"], seconds["without"], strict=True)
        row["time, with / without"] = round(statistics.median(a / b for a, b in pairs), 2)
        rows.append(row)
        print(row, flush=True)
    print(format_table(rows, markdown=True))


if __name__ == "__main__":
    main()
