"""Plans of a small experiment, on CPU devices and on TPU slices that are not here."""

import json

import jax
import pytest

from configs import laser_alibaba, lrea_industrial, sparsectr_alibaba
from ctr_jax import describe, flops, planner, sharding, steps
from ctr_jax.data import open_data
from ctr_jax.data.errors import DataError
from ctr_jax.data.expected import expected_spec
from kernels import ahead_of_time

needs_tpu_compiler = pytest.mark.skipif(
    not ahead_of_time.can_compile_for_tpu(), reason="the TPU compiler (jax[tpu]) is not installed"
)


@pytest.fixture
def prepared_config(small_config):
    open_data(small_config)
    return small_config


def nbytes(tree):
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def test_what_is_planned_is_what_a_run_holds(small_config):
    small_config.mesh.data, small_config.mesh.table = 2, 2
    spec = open_data(small_config).spec
    plan = planner.make_plan(small_config, spec, "cpu:4")
    mesh = sharding.make_mesh(data=2, table=2)
    with jax.set_mesh(mesh):
        experiment = steps.bind(small_config, spec, mesh, total_steps=1)
        state = steps.init_state(experiment, seed=0)
    for part in ("tables", "table_opt", "model", "opt"):
        assert plan.held[part] == nbytes(state[part]), part
    assert plan.mesh == {"data": 2, "table": 2} and plan.fits
    assert plan.temporaries > 0 and plan.traffic["all-reduce"][1] > 0


def test_what_is_planned_is_what_the_compiler_says(small_config):
    small_config.mesh.data, small_config.mesh.table = 2, 2
    spec = open_data(small_config).spec
    plan = planner.make_plan(small_config, spec, "cpu:4")
    mesh = sharding.make_mesh(data=2, table=2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        experiment = steps.bind(small_config, spec, mesh, total_steps=1)
        state = steps.state_shapes(experiment)
        batch = planner._batch_shapes(experiment)
        stats = steps.train_step(experiment).lower(state, batch).compile().memory_analysis()
        gradient, arguments = describe.training_pass(experiment, "xla")
        counted = flops.count(gradient, *arguments)
    # The requests are split over `data`; the devices along `table` do the same ones.
    assert plan.operations == sum(counted.values()) / 2 > 64 * 12 * 8
    held = sum(plan.held.values())
    assert held == stats.argument_size_in_bytes
    assert plan.outputs == stats.output_size_in_bytes - stats.alias_size_in_bytes
    assert plan.temporaries == stats.temp_size_in_bytes > 0
    assert plan.total == held + plan.outputs + plan.temporaries + plan.code
    # The state is donated: of what comes back, a few figures and the list of it take memory.
    assert 0 < plan.outputs < 1000 < held / 30 and stats.alias_size_in_bytes > 0.7 * held


def test_the_text_names_every_part(prepared_config):
    text = planner.plan(prepared_config, "cpu:1")
    for words in (
        "the prepared data set",
        "embedding tables",
        "temporaries of the step",
        "largest arrays",
        "sent by one device",
        "nothing",
        "Not known: time",
    ):
        assert words in text


def test_without_data_the_expected_rows_are_taken(small_config, tmp_path):
    small_config.data.raw_dir = str(tmp_path)  # nothing there
    with pytest.raises(DataError, match=r"lacks .*--rows=age=N,category=N,item=N,rating=N"):
        expected_spec(small_config, {})
    small_config.expected_rows.update(dict(age=8, category=7, item=1000, rating=9))
    spec, source = expected_spec(small_config, {"item": 5000})
    assert spec.vocabularies == dict(age=8, category=7, item=5000, rating=9)
    assert source == "config.expected_rows, but item 5,000"
    with pytest.raises(DataError, match="no such vocabulary .'itme'."):
        expected_spec(small_config, {"itme": 5})


@pytest.mark.parametrize(
    "target, says",
    [
        ("v9z:4x4", "name a slice, as v5e:4x4"),
        ("v5e", "name a slice"),
        ("cpu:99", "cpu:N with N from 1 to 8"),
        ("cpu:0", "cpu:N with N from 1 to 8"),
        ("cpu:5", "does not divide"),
        ("auto:v1", "slices are known of"),
    ],
)
def test_targets_that_make_no_sense_are_refused(prepared_config, target, says):
    prepared_config.mesh.data = -1
    with pytest.raises(planner.CannotPlan, match=says):
        planner.plan(prepared_config, target)


def test_auto_passes_over_meshes_that_micro_batches_do_not_divide_over(
    prepared_config, monkeypatch
):
    spec = open_data(prepared_config).spec
    monkeypatch.setattr(planner, "make_plan", lambda config, *_: dict(config.mesh))
    prepared_config.eval_batch_size = 64
    for micro_batch, data in ((0, {16, 32, 64}), (32, {1, 2}), (4, {16})):
        prepared_config.micro_batch = micro_batch
        tried = [m["data"] for m in planner._candidates(prepared_config, spec, "v5e")]
        assert max(tried) == max(data) and set(tried) >= data


def test_rows_are_numbers():
    assert planner.parse_rows(["a=5", "b=70"]) == {"a": 5, "b": 70}
    with pytest.raises(planner.CannotPlan, match="write name=number"):
        planner.parse_rows(["a=many"])


@needs_tpu_compiler
def test_a_slice_that_is_not_here(prepared_config):
    prepared_config.mesh.data, prepared_config.mesh.table = 1, 4
    spec, _ = expected_spec(prepared_config, {"item": 1_000_000})
    plan = planner.make_plan(prepared_config, spec, "v5e:2x2")
    assert plan.fits and plan.memory == 16 << 30
    # Narrow rows lie along the 128 lanes: a quarter of the table a device, without padding.
    assert 1_000_000 <= plan.held["tables"] / 4 / 4 * 4 <= 1_010_000
    with pytest.raises(planner.CannotPlan, match="does not make 4 devices"):
        prepared_config.mesh.table = 3
        planner.make_plan(prepared_config, spec, "v5e:2x2")


@needs_tpu_compiler
def test_tables_that_do_not_fit_and_the_smallest_slice_that_does(prepared_config):
    prepared_config.mesh.data = -1
    spec, _ = expected_spec(prepared_config, {"item": 900_000_000})
    text = planner.plan(prepared_config, "v5e:2x2", {"item": 900_000_000})
    assert "does not fit" in text and "--config.mesh.table=2" in text
    found = planner.plan(prepared_config, "auto", {"item": 900_000_000})
    tried = found.splitlines()[1:4]
    assert "table 1" in tried[0] and "does not fit" in tried[0]
    assert any(line.endswith("  fits") for line in tried)


@needs_tpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize("page", [sparsectr_alibaba, lrea_industrial, laser_alibaba])
def test_the_papers_settings_compile_for_a_slice(page):
    config = page.get_config()
    spec, _ = expected_spec(config, {})
    plan = planner.make_plan(config, spec, "v5e:2x2", ahead_of_time.LEAST_EFFORT)
    assert plan.fits, json.dumps(plan.held)
