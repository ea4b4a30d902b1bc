"""Checkpoints of a run: saved in the background, kept by rule, refused when they do not fit.

Layout of a workdir:
  checkpoints/<step>/{weights,optimizer,identity}   Orbax items
  metrics/<step>.json                     what the evaluator (or the trainer itself) measured
  metrics/<step>.evaluating               an evaluator is reading that step: it is not deleted
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from absl import logging

# What only the optimizer needs is its own item: an evaluator never reads it.
WEIGHTS = ("tables", "model", "model_state", "step")
OPTIMIZER = ("table_opt", "opt")
# A marker older than this belongs to an evaluator that died.
MARKER_SECONDS = 3600.0


class ConfigMismatch(ValueError):
    """The checkpoint in the workdir was made with another model, data set or optimizer."""


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      keep_last: how many of the newest steps stay.
      best_metric: "split/metric" in metrics/<step>.json whose highest step stays as well; a
        leading "-" means lowest.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        keep_last: int = 2,
        best_metric: str = "valid/auc",
        read_only: bool = False,
    ):
        self.workdir = Path(workdir).absolute()
        self._keep_last, self._best_metric = keep_last, best_metric
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            enable_async_checkpointing=not read_only,
        )
        self._manager = ocp.CheckpointManager(
            self.workdir / "checkpoints",
            options=options,
            item_names=("weights", "optimizer", "identity"),
        )

    def steps(self) -> list[int]:
        """Finished steps, oldest first."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def save(self, state: Mapping, identity: Mapping) -> None:
        """Starts saving `state` at its own step; returns once it is copied off the device."""
        step = int(state["step"])
        self._manager.save(
            step,
            args=ocp.args.Composite(
                weights=ocp.args.StandardSave({k: state[k] for k in WEIGHTS}),
                optimizer=ocp.args.StandardSave({k: state[k] for k in OPTIMIZER}),
                identity=ocp.args.JsonSave(dict(identity)),
            ),
        )

    def prune(self) -> list[int]:
        """Deletes the steps that the rules do not keep; returns them."""
        self._manager.wait_until_finished()
        steps = sorted(self._manager.all_steps())
        doomed = steps_to_delete(
            steps,
            {s: self.metrics(s) for s in steps},
            {s for s in steps if self.is_being_evaluated(s)},
            keep_last=self._keep_last,
            best_metric=self._best_metric,
        )
        for step in doomed:
            self._manager.delete(step)
        return doomed

    def restore(self, shapes: Mapping, identity: Mapping | None, step: int | None = None) -> dict:
        """The state at `step` (default the newest), laid out as `shapes` (ShapeDtypeStructs with
        shardings) asks; only the items that `shapes` names are read.

        Raises:
          ConfigMismatch: `identity` is given and differs from the one saved.
        """
        step = self._manager.latest_step() if step is None else step
        if identity is not None:
            saved = self._manager.restore(
                step, args=ocp.args.Composite(identity=ocp.args.JsonRestore())
            )["identity"]
            refuse_mismatch(saved, identity, self.workdir)
        items = {"weights": {k: shapes[k] for k in WEIGHTS if k in shapes}}
        optimizer = {k: shapes[k] for k in OPTIMIZER if k in shapes}
        if optimizer:
            items["optimizer"] = optimizer
        args = {k: ocp.args.StandardRestore(v) for k, v in items.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        return {name: value for item in items for name, value in restored[item].items()}

    def identity(self, step: int) -> dict:
        args = ocp.args.Composite(identity=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["identity"]

    def metrics(self, step: int) -> dict:
        """What metrics/<step>.json holds; {} where nothing was measured yet."""
        path = self.metrics_path(step)
        return json.loads(path.read_text()) if path.exists() else {}

    def best(self, metric: str) -> int | None:
        """The finished step with the best `metric`, or None where none is measured."""
        steps = self.steps()
        return best_step(steps, {s: self.metrics(s) for s in steps}, metric)

    def metrics_path(self, step: int) -> Path:
        return self.workdir / "metrics" / f"{step}.json"

    def marker_path(self, step: int) -> Path:
        return self.workdir / "metrics" / f"{step}.evaluating"

    def is_being_evaluated(self, step: int) -> bool:
        try:
            age = time.time() - self.marker_path(step).stat().st_mtime
        except FileNotFoundError:
            return False
        return age < MARKER_SECONDS

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def steps_to_delete(
    steps: Collection[int],
    metrics: Mapping[int, Mapping],
    being_evaluated: Collection[int],
    *,
    keep_last: int,
    best_metric: str,
) -> list[int]:
    """The steps outside the last `keep_last`, the best measured one, and those being evaluated.

    While a step is not yet measured it may still turn out the best, but it is not held for that:
    an evaluator that lags far behind must not fill the disk.
    """
    steps = sorted(steps)
    keep = {*steps[-keep_last:], *being_evaluated, best_step(steps, metrics, best_metric)}
    return [s for s in steps if s not in keep]


def best_step(
    steps: Collection[int], metrics: Mapping[int, Mapping], best_metric: str
) -> int | None:
    """The step whose "split/metric" is highest (lowest after a "-"), or None."""
    split, name = best_metric.lstrip("-").split("/")
    measured = {s: metrics.get(s, {}).get(split, {}).get(name) for s in steps}
    measured = {s: v for s, v in measured.items() if isinstance(v, int | float)}
    if not measured:
        return None
    return (min if best_metric.startswith("-") else max)(measured, key=lambda s: measured[s])


def refuse_mismatch(saved: Mapping, current: Mapping, workdir: Path) -> None:
    """Raises ConfigMismatch naming every field that differs between two identities."""
    saved_flat, current_flat = _flatten(saved), _flatten(current)
    different = [
        f"{key}: checkpoint {saved_flat.get(key)!r}, config {current_flat.get(key)!r}"
        for key in sorted(saved_flat.keys() | current_flat.keys())
        if saved_flat.get(key) != current_flat.get(key)
    ]
    if different:
        raise ConfigMismatch(
            f"{workdir} holds a run of another configuration; give another --workdir, or go back "
            f"to its settings:\n  " + "\n  ".join(different)
        )


def _flatten(tree: Mapping, prefix: str = "") -> dict:
    # Through JSON, so that tuples and lists, 1 and 1.0 of a saved identity compare as equal.
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return flat


def shapes_of(state, shardings):
    """ShapeDtypeStructs with shardings: what `restore` fills."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )


def log_kept(workdir: Path, deleted: list[int]) -> None:
    if deleted:
        logging.info("checkpoints: removed steps %s in %s", deleted, workdir)
