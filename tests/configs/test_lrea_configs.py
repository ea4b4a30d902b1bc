"""Every config of LREA and the DINs beside it builds; every demo prepares its generated files and
traces a training step."""

import importlib

import jax
import numpy as np
import pytest

from ctr_jax import sharding, steps
from ctr_jax.data import open_data
from ctr_jax.features import DataColumn, DataSpec

PAGES = {
    "amazon": ("lrea_amazon", "din_amazon", ("", "demo")),
    "taobao": ("lrea_taobao", "din_taobao", ("", "demo")),
    "industrial": ("lrea_industrial", "din_industrial", ("", "demo")),
    "movielens": ("lrea_movielens", "din_long_movielens", ("", "v1", "L500", "L500,v1")),
}
SIZES = {"amazon": (10, 90), "taobao": (64, 500), "industrial": (64, 10_000),
         "movielens": (20, 180), "movielens L500": (20, 480)}  # fmt: skip
SPEC = DataSpec(
    "any",
    tuple(DataColumn(g, "item", "id", "item") for g in ("behaviour", "candidate"))
    + (DataColumn("user", "user_id", "id", "user_id"),),
    {"item": 9, "user_id": 9},
    2,
)


def page(name):
    return importlib.import_module(f"configs.{name}").get_config


@pytest.mark.parametrize("data", PAGES)
def test_every_variant_builds_and_the_three_share_their_data(data):
    lrea, din, variants = PAGES[data]
    names = set()
    for variant in variants:
        long = page(din)(variant)
        short = page(din)(",".join(["short", variant]).strip(","))
        configs = [page(lrea)(variant), long, short]
        for config in configs:
            config.lock()
            names.add(config.name)
            importlib.import_module(config.model.module).build(config.model, SPEC)
            key = f"{data} L500" if "L500" in variant else data
            assert (config.model.short_length, config.model.long_length) == SIZES[key]
            read = SIZES[key][:1] if config is short else SIZES[key]
            assert config.history_length == sum(read)
            assert config.model.width == 16 and config.model.hidden == 64
            same = ("data", "batch_size", "optimizer", "table_optimizer", "total_epochs")
            assert all(config[k] == configs[0][k] for k in same)
        assert long.model.use_long and not short.model.use_long
        assert configs[0].loss.weights.non_negativity == 0.3 and not long.loss.weights
    assert len(names) == 3 * len(variants)
    for get in map(page, (lrea, din)):
        with pytest.raises(ValueError, match="choose"):
            get("large")


def shrunk(name, tmp_path):
    """A demo with few users and short histories; layout and code are the demo's."""
    config = page(name)("demo")
    config.data.raw_dir, config.data.prepared_dir = str(tmp_path / "raw"), str(tmp_path / "out")
    config.data.generate.users, config.data.generate.behaviours = 120, 30.0
    if "sessions" in config.data.generate:
        config.data.generate.sessions = 5.0
    config.batch_size = config.eval_batch_size = 16
    config.model.short_length, config.model.long_length, config.history_length = 4, 12, 16
    if "rank" in config.model:
        config.model.rank = 4
    config.model.head_hidden = (8,)
    return config


@pytest.mark.parametrize("name", ["lrea_amazon", "lrea_taobao", "lrea_industrial"])
def test_a_demo_prepares_its_files_and_traces_a_step(name, tmp_path):
    config = shrunk(name, tmp_path)
    data = open_data(config)
    assert min(data.spec.splits.values()) > 0
    mesh = sharding.make_mesh(data=1, table=1)
    with jax.set_mesh(mesh):
        experiment = steps.bind(config, data.spec, mesh, 1)
        batch = steps.empty_batch(data.spec, config.batch_size, config.history_length)
        state, scalars = jax.eval_shape(
            steps.train_step(experiment), steps.state_shapes(experiment), batch
        )
    assert "batch_stats" in state["model_state"] and scalars["loss"].shape == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lrea_amazon", "din_taobao", "lrea_industrial"])
def test_a_demo_trains_and_evaluates(name, tmp_path):
    from ctr_jax.evaluation import evaluate
    from ctr_jax.training import train

    config = shrunk(name, tmp_path)
    config.total_epochs, config.total_steps = 0.0, 4
    config.mesh.data = 1
    train(config, tmp_path / "run")
    results = evaluate(config, tmp_path / "run")
    assert 0 <= results["test"]["auc"] <= 1 and np.isfinite(results["test"]["logloss"])
    assert ("oracle_auc" in results["test"]) == (name == "lrea_industrial")
