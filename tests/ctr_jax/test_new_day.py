"""A log that has grown by a day: given vocabularies, yesterday's model on it, a warm start."""

import json
import shutil

import jax
import numpy as np
import optax
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from ctr_jax import evaluation, serving, sharding, steps, warm_start
from ctr_jax.checkpoints import Checkpoints, ConfigMismatch, refuse_mismatch
from ctr_jax.config import ConfigError, identity, scoring
from ctr_jax.data import open_data
from ctr_jax.data.errors import DataError
from ctr_jax.data.prepare import prepare
from ctr_jax.data.records import PreparedData
from ctr_jax.evaluation import evaluate
from ctr_jax.features import DataSpec
from ctr_jax.training import train
from tests.ctr_jax.data import test_alibaba, test_eleme, test_last_event
from tests.ctr_jax.test_training import final_state, log_lines

DAY = 86400
END, NEW_ITEM = 1_000_000_000 + 20 * DAY, 1000


@pytest.fixture(scope="module")
def grown_log(small_log, tmp_path_factory):
    """small_log with a day more: half of its events of new items, some of a new user."""
    directory = tmp_path_factory.mktemp("grown_log")
    old = pq.read_table(small_log / "events.parquet")
    rng, rows = np.random.default_rng(1), 200
    item = np.where(rng.random(rows) < 0.5, rng.integers(0, 40, rows), NEW_ITEM)
    time = END + np.sort(rng.integers(0, DAY, rows))
    new = dict(user=rng.integers(0, 81, rows), item=item, category=item % 4,
               rating=rng.integers(1, 6, rows), ts=time)  # fmt: skip
    pq.write_table(pa.concat_tables([old, pa.table(new)]), directory / "events.parquet")
    shutil.copy(small_log / "users.parquet", directory)
    return directory


@pytest.fixture
def first_day(small_config):
    """small_config with every kind of column."""
    data = small_config.data
    data.candidate["weight"], data.behaviour["stars"] = "ts % 97", "rating"
    data.kinds = {"candidate/weight": "standard", "behaviour/stars": "quantile"}
    data.buckets = 4
    return small_config


@pytest.fixture
def next_day(first_day, grown_log):
    """The page of the day after, its vocabularies those of the first."""
    config = first_day.copy_and_resolve_references()
    config.data.raw_dir = str(grown_log)
    config.data.train, config.data.test = f"ts < {END}", f"ts >= {END}"
    config.data.vocabularies_from = str(prepare(first_day.data))
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def yesterday(first_day, runs):
    """The workdir of a run on the first day; trained once."""
    train(first_day, runs / "yesterday")
    return runs / "yesterday"


def all_of(config, split):
    """(raw item, batch) of a split's requests, in its order."""
    requests = open_data(config).split(split)
    batch = requests.read(np.arange(len(requests)), config.history_length)
    events = pq.read_table(f"{config.data.raw_dir}/events.parquet")
    events = events.filter(pc.greater_equal(events["ts"], END))
    order = np.lexsort([events["user"].to_numpy(), events["ts"].to_numpy()])
    return events["item"].to_numpy()[order], batch


def test_known_values_keep_their_ids_and_new_ones_are_out_of_vocabulary(first_day, next_day):
    old, new = open_data(first_day), open_data(next_day)
    assert new.spec.encoding == old.spec.encoding and new.spec.encoding_hash
    assert new.spec.vocabularies == old.spec.vocabularies
    assert new.spec.content_hash != old.spec.content_hash
    for path in (old.path / "vocabularies").iterdir():
        assert pq.read_table(new.path / "vocabularies" / path.name) == pq.read_table(path)
    reports = [json.loads((data.path / "report.json").read_text()) for data in (old, new)]
    standardised = [report["standardised (mean, scale)"] for report in reports]
    assert standardised[0] == standardised[1] and "known" not in reports[0]
    assert reports[1]["known"]["item"] == 1.0  # of what would be fitted on, the days before

    items = pq.read_table(old.path / "vocabularies" / "item.parquet")
    id_of = dict(zip(items["value"].to_pylist(), items["id"].to_pylist(), strict=True))
    raw, batch = all_of(next_day, "test")
    found = batch.candidate["item"][:, 0].tolist()
    assert found == [id_of.get(item, 1) for item in raw] and NEW_ITEM in raw
    assert 1 in batch.behaviour["item"]  # of histories too

    # Fitted anew, the same values have other ids.
    next_day.data.vocabularies_from = ""
    anew = open_data(next_day).spec
    assert anew.encoding["vocabularies"]["item"] != old.spec.encoding["vocabularies"]["item"]
    assert anew.encoding["columns"] == old.spec.encoding["columns"]


