"""The order of batches, and their content against records read one at a time."""

import itertools

import jax
import numpy as np
import pytest
from array_record.python import array_record_module
from hypothesis import given, settings
from hypothesis import strategies as st

import seqvault
from ctr_jax.data.errors import DataError
from ctr_jax.data.pipeline import eval_batches, shuffled, train_batches
from ctr_jax.data.records import Requests, record_dtype, request_features
from ctr_jax.features import DataColumn, DataSpec

SPEC = DataSpec(
    "pipeline", (DataColumn("behaviour", "item"), DataColumn("candidate", "item")), {}, 3
)
SIZE, LENGTH = 37, 5


def write(directory, spec, rows, histories):
    """A split of these records, in three files."""
    shards = []
    for number, part in enumerate(np.split(rows, [10, 30])):
        file = str(directory / f"{number}.array_record")
        writer = array_record_module.ArrayRecordWriter(file, "group_size:1")
        for row in part:
            writer.write(request_features(spec).serialize_example({"request": row}))
        writer.close()
        shards.append((file, len(part)))
    return Requests("train", tuple(shards), spec, histories)


@pytest.fixture(scope="module")
def requests(tmp_path_factory):
    """37 requests in three files, request_id counting them."""
    directory = tmp_path_factory.mktemp("requests")
    rng = np.random.default_rng(0)
    rows = np.zeros(SIZE, record_dtype(SPEC))
    rows["request_id"] = np.arange(SIZE)
    rows["user"], rows["end"] = rng.integers(0, 4, SIZE), rng.integers(0, 9, SIZE)
    rows["num_candidates"] = rng.integers(1, 4, SIZE)
    rows["candidate/item"] = rng.integers(1, 50, (SIZE, 3))
    users = np.repeat(np.arange(4), 8)
    block = {"user": users, "time": np.arange(32), "item": rng.integers(1, 50, 32)}
    seqvault.bulk_build(directory / "v", seqvault.Schema({"item": np.int32}), 4, [block])
    return write(directory, SPEC, rows, seqvault.Snapshot(directory / "v"))


def take(stream, steps):
    batches = list(itertools.islice(stream, steps))
    stream.close()
    return batches


def ids(stream, steps):
    return np.concatenate([batch.request_id for batch in take(stream, steps)]).tolist()


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.integers(1, 3000), st.integers(0, 2**62), st.integers(0, 2**31))
def test_every_epoch_is_a_permutation(size, seed, epoch):
    order = shuffled(np.arange(epoch * size, (epoch + 1) * size), size, seed)
    assert sorted(order.tolist()) == list(range(size))


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.integers(1, 2**40), st.integers(-5, 2**62), st.data())
def test_one_position_does_not_depend_on_its_neighbours(size, seed, data):
    positions = np.array(data.draw(st.lists(st.integers(0, 2**61), min_size=1, max_size=20)))
    order = shuffled(positions, size, seed)
    assert ((order >= 0) & (order < size)).all()
    assert order.tolist() == [int(shuffled(np.array([p]), size, seed)[0]) for p in positions]


def test_orders_look_random():
    """Uniform places, no memory of the neighbour, of the last epoch, or of the next seed."""
    size, epochs = 1000, 200
    orders = shuffled(np.arange(size * epochs), size, 3).reshape(epochs, size)
    other = shuffled(np.arange(size * epochs), size, 4).reshape(epochs, size)

    def correlation(x, y):
        return abs(np.corrcoef(x.ravel(), y.ravel())[0, 1])

    bound = 4 / np.sqrt(size * epochs)
    place = np.broadcast_to(np.arange(size), orders.shape)
    assert correlation(orders[:, 1:], orders[:, :-1]) < bound
    assert correlation(orders[1:], orders[:-1]) < bound
    assert correlation(orders, other) < bound
    assert correlation(orders, place) < bound
    cells = np.histogram2d(orders.ravel(), place.ravel(), bins=20)[0]
    expected = size * epochs / 400
    chi_square = ((cells - expected) ** 2 / expected).sum()
    assert abs(chi_square - 361) < 5 * np.sqrt(2 * 361)
    assert len({tuple(order) for order in orders}) == epochs


def test_the_order_never_changes():
    """Old runs must resume: the order is part of what a checkpoint means."""
    assert shuffled(np.arange(10), 10, 0).tolist() == [4, 7, 1, 5, 3, 8, 2, 9, 6, 0]


