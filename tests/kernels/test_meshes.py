"""Kernels under a mesh: values and gradients of the unsharded XLA path, and what is sent for them.

Every op is a function of requests (trees of [B, ...]) and of weights; interpreted, eight devices.
"""

import functools
import itertools
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ctr_jax import hlo
from kernels import dispatch, meshes
from kernels.absorbed_target_attention import Memory, Weights, absorbed_target_attention
from kernels.evo_attention import RelTemporal, behaviour_branches, candidate_branches
from kernels.segmented_target_attention import segmented_target_attention
from tests.kernels import cases
from tests.kernels.evo_attention import dense_reference

B, C, L, D, H = 8, 3, 40, 8, 2
KERNELS = [name for name in cases.IMPLEMENTATIONS if name != "xla"]


def evo(floats, slopes, integers, **how):
    behaviours, candidates = dense_reference.arguments({**floats, "slopes": slopes}, integers)
    how = {"rel": RelTemporal(), **how}
    behaved = behaviour_branches(*behaviours, window=5, **how)
    return behaved + candidate_branches(*candidates, **how)


def segmented(floats, bias, integers, **how):
    rows = floats["q"], floats["k"], floats["v"], integers["mask"]
    return segmented_target_attention(*rows, bias, segment=8, **how)


def absorbed(floats, weights, integers, **how):
    memory = Memory(floats["keys"], floats["values"], floats["total"])
    return absorbed_target_attention(floats["query"], memory, weights, form="split", **how)


def _cases():
    rng = np.random.default_rng(0)
    normal = lambda *s: rng.normal(size=s).astype(np.float32)  # noqa: E731
    valid = (L, 30, 0, 1, 7, L, 12, 3)
    floats, integers = dense_reference.case(1, valid, L, C, H, 4, (4, 8), 5)
    floats = {name: x.astype(np.float32) for name, x in floats.items()}
    slopes = floats.pop("slopes")
    mask = np.arange(L) >= L - np.array(valid)[:, None]
    return {
        "evo": (evo, floats, slopes, integers),
        "segmented": (
            segmented,
            {"q": normal(B, C, H, 4), "k": normal(B, L, H, 4), "v": normal(B, L, H, 4)},
            normal(H),
            {"mask": mask},
        ),
        "absorbed": (
            absorbed,
            {"query": normal(B, C, D), "keys": normal(B, L, D), "values": normal(B, L, D),
             "total": normal(B, D)},
            Weights(normal(D, 6), normal(D, 6), normal(D, 6), normal(6)),
            {},
        ),
    }  # fmt: skip


CASES = _cases()


def both(op, floats, shared, integers, **how):
    """Values, and gradients of a sum that weighs each differently."""

    def total(floats, shared):
        out = op(floats, shared, integers, **how)
        leaves = jax.tree.leaves(out)
        weights = [np.cos(np.arange(x.size)).reshape(x.shape).astype(x.dtype) for x in leaves]
        return sum((x * w).sum() for x, w in zip(leaves, weights, strict=True)), out

    gradients, out = jax.grad(total, (0, 1), has_aux=True)(floats, shared)
    return out, *gradients


def mesh_of(data, table):
    devices = np.array(jax.devices()[: data * table]).reshape(data, table)
    return jax.sharding.Mesh(devices, ("data", "table"), axis_types=(AxisType.Auto,) * 2)


@functools.cache
def expected(name):
    op, floats, shared, integers = CASES[name]
    run = jax.jit(functools.partial(both, op, implementation="xla"))
    return jax.device_get(run(floats, shared, integers))


SPLITS = [
    pytest.param(*split, kernel, marks=() if at == 0 else pytest.mark.slow)
    for at, (split, kernel) in enumerate(itertools.product(((4, 2), (8, 1), (1, 8)), KERNELS))
]


