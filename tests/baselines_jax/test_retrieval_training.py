"""SIM, ETA and SDIM as whole models: what they compare, trained, resumed, on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baselines_jax import eta, sdim, sim
from ctr_jax import evaluation
from ctr_jax.batch import EmbeddedBatch
from ctr_jax.training import train
from tests.ctr_jax.test_training import check_mesh, check_micro_batches, final_state
from tests.lrea_jax.cases import SPEC, batch_of


def small(module, **changes):
    config = module.default_config()
    config.update(embedding_width=3, width=8, head_hidden=(6,))
    config.update(changes)
    return config


def test_vectors_are_common_however_they_are_given():
    """As vectors, or as rows and the places in them."""
    model, columns = sdim.build(small(sdim), SPEC)
    embedded = batch_of(columns)
    rows = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    slots = np.random.default_rng(1).integers(0, 22, (5, 12)).astype(np.int32)
    rows, slots = jnp.asarray(rows), jnp.asarray(slots)
    vectors = {**embedded.vectors, "behaviour/item": jnp.pad(rows, ((0, 2), (0, 0)))[slots]}
    given = EmbeddedBatch(embedded.batch, vectors)
    others = {k: v for k, v in vectors.items() if k != "behaviour/item"}
    as_rows = EmbeddedBatch(
        embedded.batch, others, {"behaviour/item": rows}, {"behaviour/item": slots}
    )
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), given, False))
    assert variables["hashes"]["interest"]["hash"]["projections"].shape == (3, 48)
    variables = jax.tree.map(lambda x: np.ones(x.shape, np.float32), variables)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdim.SDIM, "__call__", lambda self, tokens, train: seen.append(tokens))
        for one in (given, as_rows):
            with pytest.raises(TypeError):  # the interest is None
                model.apply(variables, one, False)
    for tokens in seen:
        np.testing.assert_array_equal(tokens.common[0], vectors["candidate/item"])
        np.testing.assert_array_equal(tokens.common[1], vectors["behaviour/item"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eta", "sdim"])
def test_hashes_stay_through_training_and_restart(name, small_config, tmp_path):
    module = dict(eta=eta, sdim=sdim)[name]
    small_config.model = small(module)
    small_config.validate = False
    whole = train(small_config, tmp_path / "whole")
    assert whole["step"] == 6
    small_config.total_steps = 3
    train(small_config, tmp_path / "parts")
    small_config.total_steps = 6
    train(small_config, tmp_path / "parts")
    states = [final_state(small_config, tmp_path / part) for part in ("whole", "parts")]
    jax.tree.map(np.testing.assert_array_equal, *states)
    first = final_state(small_config, tmp_path / "parts", step=3)["model_state"]
    jax.tree.map(np.testing.assert_array_equal, first, states[0]["model_state"])
    assert np.abs(first["hashes"]["interest"]["hash"]["projections"]).min() > 0
    assert 0 <= evaluation.evaluate(small_config, tmp_path / "parts")["test"]["auc"] <= 1


TRAINED = dict(
    soft=(sim, dict(search="soft", top_k=3)),
    hard=(sim, dict(search="hard", top_k=3)),
    eta=(eta, dict(top_k=3)),
    sdim=(sdim, {}),
)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_mesh, check_micro_batches])
@pytest.mark.parametrize("name", TRAINED)
def test_meshes_and_micro_batches(name, check, small_config):
    module, changes = TRAINED[name]
    small_config.model = small(module, **changes)
    if name == "soft":  # of micro-batches the loss is a mean of means
        small_config.loss.weights.search = 0.5 if check is check_mesh else 0.0
        # Adam's first steps have one size whatever the gradient's: where that is rounding, they
        # differ.
        for optimizer in (small_config.optimizer, small_config.table_optimizer):
            optimizer.name, optimizer.learning_rate = "sgd", 0.1
    check(small_config, 4, 2)
