"""HSTU's buckets of time, and its n."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines_jax import hstu, transformer
from ctr_jax.time_buckets import BUCKETS, bucket
from tests.baselines_jax import references
from tests.baselines_jax.cases import applied, tokens_of, variables_of
from tests.lrea_jax.cases import SPEC


@settings(deadline=None)
@given(st.lists(st.integers(-(2**31) + 1, 2**31 - 1), min_size=20, max_size=20))
def test_buckets_are_those_of_the_published_formula(seconds):
    # At a border of two buckets float32 may fall on either side of what float64 gives.
    logs = [math.log(max(abs(s), 1)) / 0.301 for s in seconds]
    out = np.asarray(bucket(np.array(seconds, np.int32)))
    assert all(
        min(int(x * (1 - 1e-6)), BUCKETS) <= b <= min(int(x * (1 + 1e-6)), BUCKETS)
        for x, b in zip(logs, out, strict=True)
    )


def test_buckets_by_hand():
    seconds = np.array([0, 1, -1, 2, 3, 60, 3600, 86400, -(2**31), 2**31 - 1], np.int32)
    # ln 2 = .69, ln 3 = 1.10, ln 60 = 4.09, ln 3600 = 8.19, ln 86400 = 11.37, ln 2^31 = 21.49.
    expected = [0, 0, 0, 2, 3, 13, 27, 37, 0, 71]  # -2^31 has no absolute value in int32
    np.testing.assert_array_equal(bucket(seconds), expected)


def test_n_is_the_configured_length():
    """The norm would hide n, were it not for its eps: so the sums are made small."""
    tokens, variables = tokens_of((11, 0, 6), 11, 3), variables_of("hstu")
    tiny = dict(variables["params"])
    for name, layer in tiny.items():
        tiny[name] = layer | dict(vk=dict(kernel=layer["vk"]["kernel"] * 1e-2))
    tiny = {"params": tiny}
    out = np.asarray(applied("hstu")(tiny, tokens))
    np.testing.assert_allclose(out, references.hstu(tiny, tokens), rtol=1e-4, atol=1e-4)
    assert np.abs(out - references.hstu(tiny, tokens, length=26)).max() > 1e-3


@pytest.mark.parametrize("module", [hstu, transformer])
@pytest.mark.parametrize("change", [dict(num_layers=0), dict(num_heads=0), dict(num_heads=3)])
def test_sizes_that_do_not_fit_are_refused(module, change):
    config = module.default_config()
    config.update(change)
    with pytest.raises(ValueError, match="num_heads"):
        module.build(config, SPEC)
