"""Runs whose vocabularies grew: tables with more rows, chains of days, yesterday's model."""

import dataclasses
import shutil

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctr_jax import growth, serving, sharding, steps, warm_start
from ctr_jax.checkpoints import Checkpoints, ConfigMismatch
from ctr_jax.config import identity
from ctr_jax.data import open_data
from ctr_jax.data.prepare import prepare
from ctr_jax.evaluation import evaluate
from ctr_jax.features import Column, table_shapes
from ctr_jax.training import train
from tests.ctr_jax.test_training import final_state

DAY, START = 86400, 1_000_000_000 + 20 * 86400
NEW = {1: 400, 2: 40}  # new items of a day: after the first the table has 512 rows, not 256
OOV = 1


@pytest.fixture(scope="module")
def logs(small_log, tmp_path_factory):
    """Raw directories of three days: small_log, and twice a day more, new items 3 times each."""
    found, rng = [small_log], np.random.default_rng(0)
    for day, number in NEW.items():
        directory = tmp_path_factory.mktemp(f"log{day}")
        item = rng.permutation(np.repeat(1000 * day + np.arange(number), 3))
        time = START + (day - 1) * DAY + np.sort(rng.integers(0, DAY, len(item)))
        more = dict(user=rng.integers(0, 80, len(item)), item=item, category=item % 4,
                    rating=rng.choice([2, 5], len(item)), ts=time)  # fmt: skip
        before = pq.read_table(found[-1] / "events.parquet")
        pq.write_table(pa.concat_tables([before, pa.table(more)]), directory / "events.parquet")
        shutil.copy(small_log / "users.parquet", directory)
        found.append(directory)
    return found


@pytest.fixture
def days(small_config, logs):
    """The configs of three days, each with vocabularies grown from those of the day before."""
    small_config.validate, small_config.total_steps = False, 3
    configs = [small_config]
    for day in NEW:
        configs.append(grown(configs[-1], logs[day], split_of(day)))
    return configs


def split_of(day):
    """The time from which events of a day's log are for testing."""
    return START + day * DAY - DAY // 8


def grown(before, log, split):
    """The config of a log whose vocabularies grow from those of the config `before`."""
    config = before.copy_and_resolve_references()
    config.data.raw_dir = str(log)
    config.data.train, config.data.test = f"ts < {split}", f"ts >= {split}"
    config.data.vocabularies_from = str(prepare(before.data))
    config.data.grow_vocabularies = True
    return config


def bind(config, mesh):
    """(experiment, identity) of a config on a mesh."""
    spec = open_data(config).spec
    whoami = identity(config, spec.content_hash, spec.encoding)
    return steps.bind(config, spec, mesh, 3), whoami


def with_a_second_table(experiment):
    """The experiment with one more table over the vocabulary of items, of its own width."""
    wide = Column("candidate", "item", "item:wide", 6, "item:wide")
    return dataclasses.replace(experiment, columns=(*experiment.columns, wide))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def monday(days, runs):
    """The workdir of a run on the first day, as if it had made 3 steps."""
    if not (runs / "monday").exists():
        over = sharding.make_mesh(1, 1)
        with jax.set_mesh(over):
            experiment, whoami = bind(days[0], over)
            state = steps.init_state(experiment, 0) | {"step": np.int32(3)}
        checkpoints = Checkpoints(runs / "monday")
        checkpoints.save(state, whoami)
        checkpoints.close()
    return runs / "monday"


@pytest.fixture
def tuesday(days, monday, runs):
    """The workdir of a run on the second day that began with Monday's; trained once."""
    days[1].start_from = str(monday)
    train(days[1], runs / "tuesday")
    return runs / "tuesday"


@pytest.mark.parametrize(
    "optimizer, first, mesh", [("lazy_adam", 0, (2, 2)), ("rowwise_adagrad", 1, (1, 8))]
)
def test_old_rows_are_copied_and_new_ones_begin_as_unknown(days, tmp_path, optimizer, first, mesh):
    for config in days:
        config.table_optimizer.name = optimizer
    rng, over = np.random.default_rng(3), sharding.make_mesh(1, 2)

    def draw(x):
        return jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding)

    with jax.set_mesh(over):
        experiment, whoami = bind(days[first], over)
        experiment = with_a_second_table(experiment)
        saved = jax.tree.map(draw, steps.state_shapes(experiment)) | {"step": np.int32(5)}
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(saved, whoami)
        checkpoints.finish()
        before = table_shapes(experiment.columns, experiment.spec)
    over = sharding.make_mesh(*mesh)
    with jax.set_mesh(over):
        experiment, whoami = bind(days[2], over)
        experiment = with_a_second_table(experiment)
        as_grown, rows = growth.as_grown(checkpoints.identity(5), experiment.spec)
        assert as_grown["encoding"] == whoami["encoding"]
        shapes = steps.state_shapes(experiment)
        found = growth.restore(experiment, checkpoints, 5, shapes, rows)
        fresh = experiment.table_optimizer.init(found["tables"])
    checkpoints.close()
    now = table_shapes(experiment.columns, experiment.spec)
    assert now["item:wide"][0] > max(256, before["item:wide"][0])
    assert rows == {"item": before["item"][0]}
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, shapes)
    saved, found, fresh = jax.device_get((saved, found, fresh))
    for name in ("model", "model_state", "opt", "step"):
        jax.tree.map(np.testing.assert_array_equal, found[name], saved[name])
    for name, table in found["tables"].items():
        old, new = before[name][0], now[name][0]
        were = saved["tables"][name], saved["table_opt"][name]
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[:old], y[:old]),  # noqa: B023
                     (table, found["table_opt"][name]), were)  # fmt: skip
        if new > old:
            unknown = np.tile(were[0][OOV], (new - old, 1))
            np.testing.assert_array_equal(table[old:new], unknown)
            assert not table[new:].any()
            jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[old:], y[old:]),  # noqa: B023
                         found["table_opt"][name], fresh[name])  # fmt: skip


