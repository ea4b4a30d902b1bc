import numpy as np
import pytest

from sparsectr_jax.temporal import slope_init


def test_slopes_start_as_printed():
    np.testing.assert_allclose(slope_init(8), [[2.0**-i for i in range(8)]] * 3)
    np.testing.assert_allclose(slope_init(8, "alibi"), [[2.0**-i for i in range(1, 9)]] * 3)
    np.testing.assert_array_equal(slope_init(8, "zero"), np.zeros((3, 8)))
    with pytest.raises(ValueError, match="slope_init"):
        slope_init(8, "none")
