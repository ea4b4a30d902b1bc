"""Reading a checkpoint whose vocabularies have grown since (`data.grow_vocabularies`).

A grown vocabulary begins with the values that it had, under the same ids, so the first rows of a
table over it are those of the checkpoint. Whether it does is told by hashes: an identity holds
those of a checkpoint's vocabularies, DataSpec.grown_from those of all that the data's grew from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ctr_jax import steps
from ctr_jax.checkpoints import Checkpoints
from ctr_jax.features import OOV, DataSpec, table_shapes


def as_grown(saved: Mapping, spec: DataSpec) -> tuple[dict, dict[str, int]]:
    """The identity of a checkpoint as if its vocabularies had grown to those of `spec`, as far as
    these grew from them, and {vocabulary: its rows in the checkpoint} of those that did."""
    hashes = saved.get("encoding", {}).get("vocabularies", {})
    rows = {
        name: spec.grown_from[name][before]
        for name, before in hashes.items()
        if before in spec.grown_from.get(name, {})
    }
    if not rows:
        return dict(saved), {}
    now = {**hashes, **{name: spec.encoding["vocabularies"][name] for name in rows}}
    return {**saved, "encoding": {**saved["encoding"], "vocabularies": now}}, rows


def restore(
    experiment: steps.Experiment,
    checkpoints: Checkpoints,
    step: int,
    shapes: Mapping,
    rows: Mapping[str, int],
) -> dict:
    """Checkpoints.restore of a step, with rows for the values that its vocabularies have gained.

    Known values keep their rows and these their optimizer's state, bit for bit. A new value's row
    is that of out-of-vocabulary values, its optimizer's state as of a row that no batch had yet.

    Args:
      shapes: of `steps.state_shapes(experiment)`, all of it or without what is not to be read.
      rows: of `as_grown`.
    Raises:
      ConfigMismatch: arrays are of other shapes.
    """
    if not rows:
        return checkpoints.restore(shapes, identity=None, step=step)
    spec = experiment.spec
    before = dataclasses.replace(spec, vocabularies={**spec.vocabularies, **rows})
    saved = steps.state_shapes(dataclasses.replace(experiment, spec=before))
    saved = {name: saved[name] for name in shapes}
    # Every device reads its part of the larger arrays, so none holds more than it will anyway.
    state = checkpoints.restore(shapes, identity=None, step=step, saved=saved)

    first, last = (
        {name: shape[0] for name, shape in table_shapes(experiment.columns, of).items()}
        for of in (before, spec)
    )
    longer = [name for name in first if first[name] != last[name]]
    parts = [part for part in ("tables", "table_opt") if part in state]

    def with_new_rows(old: dict) -> dict:
        # A model has scored these values as out-of-vocabulary until now. It begins with that, so
        # what is taken over scores as before; a random row would be noise in the place of it.
        # Rows past the last are padding, zero as in a new table.
        tables = {
            name: jnp.where(_row(table) < last[name], table[OOV], 0.0)
            for name, table in old["tables"].items()
        }
        new = {"tables": tables, "table_opt": experiment.table_optimizer.init(tables)}
        return {
            part: {name: _joined(old[part][name], new[part][name], first[name]) for name in longer}
            for part in parts
        }

    old = {part: {name: state[part][name] for name in longer} for part in parts}
    layout = jax.tree.map(lambda x: x.sharding, old)
    grown = jax.jit(with_new_rows, donate_argnums=0, out_shardings=layout)(old)
    return state | {part: state[part] | grown[part] for part in parts}


def _joined(old, new, rows: int):
    """The first `rows` rows of the arrays of `old`, and the other rows of those of `new`."""
    return jax.tree.map(lambda x, y: jnp.where(_row(x) < rows, x, y), old, new)


def _row(x: jax.Array) -> jax.Array:
    """The numbers of an array's rows, to be compared along its first axis."""
    return jnp.arange(x.shape[0]).reshape(-1, *[1] * (x.ndim - 1))