@pytest.mark.parametrize("data, table, kernel", SPLITS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_one_device(name, kernel, data, table):
    op, floats, shared, integers = CASES[name]
    mesh = mesh_of(data, table)

    def put(tree, spec):
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec)), tree)

    how = cases.IMPLEMENTATIONS[kernel]
    with jax.set_mesh(mesh), dispatch.scope("auto", ("data",)):
        arguments = put(floats, P("data")), put(shared, P()), put(integers, P("data"))
        run = jax.jit(functools.partial(both, op, **how))
        compiled = run.lower(*arguments).compile()
        got = compiled(*arguments)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected(name)), strict=True
    ):
        size = max(np.abs(y).max(initial=0), 1e-3)
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * size, err_msg=str(path))
    _, of_requests, of_shared = got
    for x in jax.tree.leaves(of_requests):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), x.ndim)
    # Sums for the weights are all that is sent: no history, and no gradient of one.
    sent = hlo.traffic(compiled.as_text(), mesh.size)
    assert sent.keys() <= {"all-reduce"}
    size = sum(size for _, size in sent.values())
    weights = sum(x.nbytes for x in jax.tree.leaves(of_shared))
    history = max(x.nbytes for x in jax.tree.leaves(of_requests)) // data
    assert size <= 4 * weights + 64 < 2 * history and bool(size) == (data > 1)


def test_xla_takes_few_requests_at_a_time_on_every_device():
    op, floats, weights, _ = CASES["absorbed"]
    mesh = mesh_of(4, 2)
    with jax.set_mesh(mesh), dispatch.scope("auto", ("data",)):
        arguments = (
            jax.device_put(floats, NamedSharding(mesh, P("data"))),
            jax.device_put(weights, NamedSharding(mesh, P())),
        )
        run = functools.partial(both, op, integers={}, tile_bytes=C * 6 * 4 * 20)  # half of a row
        compiled = jax.jit(run).lower(*arguments).compile()
        got = compiled(*arguments)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected("absorbed")), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * np.abs(y).max())
    sent = hlo.traffic(compiled.as_text(), mesh.size)
    size = sum(x.size * 4 for x in jax.tree.leaves(weights))
    assert sent.keys() == {"all-reduce"} and sent["all-reduce"][1] <= 4 * size


def auto_mesh(**axes):
    device = jax.sharding.AbstractDevice(device_kind="TPU", num_cores=None, platform="tpu")
    kinds = tuple(AxisType.Explicit if a == "explicit" else AxisType.Auto for a in axes)
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), kinds, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize(
    "axes, named, batch, says",
    [
        (dict(data=1, table=1), (), 3, None),
        (dict(data=1, table=4), ("data",), 3, None),  # every device takes all requests
        (dict(data=4, table=2), ("data",), 8, None),
        (dict(data=4, table=2), ("data",), 6, "6 requests do not divide over .*'data': 4"),
        (dict(data=4, table=2), (), 8, "cannot partition a kernel .*'data': 4, 'table': 2.*scope"),
        (dict(data=4, explicit=2), ("data",), 8, "'explicit': 2.*have to be Auto"),
        (dict(explicit=4), ("explicit",), 8, "have to be Auto"),
    ],
)
def test_where_a_kernel_can_be_mapped(axes, named, batch, says):
    with auto_mesh(**axes):
        reason = meshes.refusal(named, batch, partitioned=False)
        assert reason is None if says is None else re.search(says, reason)
        mapped = meshes.axes_to_map(named)
    assert mapped == (named if math.prod(axes.values()) > 1 and "explicit" not in named else ())


def test_within_a_shard_map_over_all_axes_nothing_is_left_to_map():
    seen = []

    def body(x):
        seen.append((meshes.axes_to_map(("data",)), meshes.refusal(("data",), 3, False)))
        return x

    with auto_mesh(data=4, table=2):
        shape = jax.ShapeDtypeStruct((8,), np.float32)
        jax.eval_shape(jax.shard_map(body, in_specs=P("data"), out_specs=P("data")), shape)
    assert seen == [((), None)]


def test_a_batch_that_does_not_divide_is_one_clear_line():
    op, floats, shared, integers = CASES["segmented"]
    six = jax.tree.map(lambda x: x[:6], (floats, integers))
    with jax.set_mesh(mesh_of(4, 2)), dispatch.scope("auto", ("data",)):
        with pytest.raises(dispatch.CannotRun, match="6 requests do not divide over .*'data': 4"):
            op(six[0], shared, six[1], **cases.IMPLEMENTATIONS["pallas_tpu"])
        op(six[0], shared, six[1])  # an open choice takes XLA
