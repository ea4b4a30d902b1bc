import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

from sparsectr_jax import chunking
from tests.sparsectr_jax.dense_reference import python_chunks, random_history

LENGTH = 20
time_chunks, fixed_chunks, sim_chunks = (
    jax.jit(f, static_argnames="num_chunks")
    for f in (chunking.time_chunks, chunking.fixed_chunks, chunking.sim_chunks)
)
WORKED = np.array([[0, 0, 0, 100, 110, 400, 405, 406, 2000, 2010]], np.int32)


def as_lists(chunks, row=0):
    """The chunks of a row as lists of indices, read from start, end and chunk_id alike."""
    out = []
    chunks = jax.tree.map(np.asarray, chunks)
    for p in range(chunks.valid.shape[1]):
        members = np.flatnonzero(chunks.chunk_id[row] == p + 1).tolist()
        if not chunks.valid[row, p]:
            assert not members and chunks.count[row, p] == 0
            assert chunks.start[row, p] == chunks.end[row, p] == -1
            assert chunks.mean_time[row, p] == 0
            continue
        assert members == list(range(chunks.start[row, p], chunks.end[row, p] + 1))
        assert chunks.count[row, p] == len(members)
        out.append(members)
    return out


def exact_means(times, lists):
    return [
        int(times[c[0]]) + sum(int(times[j]) - int(times[c[0]]) for j in c) // len(c) for c in lists
    ]


def test_worked_example_of_the_specification():
    mask = WORKED > 0
    chunks = time_chunks(WORKED, mask, num_chunks=3)
    assert as_lists(chunks) == [[3, 4], [5, 6, 7], [8, 9]]
    index, valid = chunking.transition_slots(chunks, 2)
    assert np.asarray(index)[np.asarray(valid)].tolist() == [3, 4, 6, 7, 8, 9]
    for num_chunks in (7, 10):
        chunks = time_chunks(WORKED, mask, num_chunks=num_chunks)
        assert as_lists(chunks) == [[i] for i in range(3, 10)]
        assert int(np.sum(chunks.valid)) == 7


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    valid=st.integers(0, LENGTH),
    num_chunks=st.sampled_from([1, 4, 26]),
    kind=st.sampled_from(["random", "tied"]),
    method=st.sampled_from(["time", "fixed"]),
)
def test_against_a_python_loop(seed, valid, num_chunks, kind, method):
    times, mask = random_history(np.random.default_rng(seed), LENGTH, valid, kind)
    cut = {"time": time_chunks, "fixed": fixed_chunks}[method]
    chunks = cut(times[None], mask[None], num_chunks=num_chunks)
    expected = python_chunks(times, mask, num_chunks, method)
    assert as_lists(chunks) == expected
    assert np.asarray(chunks.mean_time)[0, : len(expected)].tolist() == exact_means(times, expected)
    # The newest fixed chunk is full.
    if method == "fixed" and valid:
        assert len(expected[-1]) == -(-valid // num_chunks)


@settings(max_examples=10, derandomize=True, deadline=None)
@given(seed=st.integers(0, 2**31), valid=st.integers(0, LENGTH))
def test_sim_chunks_cut_where_cosines_are_lowest(seed, valid):
    rng = np.random.default_rng(seed)
    times, mask = random_history(rng, LENGTH, valid)
    x = np.repeat(rng.normal(size=(LENGTH // 2, 4)), 2, 0).astype(np.float32)  # equal pairs: no cut
    chunks = sim_chunks(x[None], times[None], mask[None], num_chunks=5)
    y = x.astype(np.float64)
    gaps = {0: 0.0}
    for i in range(1, LENGTH):
        cosine = y[i] @ y[i - 1] / np.linalg.norm(y[i]) / np.linalg.norm(y[i - 1])
        gaps[i] = 0.0 if i % 2 else 1 - cosine
    assert as_lists(chunks) == python_chunks(times, mask, 5, "sim", gaps)


def test_sim_chunks_pass_no_gradient():
    x = np.random.default_rng(0).normal(size=(1, 6, 3)).astype(np.float32)
    times, mask = np.arange(6, dtype=np.int32)[None], np.ones((1, 6), bool)

    def loss(x):
        return chunking.sim_chunks(x, times, mask, 3).mean_time.sum() * x.sum()

    grad = jax.jit(jax.grad(loss))(x)
    # d/dx of (a constant times sum x): the same everywhere.
    assert np.unique(np.asarray(grad)).size == 1


def test_mean_time_is_exact_at_epoch_seconds_and_the_widest_span():
    times = np.array([[1, 2, 2**31 - 2, 2**31 - 1]], np.int32)
    chunks = time_chunks(times, np.ones((1, 4), bool), num_chunks=1)
    assert int(chunks.mean_time[0, 0]) == (1 + 2 + 2**31 - 2 + 2**31 - 1) // 4
    # 8192 behaviours over 60 years in one chunk: sums of seconds would pass 2^43.
    rng = np.random.default_rng(0)
    times = np.sort(rng.integers(1, 2_000_000_000, (2, 8192)).astype(np.int32), 1)
    chunks = time_chunks(times, np.ones((2, 8192), bool), num_chunks=1)
    for row in range(2):
        assert int(chunks.mean_time[row, 0]) == int(times[row].astype(object).sum()) // 8192


def test_gaps_are_ordered_exactly_where_float32_would_tie():
    # Gaps of 20_000_001 and 20_000_002 s are equal in float32; the second must win.
    times = np.cumsum([[5, 20_000_001, 20_000_002, 1]], 1).astype(np.int32)
    chunks = time_chunks(times, np.ones((1, 4), bool), num_chunks=2)
    assert as_lists(chunks) == [[0, 1], [2, 3]]


def test_gaps_and_spans_that_pass_int32_are_cut_first_and_have_an_exact_mean():
    ends = [-(2**31), -(2**31) + 60, -5, 2**31 - 61, 2**31 - 1]
    times, mask = np.array([ends], np.int32), np.ones((1, 5), bool)
    assert as_lists(time_chunks(times, mask, num_chunks=3)) == [[0, 1], [2], [3, 4]]
    # One gap of more than 2^31 s, before an hour's.
    widest = np.array([[-(2**31), 2**31 - 4000, 2**31 - 400]], np.int32)
    assert as_lists(time_chunks(widest, np.ones((1, 3), bool), num_chunks=2)) == [[0], [1, 2]]
    # The most that the sums of a mean can hold: all but one behaviour 2^32 - 1 s after the first.
    times = np.full((1, chunking.MAX_HISTORY), 2**31 - 1, np.int32)
    times[0, 0] = -(2**31)
    chunks = time_chunks(times, np.ones(times.shape, bool), num_chunks=1)
    assert chunks.mean_time[0].tolist() == exact_means(times[0], as_lists(chunks))


@pytest.mark.parametrize("method", [time_chunks, fixed_chunks])
def test_left_padding_changes_nothing_but_positions(method):
    times, mask = random_history(np.random.default_rng(3), 12, 12)
    short = as_lists(method(times[None], mask[None], num_chunks=4))
    padded = np.pad(times, (9, 0))[None], np.pad(mask, (9, 0))[None]
    assert as_lists(method(*padded, num_chunks=4)) == [[i + 9 for i in c] for c in short]


def test_too_long_a_history_is_refused():
    shape = (1, chunking.MAX_HISTORY + 1)
    with pytest.raises(ValueError, match="32768 behaviours"):
        time_chunks(np.zeros(shape, np.int32), np.ones(shape, bool), num_chunks=2)
