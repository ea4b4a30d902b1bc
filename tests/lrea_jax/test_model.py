"""LREA and the DINs beside it as wholes: against loops, invariances, batch statistics, training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines_jax import din_long
from ctr_jax.long_short import NormalisedHead
from lrea_jax import low_rank, model
from tests.ctr_jax.test_serving import first_batch, saved
from tests.ctr_jax.test_training import final_state
from tests.kernels.cases import sizes
from tests.lrea_jax import reference
from tests.lrea_jax.cases import SPEC, B, C, applied, built, changed, double, small

VARIANTS = {
    "decompressed, joint, free": {},
    "absorbed, split, stochastic": {
        "training_path": "absorbed", "form": "split", "parametrisation": "stochastic",
    },
    "decompressed, split, stochastic": {"form": "split", "parametrisation": "stochastic"},
    "absorbed, joint, free": {"training_path": "absorbed"},
    "matrices longer than the history": {"long_length": 14},
    "history longer than the matrices": {"long_length": 5, "training_path": "absorbed"},
}  # fmt: skip


@pytest.fixture(scope="module")
def default():
    module, variables, embedded, columns = built(small())
    run = applied(module)
    return run, variables, embedded, np.asarray(run(variables, embedded))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_equals_the_loops(changes):
    config = small(**changes)
    module, variables, embedded, columns = built(config)
    with jax.enable_x64(True):
        got = applied(module)(double(variables), double(embedded))
    want = reference.model(variables, embedded, columns, config, config.training_path)
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("use_long", [True, False])
@pytest.mark.parametrize("form", ["joint", "split"])
def test_the_dins_equal_the_loops(use_long, form):
    config = small(din_long, use_long=use_long, form=form)
    module, variables, embedded, columns = built(config)
    assert ("long_attention" in variables["params"]) == use_long
    with jax.enable_x64(True):
        got = applied(module)(double(variables), double(embedded))
    want = reference.model(variables, embedded, columns, config)
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12)


def test_models_share_all_but_the_long_part():
    shapes = {}
    for name, config in {
        "lrea": small(), "long": small(din_long), "short": small(din_long, use_long=False),
    }.items():  # fmt: skip
        shapes[name] = jax.tree.map(np.shape, built(config)[1]["params"])
    assert shapes["lrea"].pop("long") == {"w_comp": (9, 4), "w_decomp": (4, 9)}
    assert shapes["lrea"] == shapes["long"]
    assert shapes["long"].pop("long_attention") == shapes["short"]["short_attention"]
    for name in ("behaviour_token", "candidate_token", "short_attention"):
        assert shapes["long"][name] == shapes["short"][name]


@settings(max_examples=12, deadline=None)
@given(
    st.permutations(range(B)), st.permutations(range(C)), st.integers(0, 2**20), st.booleans()
)  # fmt: skip
def test_padding_other_candidates_and_other_requests_change_nothing(
    default, rows, candidates, seed, pad
):
    """Padding, candidate order and who shares the batch; one compiled shape, so that it is quick.
    Padding: the history of a request moves into a longer array whose noise is masked."""
    run, variables, embedded, expected = default
    rows, candidates = list(rows), list(candidates)
    other = changed(embedded, rows, candidates, padding=4 if pad else 0, seed=seed)
    if not pad:  # noise behind the padding of the same shape
        noise = np.random.default_rng(seed)
        outside = ~np.asarray(other.batch.behaviour_mask)[..., None]
        vectors = {
            k: x + outside * noise.normal(size=x.shape).astype(np.float32)
            if k.startswith("behaviour/") else x
            for k, x in other.vectors.items()
        }  # fmt: skip
        other = other.replace(vectors=vectors)
    np.testing.assert_allclose(
        run(variables, other), expected[rows][:, candidates], rtol=1e-5, atol=1e-5
    )


def test_one_candidate_and_part_of_the_batch(default):
    run, variables, embedded, expected = default
    got = run(variables, changed(embedded, slice(1, 4), [2], padding=3))
    np.testing.assert_allclose(got, expected[1:4][:, [2]], rtol=1e-5, atol=1e-5)


def test_the_long_history_matters_only_where_there_is_one(default):
    run, variables, embedded, expected = default
    vectors = dict(embedded.vectors)
    vectors["behaviour/item"] = vectors["behaviour/item"].copy()
    vectors["behaviour/item"][:, :-3] *= 1.5  # all but the short history
    moved = np.asarray(run(variables, embedded.replace(vectors=vectors))) != expected
    assert moved[[0, 2, 4]].all() and not moved[[1, 3]].any()  # lengths 12, 7, 11 and 0, 2


def test_batch_statistics_run_and_are_used():
    rng = np.random.default_rng(0)
    head = NormalisedHead((4,), slope=0.2, momentum=0.8, eps=1e-3)
    x, mask = rng.normal(size=(6, 2, 3)), rng.random((6, 2)) < 0.7
    with jax.enable_x64(True):
        variables = head.init(jax.random.key(0), x, mask, False)
        p = jax.tree.map(lambda v: np.asarray(v, np.float64), variables["params"])
        hidden = reference.phi(x @ p["dense_0"]["kernel"], 0.2)
        valid = hidden[mask]
        logits, state = head.apply(variables, x, mask, True, mutable=["batch_stats"])
        want = (hidden - valid.mean(0)) / np.sqrt(valid.var(0) + 1e-3) @ p["logit"]["kernel"]
        np.testing.assert_allclose(logits, want[..., 0], rtol=1e-12, atol=1e-12)
        stats = state["batch_stats"]["norm_0"]
        np.testing.assert_allclose(stats["mean"], 0.2 * valid.mean(0), rtol=1e-12)
        np.testing.assert_allclose(stats["variance"], 0.8 + 0.2 * valid.var(0), rtol=1e-12)
        logits = head.apply({**variables, **state}, x, mask, False)
        used = (hidden - np.asarray(stats["mean"])) / np.sqrt(np.asarray(stats["variance"]) + 1e-3)
        np.testing.assert_allclose(logits, (used @ p["logit"]["kernel"])[..., 0], rtol=1e-12)


def test_a_request_without_candidates_is_not_in_the_loss():
    module, variables, embedded, _ = built(small())
    mask = embedded.batch.candidate_mask.copy()
    mask[2], mask[0, 1] = False, False  # a request with some of its candidates is
    filled = embedded.replace(batch=embedded.batch.replace(candidate_mask=mask))
    losses = jax.jit(lambda x: module.apply(variables, x, False)[1]["losses"]["non_negativity"])
    others = losses(changed(embedded, [0, 1, 3, 4]))
    np.testing.assert_allclose(losses(filled), others, rtol=1e-6)
    assert abs(losses(embedded) - others) > 1e-3


@pytest.mark.parametrize("changes", list(VARIANTS.values())[:2], ids=list(VARIANTS)[:2])
def test_gradients_are_finite_and_stop_at_padding(changes):
    module, variables, embedded, _ = built(small(**changes))

    def loss(params, vectors):
        (logits, out), _ = module.apply(
            {**variables, "params": params}, embedded.replace(vectors=vectors), True,
            mutable=["batch_stats"],
        )  # fmt: skip
        return jnp.sum(logits**2) + out["losses"]["non_negativity"]

    grad = jax.jit(jax.grad(loss, (0, 1)))
    of_params, of_vectors = grad(variables["params"], embedded.vectors)
    assert all(np.isfinite(x).all() and np.any(x) for x in jax.tree.leaves(of_params))
    mask = np.asarray(embedded.batch.behaviour_mask)
    for key in ("behaviour/item", "behaviour/type"):
        assert not np.asarray(of_vectors[key])[~mask].any()
        assert np.asarray(of_vectors[key])[mask].any(-1).all()


@pytest.mark.parametrize("path", low_rank.PATHS)
def test_training_makes_no_array_over_the_history_and_hidden_units(path):
    length, hidden = 400, 64
    config = small(
        long_length=length, hidden=hidden, training_path=path, tile_bytes=B * C * hidden * 4 * 8
    )
    module, variables, embedded, _ = built(config, length=length + 3)

    def loss(params):
        return module.apply({**variables, "params": params}, embedded, False)[0].sum()

    largest = max(sizes(jax.make_jaxpr(jax.grad(loss))(variables["params"]).jaxpr))
    assert largest < B * C * length * hidden / 10


@pytest.fixture
def lrea_config(small_config):
    small_config.model = model.default_config()
    small_config.model.update(
        dict(embedding_width=4, width=4, hidden=5, short_length=4, long_length=8, rank=3,
             head_hidden=(6,))
    )  # fmt: skip
    small_config.loss.weights.non_negativity = 0.3
    small_config.optimizer.name = small_config.table_optimizer.name = "adagrad"
    small_config.validate = False
    return small_config


def test_trains_and_keeps_its_statistics(lrea_config, tmp_path):
    from ctr_jax import training
    from lrea_jax.serving import load

    training.train(lrea_config, tmp_path)
    served = load(lrea_config, tmp_path)
    stats = served.variables["batch_stats"]["head"]["norm_0"]
    assert np.abs(stats["mean"]).max() > 0 and (np.asarray(stats["variance"]) != 1).all()
    assert served.name.startswith("small:6:") and served.name == load(lrea_config, tmp_path, 6).name
    assert served.name != load(lrea_config, tmp_path, 3).name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_served_is_what_evaluation_scores(lrea_config, dtype, tmp_path):
    from ctr_jax import steps
    from lrea_jax import serving

    lrea_config.dtype, lrea_config.model.training_path = dtype, "absorbed"
    lrea_config.kernels = "xla"
    batch = first_batch(lrea_config, saved(lrea_config, tmp_path))
    experiment, weights, _ = serving.restore(lrea_config, tmp_path)
    with jax.set_mesh(experiment.mesh):
        expected = np.asarray(steps.score_step(experiment)(weights, batch))
    model = serving.load(lrea_config, tmp_path)
    cache = serving.precompute(model, batch)
    assert {x.dtype for x in jax.tree.leaves(cache)} == {jnp.dtype(dtype)}
    assert f":{dtype}:" in model.name and model.kernels == "xla"
    got = serving.score(model, cache, model.embed(batch))
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-5)


def test_a_cache_is_of_the_tables_that_embedded_it(lrea_config, tmp_path, monkeypatch):
    from ctr_jax import training
    from lrea_jax import serving

    training.train(lrea_config, tmp_path)
    name, restore = serving.load(lrea_config, tmp_path).name, serving.restore

    def nudged(*arguments):
        experiment, weights, at = restore(*arguments)
        item = weights["tables"]["item"].at[1, 0].add(1e-3)
        return experiment, {**weights, "tables": {**weights["tables"], "item": item}}, at

    monkeypatch.setattr(serving, "restore", nudged)
    other = serving.load(lrea_config, tmp_path).name
    assert other != name and other.rpartition(":")[0] == name.rpartition(":")[0]


@pytest.mark.slow
def test_a_run_in_two_halves_ends_where_a_whole_one_does(lrea_config, tmp_path):
    from ctr_jax import training
    from lrea_jax.serving import load

    training.train(lrea_config, tmp_path / "whole")
    for total in (3, 6):
        lrea_config.total_steps = total
        training.train(lrea_config, tmp_path / "halves")
    states = [final_state(lrea_config, tmp_path / d, 6) for d in ("whole", "halves")]
    jax.tree.map(np.testing.assert_array_equal, *states)
    names = [load(lrea_config, tmp_path / d, 6).name for d in ("whole", "halves")]
    assert names[0] == names[1]


@pytest.mark.slow
def test_two_devices_train_what_one_does(lrea_config, tmp_path):
    from ctr_jax import training
    from lrea_jax.serving import load

    params = []
    for devices in (1, 2):
        lrea_config.mesh.data, lrea_config.total_steps = devices, 3
        training.train(lrea_config, tmp_path / str(devices))
        params.append(load(lrea_config, tmp_path / str(devices)).variables)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), *params)


def test_impossible_settings_are_refused():
    for changes, match in [
        ({"form": "both"}, "form"),
        ({"training_path": "both"}, "path"),
        ({"parametrisation": "x"}, "parametrisation"),
        ({"rank": 10}, "rank"),
        ({"slope": 1.5}, "slope"),
        ({"hidden": 0}, ">= 1"),
        ({"head_hidden": (0,)}, "head_hidden"),
        ({"base_rate": 0.0}, "base_rate"),
        ({"exclude": ("behaviour/item", "behaviour/type")}, "behaviour column"),
    ]:
        with pytest.raises(ValueError, match=match):
            model.build(small(**changes), SPEC)
