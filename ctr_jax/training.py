"""Training, top to bottom: data, mesh, model, restore, loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ctr_jax import evaluation, processes, reports, sharding, steps, warm_start
from ctr_jax.batch import RequestBatch
from ctr_jax.checkpoints import Checkpoints
from ctr_jax.config import check, identity
from ctr_jax.data import open_data, pipeline
from ctr_jax.data.records import PreparedData, Requests
from ctr_jax.optimizers import resolve_steps
from ctr_jax.preemption import Preemption
from ctr_jax.writers import MetricWriter, Progress, read_json, write_json


class NonFiniteLoss(RuntimeError):
    """The loss, or a norm of gradients, updates, parameters or table rows, became NaN or infinite;
    the message names the step and requests of its batch."""


def train(config: ConfigDict, workdir: str | Path, *, resume_anyway: bool = False) -> dict:
    """Trains `config` in `workdir`, resuming from its newest readable checkpoint if there is one,
    else from `config.start_from` if that is set.

    SIGTERM saves at the end of the running step and returns.

    Args:
      resume_anyway: take a checkpoint of another configuration; its arrays and vocabularies still
        have to fit.
    Returns:
      {"step", "seconds", "examples_per_second", "valid": metrics of the last checkpoint that was
      measured and its "step", {} where none was}; "stopped": True where SIGTERM ended it, and
      "no_better_since": the best step where `config.patience` did.
    Raises:
      ConfigError: the page cannot mean what it says.
      ConfigMismatch: the workdir's checkpoints belong to another model, data set or optimizer, or
        those of `start_from` to another model or encoding.
      Damaged: it holds checkpoints and none can be read.
      SaveFailed: a checkpoint could not be written; the message names the last good one.
      NonFiniteLoss: the loss is not a number; the last good checkpoint stays.
    """
    check(config)
    data = open_data(config)
    mesh = sharding.make_mesh(**config.mesh)
    sharding.data_share(mesh)  # before anything that processes do together
    with jax.set_mesh(mesh):
        return _train(config, Path(workdir), data, mesh, resume_anyway)


def _train(
    config: ConfigDict, workdir: Path, data: PreparedData, mesh: Mesh, resume_anyway: bool
) -> dict:
    # --- durations
    requests = data.split("train")
    unit = dict(batch_size=config.batch_size, examples=len(requests))
    total = resolve_steps("total", config, **unit)
    log_every = resolve_steps("log", config, **unit, total=total)
    checkpoint_every = resolve_steps("checkpoint", config, **unit, total=total)

    # --- model, optimizers
    experiment = steps.bind(config, data.spec, mesh, total)
    score_step = steps.score_step(experiment)

    # --- restore: own checkpoint, else another run's, else from scratch
    checkpoints = Checkpoints(workdir, keep_last=config.keep_last, best_metric=config.best_metric)
    whoami = identity(config, data.spec.content_hash, data.spec.encoding)
    state = checkpoints.restore_newest(steps.state_shapes(experiment), whoami, anyway=resume_anyway)
    if state is not None:
        logging.info("resumed %s at step %d", workdir, int(state["step"]))
        whoami |= warm_start.origin(checkpoints.identity(int(state["step"])))
    elif config.start_from:
        state, origin = warm_start.start(experiment, whoami)
        whoami |= origin
    else:
        state = steps.init_state(experiment, config.seed)
    start = int(state["step"])
    train_step = steps.train_step(experiment, warm_start.updates_before(whoami))
    done_path, about_path = workdir / "train_done.json", workdir / "config.json"
    ended = _ended(config, checkpoints, start)
    finished = read_json(done_path) if start >= total or ended is not None else {}
    if start:
        _log_other_end(config, start, total, read_json(about_path).get("resolved_total"))
    processes.barrier("read")  # by all, before the first writes
    if processes.first():
        checkpoints.forget_measures(start)
        if not finished:
            done_path.unlink(missing_ok=True)
        about = {"data_hash": data.spec.content_hash, "encoding_hash": data.spec.encoding_hash}
        about |= {"resolved_total": total, **warm_start.origin(whoami)}
        write_json(about_path, {**config.to_dict(), **about})
    _describe(state, len(requests), start, total, mesh)

    # --- loop
    batches = pipeline.train_batches(
        requests,
        batch_size=config.batch_size,
        history_length=config.history_length,
        length_buckets=config.length_buckets,
        seed=config.seed,
        start_step=start,
        **sharding.data_share(mesh),
    )
    writer = MetricWriter(workdir, start, active=processes.first())
    progress = Progress(total, start, config.name or "train")
    window, profile = _Window(config, requests), _Profile(workdir, config.profile_steps)
    due = lambda step: step % checkpoint_every == 0 or step == total  # noqa: E731
    valid, began = checkpoints.metrics(start).get("valid", {}), time.perf_counter()
    valid = valid and {"step": start, **valid}
    stopped, step = False, start

    def measure(step: int, state: dict) -> dict:
        found = _validate(config, data, mesh, score_step, state)
        writer.write(step, _scalars("valid", found))
        if processes.first():
            # Beside what an evaluator may have measured before a restart.
            write_json(checkpoints.metrics_path(step), checkpoints.metrics(step) | {"valid": found})
        progress.report(step, _one_line(_scalars("valid", found)))
        return {"step": step, **found}

    with Preemption() as preemption, contextlib.ExitStack() as closing:
        for resource in (checkpoints, writer, progress, profile):
            closing.callback(resource.close)
        is_measured = processes.from_first(np.array(bool(valid)))
        if config.validate and start and due(start) and not is_measured:
            valid = measure(start, state)  # the start before this one ended too early for it
            ended = _ended(config, checkpoints, start)
        while step < total and not stopped and ended is None:
            step += 1
            profile.before(step - start)
            batch = window.next_batch(batches)
            state, scalars = train_step(state, sharding.put_batch(batch, mesh))
            window.add(step, scalars)
            progress.advance()

            stopped = preemption.asked(step) and step < total
            save = due(step) or stopped
            if save or step % log_every == 0:  # a state that a non-finite loss touched is not saved
                measured = window.flush()
                writer.write(step, measured)
                progress.report(step, _one_line(measured))

            if save:
                checkpoints.prune()  # waits for the save before this one, if it must
                checkpoints.save(state, whoami)
                if config.validate and not stopped:
                    valid = measure(step, state)
                    ended = _ended(config, checkpoints, step)
                window.restart_clock()
            checkpoints.settle()
        checkpoints.prune()  # what is said to be done, or to be saved on SIGTERM, is written

    seconds = time.perf_counter() - began
    done = {
        "step": step,
        "seconds": round(seconds, 1),
        "examples_per_second": round(window.rate(), 1),
        "valid": valid,
    }
    if ended is not None and step < total:
        done["no_better_since"] = ended
    if finished.get("step") == step:  # nothing was trained: what the run that did it took, stays
        done = {**finished, "valid": valid or finished["valid"]}
    if processes.first() and not stopped:
        write_json(done_path, done)
    return {**done, "stopped": True} if stopped else done


def _ended(config: ConfigDict, checkpoints: Checkpoints, step: int) -> int | None:
    """The best step, if `config.patience` steps up to `step` were measured after it."""
    if not config.patience:
        return None
    best, after = checkpoints.since_best(step) if processes.first() else (None, 0)
    found = processes.from_first(np.array(best if after >= config.patience else -1))
    return int(found) if found >= 0 else None


def last_words(done: dict, workdir: str | Path) -> str:
    """What a run says of itself at its end, of what `train` returned."""
    if (best := done.get("no_better_since")) is not None:
        return f"ended by config.patience, no checkpoint is better than that of step {best}: {done}"
    if not done.get("stopped"):
        return f"done: {done}"
    measured = f"; validation was last of step {done['valid']['step']}" if done["valid"] else ""
    return (
        f"stopped by SIGTERM at step {done['step']}, which is saved in {workdir}{measured}; the "
        "same command goes on from there"
    )


def _log_other_end(config: ConfigDict, start: int, total: int, before: int | None) -> None:
    """Says so where a run goes on under a schedule that now ends elsewhere."""
    for name in ("optimizer", "table_optimizer"):
        if before not in (None, total) and config[name].schedule != "constant":
            logging.warning(
                "%s: schedule %r ends at step %d now, at %d before: from step %d on its rates are "
                "not those that the run began with",
                name, config[name].schedule, total, before, start,
            )  # fmt: skip


class _Window:
    """The steps since the last log line: scalars still on the device, times, non-finite losses.

    Scalars are fetched once per log line; a step waits only for the one before it, so that at most
    two batches are in flight and the device never idles for the host.
    """

    def __init__(self, config: ConfigDict, requests: Requests):
        self._config, self._requests = config, requests
        self._pending: list[tuple[int, dict]] = []
        self._shape, self._compiled = None, set()
        self._total_seconds, self._total_steps = 0.0, 0
        self.restart_clock()

    def restart_clock(self) -> None:
        self._began, self._wait, self._timed = time.perf_counter(), 0.0, 0

    def next_batch(self, batches: Iterator[RequestBatch]) -> RequestBatch:
        began = time.perf_counter()
        batch = next(batches)
        self._wait += time.perf_counter() - began
        self._shape = batch.shape
        return batch

    def add(self, step: int, scalars: dict) -> None:
        self._pending.append((step, scalars))
        self._timed += 1
        if len(self._pending) > 1:
            jax.block_until_ready(self._pending[-2][1]["loss"])
        if self._shape not in self._compiled:
            jax.block_until_ready(scalars["loss"])
            seconds = time.perf_counter() - self._began
            logging.info(
                "first step of (B, L, C) = %s: %.1f s, compilation included", self._shape, seconds
            )
            self._compiled.add(self._shape)
            self.restart_clock()

    def flush(self) -> dict[str, float]:
        """Means over the window, examples per second, and the share of time spent on input.

        Raises:
          NonFiniteLoss: at the first step with a scalar that is not finite.
        """
        fetched = [(step, jax.device_get(scalars)) for step, scalars in self._pending]
        elapsed = time.perf_counter() - self._began
        for step, scalars in fetched:
            for name, value in scalars.items():
                if not np.isfinite(value):
                    self._raise_non_finite(step, name, value)
        means = {k: float(np.mean([s[k] for _, s in fetched])) for k in fetched[0][1]}
        if self._timed:
            means["examples_per_second"] = self._timed * self._config.batch_size / elapsed
            means["input_wait"] = self._wait / elapsed
            self._total_seconds += elapsed
            self._total_steps += self._timed
        self._pending = []
        self.restart_clock()
        return means

    def _raise_non_finite(self, step: int, name: str, value: float) -> None:
        again = pipeline.train_batches(
            self._requests,
            batch_size=self._config.batch_size,
            history_length=self._config.history_length,
            length_buckets=self._config.length_buckets,
            seed=self._config.seed,
            start_step=step - 1,
            workers=0,
        )
        ids = next(again).request_id
        raise NonFiniteLoss(
            f"{name} is {value} at step {step}; its batch holds requests {ids[:8].tolist()} and "
            f"{max(0, len(ids) - 8)} more. Lower the learning rate or set config.clip_norm; the "
            f"last checkpoint before it is intact"
        )

    def rate(self) -> float:
        """Examples per second of training alone: neither compilation nor validation counts."""
        examples = self._total_steps * self._config.batch_size
        return examples / self._total_seconds if self._total_seconds else 0.0


class _Profile:
    """Traces steps 10 .. 9 + n of this start into <workdir>/profile, as far as there are such."""

    def __init__(self, workdir: Path, steps_traced: int):
        self._dir, self._n, self._traces = workdir / "profile", steps_traced, False

    def before(self, nth: int) -> None:
        """The nth step of this start is about to run."""
        if self._n and nth == 10:
            jax.profiler.start_trace(str(self._dir))
            self._traces = True
        elif nth == 10 + self._n:
            self.close()

    def close(self) -> None:
        if self._traces:
            jax.profiler.stop_trace()
            logging.info("profile of %d steps or fewer in %s", self._n, self._dir)
        self._traces = False


def _validate(config, data, mesh, score_step: Callable, state: dict) -> dict:
    weights = {k: state[k] for k in ("tables", "model", "model_state")}
    scores = evaluation.score_split(config, data, "valid", mesh, score_step, weights, slices=())
    return evaluation.headline(reports.evaluate_scores(scores, slices=(), bins=0))


def _scalars(prefix: str, results: dict) -> dict[str, float]:
    return {f"{prefix}/{k}": float(v) for k, v in results.items() if isinstance(v, int | float)}


def _one_line(scalars: dict[str, float]) -> str:
    shown = (
        "loss",
        "examples_per_second",
        "input_wait",
        "valid/auc",
        "valid/gauc_user",
        "valid/logloss",
    )
    return "  ".join(f"{k} {scalars[k]:.4g}" for k in shown if k in scalars)


def _describe(state: dict, examples: int, start: int, total: int, mesh) -> None:
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    logging.info(
        "%d training requests, steps %d to %d, mesh %s; parameters: %s in tables, %s in the model",
        examples, start, total, dict(mesh.shape), f"{count(state['tables']):,}",
        f"{count(state['model']):,}",
    )  # fmt: skip
