"""Does a train step's time or memory grow with the embedding table?

    python -m benchmarks.embedding_step [--rows 100000 1000000 10000000] [--repeats 15]
        [--parts whole_step table_work bare_update naive_step]
    python -m benchmarks.embedding_step --mesh 1 8 --rows 1000000 20000000
    python -m benchmarks.embedding_step --dense-rule

The whole step is the real one (`ctr_jax.steps.train_step`) at MovieLens size: SparseCTR, batch
1024, L = 200, one candidate, item ids Zipf(1.2) in one table of width 32 (205,824 ids a batch), and
four small tables. Beside it the table's own work (ids made distinct, lookup, gradient, update)
without a model, the update alone, and, for tables it can hold, plain autodiff with optax. Sizes
take turns step by step, so that a busy machine slows all of them; the figures are the median and
the least of the repeats. Writes benchmarks/results/embedding_step.json.

--mesh DATA TABLE measures the whole step on a mesh of that many CPU devices, tables split by rows
(embedding_mesh.json).

--dense-rule times the sparse and the dense path of one table against rows per id: it is where
`embedding.DENSE_ROWS_PER_ID` comes from (embedding_dense_rule.json).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ctr_jax import embedding, losses, sharding, steps
from ctr_jax.batch import EmbeddedBatch, RequestBatch
from ctr_jax.config import base_config
from ctr_jax.features import Column, DataColumn, DataSpec
from ctr_jax.table_optimizers import table_optimizer

B, L, C, WIDTH = 1024, 200, 1, 32
RESULTS = Path(__file__).parent / "results"
SMALL = {"gender": 5, "age": 10, "occupation": 24, "rating": 9}
PARTS = ("whole_step", "table_work", "bare_update", "naive_step")
ITEMS = (Column("behaviour", "item", "item", WIDTH), Column("candidate", "item", "item", WIDTH))


def zipf_batches(rows: int, number: int = 4, exponent: float = 1.2) -> list[RequestBatch]:
    """Batches whose item ids are Zipf over `rows`, the popular ones scattered over the table."""
    rng = np.random.default_rng(0)
    mass = np.cumsum(np.arange(1, rows, dtype=np.float64) ** -exponent)
    scattered = rng.permutation(rows - 1).astype(np.int32) + 1
    out = []
    for _ in range(number):
        rank = np.searchsorted(mass, rng.random((B, L + C)) * mass[-1])
        ids = scattered[np.minimum(rank, rows - 2)]
        times = np.sort(rng.integers(1_500_000_000, 1_503_000_000, (B, L), np.int32), axis=1)
        small = {name: rng.integers(1, n, B, np.int32) for name, n in SMALL.items()}
        batch = RequestBatch(
            user_id=np.arange(B, dtype=np.int32),
            request_id=np.arange(B, dtype=np.int32),
            request_time=np.full(B, 1_503_000_001, np.int32),
            user={name: small[name] for name in ("gender", "age", "occupation")},
            context={},
            behaviour={
                "item": ids[:, :L],
                "rating": rng.integers(1, SMALL["rating"], (B, L), np.int32),
            },
            behaviour_time=times,
            behaviour_mask=np.ones((B, L), bool),
            candidate={"item": ids[:, L:]},
            candidate_mask=np.ones((B, C), bool),
            label=rng.integers(0, 2, (B, C)).astype(np.float32),
        )
        out.append(batch)
    return out


def make_experiment(rows: int, mesh: Mesh) -> steps.Experiment:
    """SparseCTR's default setting on the columns of `zipf_batches`."""
    from sparsectr_jax.model import default_config

    columns = [DataColumn("user", name, "id", name) for name in ("gender", "age", "occupation")]
    columns += [DataColumn("behaviour", "item", "id", "item")]
    columns += [DataColumn("behaviour", "rating", "id", "rating")]
    columns += [DataColumn("candidate", "item", "id", "item")]
    spec = DataSpec("zipf", tuple(columns), {"item": rows, **SMALL}, C)
    config = base_config()
    config.model = default_config()
    config.table_optimizer.name = "adagrad"
    return steps.bind(config, spec, mesh, 1000)


