"""What LREA loses between training and serving: the gap of absorption.

    python -m benchmarks.lrea_gap --config=configs/lrea_amazon.py:demo
    python -m benchmarks.lrea_gap --config=configs/lrea_movielens.py --raw_dir=DIR

Trains both forms and both parametrisations on both paths, and scores the test split twice with the
same weights: by the path that was trained, and from caches as served (`lrea_jax.serving`). Where
the trained path is "absorbed" the gap is rounding; where it is "decompressed" it is what eq. 6
neglects. Largest and mean difference of the predicted click probability, and both AUCs.

Runs already finished under --workdir are not trained again. Ranks and lambdas (Table 3):
`benchmarks.quality --study=lrea_table_3`.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from ctr_jax import metrics, steps
from ctr_jax.data import open_data
from ctr_jax.evaluation import score_split
from ctr_jax.reports import format_table
from ctr_jax.serving import restore
from ctr_jax.training import train
from ctr_jax.writers import quiet_checkpoint_logs
from kernels.absorbed_target_attention import FORMS
from lrea_jax import low_rank
from lrea_jax.serving import load, precompute, score


def load_page(page: str) -> ConfigDict:
    """The config of "path/to/page.py[:variant]"."""
    path, _, variant = page.partition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant) if variant else module.get_config()


def changed(config: ConfigDict, args, what: str, seed: int, **model) -> tuple[ConfigDict, Path]:
    """A copy of the config for one run, and its workdir."""
    config = config.copy_and_resolve_references()
    config.model.update(model)
    config.seed = seed
    if args.raw_dir:
        config.data.raw_dir = args.raw_dir
    if args.prepared_dir:
        config.data.prepared_dir = args.prepared_dir
    if args.steps:
        config.total_epochs, config.total_steps = 0.0, args.steps
    return config, Path(args.workdir) / config.name / what / f"seed{seed}"


def gap(config: ConfigDict, args) -> list[dict]:
    """Rows: one training each, scored by its own path and as served."""
    rows = []
    for path, form, kind, start, seed in itertools.product(
        low_rank.PATHS, FORMS, low_rank.PARAMETRISATIONS, args.starts, range(args.seeds)
    ):
        switches = dict(training_path=path, form=form, parametrisation=kind, start=start)
        run, workdir = changed(config, args, "-".join(switches.values()), seed, **switches)
        train(run, workdir)
        rows.append({"path": path, "form": form, "matrices": kind, "start": start, "seed": seed})
        rows[-1] |= measured_gap(run, workdir)
        print(rows[-1], flush=True)
    return rows


def measured_gap(config: ConfigDict, workdir: Path) -> dict:
    """Differences between the trained path and serving, on the test split."""
    experiment, weights, _ = restore(config, workdir)
    model = load(config, workdir)
    data = open_data(config)
    with jax.set_mesh(experiment.mesh):
        own = score_split(
            config, data, "test", experiment.mesh, steps.score_step(experiment), weights
        ).columns()

        def served(weights, batch):
            del weights  # the model has them
            embedded = model.embed(batch)
            return score(model, precompute(model, embedded), embedded)

        theirs = score_split(config, data, "test", experiment.mesh, served, weights).columns()
    difference = np.abs(metrics.sigmoid(own["logits"]) - metrics.sigmoid(theirs["logits"]))
    aucs = [metrics.auc(x["labels"], x["logits"]) for x in (own, theirs)]
    return {
        "largest": float(difference.max()),
        "mean": float(difference.mean()),
        "AUC trained": aucs[0],
        "AUC served": aucs[1],
        "AUC served - trained": aucs[1] - aucs[0],
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="a page of configs/, with :variant")
    parser.add_argument("--raw_dir")
    parser.add_argument("--prepared_dir")
    parser.add_argument("--workdir", default="runs/lrea_gap")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--starts", nargs="*", default=low_rank.STARTS)
    parser.add_argument("--steps", type=int, help="instead of the config's duration")
    parser.add_argument("--cpu_devices", type=int, default=1)
    parser.add_argument("--out", help="also write the rows as JSON")
    args = parser.parse_args(argv)
    jax.config.update("jax_num_cpu_devices", args.cpu_devices)
    quiet_checkpoint_logs()
    config = load_page(args.config)
    rows = gap(config, args)
    print(f"\n{config.name}\n")
    small = ("largest", "mean")
    shown = [{k: f"{v:.1e}" if k in small else v for k, v in row.items()} for row in rows]
    print(format_table(shown, markdown=True))
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
