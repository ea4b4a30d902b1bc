import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ctr_jax.config import ConfigError
from ctr_jax.sharding import data_share, make_mesh, put_batch, shardings


def test_tables_and_their_moments_are_split_by_rows_and_the_rest_is_not():
    mesh = make_mesh(data=2, table=4)
    state = {
        "tables": {"item": jnp.zeros((8, 2))},
        "table_opt": {"item": {"sum": jnp.zeros((8,)), "count": jnp.zeros(())}},
        "model": {"w": jnp.zeros((8, 2))},
    }
    rules = shardings(state, mesh)
    assert rules["tables"]["item"].spec == PartitionSpec("table")
    assert rules["table_opt"]["item"]["sum"].spec == PartitionSpec("table")
    assert rules["table_opt"]["item"]["count"].spec == PartitionSpec()
    assert rules["model"]["w"].spec == PartitionSpec()


def test_a_mesh_that_does_not_fit_is_refused():
    assert dict(make_mesh(data=-1, table=2).shape) == {"data": 4, "table": 2}
    with pytest.raises(ValueError, match="needs 18 devices, there are 8"):
        make_mesh(data=9, table=2)
    for table in (0, -1):
        with pytest.raises(ConfigError, match=f"table={table}: give 1 or more"):
            make_mesh(data=-1, table=table)


def test_a_batch_is_split_over_the_data_axis():
    mesh = make_mesh(data=4, table=2)
    batch = put_batch({"x": jnp.arange(8)}, mesh)
    assert {s.data.shape for s in batch["x"].addressable_shards} == {(2,)}
    assert len(jax.devices()) == 8


class Device:
    def __init__(self, process):
        self.process_index = process


class Layout:
    """What `data_share` reads of a mesh."""

    def __init__(self, processes):
        self.devices = np.vectorize(Device, otypes=[object])(np.array(processes))
        self.shape = {"data": len(processes), "table": len(processes[0])}


@pytest.mark.parametrize(
    "processes, share",
    [
        ([[0], [0], [0], [0]], (0, 1)),  # one process
        ([[0, 0], [1, 1]], (1, 2)),  # each a row of the data axis
        ([[0, 1], [2, 3]], (0, 2)),  # two processes share a row
        ([[0, 1]], (0, 1)),  # all share it
        ([[0], [0], [1], [1]], (1, 2)),
    ],
)
def test_the_share_of_a_process(monkeypatch, processes, share):
    monkeypatch.setattr(jax, "process_index", lambda: 1 if (1 in np.ravel(processes)) else 0)
    assert tuple(data_share(Layout(processes)).values()) == share


@pytest.mark.parametrize(
    "processes, says",
    [
        ([[0], [1], [0], [1]], r"process 0 holds \[0, 2\]"),
        ([[0], [0], [1]], r"process 0 holds \[0, 1\]"),  # unequal
        ([[0], [0]], r"process 1 holds \[\]"),
    ],
)
@pytest.mark.parametrize("here", [0, 1])
def test_a_broken_share_is_refused_by_every_process(monkeypatch, processes, says, here):
    monkeypatch.setattr(jax, "process_index", lambda: here)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match=says + ".*unbroken part"):
        data_share(Layout(processes))
