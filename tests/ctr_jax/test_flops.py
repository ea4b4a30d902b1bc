"""The account of operations against closed forms and XLA's own."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctr_jax import describe, flops, steps
from ctr_jax.history_model import Tokens
from laser_jax import model
from tests.lrea_jax.cases import SPEC, batch_of


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_products_loops_and_branches_count_as_often_as_they_run():
    x, kernel = shape(3, 4), shape(4, 5)
    assert flops.count(lambda x, k: x @ k, x, kernel) == {"": 2 * 3 * 4 * 5}
    batched = flops.count(
        lambda a, b: jnp.einsum("bij,bjk->bik", a, b), shape(7, 3, 4), shape(7, 4, 5)
    )
    assert batched == {"": 7 * 2 * 3 * 4 * 5}

    def loop(x, k):
        return jax.lax.scan(lambda c, _: (c + x @ k, None), jnp.zeros((3, 5)), length=6)[0]

    assert flops.count(loop, x, kernel) == {"": 6 * (2 * 3 * 4 * 5 + 15)}

    def branch(x, k):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ k, lambda: jnp.zeros((3, 5)))

    assert flops.count(branch, x, kernel)[""] == 2 * 3 * 4 * 5 + 1
    with pytest.raises(ValueError, match="unknown length"):
        flops.count(lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c + 1, x), x)


SOMEWHERE = np.arange(10) * 9
AS_THEY_ARE = {"mode": "promise_in_bounds", "wrap_negative_indices": False}  # no arithmetic on them


@pytest.mark.parametrize(
    "function, operands, operations",
    [
        (lambda x, u: x.at[SOMEWHERE].add(u, **AS_THEY_ARE), (100, 10), 10),
        (lambda x, u: x.at[SOMEWHERE].max(u, **AS_THEY_ARE), (100, 10), 10),
        (lambda x, u: x.at[SOMEWHERE].set(u, **AS_THEY_ARE), (100, 10), 0),
        (jax.lax.round, (100,), 100),
        (jax.lax.ceil, (100,), 100),
        (jax.lax.is_finite, (100,), 100),
        (jax.lax.erf, (100,), 0),
    ],
)
def test_scatters_and_roundings_are_xlas(function, operands, operations):
    shapes = [shape(n) for n in operands]
    assert sum(flops.count(function, *shapes).values()) == operations
    lowered = jax.jit(function).lower(*shapes)
    assert lowered.cost_analysis().get("flops", 0) == operations


def test_cumulative_products_count_once_and_exact_gelu_its_products():
    # XLA takes a cumulative product on a CPU for n (n - 1) multiplications, and erfc for 62.
    assert flops.count(jax.lax.cumprod, shape(100)) == {"": 100}
    assert flops.count(lambda x: jax.nn.gelu(x, approximate=False), shape(100)) == {"": 400}


@pytest.mark.parametrize(
    "function, operands, name",
    [
        (
            lambda x, k: jax.lax.conv(x, k, (1,), "SAME"),
            ((1, 1, 9), (1, 1, 3)),
            "conv_general_dilated",
        ),
        (
            lambda x, k: jax.lax.ragged_dot(x, k, jnp.array([3, 5])),
            ((8, 4), (2, 4, 5)),
            "ragged_dot_general",
        ),
    ],
)
def test_products_that_no_rule_counts_are_refused(function, operands, name):
    with pytest.raises(ValueError, match=f"{name} in the function: not counted"):
        flops.count(function, *(shape(*sizes) for sizes in operands))


def laser(order, candidates=1, **changes):
    """(function, variables, Tokens) of LASER's interest at the paper's size."""
    config = model.default_config()
    config.update(order=order, **changes)
    module, length, d = model.LASER(config), 1000, config.width
    batch = batch_of((), length=length, lengths=(length,), candidates=candidates).batch
    tokens = Tokens(shape(1, candidates, d), shape(1, length, d), shape(1, 64), batch)
    variables = jax.eval_shape(lambda t: module.init(jax.random.key(0), t, False), tokens)
    return lambda v, t: module.apply(v, t, False), variables, tokens


def test_laser_at_the_papers_size_is_its_closed_form():
    length, s, d, h, k = 1000, 100, 128, 2, 16
    once = 2 * d * h * k
    expected = {
        "shared": 2 * length * d * (h * k + d) + once + 2 * length * (h * k + d),
        "per_candidate": 2 * once + 2 * length * h * d * 2 + 2 * s * d * d,
    }
    refined = 2 * s * d * d * 3  # W_O and FFN
    stacked = 2 * (2 * 4 * d * d + 2 * h * s * d * 2 + 2 * 2 * d * d)
    mixed = 2 * 8 * 2 * 2 * d * d + 2 * 64 * d + 7 * s * d  # blocks, profile, max pooling
    for order, products in expected.items():
        counted = flops.count(*laser(order), depth=3)
        compressed = counted["LASER/candidates/segmented"]
        assert compressed == pytest.approx(products + refined, rel=0.05)
        assert counted["LASER/candidates/stacked"] == pytest.approx(stacked, rel=0.05)
        assert counted["LASER/candidates/fusion"] == pytest.approx(mixed, rel=0.05)


@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("order", ["shared", "per_candidate"])
def test_laser_is_within_five_percent_of_xla(order, candidates):
    function, *args = laser(order, candidates, fusion_blocks=1)
    counted = sum(flops.count(function, *args).values())
    assert counted == pytest.approx(
        jax.jit(function).lower(*args).cost_analysis()["flops"], rel=0.05
    )


EXACT_GELU = ("baselines_jax.longer", "baselines_jax.transformer")


@pytest.mark.parametrize(
    "name",
    [
        "laser_jax.model",
        "sparsectr_jax.model",
        "baselines_jax.din",
        "baselines_jax.base",
        "baselines_jax.hstu",
        *EXACT_GELU,
    ],
)
def test_whole_models_are_within_five_percent_of_xla(name, monkeypatch):
    module = importlib.import_module(name)
    config = module.default_config()
    config.update(embedding_width=8, width=32, base_rate=0.5)
    built, columns = module.build(config, SPEC)
    embedded = batch_of(columns, length=64, lengths=(64, 20))
    variables = jax.eval_shape(lambda x: built.init(jax.random.key(0), x, False), embedded)
    function = lambda v, x: built.apply(v, x, False)[0]  # noqa: E731
    counted = sum(flops.count(function, variables, embedded).values())
    if name in EXACT_GELU:  # with erf, which XLA does not write out: the same but for erfc's 62
        erf_gelu = lambda x, approximate: x * 0.5 * (1 + jax.lax.erf(x * 0.7))  # noqa: E731
        monkeypatch.setattr(module.nn, "gelu", erf_gelu)
    lowered = jax.jit(lambda v, x: function(v, x)).lower(variables, embedded)  # traced anew
    assert counted == pytest.approx(lowered.cost_analysis()["flops"], rel=0.05)


def test_the_description_adds_up(small_config):
    text = describe.describe(small_config)
    lines = text.splitlines()
    start = lines.index("operations of the forward pass (2 per multiply-add), one request")
    rows = {}
    for line in lines[start + 2 :]:
        if line.startswith("  shared"):
            break
        rows[line[2:34].strip()] = [int(x.replace(",", "")) for x in line[34:].split()]
    total = rows.pop("all")
    np.testing.assert_array_equal(np.sum(list(rows.values()), 0), total)
    one, two, shared, each = total
    assert two - one == each and shared + 2 * each == two
    counted = [int(x.replace(",", "").split()[-2]) for x in lines[-2:]]
    assert 0 < counted[0] < counted[1]


def test_the_parameters_are_those_of_the_state(small_config):
    from ctr_jax import sharding
    from ctr_jax.data import open_data

    mesh = sharding.make_mesh(data=1, table=1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        experiment = steps.bind(small_config, open_data(small_config).spec, mesh, 1)
        state = steps.init_state(experiment, 0)
    size = sum(x.size for x in jax.tree.leaves((state["tables"], state["model"])))
    assert f"{size:,}" in describe.describe(small_config).split("operations")[0].splitlines()[-2]
