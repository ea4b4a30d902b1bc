"""How fast the input pipeline is, and how much CPU it takes from the train step.

    python -m benchmarks.input_pipeline [--requests=200000] [--users=20000] [--batches=200]
    python -m benchmarks.input_pipeline --requests 20000 --users 1000 --mean_length 8000 \
        --batches 40 --lengths 50 200 1000 10000 --out benchmarks/results/input_pipeline.json

Generates a prepared data set (Zipf ids; three behaviour columns; geometric history lengths), then
times shuffled batches of `train_batches`: as fast as they come (requests/s), the CPU time of all
threads per batch, and the wait per batch of a consumer that sleeps `--step_ms` between two, which
stands for a train step. With one thread, with two, and in two processes that share the global batch
at the same time. "parts" is the CPU time of one batch's stages, in one thread. Batches of more than
SLOTS behaviours have fewer requests.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

import seqvault
from ctr_jax.data.pipeline import shuffled, train_batches
from ctr_jax.data.records import PreparedData, record_dtype, request_features
from ctr_jax.features import DataColumn, DataSpec

BLOCK = 1 << 20
SLOTS = 2_000_000  # B * L at most, so that the batches read ahead fit any machine


class _Generated(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The TFDS side of a generated data set: one train split of given records."""

    VERSION = tfds.core.Version("1.0.0")
    name = "input_pipeline"

    def __init__(self, spec: DataSpec, records: np.ndarray, **kwargs):
        self._spec, self._records = spec, records
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = request_features(self._spec)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(len(self._records)):
            yield i, {"request": self._records[i]}


def generate(directory: Path, requests: int, users: int, mean_length: int) -> Path:
    """Writes a prepared data set; the path that PreparedData.open takes."""
    rng = np.random.default_rng(0)
    sizes = {"item": 100_000, "category": 5_000, "brand": 20_000}
    columns = [DataColumn("user", "age", vocabulary="age"), DataColumn("user", "gender")]
    columns += [DataColumn("context", "slot")]
    columns += [DataColumn("behaviour", name, vocabulary=name) for name in sizes]
    columns += [DataColumn("candidate", name, vocabulary=name) for name in sizes]
    columns += [DataColumn("candidate", "price", "dense")]
    spec = DataSpec("input_pipeline", tuple(columns), {}, 1, splits={"train": requests})

    lengths = rng.geometric(1 / mean_length, users)
    offsets = np.concatenate([[0], np.cumsum(lengths)])

    def blocks():
        for start in range(0, offsets[-1], BLOCK):
            rows = np.arange(start, min(start + BLOCK, offsets[-1]))
            user = np.searchsorted(offsets, rows, side="right") - 1
            block = {name: rng.zipf(1.2, len(rows)) % size for name, size in sizes.items()}
            yield block | {"user": user, "time": 1_500_000_000 + (rows - offsets[user]) * 60}

    records = np.zeros(requests, record_dtype(spec))
    records["user"] = rng.integers(0, users, requests)
    records["end"] = (lengths[records["user"]] * rng.random(requests)).astype(np.int32)
    records["request_id"] = np.arange(requests)
    records["num_candidates"] = 1
    records["label"] = rng.integers(0, 2, (requests, 1))
    builder = _Generated(spec, records, data_dir=directory)
    builder.download_and_prepare()
    path = Path(builder.data_dir)
    spec.save(path / "spec.json")
    schema = seqvault.Schema({name: np.int32 for name in sizes})
    seqvault.bulk_build(path / "histories", schema, users, blocks())
    return path


def measure(path: Path, batch_size: int, length: int, batches: int, workers: int, step: float):
    """(requests/s, CPU ms per batch, ms a consumer waits per batch beside steps of `step` s)."""
    requests = PreparedData.open(path).split("train")
    options = {"batch_size": batch_size, "history_length": length, "seed": 0, "workers": workers}
    stream = train_batches(requests, **options)
    for batch in itertools.islice(stream, 10):
        assert batch.shape == (batch_size, length, 1)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in itertools.islice(stream, batches):
        pass
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    waited = 0.0
    for _ in range(10):
        time.sleep(step)
        start = time.perf_counter()
        next(stream)
        waited += time.perf_counter() - start
    stream.close()
    return batch_size * batches / wall, 1e3 * cpu / batches, 1e3 * waited / 10


