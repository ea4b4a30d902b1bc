"""The frame of the baselines: what changes nothing, and what it does without a history."""

import jax
import numpy as np
import pytest

from baselines_jax import base, din, hstu, transformer, twin
from tests.lrea_jax.cases import QUICK, SPEC, batch_of, changed

MODULES = dict(base=base, din=din, hstu=hstu, transformer=transformer, twin=twin)
CHANGED = dict(base=dict(short_length=4), twin=dict(top_k=3))


def built(name, **kwargs):
    module = MODULES[name]
    config = module.default_config()
    config.update(embedding_width=3, width=8, head_hidden=(6,))
    config.update(CHANGED.get(name, {}))
    config.lock()
    model, columns = module.build(config, SPEC)
    embedded = batch_of(columns, **kwargs)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(1), embedded, False))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(2)
    leaves = [np.abs(rng.normal(size=x.shape)).astype(np.float32) * 0.3 for x in leaves]
    apply = jax.jit(lambda v, x: model.apply(v, x, False)[0], compiler_options=QUICK)
    return apply, jax.tree.unflatten(tree, leaves), embedded


CHANGES = {
    "padding": dict(padding=5),
    "permuted candidates": dict(candidates=[2, 0, 1]),
    "fewer requests and candidates": dict(rows=slice(1, 4), candidates=[1]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", MODULES)
def test_invariances(name, change):
    apply, variables, embedded = built(name)
    logits = np.asarray(apply(variables, embedded))
    what = CHANGES[change]
    expected = logits[what.get("rows", slice(None))][:, what.get("candidates", slice(None))]
    other = apply(variables, changed(embedded, **what))
    np.testing.assert_allclose(other, expected, rtol=1e-5, atol=1e-5)


def test_base_reads_the_most_recent_behaviours_only():
    apply, variables, embedded = built("base")
    logits = np.asarray(apply(variables, embedded))
    vectors = dict(embedded.vectors)
    for key in [k for k in vectors if k.startswith("behaviour/")]:
        vectors[key] = vectors[key].copy()
        vectors[key][:, :-4] += 1.0
    np.testing.assert_array_equal(apply(variables, embedded.replace(vectors=vectors)), logits)
    for key in [k for k in vectors if k.startswith("behaviour/")]:
        vectors[key][:, -4] += 1.0
    assert np.abs(apply(variables, embedded.replace(vectors=vectors)) - logits)[0].max() > 1e-3


@pytest.mark.parametrize("name", MODULES)
def test_a_history_of_length_zero_gives_finite_logits(name):
    apply, variables, embedded = built(name, length=0, lengths=(0, 0))
    assert np.isfinite(apply(variables, embedded)).all()


def test_an_unknown_activation_is_refused():
    config = din.default_config()
    config.activation = "swish"
    with pytest.raises(ValueError, match="activation"):
        din.build(config, SPEC)
