"""Batches by length bucket: their order against enumeration, their content against records read
one at a time, and what a model makes of them against batches of full length."""

import collections
import importlib
import itertools
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import seqvault
from ctr_jax import evaluation, sharding, steps
from ctr_jax.checkpoints import ConfigMismatch
from ctr_jax.config import identity
from ctr_jax.data import open_data
from ctr_jax.data.pipeline import bucket_at, by_length, eval_batches, eval_plan, train_batches
from ctr_jax.data.records import record_dtype
from ctr_jax.features import DataColumn, DataSpec
from ctr_jax.training import NonFiniteLoss, train
from tests.ctr_jax.data.test_pipeline import write

SPEC = DataSpec(
    "buckets", (DataColumn("behaviour", "item"), DataColumn("candidate", "item")), {}, 3
)
INLINE = DataSpec("inline", SPEC.columns, {}, 3, inline_history=9)
SIZE, LENGTH, BUCKETS = 90, 20, (2, 7, 20)
GOLDEN_ORDER = [(0, 1), (2, 0), (1, 0), (0, 0), (1, 2), (1, 1), (1, 5), (1, 3)]
GOLDEN_IDS = [[43, 25, 45, 65], [85, 30, 8, 76], [82, 10, 1, 51]]


@pytest.fixture(scope="module")
def ends():
    """Of 90 requests: unequal, some 0, some beyond the longest bucket."""
    return np.random.default_rng(1).permutation(np.r_[np.arange(31), np.arange(9), [1] * 50])


@pytest.fixture(scope="module")
def requests(tmp_path_factory, ends):
    """The 90 requests in three files, request_id counting them."""
    directory = tmp_path_factory.mktemp("buckets")
    rng = np.random.default_rng(0)
    rows = np.zeros(SIZE, record_dtype(SPEC))
    rows["request_id"], rows["end"] = np.arange(SIZE), ends
    rows["user"] = rng.integers(0, 4, SIZE)
    rows["num_candidates"] = rng.integers(1, 4, SIZE)
    rows["candidate/item"] = rng.integers(1, 50, (SIZE, 3))
    users = np.repeat(np.arange(4), 31)
    block = {"user": users, "time": np.arange(124), "item": rng.integers(1, 50, 124)}
    seqvault.bulk_build(directory / "v", seqvault.Schema({"item": np.int32}), 4, [block])
    return write(directory, SPEC, rows, seqvault.Snapshot(directory / "v"))


def take(stream, count):
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def bucket_of(length):
    return next(b for b in BUCKETS if min(length, LENGTH) <= b)