class Measured:
    """A donated state and a compiled function over it, stepped batch by batch."""

    def __init__(self, function: Callable, state, batches):
        """function: jitted (state, batch) -> (state, anything), with `state` donated."""
        start = time.perf_counter()
        self.compiled = function.lower(state, batches[0]).compile()
        self.compile_seconds = time.perf_counter() - start
        self.state, self.batches, self.wall, self.cpu = state, batches, [], []

    def run(self, turn: int) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.state, _ = jax.block_until_ready(
            self.compiled(self.state, self.batches[turn % len(self.batches)])
        )
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)

    def report(self) -> dict[str, float]:
        return {
            "median_ms": round(1e3 * statistics.median(self.wall[1:]), 2),
            "least_ms": round(1e3 * min(self.wall[1:]), 2),
            "processor_median_ms": round(1e3 * statistics.median(self.cpu[1:]), 2),
            "temporary_mb": round(self.compiled.memory_analysis().temp_size_in_bytes / 1e6, 2),
            "compile_s": round(self.compile_seconds, 1),
        }


def whole_step(experiment: steps.Experiment, batches) -> Measured:
    return Measured(steps.train_step(experiment), steps.init_state(experiment, 0), batches)


def table_work(rows: int, batches, dense: bool | None = None) -> Measured:
    """Lookup, gradient and Adagrad on the item table alone; the loss is a weighted sum."""
    optimizer = table_optimizer("adagrad", 0.01)
    tables = embedding.init_tables(jax.random.key(0), {"item": (rows, WIDTH)})

    def step(state, batch):
        tables, opt = state
        plan = embedding.lookup_ids(ITEMS, batch, tables)
        found = embedding.gather_rows(tables, plan)

        def loss(found):
            vectors = embedding.embed(found, plan, ITEMS, batch).vectors
            return sum(jnp.sum(jnp.square(v)) for v in vectors.values())

        grads = jax.grad(loss)(found)
        norm = embedding.row_grad_squared_norm(grads, plan)
        return optimizer.update(grads, opt, tables, plan, 0), norm

    if dense is None:
        return Measured(jax.jit(step, donate_argnums=0), (tables, optimizer.init(tables)), batches)
    rule = embedding.takes_dense_path
    embedding.takes_dense_path = lambda rows, ids: dense  # forced while this traces
    try:
        return Measured(jax.jit(step, donate_argnums=0), (tables, optimizer.init(tables)), batches)
    finally:
        embedding.takes_dense_path = rule


def bare_update(rows: int, batches) -> Measured:
    """The update of the item table from gradients at hand."""
    optimizer = table_optimizer("adagrad", 0.01)
    tables = embedding.init_tables(jax.random.key(0), {"item": (rows, WIDTH)})

    @jax.jit
    def prepare(tables, batch):
        plan = embedding.lookup_ids(ITEMS, batch, tables)
        return plan, jax.tree.map(lambda x: x + 0.01, embedding.gather_rows(tables, plan))

    given = [prepare(tables, batch) for batch in batches]

    def step(state, given):
        plan, grads = given
        tables, opt = state
        return optimizer.update(grads, opt, tables, plan, 0), None

    return Measured(jax.jit(step, donate_argnums=0), (tables, optimizer.init(tables)), given)


def naive_step(experiment: steps.Experiment, batches) -> Measured:
    """The same model and loss, tables as parameters: dense gradients, optax.adagrad."""
    state = steps.init_state(experiment, 0)
    optimizer = optax.adagrad(0.001)
    model, columns = experiment.model, experiment.columns
    params = {"tables": state["tables"], "model": state["model"]}

    def step(state, batch):
        params, opt = state

        def loss(params):
            vectors = {}
            for c in columns:
                ids = batch.values(c.group, c.source)
                vectors[c.key] = jnp.where(ids[..., None] != 0, params["tables"][c.table][ids], 0.0)
            embedded = EmbeddedBatch(batch=batch, vectors=vectors)
            logits, _ = model.apply({"params": params["model"]}, embedded, train=True)
            return losses.binary_cross_entropy(logits, batch.label, batch.candidate_mask)

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt = optimizer.update(grads, opt)
        return (optax.apply_updates(params, updates), opt), value

    return Measured(jax.jit(step, donate_argnums=0), (params, optimizer.init(params)), batches)


