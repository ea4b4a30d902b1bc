"""Meshes and sharding rules: which device holds what, as data.

A rule is (regex over the parameter's path, PartitionSpec); the first that matches decides, and
what none matches is replicated. Axes: "data" splits the requests of a batch, "table" the rows of
the embedding tables. One device is the 1 x 1 mesh, so there is one code path.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ctr_jax.config import ConfigError

DATA, TABLE = "data", "table"
BATCH_AXES = (DATA,)  # what kernels are mapped over, too
BATCH = PartitionSpec(BATCH_AXES)

# Rows of the tables, and of their optimizer's moments, over the "table" axis; all else everywhere.
STATE_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"^(tables|table_opt)/", PartitionSpec(TABLE)),
    (r".*", PartitionSpec()),
)


def make_mesh(data: int = -1, table: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, table) mesh with Auto axes; data = -1 takes all devices that table leaves.

    Raises:
      ConfigError: there are not as many devices, or an axis has none.
    """
    devices = list(devices if devices is not None else jax.devices())
    if table < 1 or data < 1 and data != -1:
        raise ConfigError(
            f"mesh data={data} x table={table}: give 1 or more, or for data -1, all that table "
            "leaves"
        )
    if data == -1:
        data = len(devices) // table
    if data < 1 or data * table > len(devices):
        raise ConfigError(
            f"mesh data={data} x table={table} needs {max(data, 1) * table} devices, "
            f"there are {len(devices)}"
        )
    return jax.make_mesh(
        (data, table),
        (DATA, TABLE),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices[: data * table],
    )


def path_name(path: tuple) -> str:
    """A pytree key path as "a/b/c"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def shardings(tree, mesh: Mesh, rules: Sequence[tuple[str, PartitionSpec]] = STATE_RULES):
    """A tree of NamedSharding for `tree` (arrays or shapes), by the first rule that matches.

    A leaf with fewer axes than its rule names (a scalar moment, say) is replicated.
    """

    def rule_for(path, leaf):
        for pattern, spec in rules:
            if re.search(pattern, path_name(path)):
                return NamedSharding(mesh, spec if len(spec) <= leaf.ndim else PartitionSpec())
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(rule_for, tree)


def data_share(mesh: Mesh) -> dict[str, int]:
    """Which part of a global batch this process reads: {"process_index": i, "process_count": n}, as
    ctr_jax.data.pipeline takes them.

    Processes whose devices lie on the same stretch of the data axis read the same part.

    Raises:
      ConfigError: the devices of some process, whichever, do not make one of n equal stretches of
        the data axis; on every process alike, so that none is left waiting.
    """
    shares = {process: _share(mesh, process) for process in _processes(mesh)}
    return shares[jax.process_index()]


def _processes(mesh: Mesh) -> list[int]:
    """All of this run, and all that the mesh names."""
    return sorted({*range(jax.process_count()), *(d.process_index for d in mesh.devices.flat)})


def _share(mesh: Mesh, process: int) -> dict[str, int]:
    own = sorted({at[0] for at, d in np.ndenumerate(mesh.devices) if d.process_index == process})
    size = mesh.shape[DATA]
    index, rest = divmod(own[0], len(own)) if own else (0, 1)
    if rest or size % len(own) or own != list(range(own[0], own[0] + len(own))):
        raise ConfigError(
            f"mesh {dict(mesh.shape)}: process {process} holds {own} of the data axis; every "
            "process has to hold an equal, unbroken part of it"
        )
    return {"process_index": index, "process_count": size // len(own)}


def put_batch(batch, mesh: Mesh):
    """Host arrays of this process's share of a batch -> global arrays split over the data axis."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
