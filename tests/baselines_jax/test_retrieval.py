"""SIM, ETA and SDIM against their formulas in float64, and what may not change them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baselines_jax import eta, sdim, sim
from ctr_jax import flops, history_model, selection
from ctr_jax.features import Column, DataColumn, DataSpec
from tests.baselines_jax.cases import IN_TILES, D, padded, tokens_of
from tests.baselines_jax.references import requests, softmax

K, HEADS, BITS, GROUPS, L, C = 3, 2, 5, 3, 11, 4
LENGTHS = (11, 0, 6, 1)  # full, empty, ragged, one behaviour
NAMES = ("soft", "hard", "eta", "sdim")


def module(name, tile_bytes=0):
    if name.startswith("sdim"):
        return sdim.SDIM(GROUPS, 2, name == "sdim", tile_bytes)
    if name == "eta":
        return eta.ETA(HEADS, K, BITS, tile_bytes)
    second = sim.Second(HEADS, not name.endswith("no_gap"), tile_bytes)
    return sim.SoftSIM(second, K, (6,)) if "soft" in name else sim.HardSIM(second, K, "kind")


def case(lengths=LENGTHS, seed=0):
    """Tokens with labels, a profile, categories (0 to 2 are none) and common columns; of the
    behaviours' common vectors some are the candidates', some each other's."""
    rng, size = np.random.default_rng(seed + 1), len(lengths)
    tokens = tokens_of(lengths, L, C, seed)
    batch = tokens.batch.replace(
        candidate={"kind": rng.integers(0, 6, (size, C)).astype(np.int32)},
        behaviour={"kind": rng.integers(0, 6, (size, L)).astype(np.int32)},
        candidate_mask=rng.random((size, C)) < 0.7,
        label=rng.integers(0, 2, (size, C)).astype(np.float32),
    )
    common = rng.normal(size=(size, C, 3)), rng.normal(size=(size, L, 3))
    common[1][:, -2:] = common[0][:, :2]
    common[1][:, 2] = common[1][:, 5]
    return tokens.replace(
        profile=rng.normal(size=(size, 2)).astype(np.float32),
        batch=batch,
        common=tuple(x.astype(np.float32) for x in common),
    )


# ---- the formulas ----


def attention(p, q, items):
    """Target attention, head by head."""
    found, width = [], len(q) // HEADS
    for h in range(HEADS):
        part = slice(h * width, (h + 1) * width)
        query = q @ p["q"]["kernel"][:, part]
        scores = [query @ (x @ p["k"]["kernel"][:, part]) / math.sqrt(width) for x in items]
        total = np.zeros(width)
        if items:
            for a, x in zip(softmax(scores), items, strict=True):
                total += a * (x @ p["v"][h])
        found.append(total)
    return np.concatenate(found) @ p["out"]["kernel"]


def choice(name, p, hashes, tokens, b, c, q, rows):
    """The places of `rows` that a candidate selects."""
    if name == "soft":
        r = [(x @ p["search_k"]["kernel"]) @ (q @ p["search_q"]["kernel"]) for *_, x in rows]
        ranked = sorted(range(len(rows)), key=lambda i: (r[i], i))
    elif name == "hard":
        kinds, kind = tokens.batch.behaviour["kind"][b], tokens.batch.candidate["kind"][b, c]
        ranked = [i for i, (at, *_) in enumerate(rows) if kinds[at] == kind > 2]
    else:
        code = signs(tokens.common[0][b, c], hashes)
        codes = [signs(tokens.common[1][b, at], hashes) for at, *_ in rows]
        differing = [sum(x != y for x, y in zip(code, other, strict=True)) for other in codes]
        ranked = sorted(range(len(rows)), key=lambda i: (-differing[i], i))
    return ranked[-K:]


def signs(x, hashes):
    return [bool(x.astype(np.float64) @ column > 0) for column in hashes.T]