# ---- the order ----


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=5).filter(any),
    st.integers(1, 40),
    st.integers(0, 2**31),
    st.integers(1, 5),
)
def test_epochs_hold_what_whole_batches_of_each_bucket_there_are(sizes, batch_size, seed, epochs):
    at = 0
    for epoch in range(epochs):
        wanted = [
            (k, number)
            for k, size in enumerate(sizes)
            for number in range(epoch * size // batch_size, (epoch + 1) * size // batch_size)
        ]
        found = [bucket_at(at + i, sizes, batch_size, seed) for i in range(len(wanted))]
        assert sorted(found) == wanted
        at += len(wanted)


def test_a_far_step_has_neighbours_that_fit():
    sizes, batch_size, step = [1_000_003, 77, 0, 500_009], 512, 2**45
    found = [bucket_at(step + i, sizes, batch_size, 3) for i in range(6000)]
    assert len(set(found)) == 6000
    for k, size in enumerate(sizes):
        numbers = [number for which, number in found if which == k]
        assert len(numbers) == pytest.approx(6000 * size / sum(sizes), abs=0.05 * 6000)
        if numbers:  # about two epochs' batches, next to where the bucket's share of 2^45 steps is
            share = step * size / sum(sizes)
            assert abs(np.array(numbers) - share).max() < 4 * size / batch_size + 2


def test_the_buckets_are_shuffled_over_the_steps():
    sizes, batch_size = [6400, 6400], 32
    epochs = np.array([bucket_at(step, sizes, batch_size, 0)[0] for step in range(1200)])
    epochs = epochs.reshape(3, 400)
    changes = (np.diff(epochs) != 0).sum(1)  # 199.5 expected, standard deviation 10; sorted: 1
    assert (abs(changes - 199.5) < 40).all()
    assert (abs(epochs[:, :200].sum(1) - 100) < 40).all()
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = [bucket_at(step, sizes, batch_size, 1)[0] for step in range(400)]
    assert other != epochs[0].tolist()


def test_the_order_never_changes(requests):
    """Old runs must resume: the order is part of what a checkpoint means."""
    order = [bucket_at(step, [9, 13, 5], 4, 7) for step in range(8)]
    assert order == GOLDEN_ORDER
    stream = train_batches(
        requests, batch_size=4, history_length=LENGTH, length_buckets=BUCKETS, seed=7
    )
    assert [b.request_id.tolist() for b in take(stream, 3)] == GOLDEN_IDS


# ---- training batches ----


def test_a_batch_holds_one_bucket_and_is_cut_to_it(requests, ends):
    stream = train_batches(
        requests, batch_size=5, history_length=LENGTH, length_buckets=BUCKETS, seed=2
    )
    seen = set()
    for batch in take(stream, 40):
        (bucket,) = {bucket_of(end) for end in ends[batch.request_id]}
        assert batch.shape == (5, bucket, 3)
        assert_equal(batch, requests.read(batch.request_id, bucket))
        assert (batch.behaviour_mask.sum(1) == np.minimum(ends[batch.request_id], LENGTH)).all()
        seen.add(bucket)
    assert seen == set(BUCKETS)


@pytest.mark.parametrize("batch_size", [1, 4, 6, 25])
def test_every_request_comes_as_often_as_any_other_of_its_bucket(requests, ends, batch_size):
    """After B epochs no bucket holds a remainder: each request came exactly B times."""
    options = dict(batch_size=batch_size, history_length=LENGTH, length_buckets=BUCKETS, seed=2)
    times, at = collections.Counter(), 0
    sizes = collections.Counter(bucket_of(end) for end in ends)
    for epoch in range(1, batch_size + 1):
        whole = {bucket: epoch * size // batch_size for bucket, size in sizes.items()}
        stream = train_batches(requests, **options, start_step=at)
        for batch in take(stream, sum(whole.values()) - at):
            times.update(batch.request_id.tolist())
        at = sum(whole.values())
        for request, end in enumerate(ends):
            exact = whole[bucket_of(end)] * batch_size / sizes[bucket_of(end)]
            assert np.floor(exact) <= times[request] <= np.ceil(exact)
    assert set(times.values()) == {batch_size}


@pytest.mark.parametrize("start, workers", [(0, 0), (7, 1), (31, 3)])
def test_any_step_is_reached_at_once(requests, start, workers):
    options = dict(batch_size=8, history_length=LENGTH, length_buckets=BUCKETS, seed=1)
    late = take(train_batches(requests, **options, start_step=start, workers=workers), 4)
    through = take(train_batches(requests, **options), start + 4)[start:]
    for found, expected in zip(late, through, strict=True):
        assert_equal(found, expected)
    assert take(train_batches(requests, **options, start_step=2**40), 1)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_global_batch(requests, processes):
    options = dict(batch_size=8, history_length=LENGTH, length_buckets=BUCKETS)
    whole = take(train_batches(requests, **options, seed=5, start_step=3), 12)
    whole += take(eval_batches(requests, **options), 99)
    parts = []
    for p in range(processes):
        own = dict(process_index=p, process_count=processes)
        part = take(train_batches(requests, **options, **own, seed=5, start_step=3), 12)
        parts.append(part + take(eval_batches(requests, **options, **own), 99))
    for batch, *own in zip(whole, *parts, strict=True):
        assert_equal(jax.tree.map(lambda *x: np.concatenate(x), *own), batch)


# ---- evaluation batches ----


@pytest.mark.parametrize("batch_size", [1, 8, 200])
def test_evaluation_reads_every_request_once(requests, ends, batch_size):
    options = dict(batch_size=batch_size, history_length=LENGTH, length_buckets=BUCKETS)
    plan = eval_plan(requests, **options)
    batches = take(eval_batches(requests, **options), 999)
    assert sorted(np.concatenate([part.records for part in plan])) == list(range(SIZE))
    for batch, part in zip(batches, plan, strict=True):
        real = len(part.records)
        assert {bucket_of(end) for end in ends[part.records]} == {part.length}
        assert batch.shape == (batch_size, part.length, 3)
        cut = jax.tree.map(lambda x: x[:real], batch)  # noqa: B023
        assert_equal(cut, requests.read(part.records, part.length))
        assert not any(np.any(x[real:]) for x in jax.tree.leaves(batch))
    full = collections.Counter(part.length for part in plan if len(part.records) < batch_size)
    assert max(full.values(), default=0) <= 1


def test_lengths_of_inline_histories(tmp_path):
    rows = np.zeros(50, record_dtype(INLINE))
    rows["num_behaviours"] = np.random.default_rng(0).integers(0, 10, 50)
    rows["end"] = 77
    requests = write(tmp_path, INLINE, rows, None)
    assert requests.history_lengths().tolist() == rows["num_behaviours"].tolist()
    short, long = by_length(requests, 8, (3, 8))
    assert short.records.tolist() == np.flatnonzero(rows["num_behaviours"] <= 3).tolist()
    assert long.records.tolist() == np.flatnonzero(rows["num_behaviours"] > 3).tolist()


@pytest.mark.parametrize("buckets", [(7, 2, 20), (2, 2, 20), (2, 7), (0, 20), (7, 20, 30)])
def test_buckets_that_do_not_fit_are_refused(requests, buckets):
    message = "ascending lengths from 1 on, the last of them history_length = 20"
    options = dict(batch_size=8, history_length=LENGTH, length_buckets=buckets)
    with pytest.raises(ValueError, match=message):
        train_batches(requests, **options, seed=0)
    with pytest.raises(ValueError, match=message):
        eval_batches(requests, **options)


# ---- models: nothing depends on the bucket ----


def model_config(module, **fields):
    model = importlib.import_module(module).default_config()
    model.update(dict(embedding_width=4, width=8, head_hidden=(8,)) | fields)
    return model


LREA = dict(short_length=5, long_length=7, rank=3)
MODELS = {
    "sparsectr": dict(module="sparsectr_jax.model", num_layers=2, num_heads=2, num_chunks=3),
    "laser": dict(module="laser_jax.model", segment=5, num_layers=1, key_width=4, short_length=6),
    "din": dict(module="baselines_jax.din", attention_hidden=(6,)),
    "lrea": dict(module="lrea_jax.model", **LREA),
    "lrea_absorbed": dict(module="lrea_jax.model", training_path="absorbed", **LREA),
    "din_long": dict(module="baselines_jax.din_long", short_length=5, long_length=7),
    "hstu": dict(module="baselines_jax.hstu", num_layers=1, length=12),
    "transformer": dict(module="baselines_jax.transformer", num_layers=1, length=12),
    "twin": dict(module="baselines_jax.twin"),
}


def both_lengths(config, lengths):
    """(logits, scalars, new state) of one batch of requests with at most 3 behaviours, read at each
    of two lengths."""
    data = open_data(config)
    requests = data.split("train")
    short = np.flatnonzero(requests.history_lengths() <= 3)
    short = short[:: len(short) // config.batch_size][: config.batch_size]
    assert set(requests.history_lengths()[short].tolist()) == {0, 1, 2, 3}
    mesh = sharding.make_mesh(1, 1)
    with jax.set_mesh(mesh):
        experiment = steps.bind(config, data.spec, mesh, 10)
        score, step = steps.score_step(experiment), steps.train_step(experiment)
        found = []
        for length in lengths:
            batch = sharding.put_batch(requests.read(short, length), mesh)
            state = steps.init_state(experiment, 0)
            weights = {k: state[k] for k in ("tables", "model", "model_state")}
            logits = score(weights, batch)
            state, scalars = step(state, batch)
            found.append(jax.device_get((logits, scalars, state)))
    return found


@pytest.mark.parametrize(
    "name",
    [name if name == "din" else pytest.param(name, marks=pytest.mark.slow)
     for name in MODELS],
)  # fmt: skip
def test_a_step_does_not_depend_on_the_bucket(small_config, name):
    """Logits, loss, gradient norm, and the whole state after the step, momenta included."""
    small_config.model = model_config(**MODELS[name])
    small_config.batch_size = small_config.eval_batch_size = 32
    # Plain gradients: Adam's quotient turns rounding of a vanishing gradient into a whole step.
    small_config.optimizer.name = small_config.table_optimizer.name = "sgd"
    if name.startswith("lrea"):
        small_config.loss.weights.non_negativity = 0.1
    (logits, scalars, state), (short_logits, short_scalars, short_state) = both_lengths(
        small_config, (12, 4)
    )
    assert np.ptp(logits) > 1e-6
    np.testing.assert_allclose(short_logits, logits, rtol=1e-5, atol=1e-6)
    for key in ("loss", "logloss", "norm_gradients"):
        np.testing.assert_allclose(short_scalars[key], scalars[key], rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), short_state, state
    )


# ---- the loop ----


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(small_config, tmp_path):
    small_config.length_buckets = (4, 12)
    small_config.validate = False
    small_config.log_steps = 1

    def losses(name):
        lines = (tmp_path / name / "train.jsonl").read_text().splitlines()
        return [line["loss"] for line in map(json.loads, lines) if "loss" in line]

    train(small_config, tmp_path / "whole")
    small_config.total_steps = 3
    train(small_config, tmp_path / "parts")
    small_config.total_steps = 6
    train(small_config, tmp_path / "parts")
    assert losses("whole") == losses("parts") and len(losses("whole")) == 6
    small_config.length_buckets = ()
    with pytest.raises(ConfigMismatch, match="length_buckets: checkpoint"):
        train(small_config, tmp_path / "parts")


def test_runs_from_before_the_field_can_be_resumed(small_config):
    assert "length_buckets" not in identity(small_config, "hash")
    small_config.length_buckets = (4, 12)
    assert identity(small_config, "hash")["length_buckets"] == (4, 12)


def test_a_non_finite_loss_names_the_requests_of_its_bucket(small_config, tmp_path):
    small_config.length_buckets = (4, 12)
    small_config.validate = False
    small_config.optimizer.update(dict(name="sgd", learning_rate=1e30))
    with pytest.raises(NonFiniteLoss) as error:
        train(small_config, tmp_path)
    batch = next(
        train_batches(
            open_data(small_config).split("train"),
            batch_size=64, history_length=12, length_buckets=(4, 12), seed=0, start_step=0,
        )
    )  # fmt: skip
    assert "at step 1" in str(error.value)
    assert str(batch.request_id[:8].tolist()) in str(error.value)


def test_evaluation_gives_the_same_scores_in_stored_order(small_config):
    small_config.slices = ("candidate/category",)
    data, mesh = open_data(small_config), sharding.make_mesh(1, 1)
    with jax.set_mesh(mesh):
        experiment = steps.bind(small_config, data.spec, mesh, 10)
        state = steps.init_state(experiment, 0)
        weights = {k: state[k] for k in ("tables", "model", "model_state")}
        score = steps.score_step(experiment)
        found = []
        for buckets in ((), (2, 5, 12)):
            small_config.length_buckets = buckets
            log = evaluation.score_split(small_config, data, "train", mesh, score, weights)
            found.append((log.columns(), evaluation.reports.evaluate_scores(log, (), bins=0)))
    (whole, metrics), (bucketed, again) = found
    assert whole.keys() == bucketed.keys()
    lengths = data.split("train").history_lengths()  # whole ones, one candidate a record
    np.testing.assert_array_equal(whole["history_length"], lengths)
    assert lengths.max() > small_config.history_length
    for name in whole.keys() - {"logits"}:
        np.testing.assert_array_equal(bucketed[name], whole[name])
    np.testing.assert_allclose(bucketed["logits"], whole["logits"], rtol=1e-5, atol=1e-6)
    for name in evaluation.headline(metrics):
        assert again[name] == pytest.approx(metrics[name], abs=1e-6), name