def test_the_content_hash_is_that_of_before_encodings_were_recorded(small_config):
    spec = open_data(small_config).spec
    assert spec.content_hash.startswith("81afb54cd76a7e7a38bee36a8e0c5b7e") and spec.encoding


def test_a_data_set_is_what_its_vocabularies_hold_not_where_they_lie(next_day, tmp_path):
    given = next_day.data.vocabularies_from
    path = prepare(next_day.data)
    next_day.data.vocabularies_from = str(shutil.copytree(given, tmp_path / "elsewhere"))
    assert prepare(next_day.data) == path
    # Nor how often its values were seen where it was fitted.
    ids = tmp_path / "elsewhere" / "vocabularies" / "item.parquet"
    pq.write_table(pq.read_table(ids).set_column(2, "count", [[7] * len(pq.read_table(ids))]), ids)
    next_day.data.prepared_dir = str(tmp_path / "prepared")
    assert open_data(next_day).spec == DataSpec.load(path / "spec.json")
    next_day.data.prepared_dir = str(path.parents[2])
    next_day.data.vocabularies_from = str(path)  # the day after that takes them from this one
    assert prepare(next_day.data) == path
    next_day.data.vocabularies_from = ""
    assert prepare(next_day.data) != path


def test_more_vocabularies_than_needed_are_fine_and_other_columns_named(next_day, tmp_path):
    data = next_day.data
    del data.candidate["category"]
    fewer = DataSpec.load(prepare(data) / "spec.json")
    assert "category" in fewer.vocabularies  # of the behaviours
    data.candidate["shop"] = "category"
    data.kinds = {"candidate/weight": "quantile"}
    data.vocabularies = {"behaviour/category": "kind"}
    with pytest.raises(DataError) as error:
        prepare(data)
    for says in (
        "no column 'candidate/shop'",
        "'candidate/weight' is, there and here, 'standard' and 'quantile' weight",
        "'behaviour/stars' is, there and here, 'quantile' stars and 'id' stars",
        "'behaviour/category' is, there and here, 'id' category and 'id' kind",
    ):
        assert says in str(error.value)
    data.vocabularies_from = str(tmp_path / "none")
    with pytest.raises(DataError, match="none: no directory of a prepared data set"):
        prepare(data)


def test_numbers_and_texts_that_are_written_alike_are_one_value(next_day):
    wanted = all_of(next_day, "test")[1].candidate["item"]
    encoding = open_data(next_day).spec.encoding
    columns = ("candidate", "behaviour")
    for column in columns:
        next_day.data[column]["item"] = "CAST(item AS VARCHAR)"
    np.testing.assert_array_equal(all_of(next_day, "test")[1].candidate["item"], wanted)
    assert open_data(next_day).spec.encoding == encoding
    for column in columns:  # 7.0 is not 7: none would be known
        next_day.data[column]["item"] = "CAST(item AS DOUBLE)"
    with pytest.raises(DataError, match="'item' there is of whole numbers.* fractions or texts"):
        prepare(next_day.data)


@pytest.mark.parametrize("builder", ["alibaba", "amazon", "eleme"])
def test_every_builder_encodes_by_given_vocabularies_as_by_the_same_fitted(builder, tmp_path):
    raw = tmp_path / "raw"
    if builder == "amazon":
        test_last_event.write_amazon(raw, *test_last_event.draw_amazon(0))
        config = test_last_event.config(builder, tmp_path)
    else:
        module = {"alibaba": test_alibaba, "eleme": test_eleme}[builder]
        module.write(raw, module.draw(0))
        config = module.config(tmp_path)
    fitted = PreparedData.open(prepare(config))
    options = {"min_count": 9, "buckets": 5} if builder != "amazon" else {"min_count": 9}
    given = PreparedData.open(prepare({**config, **options, "vocabularies_from": fitted.path}))
    assert given.path != fitted.path and given.spec.encoding == fitted.spec.encoding
    for split, count in fitted.spec.splits.items():
        records = [data.split(split).records(np.arange(count)) for data in (fitted, given)]
        np.testing.assert_array_equal(*records)
    if fitted.histories is not None:
        assert given.histories.content_hash == fitted.histories.content_hash