def expected(name, variables, tokens):
    """[B, C, d]."""
    variables = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
    hashes = variables.get("hashes", {}).get("hash", {}).get("projections")
    if name.startswith("sdim"):
        return expected_sdim(hashes, tokens, unit=name == "sdim")
    p, out = variables["params"], []
    second = p if name == "eta" else p["second"]
    for b, (rows, _, candidates, request_time) in enumerate(requests(tokens)):
        out.append([])
        items = [x for *_, x in rows]
        if "time_gap" in second:
            gaps = [max(request_time - time, 0) for _, time, _ in rows]
            items = [
                x + second["time_gap"][g.bit_length()] for x, g in zip(items, gaps, strict=True)
            ]
        for c, q in enumerate(candidates):
            kept = choice(name.split("_")[0], p, hashes, tokens, b, c, q, rows)
            out[-1].append(attention(second["attention"], q, [items[i] for i in kept]))
    return np.array(out)


def expected_sdim(hashes, tokens, unit):
    out = []
    for b, (rows, _, candidates, _) in enumerate(requests(tokens)):
        out.append([])
        for c in range(len(candidates)):
            total = np.zeros(D)
            for columns in np.split(hashes, GROUPS, 1):
                bucket = signs(tokens.common[0][b, c], columns)
                alike = [
                    x for at, _, x in rows if signs(tokens.common[1][b, at], columns) == bucket
                ]
                found = np.sum(alike, 0) if alike else np.zeros(D)
                norm = np.linalg.norm(found) if unit and alike else 1
                total += found / norm / GROUPS
            out[-1].append(total)
    return np.array(out)