def test_a_chain_of_days_trains_what_is_new(days, monday, tuesday, tmp_path):
    days[2].start_from = str(tuesday)
    train(days[2], tmp_path / "wednesday")
    chain = list(zip(days, (monday, tuesday, tmp_path / "wednesday"), strict=True))
    for day in (1, 2):
        old, new = (final_state(*run) for run in chain[day - 1 : day + 1])
        first, last = (open_data(c).spec.vocabularies["item"] for c in days[day - 1 : day + 1])
        assert last - first > 30 and len(new["tables"]["item"]) == 512
        moved = np.any(new["tables"]["item"][first:last] != old["tables"]["item"][OOV], axis=1)
        seen = np.any(new["table_opt"]["item"]["nu"][first:last], axis=1)
        assert moved.mean() > 0.2 and seen.tolist() == moved.tolist()
        assert not new["tables"]["item"][last:].any()
        about = Checkpoints(chain[day][1], read_only=True).identity(3)
        assert about["started_from"]["updates"] == 3 * day


def test_yesterdays_model_scores_what_it_lacks_as_unknown(days, monday, tuesday):
    asis = days[1].copy_and_resolve_references()
    asis.data.grow_vocabularies = False
    with jax.set_mesh(sharding.make_mesh(1, 1)):
        found = [serving.restore(config, monday)[1]["tables"]["item"] for config in (asis, days[1])]
    known, now = (open_data(config).spec.vocabularies["item"] for config in (asis, days[1]))
    assert [len(table) for table in found] == [256, 512] and now > 256 > known
    np.testing.assert_array_equal(found[1][:known], found[0][:known])
    np.testing.assert_array_equal(found[1][known:now], np.tile(found[0][OOV], (now - known, 1)))
    batch = open_data(days[1]).split("test").read(np.arange(40), 12)
    assert batch.candidate["item"].max() >= known
    results = [evaluate(config, monday, splits=("test",))["test"] for config in (asis, days[1])]
    for name in ("count", "positives", "auc", "logloss"):
        assert results[1][name] == pytest.approx(results[0][name], rel=1e-6)
    assert results[0]["data_hash"] != results[1]["data_hash"]
    today = evaluate(days[1], tuesday, splits=("test",), relative_to=monday)["test"]
    assert today["comparison"]["auc_difference"] == today["auc"] - results[1]["auc"]


def test_anything_but_a_continuation_is_refused(days, monday, tuesday, logs, tmp_path):
    says = "encoding.vocabularies.item: checkpoint"
    other = grown(days[0], logs[2], START + DAY // 2)  # another Tuesday
    assert "item" in open_data(other).spec.grown_from
    for config in (other, days[0]):
        config.start_from = str(tuesday)
        with pytest.raises(ConfigMismatch, match=says) as error:
            train(config, tmp_path / "new")
        assert "category" not in str(error.value)
        with pytest.raises(ConfigMismatch, match=says):
            evaluate(config, tuesday)
    with pytest.raises(ConfigMismatch, match=says):  # a run goes on with what it has
        train(days[1], monday)
    with pytest.raises(ConfigMismatch, match=f"where they grew, with start_from(.|\n)*{says}"):
        train(days[1], monday, resume_anyway=True)


def test_what_a_first_process_chooses_all_take(days, monday, tmp_path, monkeypatch):
    """As if in another process, which saw another best step while the other run went on."""
    days[1].start_from = str(monday)
    first = lambda value: value if value.ndim else np.array(3)  # noqa: E731
    monkeypatch.setattr(warm_start, "chosen", lambda *args: 99)
    monkeypatch.setattr(warm_start.processes, "from_first", first)
    over = sharding.make_mesh(1, 1)
    with jax.set_mesh(over):
        experiment, whoami = bind(days[1], over)
        with pytest.raises(ValueError, match="stop here"):
            monkeypatch.setattr(growth, "restore", stop)
            warm_start.start(experiment, whoami)


def stop(experiment, checkpoints, step, shapes, rows):
    assert step == 3 and rows["item"] < 256
    raise ValueError("stop here")
