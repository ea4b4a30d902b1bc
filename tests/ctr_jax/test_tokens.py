"""Tokens from rows and slots against loops over behaviours, and whole steps against vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctr_jax import embedding, sharding, steps
from ctr_jax.batch import RequestBatch
from ctr_jax.data import open_data, pipeline
from ctr_jax.features import Column
from ctr_jax.tokens import BehaviourToken

# 24 requests x 10 behaviours: "kind" is on the dense path, "item" is not, "price" has no table.
COLUMNS = (
    Column("behaviour", "kind", "kind", 3),
    Column("behaviour", "item", "item", 5),
    Column("behaviour", "price"),
    Column("candidate", "kind", "kind", 3),
)
KEYS = tuple(c.key for c in COLUMNS if c.group == "behaviour")
ROWS = {"kind": 7, "item": 300}


def make_batch(rng, b=24, length=10):
    mask = np.arange(length) >= length - rng.integers(0, length + 1, b)[:, None]
    ids = {t: np.where(mask, rng.integers(1, n, (b, length)), 0) for t, n in ROWS.items()}
    zeros, values = np.zeros(b, np.int32), rng.normal(size=(b, length))
    return RequestBatch(
        user_id=zeros,
        request_id=zeros,
        request_time=zeros,
        user={},
        context={},
        behaviour={k: x.astype(np.int32) for k, x in ids.items()}
        | {"price": values.astype(np.float32)},
        behaviour_time=np.zeros((b, length), np.int32),
        behaviour_mask=mask,
        candidate={"kind": rng.integers(1, ROWS["kind"], (b, 1)).astype(np.int32)},
        candidate_mask=np.ones((b, 1), bool),
        label=np.zeros((b, 1), np.float32),
    )


@pytest.mark.parametrize(
    "length, use_bias, masked",
    [(10, True, False), (10, False, True), (10, True, True), (0, True, False)],
)
def test_tokens_and_gradients_equal_loops(length, use_bias, masked):
    rng = np.random.default_rng(length)
    batch = make_batch(rng, length=length)
    tables = {
        t: jnp.asarray(rng.normal(size=(n, w)), jnp.float32)
        for (t, n), w in zip(ROWS.items(), (3, 5), strict=True)
    }
    module = BehaviourToken(4, KEYS, use_bias)
    plan = embedding.lookup_ids(COLUMNS, batch, tables)
    rows = embedding.gather_rows(tables, plan)
    embedded = embedding.embed(rows, plan, COLUMNS, batch, as_rows=True)
    if length:
        assert set(embedded.rows) == {"behaviour/kind"}  # and only it
    params = module.init(jax.random.key(0), embedded)
    if use_bias:
        params["params"]["bias"] = jnp.asarray(rng.normal(size=4), jnp.float32)
    weights = rng.normal(size=(24, length, 4)).astype(np.float32)
    mask = rng.random((24, length)) < 0.6 if masked else None  # behaviours are left out, too

    def total(params, rows, as_rows):
        embedded = embedding.embed(rows, plan, COLUMNS, batch, as_rows=as_rows)
        tokens = module.apply(params, embedded, mask)
        return jnp.sum(weights * tokens), tokens

    whole = {t: np.asarray(x, np.float64) for t, x in tables.items()}
    kernel = np.asarray(params["params"]["kernel"], np.float64)
    bias = np.asarray(params["params"].get("bias", np.zeros(4)), np.float64)
    tokens, of_kernel = np.zeros((24, length, 4)), np.zeros_like(kernel)
    of_table = {t: np.zeros(x.shape) for t, x in tables.items()}
    for i, j in np.ndindex(24, length):
        at = {t: int(batch.behaviour[t][i, j]) for t in ROWS}
        parts = [whole[t][at[t]] if at[t] else np.zeros(whole[t].shape[1]) for t in ROWS]
        price = batch.behaviour["price"][i, j] * batch.behaviour_mask[i, j]
        x = np.concatenate([*parts, [price]]).astype(np.float64)
        if masked and not mask[i, j]:
            tokens[i, j] = bias
            continue
        tokens[i, j] = x @ kernel + bias
        of_kernel += np.outer(x, weights[i, j])
        back = kernel @ weights[i, j]
        for t, g in (("kind", back[:3]), ("item", back[3:8])):
            of_table[t][at[t]] += g if at[t] else 0

    for as_rows in (False, True):
        gradient = jax.grad(total, argnums=(0, 1), has_aux=True)
        (grads, row_grads), found = gradient(params, rows, as_rows)
        np.testing.assert_allclose(found, tokens, rtol=1e-5, atol=1e-5)
        if masked and not use_bias:
            assert (np.asarray(found)[~mask] == 0).all()
        np.testing.assert_allclose(grads["params"]["kernel"], of_kernel, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(row_grads["kind"], of_table["kind"], rtol=1e-4, atol=1e-4)
        if length:
            count = int(plan["item"].count[0])
            at = np.asarray(plan["item"].unique)[:count]
            item = np.asarray(row_grads["item"])[:count]
            np.testing.assert_allclose(item, of_table["item"][at], rtol=1e-4, atol=1e-4)
        if use_bias:
            np.testing.assert_allclose(
                grads["params"]["bias"], weights.sum((0, 1)), rtol=1e-4, atol=1e-4
            )


def laser_model():
    from laser_jax.model import default_config

    model = default_config()
    model.update(dict(embedding_width=4, width=16, key_width=4, segment=5, short_length=0,
                      fusion_blocks=1, num_layers=1, head_hidden=(8,)))  # fmt: skip
    return model


def lrea_model():
    from lrea_jax.model import default_config

    model = default_config()
    model.update(dict(embedding_width=4, width=8, short_length=6, long_length=10, rank=4, hidden=6,
                      head_hidden=(8,)))  # fmt: skip
    return model


def sparsectr_model():
    from sparsectr_jax.model import default_config

    model = default_config()
    model.update(dict(embedding_width=4, width=8, num_layers=1, num_heads=2, num_chunks=3))
    return model


@pytest.mark.parametrize(
    "model, micro_batch, dtype, mesh",
    [
        (lrea_model, 0, "float32", (1, 1)),
        pytest.param(laser_model, 32, "float32", (1, 1), marks=pytest.mark.slow),
        pytest.param(laser_model, 0, "float32", (2, 1), marks=pytest.mark.slow),
        pytest.param(laser_model, 0, "bfloat16", (1, 1), marks=pytest.mark.slow),
        pytest.param(sparsectr_model, 16, "float32", (2, 2), marks=pytest.mark.slow),
    ],
)
def test_a_step_is_the_same_from_rows_as_from_vectors(
    small_config, monkeypatch, model, micro_batch, dtype, mesh
):
    """The vectors go through one device, the rows through the mesh."""
    small_config.model = model()
    if model is lrea_model:
        small_config.loss.weights.non_negativity = 0.3
    small_config.batch_size = small_config.eval_batch_size = 128
    small_config.dtype = dtype
    small_config.history_length = 24
    loaded = open_data(small_config)
    batch = next(
        pipeline.train_batches(loaded.split("train"), batch_size=128, history_length=24, seed=0)
    )

    def run(mesh, micro_batch):
        small_config.micro_batch = micro_batch
        mesh = sharding.make_mesh(*mesh)
        with jax.set_mesh(mesh):
            experiment = steps.bind(small_config, loaded.spec, mesh, 10)
            state = steps.init_state(experiment, 0)
            on_device = sharding.put_batch(batch, mesh)
            weights = {k: state[k] for k in ("tables", "model", "model_state")}
            logits = np.asarray(steps.score_step(experiment)(weights, on_device))
            step = steps.train_step(experiment)
            for _ in range(2):
                state, scalars = step(state, on_device)
            return logits, float(scalars["loss"]), jax.device_get((state["tables"], state["model"]))

    used = []
    reads_rows = embedding.reads_rows
    monkeypatch.setattr(embedding, "reads_rows", lambda p: used.append(reads_rows(p)) or used[-1])
    from_rows = run(mesh, micro_batch)
    assert any(used)
    monkeypatch.setattr(embedding, "reads_rows", lambda part: False)
    from_vectors = run((1, 1), 0)
    loose = 1e-2 if dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(from_rows[0], from_vectors[0], rtol=10 * loose, atol=loose)
    np.testing.assert_allclose(from_rows[1], from_vectors[1], rtol=loose)
    # Adam divides by the size of a gradient: where that is rounding, so is the step.
    steps_of = lambda a, b: np.testing.assert_allclose(a, b, rtol=10 * loose, atol=20 * loose)  # noqa: E731
    jax.tree.map(steps_of, from_rows[2], from_vectors[2])