def expected_loss(variables, tokens):
    """SIM's loss "search"."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    head, losses = p["search_head"], []
    for b, (rows, _, candidates, _) in enumerate(requests(tokens)):
        for c, q in enumerate(candidates):
            pooled = np.zeros(D)
            for *_, x in rows:
                pooled += (x @ p["search_k"]["kernel"]) @ (q @ p["search_q"]["kernel"]) * x
            pooled *= sim.SUM_SCALE / math.sqrt(D)
            row = np.concatenate([q, pooled])
            row = np.maximum(row @ head["dense_0"]["kernel"] + head["dense_0"]["bias"], 0)
            (logit,) = row @ head["logit"]["kernel"] + head["logit"]["bias"]
            if tokens.batch.candidate_mask[b, c]:
                sign = 1 if tokens.batch.label[b, c] else -1
                losses.append(np.logaddexp(0, -sign * logit))
    return np.mean(losses)


# ---- the models ----


@functools.cache
def variables_of(name):
    """Weights well away from their initial values, so that every one matters."""
    shapes = jax.eval_shape(lambda: module(name).init(jax.random.key(0), case(), False))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(
        tree, [rng.normal(size=x.shape).astype(np.float32) * 0.6 for x in leaves]
    )


@functools.cache
def applied(name):
    """A jitted (variables, tokens) -> [B, C, d]."""
    return jax.jit(lambda v, t: module(name).apply(v, t, False))


def close(out, expected, tolerance=2e-4):
    np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [*NAMES, "soft_no_gap", "sdim_sums"])
def test_equal_to_the_formulas(name):
    for tokens in (case(), case((3, 11, 2, 0), seed=5), case(LENGTHS[::-1], seed=7)):
        close(applied(name)(variables_of(name), tokens), expected(name, variables_of(name), tokens))


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_in_tiles_equal_those_of_the_formulas(name):
    tokens, variables, rng = case(seed=3), variables_of(name), np.random.default_rng(3)
    hashes = {k: v for k, v in variables.items() if k != "params"}
    train = name == "soft"  # with its loss

    def loss(params, candidates, behaviours):
        given = tokens.replace(candidates=candidates, behaviours=behaviours)
        given_variables = {"params": params, **hashes}
        out = module(name, IN_TILES["tile_bytes"]).apply(given_variables, given, train)
        out, losses = out if train else (out, {})
        return jnp.sum(jnp.sin(out)) + sum(losses.values()), (out, losses)

    arguments = (variables.get("params", {}), tokens.candidates, tokens.behaviours)
    both = jax.jit(jax.grad(loss, range(3), has_aux=True))
    grads, (out, losses) = both(*arguments)
    close(out, expected(name, variables, tokens))
    if train:
        close(losses["search"], expected_loss(variables, tokens))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    of_vectors = grads[1:] if name != "sdim" else grads[2:]  # a bucket has no gradient
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves((grads[0], of_vectors)))
    assert (np.asarray(grads[2])[~tokens.batch.behaviour_mask] == 0).all()

    directions = jax.tree.map(lambda x: rng.normal(size=x.shape), arguments)
    directions[2][~tokens.batch.behaviour_mask] = 0

    def moved(by):
        params, candidates, behaviours = jax.tree.map(
            lambda x, to: np.asarray(x, np.float64) + by * to, arguments, directions
        )
        given = tokens.replace(candidates=candidates, behaviours=behaviours)
        given_variables = {"params": params, **hashes}
        value = np.sum(np.sin(expected(name, given_variables, given)))
        return value + (expected_loss(given_variables, given) if train else 0)

    difference = (moved(1e-6) - moved(-1e-6)) / 2e-6
    products = jax.tree.map(lambda g, to: np.sum(g * to), grads, directions)
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), difference, rtol=2e-3)


def of_candidates(tokens, which):
    batch = tokens.batch.replace(
        candidate={"kind": tokens.batch.candidate["kind"][:, which]},
        candidate_mask=tokens.batch.candidate_mask[:, which],
        label=tokens.batch.label[:, which],
    )
    common = (tokens.common[0][:, which], tokens.common[1])
    return tokens.replace(candidates=tokens.candidates[:, which], batch=batch, common=common)


@pytest.mark.parametrize("name", NAMES)
def test_candidates_do_not_see_one_another(name):
    tokens, variables = case(), variables_of(name)
    out = np.asarray(applied(name)(variables, tokens))
    for which in ([2, 0, 3, 1], [1, 1, 1, 1]):
        again = applied(name)(variables, of_candidates(tokens, which))
        close(again, out[:, which], 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name):
    """What stands in it, and more of it."""
    tokens, variables = case(), variables_of(name)
    out = applied(name)(variables, tokens)

    def noisy(tokens, by):
        hidden = ~tokens.batch.behaviour_mask
        kind = np.pad(tokens.batch.behaviour["kind"], ((0, 0), (by, 0)))
        common = np.pad(tokens.common[1], ((0, 0), (by, 0), (0, 0)))
        batch = tokens.batch.replace(
            behaviour_time=np.where(hidden, -5, tokens.batch.behaviour_time).astype(np.int32),
            behaviour={"kind": np.where(hidden, tokens.batch.candidate["kind"][:, :1], kind)},
        )
        common = np.where(hidden[..., None], tokens.common[0][:, :1], common)
        return tokens.replace(
            behaviours=np.where(hidden[..., None], 9, tokens.behaviours).astype(np.float32),
            batch=batch,
            common=(tokens.common[0], common),
        )

    close(applied(name)(variables, noisy(tokens, 0)), out, 1e-5)
    close(applied(name)(variables, noisy(padded(tokens, 3), 3)), out, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_halves_in_halves_out_near_float32(name):
    tokens = case()
    small = jax.tree.map(lambda x: x / 3, variables_of(name))
    halved = functools.partial(
        jax.tree.map, lambda x: x.astype(jnp.bfloat16) if x.dtype == np.float32 else x
    )
    vectors = dict(zip(("candidates", "behaviours", "profile"), halved(
        (tokens.candidates, tokens.behaviours, tokens.profile)), strict=True))  # fmt: skip
    variables = small | ({"params": halved(small["params"])} if "params" in small else {})
    out = applied(name)(variables, tokens.replace(**vectors))
    assert out.dtype == jnp.bfloat16
    # Soft choices of near-equals may differ.
    share = np.isclose(out.astype(np.float32), applied(name)(small, tokens), rtol=0.1, atol=0.05)
    assert share.mean() > 0.95


# ---- what is particular ----


@pytest.mark.parametrize("k", [1, 3, 20])
def test_the_most_recent_of_a_mask(k):
    mask = np.random.default_rng(0).random((5, L)) < 0.5
    mask[0], mask[1] = False, True
    rows = np.zeros_like(mask)
    for row, given in zip(rows, mask, strict=True):
        row[np.flatnonzero(given)[-k:]] = True
    np.testing.assert_array_equal(selection.most_recent(jnp.asarray(mask), k), rows)


def test_the_choice_of_the_soft_search_is_trained_by_its_loss_alone():
    tokens, variables = case(), variables_of("soft")

    def of_interest(params):
        return jnp.sum(jnp.sin(module("soft").apply({"params": params}, tokens, False)))

    grads = jax.jit(jax.grad(of_interest))(variables["params"])
    assert set(grads) == {"second", "search_q", "search_k", "search_head"}
    for name, tree in grads.items():
        assert (max(np.abs(x).max() for x in jax.tree.leaves(tree)) > 0) == (name == "second")


def test_a_sum_that_cancels_has_a_finite_gradient():
    tokens = case((2,))
    x, common = np.zeros((1, L, D), np.float32), np.ones((1, L, 3), np.float32)
    x[0, -2:, 0] = 1, -1
    tokens = tokens.replace(common=(common[:, :C], common))

    def loss(x):
        out = module("sdim").apply(variables_of("sdim"), tokens.replace(behaviours=x), False)
        return jnp.sum(jnp.sin(out))

    assert (np.asarray(jax.jit(jax.grad(loss))(x)) == 0).all()


def test_what_a_candidate_costs_sdim_does_not_depend_on_the_history():
    def operations(length, candidates):
        rng = np.random.default_rng(0)
        common = rng.normal(size=(1, candidates, 3)), rng.normal(size=(1, length, 3))
        tokens = tokens_of((length,), length, candidates).replace(common=common)
        run = lambda t: module("sdim").apply(variables_of("sdim"), t, False)  # noqa: E731
        return sum(flops.count(run, tokens).values())

    assert operations(40, 5) > operations(20, 5)
    more = [operations(length, 9) - operations(length, 5) for length in (20, 40)]
    assert more[0] == more[1] > 0


# ---- the frame ----

KINDS = DataSpec(
    "kinds",
    (
        DataColumn("behaviour", "item", "id", "item"),
        DataColumn("behaviour", "kind", "id", "kind"),
        DataColumn("candidate", "item", "id", "item"),
        DataColumn("candidate", "kind", "id", "item"),
        DataColumn("candidate", "price", "dense"),
    ),
    dict(item=9, kind=9),
    C,
)


@pytest.mark.parametrize(
    "module, change, says",
    [
        (sim, dict(search="fuzzy"), "search must be one of"),
        (sim, dict(top_k=0), "num_heads"),
        (sim, dict(num_heads=3), "num_heads"),
        (sim, dict(search="hard", category="kind"), "one vocabulary"),
        (sim, dict(search="hard", category="price"), "'price' must be an id column"),
        (eta, dict(num_heads=3), "num_heads"),
        (eta, dict(bits=0), "bits"),
        (eta, dict(exclude=("behaviour/item",)), "columns that both have"),
        (sdim, dict(bits=9), "bits"),
        (sdim, dict(groups=0), "groups"),
        (sdim, dict(exclude=("candidate/item",)), "columns that both have"),
    ],
)
def test_what_does_not_fit_is_refused(module, change, says):
    config = module.default_config()
    config.update(change)
    with pytest.raises(ValueError, match=says):
        module.build(config, KINDS)


def test_common_columns_have_one_name_and_one_table():
    columns = [
        Column(group, name, table, 4)
        for group, name, table in (
            ("user", "age", "age"), ("candidate", "price", ""), ("candidate", "kind", "kind"),
            ("candidate", "maker", "shop"), ("candidate", "item", "item"),
            ("behaviour", "item", "item"), ("behaviour", "maker", "maker"),
            ("behaviour", "price", ""), ("behaviour", "kind", "kind"),
        )
    ]  # fmt: skip
    assert history_model.common_columns(columns) == (
        ("candidate/kind", "behaviour/kind"), ("candidate/item", "behaviour/item"),
    )  # fmt: skip