@settings(derandomize=True, deadline=None, max_examples=12)
@given(st.integers(1, 90), st.integers(0, 1000))
def test_epochs_follow_one_another_without_drop_or_repeat(requests, batch_size, seed):
    steps = -(-3 * SIZE // batch_size)
    stream = train_batches(requests, batch_size=batch_size, history_length=1, seed=seed)
    found = ids(stream, steps)
    assert len(found) == steps * batch_size
    epochs = [found[start : start + SIZE] for start in range(0, 3 * SIZE, SIZE)]
    assert all(sorted(epoch) == list(range(SIZE)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("start", [0, 1, 4, 9, 2**40])
def test_any_step_is_reached_at_once(requests, start, workers):
    options = {"batch_size": 8, "history_length": LENGTH, "seed": 1}
    late = train_batches(requests, **options, start_step=start, workers=workers)
    positions = (start + np.arange(4))[:, None] * 8 + np.arange(8)
    wanted = [requests.read(shuffled(p, SIZE, 1), LENGTH) for p in positions]
    for found, expected in zip(take(late, 4), wanted, strict=True):
        assert_equal(found, expected)
    if start < 10:
        through = take(train_batches(requests, **options), start + 4)[start:]
        for found, expected in zip(through, wanted, strict=True):
            assert_equal(found, expected)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_the_global_batch(requests, processes):
    options = {"batch_size": 8, "history_length": LENGTH}
    whole = take(train_batches(requests, **options, seed=5, start_step=3), 6)
    last = take(eval_batches(requests, **options), 9)
    train, evaluation = [], []
    for p in range(processes):
        own = {"process_index": p, "process_count": processes}
        train.append(take(train_batches(requests, **options, **own, seed=5, start_step=3), 6))
        evaluation.append(take(eval_batches(requests, **options, **own), 9))
    for parts, wanted in ((train, whole), (evaluation, last)):
        assert {len(part) for part in parts} == {len(wanted)}
        for step, batch in enumerate(wanted):
            joined = jax.tree.map(lambda *x: np.concatenate(x), *(part[step] for part in parts))
            assert_equal(joined, batch)


def test_seeds_give_different_orders(requests):
    options = {"batch_size": SIZE, "history_length": 1}
    assert len({tuple(ids(train_batches(requests, **options, seed=s), 1)) for s in range(9)}) == 9


@pytest.mark.parametrize("batch_size", [1, 8, 37, 50])
def test_evaluation_is_in_order_and_padded(requests, batch_size):
    batches = take(eval_batches(requests, batch_size=batch_size, history_length=LENGTH), 99)
    assert len(batches) == -(-SIZE // batch_size)
    assert {batch.shape for batch in batches} == {(batch_size, LENGTH, 3)}
    whole = jax.tree.map(lambda *x: np.concatenate(x), *batches)
    assert_equal(jax.tree.map(lambda x: x[:SIZE], whole), requests.read(np.arange(SIZE), LENGTH))
    assert not any(np.any(x[SIZE:]) for x in jax.tree.leaves(whole))
    assert whole.request_id[:SIZE].tolist() == list(range(SIZE))


def test_shards_are_read_as_one_sequence(requests):
    """Against array_record read one record at a time."""
    files = [array_record_module.ArrayRecordReader(file) for file in requests._files]
    single = [file.read([i])[0] for file in files for i in range(file.num_records())]
    width = record_dtype(SPEC).itemsize
    indices = np.random.default_rng(0).integers(0, SIZE, 60)
    wanted = [np.frombuffer(single[i][-width:], record_dtype(SPEC))[0] for i in indices]
    found = requests.records(indices)
    assert [row.tobytes() for row in found] == [row.tobytes() for row in wanted]


def test_wrong_arguments(requests):
    good = {"batch_size": 8, "history_length": 1, "seed": 0}
    for change, message in (
        ({"process_count": 3}, "multiple of the 3 processes"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"process_count": 2, "process_index": 2}, "process_index 2"),
        ({"start_step": -1}, "start_step is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            train_batches(requests, **(good | change))
    with pytest.raises(DataError, match="empty split"):
        train_batches(Requests("train", (), SPEC, None), **good)
    assert not take(eval_batches(Requests("t", (), SPEC, None), batch_size=8, history_length=1), 9)


def test_errors_of_a_worker_reach_the_caller(requests, monkeypatch):
    def fail(indices, history_length):
        raise DataError("a.array_record: damaged")

    monkeypatch.setattr(requests, "read", fail)
    stream = train_batches(requests, batch_size=8, history_length=1, seed=0)
    with pytest.raises(DataError, match="a.array_record"):
        next(stream)
    stream.close()