def logits_of(config, workdir, data, split):
    """{(user, time): logit} of a split, by the newest checkpoint."""
    mesh = sharding.make_mesh(1, 1)
    with jax.set_mesh(mesh):
        experiment, weights, _ = serving.restore(config, workdir, step=6)
        score = steps.score_step(experiment)
        scores = evaluation.score_split(config, data, split, mesh, score, weights).columns()
    requests = data.split(split)
    batch = requests.read(np.arange(len(requests)), 1)
    keys = zip(batch.user_id.tolist(), batch.request_time.tolist(), strict=True)
    return dict(zip(keys, scores["logits"].tolist(), strict=True))


def test_yesterdays_model_on_todays_data(first_day, next_day, yesterday):
    old, new = open_data(first_day), open_data(next_day)
    measured = Checkpoints(yesterday, read_only=True).metrics(6)
    results = evaluate(next_day, yesterday, step=6, splits=("valid", "test"))
    assert results["test"]["count"] == len(new.split("test"))
    assert results["test"]["data_hash"] == new.spec.content_hash
    assert results["test"]["encoding_hash"] == old.spec.encoding_hash
    # What chooses a checkpoint stays that of its own data.
    assert Checkpoints(yesterday, read_only=True).metrics(6) == measured
    today = {**logits_of(next_day, yesterday, new, "train"),
             **logits_of(next_day, yesterday, new, "valid")}  # fmt: skip
    before = logits_of(first_day, yesterday, old, "test")
    both = before.keys() & today.keys()
    assert len(both) > 300
    np.testing.assert_allclose([today[k] for k in both], [before[k] for k in both], rtol=1e-6)


def test_data_of_other_vocabularies_are_refused(first_day, next_day, yesterday, tmp_path):
    next_day.data.vocabularies_from = ""
    says = r"encoding.vocabularies.item: checkpoint"
    for refused in (
        lambda: evaluate(next_day, yesterday, step=6),
        lambda: serving.restore(next_day, yesterday),
        lambda: train(next_day, yesterday),
        lambda: train(next_day, yesterday, resume_anyway=True),
    ):
        with pytest.raises(ConfigMismatch, match=says):
            refused()
    next_day.start_from = str(yesterday)
    with pytest.raises(ConfigMismatch, match=says) as error:
        train(next_day, tmp_path / "new")
    assert "vocabularies.rating" not in str(error.value)  # its counts alone are others
    assert not list((tmp_path / "new").glob("checkpoints/*"))


def test_resuming_on_other_data_of_the_same_vocabularies(next_day, yesterday, tmp_path):
    workdir = shutil.copytree(yesterday, tmp_path / "run")
    next_day.total_steps = 8
    with pytest.raises(ConfigMismatch, match="data: checkpoint") as error:
        train(next_day, workdir)
    assert "encoding" not in str(error.value)
    assert train(next_day, workdir, resume_anyway=True)["step"] == 8


def test_what_is_from_before_encodings_were_recorded_goes_by_its_data(first_day, tmp_path):
    spec = open_data(first_day).spec
    spec.save(tmp_path / "spec.json")
    assert DataSpec.load(tmp_path / "spec.json") == spec
    fields = json.loads((tmp_path / "spec.json").read_text())
    del fields["encoding"]
    (tmp_path / "spec.json").write_text(json.dumps(fields))
    old = DataSpec.load(tmp_path / "spec.json")
    assert old.encoding == {} and old.encoding_hash == ""
    before = identity(first_day, old.content_hash, old.encoding)
    now = identity(first_day, spec.content_hash, spec.encoding)
    other = identity(first_day, "another", spec.encoding)
    assert before == identity(first_day, old.content_hash)
    refuse_mismatch(before, now, tmp_path)
    refuse_mismatch(*scoring(before, now), tmp_path)
    refuse_mismatch(*scoring(other, now), tmp_path)
    for pair in ((other, now), (before, other), scoring(before, other)):
        with pytest.raises(ConfigMismatch, match="data: checkpoint"):
            refuse_mismatch(*pair, tmp_path)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)])
