"""The whole model against model_reference.py, with every switch that changes a number."""

import functools

import jax
import numpy as np
import pytest

from ctr_jax.layers import dropped
from sparsectr_jax import model
from tests.sparsectr_jax import model_reference
from tests.sparsectr_jax.test_model import built, data_spec, embedded_batch, small

NO_USER = "no user columns"
# Every switch is away from its default somewhere, and no two that could hide each other together.
SETTINGS = {
    "default": {},
    "suan block and buckets, eps": {"block": "suan", "time_bucket": "suan", "norm_eps": 0.5},
    "per-head gates, none masked": {"gate": "per_head", "mask_empty_branches": False},
    "three layers, no user columns": {
        "num_layers": 3,
        "aggregate": "mean_residual",
        "logit_scale": "model",
        "transition_inclusive": False,
        NO_USER: True,
    },
    "another time zone and sparsity, eps": {
        "timezone_hours": -6.0,
        "num_chunks": 9,
        "num_transition": 1,
        "local_window": 20,  # beyond the history
        "norm_eps": 0.5,
        "num_layers": 1,
    },
    "A2, fixed chunks": {"use_global": False, "chunking": "fixed"},
    "A3, clock hours": {"use_transition": False, "hour_form": "clock"},
    "A4, fixed chunks": {"use_local": False, "chunking": "fixed"},
    "B2, mlp_mean": {"rel_time": False, "aggregate": "mlp_mean"},
    "B3, mean": {"rel_hour": False, "aggregate": "mean"},
    "B4, attn_pool": {"rel_weekend": False, "aggregate": "attn_pool"},
    "sim chunks": {"chunking": "sim"},
    "MLPs over d": {"aggregate_scope": "model", "gate": "per_head"},
    "mlp_mean over d, linear head": {
        "aggregate": "mlp_mean",
        "aggregate_scope": "model",
        "head_hidden": (),
        "num_layers": 1,
    },
    "head and FFN": {
        "head_activation": "tanh",
        "head_hidden": (5, 3),
        "ffn_multiplier": 2,
        "num_layers": 1,
    },
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS.keys())
def test_logits_equal_the_loops(changes):
    # A dropout, which evaluation has to leave out.
    config = small(dropout=0.3, **{k: v for k, v in changes.items() if k != NO_USER})
    module, variables, embedded = built(config, user=NO_USER not in changes)
    # Operation by operation: settings share what is compiled of each.
    got = module.apply(variables, embedded, False)[0]
    expected = model_reference.logits(config, variables, module.columns, embedded)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1  # nothing is compared that a saturated head has levelled


@pytest.mark.parametrize("block", ["pre_norm", "suan"])
def test_dropout_drops_every_update_and_nothing_else(block):
    config = small(dropout=0.4, block=block)
    module, variables, embedded = built(config)
    size, rngs = embedded.batch.shape[0], {"dropout": jax.random.key(5)}
    seeds = module.apply({}, size, rngs=rngs, method=_seeds)

    @functools.cache
    def factors(place, shape):
        return np.float64(dropped(0.4, seeds, place, np.ones((size, *shape), np.float32)))

    def drop(request, layer, place, x):
        return x * factors(4 * layer + place, x.shape)[request]

    got = module.apply(variables, embedded, True, rngs=rngs)[0]
    expected = model_reference.logits(config, variables, module.columns, embedded, drop)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert factors.cache_info().currsize == 8  # four of each block, each with a draw of its own


def _seeds(module, size):
    """What the model draws for the requests."""
    return jax.random.bits(module.make_rng("dropout"), (size,), np.uint32)


@pytest.mark.parametrize("rate", [0.5, 0.02])
def test_the_first_logit_is_that_of_the_base_rate(rate):
    module, columns = model.build(small(base_rate=rate), data_spec())
    embedded = embedded_batch(columns)

    @jax.jit  # which leaves nothing to be made but the bias
    def bias(key):
        head = module.init(key, embedded, False)["params"]["requests"]["head"]
        return head["logit"]["bias"]

    np.testing.assert_allclose(jax.nn.sigmoid(bias(jax.random.key(0))), rate, rtol=1e-5)
