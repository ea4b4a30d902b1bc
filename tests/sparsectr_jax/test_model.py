"""SparseCTR as a whole: invariances, the last block's short cut, every switch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctr_jax import losses
from ctr_jax.batch import EmbeddedBatch, RequestBatch
from ctr_jax.features import DataColumn, DataSpec
from sparsectr_jax import model
from tests.sparsectr_jax.dense_reference import random_history

B, L, C = 6, 14, 3
WIDTH = 4


def data_spec(user=True):
    columns = [
        DataColumn("context", "slot", "id", "slot"),
        DataColumn("behaviour", "cate", "id", "cate"),
        DataColumn("behaviour", "type", "id", "type"),
        DataColumn("candidate", "cate", "id", "cate"),
        DataColumn("candidate", "price", "dense"),
    ]
    users = [DataColumn("user", "age", "id", "age"), DataColumn("user", "spend", "dense")]
    names = dict.fromkeys(("slot", "cate", "type", "age"), 9)
    return DataSpec("test", tuple(users * user + columns), names, C)


def small(**changes):
    config = model.default_config()
    config.update(
        embedding_width=WIDTH, width=8, num_heads=2, num_chunks=3, local_window=3, head_hidden=(4,)
    )
    config.update(changes)
    config.lock()
    return config


def embedded_batch(columns, seed=0, length=L, lengths=(0, 1, 14, 9, 14, 5)):
    rng = np.random.default_rng(seed)
    kinds = ["random", "tied"]
    drawn = [
        random_history(rng, length, min(n, length), kinds[i % 2]) for i, n in enumerate(lengths)
    ]
    times, mask = (np.stack(x) for x in zip(*drawn, strict=True))
    size = len(lengths)
    shapes = {
        "user": (size,),
        "context": (size,),
        "behaviour": (size, length),
        "candidate": (size, C),
    }
    vectors = {
        c.key: rng.normal(size=shapes[c.group] + (c.width,)).astype(np.float32) for c in columns
    }
    for c in columns:
        if c.group == "behaviour":
            vectors[c.key] *= mask[..., None]
    batch = RequestBatch(
        user_id=np.arange(size, dtype=np.int32),
        request_id=np.arange(size, dtype=np.int32),
        request_time=np.full(size, 1_500_000_000, np.int32),
        user={},
        context={},
        behaviour={},
        behaviour_time=times,
        behaviour_mask=mask,
        candidate={},
        candidate_mask=np.ones((size, C), bool),
        label=rng.integers(0, 2, (size, C)).astype(np.float32),
    )
    return EmbeddedBatch(batch, vectors)


def built(config, user=True, **kwargs):
    module, columns = model.build(config, data_spec(user))
    embedded = embedded_batch(columns, **kwargs)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(1), embedded, False))
    # Away from the initial values, so that biases and scales matter; and nothing to compile.
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(2)
    leaves = [rng.normal(size=x.shape).astype(np.float32) * 0.4 + (x.ndim < 2) for x in leaves]
    return module, jax.tree.unflatten(tree, leaves), embedded


def logits_of(module, variables, embedded):
    apply = jax.jit(module.apply, static_argnums=2)
    return np.asarray(apply(variables, embedded, False)[0])


@pytest.fixture(scope="module")
def default():
    module, variables, embedded = built(small())
    return module, variables, embedded, logits_of(module, variables, embedded)


def changed(embedded, rows=slice(None), candidates=slice(None), padding=0):
    """The same requests: some rows, some candidates in some order, more left padding."""
    rng = np.random.default_rng(0)
    batch, vectors = jax.tree.map(lambda x: x[rows], (embedded.batch, dict(embedded.vectors)))
    for key, x in vectors.items():
        if key.startswith("candidate/"):
            vectors[key] = x[:, candidates]
        if key.startswith("behaviour/"):  # what stands in padding is never read
            noise = rng.normal(size=(len(x), padding, x.shape[-1])).astype(np.float32)
            vectors[key] = np.concatenate([noise, x], 1)
    left = ((0, 0), (padding, 0))
    batch = batch.replace(
        behaviour_time=np.pad(batch.behaviour_time, left, constant_values=12345),
        behaviour_mask=np.pad(batch.behaviour_mask, left),
        candidate_mask=batch.candidate_mask[:, candidates],
        label=batch.label[:, candidates],
    )
    return EmbeddedBatch(batch, vectors)


CHANGES = {
    "all at once": {"rows": slice(2, 5), "candidates": [2, 0], "padding": 7},
    "permuted candidates": {"candidates": [2, 0, 1]},
    "one candidate": {"candidates": [1]},
    "left padding": {"padding": 7},
    "some requests": {"rows": slice(2, 5)},
}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(c, id=name, marks=[] if len(c) == 3 else pytest.mark.slow)
        for name, c in CHANGES.items()
    ],
)
def test_padding_other_candidates_and_other_requests_change_nothing(change, default):
    module, variables, embedded, expected = default
    got = logits_of(module, variables, changed(embedded, **change))
    expected = expected[change.get("rows", slice(None))][:, change.get("candidates", slice(None))]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_the_history_matters_and_the_outputs_are_named(default):
    module, variables, embedded, expected = default
    vectors = dict(embedded.vectors)
    vectors["behaviour/cate"] = vectors["behaviour/cate"] * 1.5
    differs = logits_of(module, variables, embedded.replace(vectors=vectors)) != expected
    assert differs[1:].all() and not differs[0].any()  # the first history is empty
    out = jax.eval_shape(lambda: module.apply(variables, embedded, False)[1])
    assert out["losses"] == {} and out["candidates"].shape == (B, C, 8)


def value_and_grad(module, variables, embedded):
    def loss(variables, vectors):
        logits, _ = module.apply(
            variables, embedded.replace(vectors=vectors), True, rngs={"dropout": jax.random.key(3)}
        )
        return (logits**2).sum(), logits

    grad = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    return grad(variables, embedded.vectors)


SHORT_CUTS = {"rows_per_tile": 2}
PLAIN = {"rows_per_tile": 6, "sparse_last_layer": False}


def test_last_block_and_tiles_of_requests_equal_the_plain_form(default):
    module, variables, embedded, _ = default
    for changes in (SHORT_CUTS, PLAIN):
        other, _ = model.build(small(**changes), data_spec())
        got = logits_of(other, variables, embedded)
        np.testing.assert_allclose(got, default[3], rtol=1e-5, atol=1e-5)


def test_what_a_request_drops_depends_on_neither_tiles_nor_other_requests():
    _, variables, embedded = built(small())
    logits = {}
    for rows in (6, 4):
        module, _ = model.build(small(dropout=0.3, rows_per_tile=rows), data_spec())

        @jax.jit
        def run(seed, module=module):
            rngs = {"dropout": jax.random.key(seed)}
            return module.apply(variables, embedded, True, rngs=rngs)[0]

        logits[rows] = np.asarray(run(0))
        np.testing.assert_allclose(logits[rows], logits[6], rtol=1e-5, atol=1e-5)
        assert (np.abs(run(1) - logits[rows]) > 1e-3).any(-1).all()  # every request draws


@pytest.mark.parametrize("rows", [2, 4])  # of six requests: four leave two zeros to fill up
def test_a_loss_in_tiles_equals_that_of_the_logits(default, rows):
    module, variables, embedded, _ = default
    tiles, _ = model.build(small(rows_per_tile=rows), data_spec())

    def loss_of(logits, batch, denominator):
        return losses.binary_cross_entropy(
            logits, batch.label, batch.candidate_mask, weights=batch.weight, denominator=denominator
        )

    weight = np.random.default_rng(3).uniform(0, 5, (6, C)).astype(np.float32)
    embedded = embedded.replace(batch=embedded.batch.replace(weight=weight))

    def plain(variables, vectors, denominator):
        logits, _ = module.apply(variables, embedded.replace(vectors=vectors), True)
        return loss_of(logits, embedded.batch, denominator)

    def in_tiles(variables, vectors, denominator):
        found = tiles.apply(
            variables, embedded.replace(vectors=vectors), True, loss_of, denominator
        )
        return found[0]

    (value, grads), (expected, expected_grads) = (
        jax.jit(jax.value_and_grad(f, (0, 1)))(variables, embedded.vectors, jnp.float32(7))
        for f in (in_tiles, plain)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            x, y, rtol=1e-4, atol=2e-5 * max(np.abs(y).max(), 1)
        ),
        grads,
        expected_grads,
    )


@pytest.mark.slow
@pytest.mark.parametrize("aggregate", ["mean_mlp", "mean"])
def test_gradients_of_the_short_cuts_equal_the_plain_form(aggregate):
    module, variables, embedded = built(small(aggregate=aggregate, **SHORT_CUTS))
    slow, _ = model.build(small(aggregate=aggregate, **PLAIN), data_spec())
    (_, got), grads = value_and_grad(module, variables, embedded)
    (_, expected), expected_grads = value_and_grad(slow, variables, embedded)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            x, y, rtol=1e-4, atol=2e-5 * max(np.abs(y).max(), 1)
        ),
        grads,
        expected_grads,
    )
    # No gradient reaches what is behind the padding.
    mask = embedded.batch.behaviour_mask
    assert not np.asarray(grads[1]["behaviour/cate"])[~mask].any()


# Every value of every switch occurs; the ablations of the paper are named.
SWITCHES = {
    "A1 full attention": {"attention": "full"},
    "A2 no global, fixed chunks": {"use_global": False, "chunking": "fixed"},
    "A3 no transition, mean": {"use_transition": False, "aggregate": "mean"},
    "A4 no local, literal empty branch": {"use_local": False, "mask_empty_branches": False},
    "B1 no RelTemporal, sim chunks": {
        "rel_time": False,
        "rel_hour": False,
        "rel_weekend": False,
        "chunking": "sim",
    },
    "B2, clock hours, per-head gate": {"rel_time": False, "hour_form": "clock", "gate": "per_head"},
    "B3, suan block and buckets": {"rel_hour": False, "block": "suan", "time_bucket": "suan"},
    "B4, mlp_mean over d, one layer": {
        "rel_weekend": False,
        "aggregate": "mlp_mean",
        "aggregate_scope": "model",
        "num_layers": 1,
    },
    "attn_pool, exclusive, model scale, alibi": {
        "aggregate": "attn_pool",
        "transition_inclusive": False,
        "logit_scale": "model",
        "slope_init": "alibi",
    },
    "only global, dropout": {
        "use_local": False,
        "use_transition": False,
        "dropout": 0.3,
        "rows_per_tile": 2,
    },
}


@pytest.mark.parametrize("changes", SWITCHES.values(), ids=SWITCHES.keys())
def test_every_switch_traces_forward_and_backward(changes):
    module, columns = model.build(small(**changes), data_spec())
    embedded = embedded_batch(columns)

    def loss(variables):
        rngs = {"dropout": jax.random.key(1)}
        return module.apply(variables, embedded, True, rngs=rngs)[0].sum()

    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), embedded, False))
    grads = jax.eval_shape(jax.grad(loss), variables)
    assert jax.tree.structure(grads) == jax.tree.structure(variables)


@pytest.mark.slow
@pytest.mark.parametrize("changes", SWITCHES.values(), ids=SWITCHES.keys())
def test_every_switch_runs_and_changes_the_output(changes, default):
    module, variables, embedded = built(small(**changes))
    logits = logits_of(module, variables, embedded)
    assert logits.shape == (B, C) and logits.dtype == np.float32 and np.isfinite(logits).all()
    if jax.tree.structure(variables) == jax.tree.structure(default[1]):
        assert not np.allclose(logits, default[3], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("changes", SWITCHES.values(), ids=SWITCHES.keys())
def test_every_switch_has_finite_gradients(changes):
    module, variables, embedded = built(small(**changes))
    _, grads = value_and_grad(module, variables, embedded)
    assert all(np.isfinite(x.astype(jnp.float32)).all() for x in jax.tree.leaves(grads))


def test_no_history_and_no_user_columns_run():
    module, variables, embedded = built(small(), user=False, length=0, lengths=(0, 0, 0))
    logits = logits_of(module, variables, embedded)
    assert logits.shape == (3, C) and np.isfinite(logits).all()
    # Equal to a history of padding only, at the same shapes as the one row made above.
    _, columns = model.build(small(), data_spec(False))
    padded = embedded_batch(columns, length=1, lengths=(0, 0, 0))
    vectors = {
        k: padded.vectors[k] if k.startswith("behaviour/") else embedded.vectors[k]
        for k in embedded.vectors
    }
    np.testing.assert_allclose(
        logits_of(module, variables, EmbeddedBatch(padded.batch, vectors)),
        logits,
        rtol=1e-5,
        atol=1e-6,
    )


def test_impossible_settings_are_refused():
    for changes, match in [
        ({"width": 9}, "multiple"),
        ({"chunking": "day"}, "chunking"),
        ({"num_chunks": 0}, "num_chunks must be >= 1"),
        ({"ffn_multiplier": 0}, "ffn_multiplier must be >= 1"),
        ({"gate": "x"}, "gate must be one of .*literal.*per_head"),
        ({"block": "x"}, "block must be one of .*pre_norm.*suan"),
        ({"aggregate_scope": "x"}, "aggregate_scope must be one of .*head.*model"),
        ({"head_activation": "x"}, "head_activation must be one of .*relu.*swish"),
        ({"head_hidden": (8, 0)}, "head_hidden"),
        ({"base_rate": 1.0}, "base_rate"),
        ({"dropout": 1.5}, "dropout"),
        ({"attention": "full", "use_global": False}, "use_global=False .* attention='full'"),
        ({"attention": "dilated", "use_transition": False}, "use_transition=False"),
        ({"attention": "nsa", "use_local": False}, "use_local=False"),
        ({"use_global": False, "use_transition": False, "use_local": False}, "at least one"),
        ({"hour_form": "minute"}, "hour_form"),
        ({"logit_scale": "none"}, "logit_scale"),
        ({"attention": "x"}, "attention must be"),
        ({"aggregate": "x"}, "aggregate must be"),
        ({"exclude": ("user/height",)}, "no such column"),
        ({"exclude": ("behaviour/cate", "behaviour/type")}, "behaviour column"),
    ]:
        with pytest.raises(ValueError, match=match):
            model.build(small(**changes), data_spec())