def test_a_warm_start_begins_with_the_other_runs_state(first_day, next_day, yesterday, mesh):
    old = final_state(first_day, yesterday, 3)
    next_day.mesh.data, next_day.mesh.table = mesh
    next_day.start_from = f"{yesterday}@3"
    spec = open_data(next_day).spec
    whoami = identity(next_day, spec.content_hash, spec.encoding)
    over = sharding.make_mesh(*mesh)
    with jax.set_mesh(over):
        experiment = steps.bind(next_day, spec, over, 6)
        state, origin = warm_start.start(experiment, whoami)
        wanted = jax.tree.map(lambda x: x.sharding, steps.state_shapes(experiment))
    assert jax.tree.map(lambda x: x.sharding, state) == wanted
    state = jax.device_get(state)
    assert state["step"] == 0 and origin["started_from"]["updates"] == 3
    for name in ("tables", "table_opt", "model", "model_state"):
        jax.tree.map(np.testing.assert_array_equal, state[name], old[name])
    adam, schedule = state["opt"]
    jax.tree.map(np.testing.assert_array_equal, adam, old["opt"][0])
    assert isinstance(schedule, optax.ScaleByScheduleState)
    assert (adam.count, schedule.count, old["opt"][1].count) == (3, 0, 3)


def test_moments_taken_over_move_rows_as_in_the_run_they_are_of(first_day, yesterday):
    first_day.start_from = f"{yesterday}@3"
    mesh, spec = sharding.make_mesh(1, 1), open_data(first_day).spec
    whoami = identity(first_day, spec.content_hash, spec.encoding)
    batch = open_data(first_day).split("train").read(np.arange(64), 12)
    with jax.set_mesh(mesh):
        experiment = steps.bind(first_day, spec, mesh, 6)
        state, origin = warm_start.start(experiment, whoami)
        earlier = warm_start.updates_before(origin)
        moved, _ = steps.train_step(experiment, earlier)(state, batch)
        shapes = steps.state_shapes(experiment)
        old = Checkpoints(yesterday, read_only=True).restore(shapes, None, step=3)
        expected, _ = steps.train_step(experiment)(old, batch)
    assert (moved["step"], expected["step"]) == (1, 4)
    for name in ("tables", "table_opt", "model"):
        jax.tree.map(np.testing.assert_array_equal, moved[name], expected[name])


def test_a_warm_start_killed_and_resumed_equals_an_uninterrupted_one(
    next_day, yesterday, tmp_path, monkeypatch
):
    source = shutil.copytree(yesterday, tmp_path / "source")
    next_day.start_from = str(source)
    for of in (next_day.optimizer, next_day.table_optimizer):
        of.update(dict(schedule="linear", warmup_steps=2))
    earlier = []
    make = steps.train_step
    monkeypatch.setattr(steps, "train_step", lambda *args: earlier.append(args[1]) or make(*args))
    done = train(next_day, tmp_path / "whole")
    assert done["step"] == 6
    next_day.total_steps = 3
    with monkeypatch.context() as patch:  # as if it were to end at 6
        patch.setattr("ctr_jax.optimizers.schedule", of_6_steps())
        train(next_day, tmp_path / "parts")
    shutil.rmtree(source)
    next_day.total_steps = 6
    train(next_day, tmp_path / "parts")
    best = Checkpoints(yesterday, read_only=True).best("valid/auc")
    assert earlier == [best] * 3
    whole, parts = (final_state(next_day, tmp_path / name) for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    logs = [
        [(r["step"], r["loss"]) for r in log_lines(tmp_path / name) if "loss" in r]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]
    identities = [
        Checkpoints(tmp_path / name, read_only=True).identity(6) for name in ("whole", "parts")
    ]
    assert identities[0] == identities[1]
    assert identities[0]["started_from"]["updates"] == best


def of_6_steps():
    from ctr_jax import optimizers

    original = optimizers.schedule
    return lambda config, total_steps: original(config, 6)


def test_a_start_from_nothing_says_so(next_day, yesterday, tmp_path):
    assert warm_start.parse("runs/a@b") == (warm_start.Path("runs/a@b"), None)
    assert warm_start.parse("runs/a@12") == (warm_start.Path("runs/a"), 12)
    for source, says in (
        (tmp_path / "none", "start_from .*train it first"),
        (f"{yesterday}@4", "no checkpoint of step 4"),
    ):
        next_day.start_from = str(source)
        with pytest.raises(ConfigError, match=says):
            train(next_day, tmp_path / "new")
    next_day.start_from = str(yesterday)
    next_day.model.width = 4
    with pytest.raises(ConfigMismatch, match="model.width: checkpoint 8, config 4"):
        train(next_day, tmp_path / "new")
    next_day.model.width = 8
    next_day.table_optimizer.name = "sgd"
    with pytest.raises(ConfigMismatch, match="table_opt/item/mu"):
        train(next_day, tmp_path / "new")
