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

import seqvault
from ctr_jax import growth, sharding, steps
from ctr_jax.batch import RequestBatch
from ctr_jax.checkpoints import Checkpoints, refuse_mismatch
from ctr_jax.config import check, identity, scoring
from ctr_jax.data import open_data
from ctr_jax.data.errors import DataError
from ctr_jax.data.records import PreparedData
from ctr_jax.evaluation import chosen
from ctr_jax.features import DataColumn, DataSpec


def restore(
    config: ConfigDict, workdir: str | Path, step: int | None = None
) -> tuple[steps.Experiment, dict, int]:
    """(experiment, weights, step) of a training run, on one device. Where the vocabularies have
    grown since, what they gained scores as out-of-vocabulary.

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
        saved, rows = growth.as_grown(checkpoints.identity(at), data.spec)
        refuse_mismatch(*scoring(saved, whoami), workdir)
        weights = growth.restore(experiment, checkpoints, at, shapes, rows)
    weights.pop("step")
    return experiment, weights, at


def history_store(data: PreparedData) -> seqvault.Snapshot:
    """The histories of a prepared data set, by user.

    Raises:
      DataError: they lie in its records, so that none is found by user.
    """
    if data.histories is None:
        raise DataError(f"{data.path}: histories lie in its records, so none is found by user")
    return data.histories


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

    Ids are those of the data set's vocabularies (vocabularies/ beside its records, raw value ->
    id), integers of any width: 1 is whatever a vocabulary does not have, 0 padding.

    Args:
      history: what `last_n` of a store gave: the behaviour columns, "time" and "mask", each [B, L].
      time: [B] integers, seconds: the `before` that the store was asked with, floored as those of
        the data set if it has a `time_floor`.
      user, context: {column: [B]}. candidate: {column: [B, C]}; all are candidates.
    Raises:
      ValueError: a column of the data set is missing or has another shape, a history is followed
        by padding, an id is no integer or outside its vocabulary, a dense value is no finite
        number, or a time is none in seconds, as int32. It names the column, and the first value
        that is wrong with its place.
    """
    given = {"behaviour": history, "user": user, "context": context, "candidate": candidate}
    for group, columns in given.items():
        if missing := [c.name for c in spec.group(group) if c.name not in columns]:
            raise ValueError(f"{group} columns {missing} of {spec.name!r} are missing")
    if missing := [name for name in ("time", "mask") if name not in history]:
        raise ValueError(f"the history has no {missing}; it is what last_n of a store gives")
    mask, first = np.asarray(history["mask"]), spec.group("candidate")[0].name
    for name, values, axes in (
        ("time", time, "[B]"),
        ("the history's mask", mask, "[B, L]"),
        (f"candidate/{first}", candidate[first], "[B, C]"),
    ):
        if np.ndim(values) != axes.count(",") + 1:
            raise ValueError(f"{name} has shape {np.shape(values)}, not {axes}")
    if mask.dtype != bool:
        raise ValueError(f"the history's mask must be bool, not {mask.dtype}")
    if (early := mask[:, :-1] & ~mask[:, 1:]).any():
        what = "a history stands at the right, its latest behaviour last"
        _refuse("the history's mask", mask, early, what)
    requests = np.shape(time)
    of_history, of_candidates = requests + mask.shape[1:], requests + np.shape(candidate[first])[1:]
    shapes = {"behaviour": of_history, "candidate": of_candidates}
    groups = {
        group: {
            c.name: _column(spec, c, columns[c.name], shapes.get(group, requests))
            for c in spec.group(group)
        }
        for group, columns in given.items()
    }
    number = np.arange(*requests, dtype=np.int32)
    return RequestBatch(
        user_id=number,
        request_id=number,
        request_time=_seconds("time", time, requests),
        behaviour_time=_seconds("the history's time", history["time"], of_history),
        behaviour_mask=_shaped("the history's mask", mask, of_history),
        candidate_mask=np.ones(of_candidates, bool),
        label=np.zeros(of_candidates, np.float32),
        **groups,
    )


def _column(spec: DataSpec, column: DataColumn, values, shape: tuple[int, ...]) -> np.ndarray:
    """The values of a column as int32 ids or float32, or ValueError."""
    name = f"{column.group}/{column.name}"
    values = _shaped(name, values, shape)
    if column.kind == "dense":
        what = "standardised values are finite numbers, and 0 is missing"
        if values.dtype.kind not in "iuf":
            raise ValueError(f"{name} is {values.dtype}: {what}")
        if not (finite := np.isfinite(values)).all():
            _refuse(name, values, ~finite, what)
        return values.astype(np.float32, copy=False)
    rows = spec.vocabularies[column.vocabulary]
    what = f"ids of vocabulary {column.vocabulary!r} are 0 to {rows - 1}, and 1 is unknown"
    # Read as unsigned a negative id is a large one: one pass finds both.
    if _integers(name, values, what).view(f"u{values.itemsize}").max(initial=0) >= rows:
        _refuse(name, values, (values < 0) | (values >= rows), what)
    return values.astype(np.int32, copy=False)


def _seconds(name: str, values, shape: tuple[int, ...]) -> np.ndarray:
    """Times as int32 seconds, or ValueError."""
    values, what = _shaped(name, values, shape), "times are seconds, as int32"
    if _integers(name, values, what).dtype == np.int32:
        return values
    limits = np.iinfo(np.int32)
    wrong = (values < limits.min) | (values > limits.max)
    if wrong.any():
        _refuse(name, values, wrong, what)
    return values.astype(np.int32, copy=False)


def _shaped(name: str, values, shape: tuple[int, ...]) -> np.ndarray:
    values = np.asarray(values)
    if values.shape != shape:
        raise ValueError(f"{name} has shape {values.shape}, not {shape}")
    return values


def _integers(name: str, values: np.ndarray, what: str) -> np.ndarray:
    if values.dtype.kind not in "iu":
        raise ValueError(f"{name} is {values.dtype}: {what}")
    return values


def _refuse(name: str, values: np.ndarray, wrong: np.ndarray, what: str) -> None:
    place = tuple(np.argwhere(wrong)[0].tolist())
    raise ValueError(f"{name}{[*place]} is {values[place]}: {what}")
