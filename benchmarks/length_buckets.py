"""What length buckets save in training, on histories of very unequal length.

    python -m benchmarks.length_buckets --directory=DIR [--rounds=3] [--out=FILE]

The model of configs/sparsectr_alibaba.py:demo at L = 4096 on generated data of few, long sessions
(600 behaviours in 1.5 sessions a user on average), so that histories spread over 12 to about 4000
behaviours. A round trains one epoch without and one with buckets, taking turns on one state each;
wall and CPU seconds are of the epoch, input included, after all shapes are compiled.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import sparsectr_alibaba
from ctr_jax import sharding, steps
from ctr_jax.data import open_data
from ctr_jax.data.pipeline import bucket_at, by_length, train_batches

BUCKETS = (64, 256, 1024, 4096)


def setting(directory: Path, users: int, batch_size: int) -> ConfigDict:
    """The demo's config with long histories; data goes under `directory`."""
    config = sparsectr_alibaba.get_config("demo")
    config.data.raw_dir = str(directory / "raw")
    config.data.prepared_dir = str(directory / "prepared")
    config.data.generate = ConfigDict(
        dict(users=users, behaviours=600.0, sessions=1.5, seed=0, test_users=0.1)
    )
    config.history_length = BUCKETS[-1]
    config.batch_size = config.eval_batch_size = batch_size
    config.mesh.data = 1
    return config


class Run:
    """Training with or without buckets, an epoch at a time."""

    def __init__(self, experiment: steps.Experiment, requests, buckets: tuple[int, ...]):
        config, self._mesh = experiment.config, experiment.mesh
        self._step, self._state = steps.train_step(experiment), steps.init_state(experiment, 0)
        self._batches = train_batches(
            requests,
            batch_size=config.batch_size,
            history_length=config.history_length,
            length_buckets=buckets,
            seed=0,
        )

        # Every shape once: what compilation takes is no part of an epoch.
        began = time.perf_counter()
        for length in buckets or (config.history_length,):
            first = requests.read(np.arange(config.batch_size), length)
            self._train(first)
        self.compile_seconds = time.perf_counter() - began

    def _train(self, batch) -> None:
        batch = sharding.put_batch(batch, self._mesh)
        self._state, scalars = self._step(self._state, batch)
        jax.block_until_ready(scalars["loss"])

    def epoch(self, count: int) -> tuple[float, float]:
        """(wall, CPU) seconds of the next `count` steps."""
        wall, cpu = time.perf_counter(), time.process_time()
        for batch in itertools.islice(self._batches, count):
            self._train(batch)
        return time.perf_counter() - wall, time.process_time() - cpu


def measure(config: ConfigDict, rounds: int) -> dict:
    """The figures; keys "off" and "buckets" for the two runs."""
    data, mesh = open_data(config), sharding.make_mesh(1, 1)
    requests = data.split("train")
    began = time.perf_counter()
    lengths = requests.history_lengths()
    read_seconds = time.perf_counter() - began
    sizes = [len(b.records) for b in by_length(requests, config.history_length, BUCKETS)]
    epoch_steps = sum(size // config.batch_size for size in sizes)
    held = [bucket_at(step, sizes, config.batch_size, 0)[0] for step in range(epoch_steps)]

    with jax.set_mesh(mesh):
        experiment = steps.bind(config, data.spec, mesh, rounds * epoch_steps)
        runs = {"off": Run(experiment, requests, ()), "buckets": Run(experiment, requests, BUCKETS)}
        seconds = {name: [] for name in runs}
        for number in range(rounds):
            for name, run in runs.items():
                seconds[name].append(run.epoch(epoch_steps))
                print(f"round {number}, {name}: %.1f s, %.1f CPU s" % seconds[name][-1], flush=True)

    examples = epoch_steps * config.batch_size
    result = {
        "requests": len(requests),
        "history_length_percentiles": {
            str(p): int(np.percentile(lengths, p)) for p in (0, 5, 25, 50, 75, 95, 100)
        },
        "read_lengths_seconds": round(read_seconds, 3),
        "bucket_lengths": list(BUCKETS),
        "requests_in_buckets": sizes,
        "first_epoch_batches": np.bincount(held, minlength=len(BUCKETS)).tolist(),
        "slots_off_over_buckets": round(
            epoch_steps * BUCKETS[-1] / sum(BUCKETS[which] for which in held), 3
        ),
        "batch_size": config.batch_size,
        "steps_per_round": epoch_steps,
    }
    for name, rows in seconds.items():
        wall, cpu = zip(*rows, strict=True)
        result[name] = {
            "compile_seconds": round(runs[name].compile_seconds, 1),
            "wall_seconds": [round(s, 2) for s in wall],
            "cpu_seconds": [round(s, 2) for s in cpu],
            "examples_per_second": round(examples / statistics.median(wall), 2),
            "examples_per_cpu_second": round(examples / statistics.median(cpu), 2),
        }
    for unit in ("wall", "cpu"):
        pairs = zip(*(result[name][f"{unit}_seconds"] for name in ("off", "buckets")), strict=True)
        result[f"{unit}_saving"] = round(statistics.median(a / b for a, b in pairs), 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, required=True, help="for the generated data")
    parser.add_argument("--users", type=int, default=600)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default="benchmarks/results/length_buckets.json")
    args = parser.parse_args()
    result = measure(setting(args.directory, args.users, args.batch_size), args.rounds)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
