"""Evaluation of checkpoints, apart from training: one step, or each new one as it appears."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ctr_jax import processes, reports, sharding, steps
from ctr_jax.checkpoints import Checkpoints, refuse_mismatch
from ctr_jax.config import MEASURES, check, identity, scoring
from ctr_jax.data import keys, open_data, pipeline, synthetic
from ctr_jax.data.records import PreparedData
from ctr_jax.metrics import ScoreLog
from ctr_jax.optimizers import resolve_steps
from ctr_jax.raw_values import RawValues
from ctr_jax.score_files import write_scores
from ctr_jax.writers import Progress, write_json

POLL_SECONDS = 5.0


def score_split(
    config: ConfigDict,
    data: PreparedData,
    split: str,
    mesh: jax.sharding.Mesh,
    score_step: Callable,
    weights: dict,
    slices: Sequence[str] = (),
) -> ScoreLog:
    """Scores every request of a split, in stored order; rows that fill a batch count nowhere.

    Args:
      slices: columns that are kept with the scores, of metrics.ScoreLog.
    """
    requests = data.split(split)
    scores = ScoreLog(slices)
    read = dict(
        batch_size=config.eval_batch_size,
        history_length=config.history_length,
        length_buckets=config.length_buckets,
    )
    plan = pipeline.eval_plan(requests, **read)
    progress = Progress(len(plan), 0, f"score {split}")
    share = sharding.data_share(mesh)
    pending, candidates, lengths = None, [], requests.history_lengths()

    def keep(batch, logits, planned):
        batch, logits = processes.whole(batch, logits, mesh)
        candidates.append(batch.candidate_mask[: len(planned.records)].sum(1))
        length = lengths[planned.records]
        scores.add(batch, logits, weights=batch.weight, history_length=length)

    for batch, planned in zip(pipeline.eval_batches(requests, **read, **share), plan, strict=True):
        logits = score_step(weights, sharding.put_batch(batch, mesh))
        if pending is not None:  # one batch behind, so that the device works while the host adds
            keep(*pending)
        pending = (batch, logits, planned)
        progress.advance()
    if pending is not None:
        keep(*pending)
    progress.close()
    if config.length_buckets and plan:
        records = np.concatenate([planned.records for planned in plan])
        scores.reorder(np.argsort(np.repeat(records, np.concatenate(candidates)), kind="stable"))
    return scores


def evaluate(
    config: ConfigDict,
    workdir: str | Path,
    step: int | None = None,
    watch: bool = False,
    splits: Sequence[str] = ("valid", "test"),
    relative_to: str | Path | None = None,
    scores: str | Path | None = None,
) -> dict:
    """Evaluates checkpoints of `workdir`: metrics/<step>.json, and results.json with plots in
    evaluation/<split>. On other data of the same vocabularies only the latter.

    Args:
      step: which checkpoint; None = the best by `config.best_metric` as far as measured, else the
        newest.
      watch: evaluate each checkpoint as it appears, until training is done.
      relative_to: another run's workdir, whose results RelaImpr is measured against.
      scores: a directory for the scores themselves: <split>.parquet, of score_files.write_scores.
    Returns:
      {split: metrics} of the last step evaluated; also in evaluation/<split>/results.json.
    Raises:
      FileNotFoundError: there is no such checkpoint, or no results in `relative_to`.
      Damaged: its files are not what was saved.
      ConfigMismatch: the checkpoint was made with another model, or data of another encoding.
      ConfigError: the page cannot mean what it says, or `relative_to` holds results of other rows.
      DataError: `scores` are wanted, and the data set was prepared without raw keys.
    """
    check(config)
    data = open_data(config)
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        return _evaluate(
            config, Path(workdir), data, mesh, step, watch, splits, relative_to, scores
        )


def _evaluate(config, workdir, data, mesh, step, watch, splits, relative_to, scores) -> dict:
    unit = dict(batch_size=config.batch_size, examples=len(data.split("train")))
    experiment = steps.bind(config, data.spec, mesh, resolve_steps("total", config, **unit))
    score_step, shapes = steps.score_step(experiment), steps.state_shapes(experiment)
    shapes = {k: shapes[k] for k in ("tables", "model", "model_state", "step")}

    spec, results = data.spec, {}
    whoami = identity(config, spec.content_hash, spec.encoding)
    baselines = {split: None for split in splits}
    if relative_to:  # looked at before anything is scored
        baselines = {split: Path(relative_to) / "evaluation" / split for split in splits}
        for split, path in baselines.items():
            about = {"data_hash": data.spec.content_hash, "split": split}
            reports.refuse_other_rows(about, reports.read_results(path), about)
    if scores:
        for name in ("users", *splits):
            keys.file_of(data.path, name)  # likewise
    checkpoints = Checkpoints(workdir, read_only=True)
    for at in _new_steps(checkpoints) if watch else [chosen(checkpoints, step, config)]:
        with _marked(checkpoints, at):
            if watch and at not in checkpoints.steps():  # deleted before the marker was there
                logging.info("step %d: gone, as newer ones are there; not evaluated", at)
                continue
            checkpoints.check(at)
            saved = checkpoints.identity(at)
            refuse_mismatch(*scoring(saved, whoami), workdir)
            weights = checkpoints.restore(shapes, identity=None, step=at)
            weights.pop("step")
            logs = {
                split: score_split(config, data, split, mesh, score_step, weights, config.slices)
                for split in splits
            }
        raw = RawValues(data)
        results = {split: reports.evaluate_scores(log, raw=raw) for split, log in logs.items()}
        measured = {split: headline(result) for split, result in results.items()}
        if saved["data"] == spec.content_hash:  # a checkpoint is chosen by its own data alone
            write_json(checkpoints.metrics_path(at), {**checkpoints.metrics(at), **measured})
        about = {"run": config.name, "step": at}
        about |= {"data_hash": spec.content_hash, "encoding_hash": spec.encoding_hash}
        if scores and processes.first():
            for split, log in logs.items():
                write_scores(Path(scores) / f"{split}.parquet", data, split, log, **about)
        for split, result in results.items():
            if (oracle := oracle_auc(config, split)) is not None:
                result["oracle_auc"] = oracle
            directory = workdir / "evaluation" / split
            reports.write_report(
                directory,
                result,
                baseline=baselines[split],
                split=split,
                **about,
            )
            results[split] = reports.read_results(directory)  # with the comparison
        logging.info("step %d: %s", at, measured)
    return results


def headline(result: dict) -> dict[str, float]:
    """The scalars of one split that choose a checkpoint and go into logs."""
    return {name: result[name] for name in MEASURES if result.get(name) is not None}


def oracle_auc(config: ConfigDict, split: str) -> float | None:
    """AUC of the true click probabilities, where the data is generated and so knows them."""
    known = (Path(config.data.raw_dir) / synthetic.ORACLE).exists()
    if config.data.get("generate") is None or split != "test" or not known:
        return None
    return synthetic.oracle_auc(Path(config.data.raw_dir), split)


def chosen(checkpoints: Checkpoints, step: int | None, config: ConfigDict) -> int:
    """`step`, or the best as far as measured, else the newest; FileNotFoundError where none is."""
    steps_there = checkpoints.steps()
    if not steps_there:
        raise FileNotFoundError(f"no checkpoint in {checkpoints.workdir}; train it first")
    if step is not None:
        if step not in steps_there:
            raise FileNotFoundError(
                f"no checkpoint of step {step} in {checkpoints.workdir}; there are {steps_there}"
            )
        return step
    return checkpoints.best(config.best_metric) or steps_there[-1]


def _new_steps(checkpoints: Checkpoints) -> Iterator[int]:
    """Each finished step once, until the trainer says it is done and all are seen."""
    seen: set[int] = set()
    while True:
        done = (checkpoints.workdir / "train_done.json").exists()
        # The oldest of those that are there now: while one is read, others come and go.
        fresh = [s for s in checkpoints.steps() if s not in seen]
        if fresh:
            seen.add(fresh[0])
            yield fresh[0]
        elif done:
            return
        else:
            time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _marked(checkpoints: Checkpoints, step: int):
    """Holds the marker that keeps the trainer from deleting a step while it is read."""
    marker = checkpoints.marker_path(step)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()
    try:
        yield
    finally:
        marker.unlink(missing_ok=True)