def measure_processes(
    path: Path, batch_size: int, length: int, batches: int, processes: int
) -> tuple[float, float]:
    """(requests/s, CPU ms per global batch) of processes that read it together, one thread each."""
    context = multiprocessing.get_context("spawn")
    ready, shares = context.Barrier(processes), context.SimpleQueue()
    workers = [
        context.Process(
            target=_read_share,
            args=(path, batch_size, length, batches, p, processes, ready, shares),
        )
        for p in range(processes)
    ]
    for worker in workers:
        worker.start()
    wall, cpu = zip(*(shares.get() for _ in workers), strict=True)
    for worker in workers:
        worker.join()
    return batch_size * batches / max(wall), 1e3 * sum(cpu) / batches


def _read_share(path, batch_size, length, batches, index, count, ready, shares) -> None:
    """One process: (wall, CPU) seconds of its rows of `batches` batches into `shares`."""
    stream = train_batches(
        PreparedData.open(path).split("train"),
        batch_size=batch_size,
        history_length=length,
        seed=0,
        process_index=index,
        process_count=count,
    )
    for _ in itertools.islice(stream, 10):
        pass
    ready.wait()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in itertools.islice(stream, batches):
        pass
    shares.put((time.perf_counter() - wall, time.process_time() - cpu))
    stream.close()


def measure_parts(path: Path, batch_size: int, length: int, repeats: int = 50) -> dict[str, float]:
    """CPU ms of one batch's stages."""
    requests = PreparedData.open(path).split("train")
    positions = np.arange(batch_size)
    indices = shuffled(positions, len(requests), 0)
    rows = requests.records(indices)
    vault = PreparedData.open(path).histories
    stages = {
        "order": lambda: shuffled(positions, len(requests), 0),
        "records": lambda: requests.records(indices),
        "histories": lambda: vault.last_n(rows["user"], length, end=rows["end"]),
        "whole": lambda: requests.read(indices, length),
    }
    figures = {}
    for name, stage in stages.items():
        stage()
        start = time.process_time()
        for _ in range(repeats):
            stage()
        figures[name] = 1e3 * (time.process_time() - start) / repeats
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--mean_length", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step_ms", type=float, default=100)
    parser.add_argument("--lengths", type=int, nargs="+", default=[50, 200, 1024])
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        path = generate(Path(directory), args.requests, args.users, args.mean_length)
        histories = PreparedData.open(path).histories
        rows, size = (
            histories.num_behaviours,
            sum(f.stat().st_size for f in histories.path.iterdir()),
        )
        print(
            f"{args.requests} requests, {rows} behaviours at {size / rows:.1f} bytes, "
            f"generated in {time.perf_counter() - start:.0f} s"
        )
        figures = [measure_length(path, length, args) for length in args.lengths]
    if args.out:
        sizes = {name: vars(args)[name] for name in ("requests", "users", "mean_length", "rounds")}
        args.out.write_text(json.dumps({**sizes, "lengths": figures}, indent=1) + "\n")


def measure_length(path: Path, length: int, args: argparse.Namespace) -> dict:
    """All figures of one L, medians over the rounds; the ways of reading take turns."""
    batch_size = min(args.batch_size, SLOTS // length)
    common = (path, batch_size, length, args.batches)
    ways = {
        "1 thread": lambda: measure(*common, 1, args.step_ms / 1e3),
        "2 threads": lambda: measure(*common, 2, args.step_ms / 1e3),
        "2 processes": lambda: measure_processes(*common, 2),
    }
    rounds = [{name: way() for name, way in ways.items()} for _ in range(args.rounds)]
    requests = PreparedData.open(path).split("train")
    figures = {
        "history_length": length,
        "batch_size": batch_size,
        "mean_behaviours": round(float(np.minimum(requests.history_lengths(), length).mean()), 1),
        "parts_cpu_ms": {
            k: round(v, 2) for k, v in measure_parts(path, batch_size, length).items()
        },
    }
    print(f"B={batch_size} L={length}: parts, CPU ms: {figures['parts_cpu_ms']}", flush=True)
    for name in ways:
        rate, cpu, *wait = map(statistics.median, zip(*(r[name] for r in rounds), strict=True))
        figures[name] = {
            "requests_per_second": round(rate),
            "requests_per_cpu_second": round(1e3 * batch_size / cpu),
            "cpu_ms_per_batch": round(cpu, 2),
            "wait_ms": round(wait[0], 2) if wait else None,
        }
        print(
            f"  {name}: {rate:,.0f} requests/s, {cpu:.2f} CPU ms per batch"
            + (f", {wait[0]:.2f} ms wait beside {args.step_ms:g} ms steps" if wait else ""),
            flush=True,
        )
    return figures


if __name__ == "__main__":
    main()
