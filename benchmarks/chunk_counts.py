"""How TimeChunking and FixedChunking cut the histories of a prepared data set.

    python -m benchmarks.chunk_counts --config=configs/sparsectr_movielens.py \
        --config.data.raw_dir=DIR

Prints percentiles, over requests, of the number of chunks and of the behaviours in a chunk.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from ctr_jax.data import open_data
from sparsectr_jax import chunking

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
REQUESTS = flags.DEFINE_integer("requests", 16384, "Requests of each split, at most.")
PERCENTILES = (0, 10, 25, 50, 75, 90, 100)


def counts(config, requests) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{method: (chunks per request [N], behaviours per chunk [M])} of requests spread evenly."""
    rows = np.unique(np.linspace(0, len(requests) - 1, REQUESTS.value).astype(np.int64))
    batch = requests.read(rows, config.history_length)
    times, mask = jnp.asarray(batch.behaviour_time), jnp.asarray(batch.behaviour_mask)
    out = {}
    for method in (chunking.time_chunks, chunking.fixed_chunks):
        chunks = method(times, mask, config.model.num_chunks)
        sizes = np.asarray(chunks.count)[np.asarray(chunks.valid)]
        out[method.__name__] = np.asarray(chunks.valid).sum(1), sizes
    return out


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    config = CONFIG.value
    data = open_data(config)
    print(f"{config.name}, L={config.history_length}, |P|={config.model.num_chunks}")
    print("percentile".ljust(40) + "".join(f"{p:>7d}" for p in PERCENTILES))
    for split in ("train", "test"):
        for method, both in counts(config, data.split(split)).items():
            for what, values in zip(("chunks", "behaviours a chunk"), both, strict=True):
                cells = np.percentile(values, PERCENTILES, method="nearest")
                name = f"{split} {method} {what}"
                print(name.ljust(40) + "".join(f"{c:>7d}" for c in cells))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
