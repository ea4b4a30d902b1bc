"""HSTU against RecML's Keras layers on their JAX backend.

    pip install keras
    git clone https://github.com/AI-Hypercomputer/RecML && export RECML_DIR=$PWD/RecML

The blocks and the bias of recml/layers/keras/hstu.py are read from that checkout; without it, or
without keras, the test skips. That file also imports keras_hub, which they do not use: an empty
module stands in for it. RecML has no isolated targets, so each candidate is given to it as the last
item of a sequence of its own. Seen to pass with keras 3.15.1 and RecML c1d33cb.
"""

import os
import pathlib
import sys
import types
import warnings

import jax
import numpy as np
import pytest

from baselines_jax.hstu import HSTU
from tests.baselines_jax.cases import D, tokens_of

L, C, HEADS, LAYERS = 9, 2, 2, 2


@pytest.fixture(scope="module")
def recml():
    """recml/layers/keras/hstu.py as a module."""
    directory = pathlib.Path(os.environ.get("RECML_DIR") or "", "recml")
    if not os.environ.get("RECML_DIR") or not (directory / "layers/keras/hstu.py").is_file():
        pytest.skip("RECML_DIR names no checkout of github.com/AI-Hypercomputer/RecML")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say at import is not ours to mend
        patch.setenv("KERAS_BACKEND", "jax")
        keras = pytest.importorskip("keras", reason="keras is not installed")
        if keras.backend.backend() != "jax":
            pytest.skip("keras was imported before with another backend")
        # Its packages without what their __init__ files import.
        for name in ("", "layers", "layers.keras"):
            package = types.ModuleType(f"recml.{name}".rstrip("."))
            package.__path__ = [str(directory.joinpath(*name.split(".")))]
            patch.setitem(sys.modules, package.__name__, package)
        patch.setitem(sys.modules, "keras_hub", types.ModuleType("keras_hub"))
        from recml.layers.keras import hstu

        yield hstu


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype int64")
def test_hstu_is_recmls(recml):
    # One row per candidate: the history, then the candidate.
    tokens = tokens_of((9, 4, 0), L, C, seed=5)
    batch = tokens.batch
    histories = np.repeat(tokens.behaviours, C, 0)
    x = np.concatenate([histories, tokens.candidates.reshape(-1, 1, D)], 1)
    times = np.concatenate([batch.behaviour_time, batch.request_time[:, None]], 1)
    times = np.repeat(times, C, 0)
    mask = np.repeat(np.pad(batch.behaviour_mask, ((0, 0), (0, 1)), constant_values=True), C, 0)

    rng = np.random.default_rng(0)
    params = {}
    visible = np.tril(mask[:, :, None] & mask[:, None, :])
    for i in range(LAYERS):
        bias = recml.RelativeBucketedTimeAndPositionBasedBias()
        block = recml.HSTUBlock(num_heads=HEADS)
        bias(times), block.build(x.shape)
        # Weights away from their start; those of the norms stay at 1 and 0, where HSTU has none.
        for layer in (bias, block):
            for weight in layer.trainable_variables:
                if "norm" not in weight.path:
                    weight.assign(rng.normal(size=weight.shape) * 0.6)
        x = np.asarray(block(x, attention_mask=visible, attention_bias=bias(times)))

        def kernel(*names, block=block):
            kernels = [getattr(block, f"_{name}_dense").kernel for name in names]
            return dict(kernel=np.concatenate([np.asarray(k).reshape(D, D) for k in kernels], 1))

        by_distance = np.asarray(bias._positional_bias._pos_biases)[L::-1]  # [L] is of i = j
        params[f"layer_{i}"] = dict(
            uq=kernel("u", "q"),
            vk=kernel("v", "k"),
            out=kernel("output") | dict(bias=np.zeros(D, np.float32)),
            position=np.append(by_distance, np.float32(0)),
            time=np.asarray(bias._ts_w),
        )
    # RecML divides by the length it is given, that of history and candidate.
    module = HSTU(LAYERS, HEADS, length=L + 1)
    out = module.apply({"params": jax.device_put(params)}, tokens, False)
    np.testing.assert_allclose(out, x[:, -1].reshape(-1, C, D), rtol=1e-5, atol=1e-5)
