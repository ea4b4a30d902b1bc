"""TWIN's choice of behaviours."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines_jax import twin
from ctr_jax import selection
from tests.lrea_jax.cases import SPEC

L = 9
LARGEST = jax.jit(selection.largest, static_argnums=2)
SCORES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, -1e-30, 3e38, -3e38, 1e9, -1e9])


@pytest.mark.parametrize("k", [1, 3, L - 1, L, 50])
@settings(max_examples=40, deadline=None)
@given(
    scores=st.lists(SCORES, min_size=L, max_size=L),
    mask=st.lists(st.booleans(), min_size=L, max_size=L),
)
def test_the_k_largest_valid_ones_the_newer_of_equals(k, scores, mask):
    ranked = sorted((s, i) for i, s in enumerate(scores) if mask[i])
    expected = np.zeros(L, bool)
    expected[[i for _, i in ranked[-k:]]] = True
    out = LARGEST(np.array([scores], np.float32), np.array([mask]), k)
    np.testing.assert_array_equal(out[0], expected)


@pytest.mark.parametrize("change", [dict(top_k=0), dict(num_heads=0), dict(num_heads=3)])
def test_sizes_that_do_not_fit_are_refused(change):
    config = twin.default_config()
    config.update(change)
    with pytest.raises(ValueError, match="num_heads"):
        twin.build(config, SPEC)
