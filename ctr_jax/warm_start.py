"""A new run that begins with the state of another one (`config.start_from`).

Taken over are tables, parameters, `model_state` and the moments of both optimizers with the number
of updates that these saw, by which Adam corrects their bias: counted from 0 again, it would take
settled moments for fresh ones. Steps, and with them schedules, data order and dropout, are the new
run's and begin at 0.

What a run started from stays in the identity of its checkpoints, so a resumed run needs neither the
other run nor its files. It is no ground to refuse a resume.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ctr_jax import growth, optimizers, processes, steps
from ctr_jax.checkpoints import Checkpoints, refuse_mismatch
from ctr_jax.config import ConfigError, scoring
from ctr_jax.evaluation import chosen

ORIGIN = "started_from"
# Of an identity. Optimizers, lengths and the like may be others as far as the arrays are the same.
MUST_FIT = ("data", "encoding", "model")


def start(experiment: steps.Experiment, whoami: Mapping) -> tuple[dict, dict]:
    """The state of `config.start_from` at step 0 of a new run, laid out over its mesh, and what to
    add to the new run's identity.

    Where vocabularies have grown since, so do the tables (growth.restore).

    Args:
      whoami: the new run's identity.
    Raises:
      ConfigError: there is no such checkpoint.
      ConfigMismatch: it is of another model, encoding or optimizer, or of arrays of other shapes.
      Damaged: its files are not what was saved.
    """
    workdir, step = parse(experiment.config.start_from)
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        # By the first process for all: while the other run goes on, each might see another best.
        at = int(processes.from_first(np.array(chosen(checkpoints, step, experiment.config))))
    except FileNotFoundError as error:
        raise ConfigError(f"start_from {experiment.config.start_from!r}: {error}") from error
    checkpoints.check(at)
    saved, rows = growth.as_grown(checkpoints.identity(at), experiment.spec)
    fit = [{k: v for k, v in x.items() if k in MUST_FIT} for x in scoring(saved, whoami)]
    remedy = "start_from needs the same model, and vocabularies that are the data's or grew to them"
    refuse_mismatch(*fit, workdir, remedy)
    shapes = steps.state_shapes(experiment)
    state = growth.restore(experiment, checkpoints, at, shapes, rows)
    checkpoints.close()
    layout = jax.tree.map(lambda x: x.sharding, {k: shapes[k] for k in ("opt", "step")})
    state |= jax.jit(_at_step_0, out_shardings=layout)(state["opt"], state["step"])
    origin = {"workdir": str(workdir), "step": at, "data": saved["data"]}
    origin["updates"] = at + updates_before(saved)
    logging.info("started from step %d of %s", at, workdir)
    for name, before in rows.items():
        logging.info("%s: %d new values", name, experiment.spec.vocabularies[name] - before)
    return state, {ORIGIN: origin}


def _at_step_0(opt, step) -> dict:
    return {"opt": optimizers.restarted(opt), "step": jnp.zeros_like(step)}


def origin(identity: Mapping) -> dict:
    """{"started_from": ...} of an identity, {} of a run that started from scratch."""
    return {ORIGIN: identity[ORIGIN]} if ORIGIN in identity else {}


def updates_before(identity: Mapping) -> int:
    """Updates that the moments of a run saw before its step 0."""
    return identity.get(ORIGIN, {}).get("updates", 0)


def parse(text: str) -> tuple[Path, int | None]:
    """ "WORKDIR" or "WORKDIR@STEP" -> (workdir, step or None)."""
    workdir, at, step = text.rpartition("@")
    return (Path(workdir), int(step)) if at and step.isdigit() else (Path(text), None)
