"""The frame of the baselines: what changes nothing, and what it does without a history."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import laser_jax.model
from baselines_jax import (
    base,
    bst,
    can,
    din,
    eta,
    hstu,
    longer,
    sdim,
    sim,
    suan,
    transformer,
    twin,
    twin_v2,
)
from ctr_jax import history_model, query_tiles
from kernels import dispatch
from tests.lrea_jax.cases import SPEC, batch_of, changed

MODULES = dict(
    base=base, bst=bst, can=can, din=din, eta=eta, hstu=hstu, longer=longer, sdim=sdim, sim=sim,
    suan=suan, transformer=transformer, twin=twin, twin_v2=twin_v2,
)  # fmt: skip
CHANGED = dict(
    base=dict(short_length=4),
    bst=dict(num_layers=2, pooling="mean"),
    can=dict(micro_widths=(4, 3, 2)),
    eta=dict(top_k=3),
    longer=dict(recent=2, merge=2),
    sim=dict(top_k=3),
    twin=dict(top_k=3),
    twin_v2=dict(top_k=3, cluster_size=2),
)


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
    apply = jax.jit(lambda v, x: model.apply(v, x, False)[0])
    return apply, jax.tree.unflatten(tree, leaves), embedded


CHANGES = {
    "padding": dict(padding=5),
    "permuted candidates": dict(candidates=[2, 0, 1]),
    "fewer requests and candidates": dict(rows=slice(1, 4), candidates=[1]),
}


@pytest.mark.parametrize("name", MODULES)
def test_invariances(name):
    apply, variables, embedded = built(name)
    logits = np.asarray(apply(variables, embedded))
    for change, what in CHANGES.items():
        expected = logits[what.get("rows", slice(None))][:, what.get("candidates", slice(None))]
        other = apply(variables, changed(embedded, **what))
        np.testing.assert_allclose(other, expected, rtol=1e-5, atol=1e-5, err_msg=change)


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


def test_a_head_that_cannot_be_is_refused_before_anything_is_made():
    for change in ({"head_hidden": (8, 0)}, {"base_rate": 1.0}):
        config = din.default_config()
        config.update(change)
        with pytest.raises(ValueError, match=next(iter(change))):
            din.build(config, SPEC)


SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("laser", "transformer", "bst", "hstu", "longer", "suan")
]


@pytest.mark.parametrize("name", ["twin", *SLOW])
def test_few_requests_at_a_time_give_the_same_values_and_gradients(name, monkeypatch):
    module = laser_jax.model if name == "laser" else MODULES[name]
    config = module.default_config()
    config.update(embedding_width=3, width=8, head_hidden=(6,))
    config.update({"laser": dict(segment=3, recent=1, fusion_tokens=8)}.get(name, {}))
    config.update(CHANGED.get(name, {}))
    model, columns = module.build(config, SPEC)
    embedded = batch_of(columns, lengths=(12, 0, 7, 2, 11, 5))
    variables = model.init(jax.random.key(1), embedded, False)

    def run():
        def both(params, vectors):
            def loss(params, vectors):
                logits = model.apply(params, embedded.replace(vectors=vectors), True)[0]
                return jnp.sum(jnp.sin(3 * logits)), logits

            return jax.grad(loss, (0, 1), has_aux=True)(params, vectors)

        lowered = jax.jit(both).lower(variables, embedded.vectors)
        found = lowered.compile()(variables, embedded.vectors)
        return found, lowered.as_text().count("stablehlo.while")

    expected, loops = run()
    row = embedded.batch.shape[1] * 8 * 4
    monkeypatch.setattr(history_model, "TILE_BYTES", {"cpu": 2 * row})
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    for data in (1, 2):
        mesh = jax.make_mesh((data, 2), ("data", "table"), (AxisType.Auto,) * 2)
        with jax.set_mesh(mesh), dispatch.scope("auto", ("data",)):
            got, tiled_loops = run()
        assert tiled_loops >= loops + 2  # forward and backward
        jax.tree.map(close, got, expected)


@pytest.mark.parametrize(
    "name",
    [
        "sim",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("bst", "eta", "hstu", "suan", "twin")),
    ],
)
def test_each_device_goes_through_its_own_requests(name, monkeypatch):
    """With an accelerator's tiles, of which its batch makes several: else the loop over requests
    would have every device gather, and do, all of them."""
    monkeypatch.setattr(history_model, "TILE_BYTES", {})
    monkeypatch.setattr(query_tiles, "TILE_BYTES", {"cpu": 256})
    _, variables, embedded = built(name, lengths=(7, 5, 3, 1, 7, 6, 0, 2))
    module = MODULES[name]
    config = module.default_config()
    config.update(embedding_width=3, width=8, head_hidden=(6,), **CHANGED.get(name, {}))
    if name == "bst":
        config.dropout = 0.5  # it goes in tiles as without
    model, _ = module.build(config, SPEC)

    def loss(variables, vectors):
        return jnp.sum(model.apply(variables, embedded.replace(vectors=vectors), False)[0] ** 2)

    expected = jax.jit(jax.grad(loss, (0, 1)))(variables, embedded.vectors)
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
    with jax.set_mesh(mesh), dispatch.scope("auto", ("data",)):
        split = NamedSharding(mesh, PartitionSpec("data"))
        variables = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
        arguments = variables, jax.device_put(embedded.vectors, split)
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile()
        got = compiled(*arguments)
    assert "all-gather" not in compiled.as_text()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, expected)


def test_what_a_candidate_drops_depends_on_neither_tiles_nor_devices(monkeypatch):
    _, variables, embedded = built("bst", lengths=(7, 5, 3, 1, 7, 6, 0, 2))
    config = bst.default_config()
    config.update(embedding_width=3, width=8, head_hidden=(6,), dropout=0.5)
    model, _ = bst.build(config, SPEC)
    row = embedded.batch.shape[1] * 8 * 4
    rngs, logits = {"dropout": jax.random.key(3)}, {}
    for name, data, tile in (("whole", 1, 100), ("tiles", 1, 3), ("devices", 4, 1)):
        monkeypatch.setattr(history_model, "TILE_BYTES", {"cpu": tile * row})
        mesh = jax.make_mesh((data,), ("data",), (AxisType.Auto,), devices=jax.devices()[:data])
        with jax.set_mesh(mesh), dispatch.scope("auto", ("data",)):
            run = jax.jit(lambda v: model.apply(v, embedded, True, rngs=rngs)[0])
            logits[name] = np.asarray(run(variables))
            plain = np.asarray(jax.jit(lambda v: model.apply(v, embedded, False)[0])(variables))
    np.testing.assert_allclose(logits["tiles"], logits["whole"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits["devices"], logits["whole"], rtol=1e-5, atol=1e-5)
    assert np.abs(plain - logits["whole"]).max() > 1e-3
