"""The two sides of benchmarks/fuxictr_speed.py: one model per process, commands over stdin.

    python -m benchmarks.fuxictr_workers JSON

imports nothing but numpy until it knows its side, so that it also runs under an interpreter that
has FuxiCTR and none of this library. Both sides get the same generated batches, made beforehand.
Commands are lines {"phase": "train" | "infer", "steps": n}; each is answered by one line of JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections import OrderedDict

import numpy as np

# Rows of MovieLens-1M's tables: padding, out-of-vocabulary and missing, then the known values.
KNOWN = {
    "item": 3706,
    "genres": 299,
    "rating": 5,
    "user_id": 6040,
    "gender": 2,
    "age": 7,
    "occupation": 21,
}
RESERVED = 3
USER = ("user_id", "gender", "age", "occupation")
TARGET = ("item", "genres")
HISTORY = ("item", "genres", "rating")


def generated_batch(rows: int, length: int, zipf: float, seed: int) -> dict[str, np.ndarray]:
    """One batch with MovieLens-1M's sizes and history lengths; int32, 0 = padding.

    Users' sizes are log-normal (median 96, 90th percentile 400, at most 2,300); a target is any
    event of a user, so its history is what stands before it. Items are Zipf, genres follow from
    the item, times come in sessions with gaps from a minute to months.
    """
    rng = np.random.default_rng(seed)
    sigma = np.log(400 / 96) / 1.2816
    # An event's user is drawn by size: a log-normal drawn so is one with its mean moved by sigma^2.
    sizes = np.minimum(np.exp(rng.normal(np.log(96) + sigma**2, sigma, rows)), 2300)
    lengths = np.minimum((rng.random(rows) * sizes).astype(np.int64), length)
    mask = np.arange(length) >= length - lengths[:, None]

    def items(*shape: int) -> np.ndarray:
        weights = np.arange(1, KNOWN["item"] + 1) ** -zipf
        cumulative = np.cumsum(weights / weights.sum())
        drawn = np.searchsorted(cumulative, rng.random(shape))
        return np.minimum(drawn, KNOWN["item"] - 1) + RESERVED

    def genres(item: np.ndarray) -> np.ndarray:
        return (item * 7919) % KNOWN["genres"] + RESERVED

    gaps = np.exp(rng.normal(4, 1, (rows, length))) + (rng.random((rows, length)) < 0.05) * np.exp(
        rng.normal(12, 2, (rows, length))
    ).clip(0, 1e7)
    before = np.cumsum(gaps[:, ::-1], 1)[:, ::-1].clip(0, 8e8)
    request_time = rng.integers(970_000_000, 1_040_000_000, rows)
    batch = {name: rng.integers(0, KNOWN[name], rows) + RESERVED for name in USER}
    batch["item"] = items(rows)
    batch["genres"] = genres(batch["item"])
    behaviour = items(rows, length)
    batch["item_history"] = behaviour * mask
    batch["genres_history"] = genres(behaviour) * mask
    ratings = rng.integers(0, KNOWN["rating"], (rows, length)) + RESERVED
    batch["rating_history"] = ratings * mask
    batch["time_history"] = (request_time[:, None] - before.astype(np.int64)) * mask
    batch["request_time"] = request_time
    batch["label"] = rng.random(rows) < 0.58
    return {name: np.ascontiguousarray(x, np.int32) for name, x in batch.items()}


def by_length(batches: list[dict], buckets: list[int]) -> list[dict]:
    """The requests of `batches` in batches of one length bucket each, cut to its length.

    As config.length_buckets has them (docs/input.md): a request is in the first bucket that holds
    its history. Batches keep their number of rows; what does not fill one is left out. Their order
    spreads every bucket evenly, so that any run of batches holds the buckets in their shares.
    """
    rows = len(batches[0]["label"])
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    which = np.searchsorted(buckets[:-1], (whole["item_history"] != 0).sum(1))
    placed = []
    for k, bucket in enumerate(buckets):
        of = np.flatnonzero(which == k)
        number = len(of) // rows
        for i, index in enumerate(of[: number * rows].reshape(number, rows)):
            batch = {
                name: np.ascontiguousarray(x[index, -bucket:] if x.ndim == 2 else x[index])
                for name, x in whole.items()
            }
            placed.append(((i + 0.5) / number, bucket, batch))
    return [batch for *_, batch in sorted(placed, key=lambda x: x[:2])]


def fuxictr_side(options: dict, batches: list[dict]) -> dict:
    """FuxiCTR's class, layers, initialisation, loss and optimizer step (its train_step).

    The target has no rating: its behaviour type is the row "missing", so that BST's 3 x 32 + 32
    positions make its model dimension of 128.
    """
    import torch
    from fuxictr.features import FeatureMap
    from fuxictr.version import __version__

    name, length, width = options["model"], options["length"], options["width"]
    sys.path.insert(0, os.path.join(options["repo"], "model_zoo", name))
    model_class = getattr(importlib.import_module(f"src.{name}"), name)
    torch.set_num_threads(options["threads"])
    torch.manual_seed(0)

    features = FeatureMap("generated", ".")
    features.labels, features.default_emb_dim = ["label"], width
    for field in TARGET + ("rating",) + USER:
        features.features[field] = {
            "type": "categorical",
            "source": "",
            "padding_idx": 0,
            "vocab_size": KNOWN[field] + RESERVED,
        }
    for field in HISTORY:
        features.features[f"{field}_history"] = {
            "type": "sequence",
            "source": "",
            "padding_idx": 0,
            "vocab_size": KNOWN[field] + RESERVED,
            "max_len": length,
            "share_embedding": field,
        }
    features.num_fields = features.get_num_fields()
    prefix = name.lower()
    model = model_class(
        features,
        embedding_dim=width,
        dnn_hidden_units=[512, 256, 128],
        dnn_activations="ReLU",
        learning_rate=1e-3,
        optimizer="adam",
        loss="binary_crossentropy",
        task="binary_classification",
        metrics=["AUC"],
        model_root=".",
        verbose=0,
        gpu=-1,
        **{
            f"{prefix}_target_field": [HISTORY],
            f"{prefix}_sequence_field": [tuple(f"{field}_history" for field in HISTORY)],
        },
        **options["hyperparameters"],
    )
    model._max_gradient_norm = 10.0  # what BaseModel.fit sets by default

    def inputs(batch: dict) -> OrderedDict:
        # int64, in the order of the feature map: neither conversion nor shuffling is timed.
        batch = batch | {"rating": np.full_like(batch["item"], 2)}
        names = list(features.features) + ["label"]
        return OrderedDict((key, torch.from_numpy(batch[key].astype(np.int64))) for key in names)

    tensors = [inputs(batch) for batch in batches]

    def train(i: int) -> float:
        model.train()
        return model.train_step(tensors[i]).item()

    def infer(i: int) -> np.ndarray:
        model.eval()
        with torch.no_grad():
            return model.forward(tensors[i])["y_pred"].numpy()

    count = {name: p.numel() for name, p in model.named_parameters()}
    tables = sum(n for name, n in count.items() if name.startswith("embedding_layer."))
    facts = {
        "parameters": sum(count.values()) - tables,
        "table_parameters": tables,
        "versions": {"fuxictr": __version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
    }
    return {"train": train, "infer": infer, "facts": facts}


def our_side(options: dict, batches: list[dict]) -> dict:
    """This library's own train and score steps, batches put on the devices at each step: as with
    train.py --cpu_devices."""
    import jax

    jax.config.update("jax_num_cpu_devices", options["devices"])

    from ctr_jax import sharding, steps
    from ctr_jax.batch import RequestBatch
    from ctr_jax.config import base_config
    from ctr_jax.features import DataColumn, DataSpec

    columns = [DataColumn("user", name, vocabulary=name) for name in USER]
    columns += [DataColumn("behaviour", name, vocabulary=name) for name in HISTORY]
    columns += [DataColumn("candidate", name, vocabulary=name) for name in TARGET]
    vocabularies = {name: n + RESERVED for name, n in KNOWN.items()}
    spec = DataSpec("generated", tuple(columns), vocabularies, max_candidates=1)

    config = base_config()
    config.model = importlib.import_module(options["module"]).default_config()
    config.model.embedding_width = options["width"]
    config.model.update(options["hyperparameters"])
    config.history_length = options["length"]
    config.clip_norm = 10.0
    mesh = sharding.make_mesh()
    jax.set_mesh(mesh)

    def request_batch(batch: dict) -> RequestBatch:
        return RequestBatch(
            user_id=batch["user_id"],
            request_id=np.arange(len(batch["user_id"]), dtype=np.int32),
            request_time=batch["request_time"],
            user={name: batch[name] for name in USER},
            context={},
            behaviour={name: batch[f"{name}_history"] for name in HISTORY},
            behaviour_time=batch["time_history"],
            behaviour_mask=batch["item_history"] != 0,
            candidate={name: batch[name][:, None] for name in TARGET},
            candidate_mask=np.ones((len(batch["label"]), 1), bool),
            label=batch["label"][:, None].astype(np.float32),
        )

    if options.get("length_buckets"):
        shorter = [n for n in options["length_buckets"] if n < options["length"]]
        batches = by_length(batches, [*shorter, options["length"]])
    requests = [request_batch(batch) for batch in batches]
    experiment = steps.bind(config, spec, mesh, total_steps=1_000_000)
    state = steps.init_state(experiment, seed=0)
    shapes = {request.shape: sharding.put_batch(request, mesh) for request in requests}

    def compile_step(step, first):
        """{shape: compiled}, seconds for all of them, the most temporary bytes."""
        began = time.perf_counter()
        compiled = {shape: step.lower(first, batch).compile() for shape, batch in shapes.items()}
        seconds = round(time.perf_counter() - began, 2)
        temporary = (x.memory_analysis().temp_size_in_bytes for x in compiled.values())
        return compiled, seconds, max(temporary)

    def weights() -> dict:
        return {name: state[name] for name in ("tables", "model", "model_state")}

    train_step, train_compile, train_temp = compile_step(steps.train_step(experiment), state)
    score_step, infer_compile, infer_temp = compile_step(steps.score_step(experiment), weights())

    def train(i: int) -> float:
        nonlocal state
        step = train_step[requests[i].shape]
        state, scalars = step(state, sharding.put_batch(requests[i], mesh))
        return float(scalars["loss"])

    def infer(i: int) -> np.ndarray:
        step = score_step[requests[i].shape]
        return np.asarray(step(weights(), sharding.put_batch(requests[i], mesh)))

    def size(tree) -> int:
        return sum(x.size for x in jax.tree.leaves(tree))

    facts = {
        "parameters": size(state["model"]),
        "table_parameters": size(state["tables"]),
        "versions": {"jax": jax.__version__},
        "batches": len(requests),
        "threads": options["threads"],  # XLA takes as many as the process may run on
        "compile_seconds": {"train": train_compile, "infer": infer_compile},
        "temp_bytes": {"train": train_temp, "infer": infer_temp},
    }
    return {"train": train, "infer": infer, "facts": facts}


def memory_mb(field: str) -> float | None:
    """VmRSS (now) or VmHWM (peak) of this process, in MB; None where there is no /proc."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith(field):
                    return int(line.split()[1]) * 1024 / 1e6
    except FileNotFoundError:
        pass
    return None


def serve(options: dict) -> None:
    """Builds the model, says so, and runs the phases it is told to until stdin ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print

    def answer(**fields) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    if hasattr(os, "sched_setaffinity"):  # before XLA counts the cores it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options["threads"]])
    batches = [
        generated_batch(options["rows"], options["length"], options["zipf"], seed)
        for seed in range(options["batches"])
    ]
    side = {"fuxictr": fuxictr_side, "ours": our_side}[options["side"]](options, batches)
    answer(**side["facts"], built_mb=memory_mb("VmRSS"))
    at = 0
    for line in sys.stdin:
        command = json.loads(line)
        step, last = side[command["phase"]], None
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(command["steps"]):
            last = step(at % side["facts"].get("batches", len(batches)))
            at += 1
        answer(
            seconds=time.perf_counter() - began,
            cpu_seconds=time.process_time() - cpu,
            finite=bool(np.all(np.isfinite(last))),
            peak_mb=memory_mb("VmHWM"),
        )


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