def compare(kinds: dict[str, Measured], repeats: int) -> dict[str, dict]:
    """Runs all in turns and reports each."""
    for turn in range(repeats + 1):
        for measured in kinds.values():
            measured.run(turn)
    return {name: measured.report() for name, measured in kinds.items()}


def growth(args) -> dict:
    """The report of every part at every size, and the ratios of the largest to the smallest."""
    report = {"distinct_ids": {}, "ids": B * (L + C)}
    data, table = args.mesh
    mesh = sharding.make_mesh(data, table, jax.devices()[: data * table])
    batches = {rows: zipf_batches(rows) for rows in args.rows}
    for rows, of_size in batches.items():
        ids = [np.concatenate([b.behaviour["item"], b.candidate["item"]], 1) for b in of_size]
        report["distinct_ids"][str(rows)] = [int(np.unique(x).size) for x in ids]
    batches = {r: [sharding.put_batch(b, mesh) for b in some] for r, some in batches.items()}
    experiments = {rows: make_experiment(rows, mesh) for rows in args.rows}
    naive = [rows for rows in args.rows if rows <= args.naive_rows]
    builders = {
        "whole_step": {r: lambda r=r: whole_step(experiments[r], batches[r]) for r in args.rows},
        "table_work": {r: lambda r=r: table_work(r, batches[r]) for r in args.rows},
        "bare_update": {r: lambda r=r: bare_update(r, batches[r]) for r in args.rows},
        "naive_step": {r: lambda r=r: naive_step(experiments[r], batches[r]) for r in naive},
    }
    with jax.set_mesh(mesh):
        for part in args.parts:
            measured = {str(rows): build() for rows, build in builders[part].items()}
            report[part] = compare(measured, args.repeats)
            del measured
            print(part, json.dumps(report[part], indent=1), flush=True)
    small, large = str(min(args.rows)), str(max(args.rows))
    for part in set(args.parts) - {"naive_step"}:
        report[part]["ratio"] = {
            name: round(report[part][large][name] / report[part][small][name], 3)
            for name in ("median_ms", "least_ms", "processor_median_ms", "temporary_mb")
        }
    return report


def dense_rule(args) -> dict:
    """Both paths of the table's work at several rows per id."""
    report = {"ids": B * (L + C), "rows_per_id": {}}
    for ratio in (1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2):
        rows = int(ratio * B * (L + C)) // embedding.ROW_MULTIPLE * embedding.ROW_MULTIPLE
        batches = zipf_batches(rows)
        both = {
            "sparse": table_work(rows, batches, dense=False),
            "dense": table_work(rows, batches, dense=True),
        }
        report["rows_per_id"][ratio] = compare(both, args.repeats)
        print(ratio, rows, json.dumps(report["rows_per_id"][ratio]), flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--naive-rows", type=int, default=1_000_000, help="largest table for optax")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dense-rule", action="store_true")
    parser.add_argument("--mesh", type=int, nargs=2, default=(1, 1), metavar=("DATA", "TABLE"))
    args = parser.parse_args()
    if args.mesh[0] * args.mesh[1] > 1:
        args.parts = ("whole_step",)
        jax.config.update("jax_num_cpu_devices", args.mesh[0] * args.mesh[1])
    report = dense_rule(args) if args.dense_rule else growth(args)
    report["machine"] = {
        "cores": os.cpu_count(),
        "load_at_end": round(os.getloadavg()[0], 1),
        "device": jax.devices()[0].device_kind,
        "platform": platform.platform(),
        "jax": jax.__version__,
    }
    RESULTS.mkdir(exist_ok=True)
    report["mesh"] = args.mesh
    name = "step" if tuple(args.mesh) == (1, 1) else "mesh"
    path = RESULTS / f"embedding_{'dense_rule' if args.dense_rule else name}.json"
    if name == "step" and not args.dense_rule and path.exists():  # parts measured before stay
        before = json.loads(path.read_text())
        report["distinct_ids"] = before["distinct_ids"] | report["distinct_ids"]
        report = before | report
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
