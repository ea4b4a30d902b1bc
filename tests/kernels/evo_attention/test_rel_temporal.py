import datetime
import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from kernels.evo_attention.rel_temporal import RelTemporal, floor_log2, half_sine
from tests.sparsectr_jax.dense_reference import python_terms

SHANGHAI = datetime.timezone(datetime.timedelta(hours=8))


def epoch(*date):
    return int(datetime.datetime(*date, tzinfo=SHANGHAI).timestamp())


def test_floor_log2_is_exact_at_powers_of_two():
    powers = [2**k for k in range(31)]
    x = np.array([0, *powers, *[p - 1 for p in powers[1:]]], np.int32)
    expected = [0, *range(31), *[max(k - 1, 0) for k in range(1, 31)]]
    assert np.asarray(floor_log2(x)).tolist() == expected
    assert int(floor_log2(np.int32(2**31 - 1))) == 30


def test_hour_term_is_a_half_sine_and_symmetric():
    hours = np.arange(25)
    got = np.asarray(half_sine(hours))
    np.testing.assert_allclose(got, [math.sin(math.pi * h / 24) for h in hours], atol=2e-7)
    assert (got == got[::-1]).all()


def test_weekend_begins_on_friday_midnight_and_ends_on_sunday_midnight():
    rel = RelTemporal()
    cases = {
        epoch(2017, 5, 5, 23, 59, 59): False,  # Friday
        epoch(2017, 5, 6, 0, 0, 0): True,
        epoch(2017, 5, 6, 23, 59, 59): True,  # Saturday
        epoch(2017, 5, 7, 0, 0, 0): True,
        epoch(2017, 5, 7, 23, 59, 59): True,  # Sunday
        epoch(2017, 5, 8, 0, 0, 0): False,
    }
    assert np.asarray(rel.is_weekend(np.array(list(cases), np.int32))).tolist() == list(
        cases.values()
    )
    utc = RelTemporal(timezone_hours=0)
    assert not bool(utc.is_weekend(np.int32(epoch(2017, 5, 6))))  # still Friday in UTC
    half = RelTemporal(timezone_hours=5.5)
    assert bool(half.is_weekend(np.int32(epoch(2017, 5, 6, 2, 30))))
    assert not bool(half.is_weekend(np.int32(epoch(2017, 5, 6, 2, 29, 59))))


def test_weekend_near_the_end_of_int32():
    last = 2**31 - 1  # 2038-01-19 11:14:07 +8, a Tuesday
    assert not bool(RelTemporal().is_weekend(np.int32(last)))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(t_i=st.integers(0, 2**31 - 1), t_j=st.integers(0, 2**31 - 1))
def test_terms_against_python_integers(t_i, t_j):
    got = [float(x[0]) for x in RelTemporal().pair_terms(np.int32([t_i]), np.int32([t_j]))]
    np.testing.assert_allclose(got, python_terms(t_i, t_j), atol=2e-7)


def test_clock_hours_differ_from_elapsed_hours_by_at_most_one():
    rng = np.random.default_rng(0)
    t_i, t_j = rng.integers(0, 2**31 - 1, (2, 2000)).astype(np.int32)
    rel = RelTemporal(hour_form="clock")
    hours = [
        [datetime.datetime.fromtimestamp(int(t), SHANGHAI).hour for t in x] for x in (t_i, t_j)
    ]
    np.testing.assert_array_equal(rel.hour_of_day(t_i), hours[0])
    distance = np.abs(np.subtract(*hours))
    np.testing.assert_allclose(
        rel.pair_terms(t_i, t_j)[1], [math.sin(math.pi * h / 24) for h in distance], atol=2e-7
    )


def test_suan_buckets():
    rel = RelTemporal(bucket="suan")
    for delta in (0, 1, 2, 3, 10, 1000, 86_400, 10_000_000):
        got = float(rel.pair_terms(np.int32([delta]), np.int32([0]))[0][0])
        assert got == int(math.log(max(delta, 1)) / 0.301)


def test_parts_and_refusals():
    assert RelTemporal(hour=False).parts == (0, 2)
    assert RelTemporal(False, False, False).pair_terms(np.int32([1]), np.int32([2])) == []
    with pytest.raises(ValueError, match="hour_form"):
        RelTemporal(hour_form="day")
    with pytest.raises(ValueError, match="time_bucket"):
        RelTemporal(bucket="ln")
