"""Checkpoints of a run: saved in the background, kept by rule, refused when they do not fit.

Layout of a workdir:
  checkpoints/<step>/{weights,optimizer,identity}   Orbax items, and manifest.json
  checkpoints/<step>.damaged              a step that could not be read, moved aside
  metrics/<step>.json                     what the evaluator (or the trainer itself) measured
  metrics/<step>.evaluating               an evaluator is reading that step: it is not deleted
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from ctr_jax import manifests, processes
from ctr_jax.config import without_speed
from ctr_jax.measures import best_step, steps_to_delete
from ctr_jax.sharding import path_name
from ctr_jax.writers import read_json

# What only the optimizer needs is its own item: an evaluator never reads it.
WEIGHTS = ("tables", "model", "model_state", "step")
OPTIMIZER = ("table_opt", "opt")
# A marker older than this belongs to an evaluator that died.
MARKER_SECONDS = 3600.0


class ConfigMismatch(ValueError):
    """The checkpoint in the workdir was made with another model, data set or optimizer."""


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; the message names the last good one."""


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
        self._directory = self.workdir / "checkpoints"
        self._keep_last, self._best_metric = keep_last, best_metric
        self._unsettled = False  # whether a save was begun since the last `finish`
        if not read_only and processes.first():
            for leftover in self._directory.glob("*.orbax-checkpoint-tmp*"):  # of a killed save
                shutil.rmtree(leftover)
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            read_only=read_only,
            enable_async_checkpointing=not read_only,
        )
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=options,
            item_names=("weights", "optimizer", "identity"),
        )

    def steps(self) -> list[int]:
        """Finished steps, oldest first."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def save(self, state: Mapping, identity: Mapping) -> None:
        """Starts saving `state` at its own step; returns once a later step cannot change it.
        It is done once `finish`, or `settle` in passing, has written its manifest.

        Raises:
          SaveFailed: this save or the one before it.
        """
        step = int(state["step"])
        with self._failing(step):
            self._unsettled = True
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    weights=ocp.args.StandardSave({k: state[k] for k in WEIGHTS}),
                    optimizer=ocp.args.StandardSave({k: state[k] for k in OPTIMIZER}),
                    identity=ocp.args.JsonSave(dict(identity)),
                ),
            )

    def finish(self) -> None:
        """Waits for the save under way, and writes the manifests of finished steps.

        Raises:
          SaveFailed: it came to nothing.
        """
        self._unsettled = False
        with self._failing(self._manager.latest_step()):
            self._manager.wait_until_finished()
            for step in self._manager.all_steps() if processes.first() else ():
                if not manifests.exists(self._directory / str(step)):
                    manifests.write(self._directory / str(step))

    def settle(self) -> None:
        """`finish` where the save under way is written already; does not wait for it."""
        if self._unsettled and not self._manager.is_saving_in_progress():
            self.finish()

    @contextlib.contextmanager
    def _failing(self, step: int | None):
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise what the file system says
            good = [s for s in self.steps() if manifests.exists(self._directory / str(s))]
            last = f"the last good one is step {good[-1]}" if good else "there is no good one yet"
            reason = " ".join(str(error).split())[:300]
            raise SaveFailed(
                f"the checkpoint of step {step} could not be saved in {self._directory}; {last}. "
                f"{type(error).__name__}: {reason}"
            ) from error

    def prune(self) -> list[int]:
        """Deletes the steps that the rules do not keep; returns them. The first process chooses:
        an evaluator's marker may come or go between one process's look and another's."""
        self.finish()
        steps = sorted(self._manager.all_steps())
        doomed = steps_to_delete(
            steps,
            {s: self.metrics(s) for s in steps},
            {s for s in steps if self.is_being_evaluated(s)},
            keep_last=self._keep_last,
            best_metric=self._best_metric,
        )
        chosen = processes.from_first(np.isin(steps, doomed))
        doomed = [step for step, delete in zip(steps, chosen, strict=True) if delete]
        for step in doomed:
            self._manager.delete(step)
        if doomed:
            logging.info("checkpoints: removed steps %s in %s", doomed, self.workdir)
        return doomed

    def restore(self, shapes: Mapping, identity: Mapping | None, step: int | None = None) -> dict:
        """The state at `step` (default the newest), laid out as `shapes` (ShapeDtypeStructs with
        shardings) asks; only the items that `shapes` names are read.

        Raises:
          ConfigMismatch: `identity` is given and differs from the one saved, or arrays are of other
            shapes.
        """
        step = self._manager.latest_step() if step is None else step
        if identity is not None:
            refuse_mismatch(self.identity(step), identity, self.workdir)
        items = {"weights": {k: shapes[k] for k in WEIGHTS if k in shapes}}
        optimizer = {k: shapes[k] for k in OPTIMIZER if k in shapes}
        if optimizer:
            items["optimizer"] = optimizer
        for item, wanted in items.items():
            self._refuse_shapes(step, item, wanted)
        args = {k: ocp.args.StandardRestore(v) for k, v in items.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        return {name: value for item in items for name, value in restored[item].items()}

    def _refuse_shapes(self, step: int, item: str, wanted: Mapping) -> None:
        """Raises ConfigMismatch unless the saved arrays are of the wanted shapes."""
        handler = ocp.StandardCheckpointHandler()
        saved = _shapes(handler.metadata(self._directory / str(step) / item).tree)
        if different := _differences(saved, _shapes(wanted), "model"):
            raise ConfigMismatch(
                f"step {step} in {self._directory} holds other arrays:\n  " + "\n  ".join(different)
            )

    def restore_newest(
        self, shapes: Mapping, identity: Mapping, *, anyway: bool = False
    ) -> dict | None:
        """The newest state that can be read, or None where nothing was saved. Damaged steps are
        moved aside once one before them is read; nothing is moved where none can be.

        Args:
          anyway: go on under another configuration, naming what differs in the log.
        Raises:
          ConfigMismatch: the newest readable one is of another configuration, or `anyway` of other
            vocabularies.
          Damaged: none can be read.
        """
        there, damaged = self.steps(), {}
        processes.barrier("listed")  # by all, before any is moved
        for step in reversed(there):
            try:
                state = self._restore_checked(shapes, identity, step, anyway)
            except manifests.Damaged as error:
                logging.error("%s. Trying the step before it", error)
                damaged[step] = error
            else:
                self._move_aside(damaged)
                return state
        if there:
            raise manifests.Damaged(
                f"none of the checkpoints {there} in {self._directory} can be read; to start "
                "again, remove the directory or give another --workdir"
            )
        return None

    def _move_aside(self, damaged: Mapping[int, manifests.Damaged]) -> None:
        if not damaged:
            return
        for step, error in damaged.items():
            aside = self._directory / f"{step}.damaged"
            logging.error("%s. Moved to %s", error, aside)
            if processes.first():
                shutil.rmtree(aside, ignore_errors=True)
                (self._directory / str(step)).rename(aside)
        processes.barrier("moved")
        self._manager.reload()

    def _restore_checked(self, shapes, identity, step: int, anyway: bool) -> dict:
        has_manifest = self.check(step)
        try:
            if anyway:
                refuse_other_ids(self.identity(step), identity, self.workdir)
                _log_differences(self.identity(step), identity)
            return self.restore(shapes, None if anyway else identity, step)
        except (ConfigMismatch, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise  # nothing that a checkpoint is to blame for
        except Exception as error:
            if has_manifest:  # the files are what was saved: they do not fit this model
                raise
            reason = " ".join(str(error).split())[:200]
            raise manifests.Damaged(f"step {step}: {type(error).__name__}: {reason}") from error

    def check(self, step: int) -> bool:
        """Whether `step` has a manifest, with which its files then agree; the first process reads
        them for all.

        Raises:
          Damaged: they do not agree.
        """
        has_manifest, damage = False, None
        if processes.first() and (has_manifest := manifests.exists(self._directory / str(step))):
            try:
                manifests.check(self._directory / str(step))
            except manifests.Damaged as error:
                damage = error
        has_manifest, damaged = processes.from_first(np.array([has_manifest, damage is not None]))
        if damaged:
            raise damage or manifests.Damaged(f"step {step}: damaged; the first process says how")
        return bool(has_manifest)

    def identity(self, step: int) -> dict:
        """What `step` was saved with; runs from before had what only speed depends on in it."""
        args = ocp.args.Composite(identity=ocp.args.JsonRestore())
        return without_speed(self._manager.restore(step, args=args)["identity"])

    def metrics(self, step: int) -> dict:
        """What metrics/<step>.json holds; {} where nothing was measured yet."""
        return read_json(self.metrics_path(step))

    def forget_measures(self, after: int) -> None:
        """Removes measures and markers of steps past `after`: of a run that went on from an earlier
        step, or of another one whose checkpoints are gone."""
        for path in (self.workdir / "metrics").glob("*"):
            if path.stem.isdigit() and int(path.stem) > after:
                path.unlink(missing_ok=True)

    def best(self, metric: str) -> int | None:
        """The finished step with the best `metric`, or None where none is measured."""
        steps = self.steps()
        return best_step(steps, {s: self.metrics(s) for s in steps}, metric)

    def since_best(self, until: int) -> tuple[int | None, int]:
        """The step up to `until` with the best `best_metric`, and how many were measured after."""
        found = {int(p.stem): read_json(p) for p in (self.workdir / "metrics").glob("*.json")}
        split = self._best_metric.lstrip("-").split("/")[0]
        steps = sorted(s for s, measured in found.items() if s <= until and split in measured)
        best = best_step(steps, found, self._best_metric)
        return best, 0 if best is None else sum(s > best for s in steps)

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
        """Waits for the save under way. Raises SaveFailed as `finish` does."""
        try:
            if self._unsettled:
                self.finish()
        finally:
            self._manager.close()


def refuse_mismatch(
    saved: Mapping,
    current: Mapping,
    workdir: Path,
    remedy: str = "give another --workdir, or go back to its settings",
) -> None:
    """Raises ConfigMismatch naming every field that differs between two identities."""
    if different := _identity_differences(saved, current):
        raise ConfigMismatch(
            f"{workdir} holds a run of another configuration; {remedy}:\n  "
            + "\n  ".join(different)
        )


def refuse_other_ids(saved: Mapping, current: Mapping, workdir: Path) -> None:
    """Raises ConfigMismatch naming vocabularies and standardised columns that two identities both
    have and that differ: rows of tables would be taken for those of other values."""
    sides = [{**x.get("encoding", {}), "columns": None} for x in (saved, current)]
    there, here = (_flatten({"encoding": side}) for side in sides)
    both = there.keys() & here.keys()
    if different := _differences({k: there[k] for k in both}, {k: here[k] for k in both}):
        raise ConfigMismatch(
            f"{workdir} was trained with other vocabularies, in which ids mean other values, and "
            "is not resumed anyway; prepare the data with data.vocabularies_from, or give another "
            "--workdir:\n  " + "\n  ".join(different)
        )


def _identity_differences(saved: Mapping, current: Mapping) -> list[str]:
    """Of two identities, less what a run started from, and the encoding where one of them is from
    before it was recorded."""
    both = saved.get("encoding") and current.get("encoding")
    left_out = ("started_from",) if both else ("started_from", "encoding")
    sides = ({k: v for k, v in x.items() if k not in left_out} for x in (saved, current))
    return _differences(*sides)


def _shapes(tree) -> dict[str, list[int]]:
    """{path: shape} of the arrays in a state or in Orbax's account of one."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {path_name(path): list(leaf.shape) for path, leaf in leaves}


def _differences(saved: Mapping, current: Mapping, whose: str = "config") -> list[str]:
    """What two identities, or two accounts of arrays, differ in, a line each."""
    saved, current = _flatten(saved), _flatten(current)
    return [
        f"{key}: checkpoint {saved.get(key)!r}, {whose} {current.get(key)!r}"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
    ]


def _log_differences(saved: Mapping, current: Mapping) -> None:
    for line in _identity_differences(saved, current):
        logging.warning("resuming anyway, although %s", line)


def _flatten(tree: Mapping, prefix: str = "") -> dict:
    # Through JSON, so that tuples and lists, 1 and 1.0 of a saved identity compare as equal.
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return flat
