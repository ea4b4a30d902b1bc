"""From a training run to scores of live requests: restoring weights, and requests whose history a
store has just read.

The history comes from `last_n` of a seqvault store, the function that training reads through, so a
request is scored as it would have been trained on.

Axis letters: B requests, C candidates, L history.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from ctr_jax import sharding, steps
from ctr_jax.batch import RequestBatch
from ctr_jax.checkpoints import Checkpoints, refuse_mismatch
from ctr_jax.config import check, identity, scoring
from ctr_jax.data import open_data
from ctr_jax.evaluation import chosen
from ctr_jax.features import DataSpec


def restore(
    config: ConfigDict, workdir: str | Path, step: int | None = None
) -> tuple[steps.Experiment, dict, int]:
    """(experiment, weights, step) of a training run, on one device.

    Args:
      step: which checkpoint; None = the best measured one, else the newest.
    Returns:
      weights: {"tables", "model", "model_state"}, as ctr_jax.steps.score_step takes them.
    Raises:
      FileNotFoundError: there is no such checkpoint.
      Damaged: its files are not what was saved.
      ConfigMismatch: it was made with another model, or data of another encoding.
    """
    check(config)
    data, workdir = open_data(config), Path(workdir)
    mesh = sharding.make_mesh(data=1, table=1)
    checkpoints = Checkpoints(workdir, read_only=True)
    at = chosen(checkpoints, step, config)
    checkpoints.check(at)
    with jax.set_mesh(mesh):
        experiment = steps.bind(config, data.spec, mesh, 1)
        shapes = steps.state_shapes(experiment)
        shapes = {k: shapes[k] for k in ("tables", "model", "model_state", "step")}
        whoami = identity(config, data.spec.content_hash, data.spec.encoding)
        refuse_mismatch(*scoring(checkpoints.identity(at), whoami), workdir)
        weights = checkpoints.restore(shapes, identity=None, step=at)
    weights.pop("step")
    return experiment, weights, at


def request_batch(
    spec: DataSpec,
    history: Mapping[str, np.ndarray],
    *,
    time: np.ndarray,
    user: Mapping[str, np.ndarray],
    context: Mapping[str, np.ndarray],
    candidate: Mapping[str, np.ndarray],
) -> RequestBatch:
    """Requests to be scored, as a model takes them.

    Args:
      history: what `last_n` of a store gave: the behaviour columns, "time" and "mask", each [B, L].
      time: [B] int32 seconds, the `before` that the store was asked with.
      user, context: {column: [B]}. candidate: {column: [B, C]}; all are candidates.
    Raises:
      ValueError: a column of the data set is missing.
    """
    given = {"behaviour": history, "user": user, "context": context, "candidate": candidate}
    types = {"id": np.int32, "dense": np.float32}
    groups = {}
    for group, columns in given.items():
        wanted = spec.group(group)
        if missing := [c.name for c in wanted if c.name not in columns]:
            raise ValueError(f"{group} columns {missing} of {spec.name!r} are missing")
        groups[group] = {c.name: np.asarray(columns[c.name], types[c.kind]) for c in wanted}
    shape = next(iter(groups["candidate"].values())).shape
    number = np.arange(shape[0], dtype=np.int32)
    return RequestBatch(
        user_id=number,
        request_id=number,
        request_time=np.asarray(time, np.int32),
        behaviour_time=history["time"].astype(np.int32),
        behaviour_mask=history["mask"],
        candidate_mask=np.ones(shape, bool),
        label=np.zeros(shape, np.float32),
        **groups,
    )
