"""Functions of requests in tiles: values and gradients of the function itself, on one device and on
meshes; sizes of groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ctr_jax import hlo, micro_batches
from ctr_jax.request_tiles import in_tiles, loss_in_tiles
from kernels import dispatch
from kernels.request_groups import cut, size_of_groups, whole

B, L, D, H = 8, 5, 3, 4


def function(requests, fixed, shared):
    """Some behaviours of a request, through weights, in two results."""
    kernel, bias = shared
    x = jnp.where(fixed["mask"][..., None], jnp.tanh(requests["rows"] @ kernel + bias), 0)
    return {"sum": x.sum(1) * requests["scale"][:, None], "all": x}


def draw(b=B):
    rng = np.random.default_rng(0)
    normal = lambda *s: rng.normal(size=s).astype(np.float32)  # noqa: E731
    requests = {"rows": normal(b, L, D), "scale": normal(b)}
    return requests, {"mask": rng.random((b, L)) < 0.7}, (normal(D, H), normal(H))


def in_float64(requests, fixed, shared):
    """Values, and gradients of `total`, by hand."""
    rows, scale = (np.float64(requests[k]) for k in ("rows", "scale"))
    kernel, bias = (np.float64(x) for x in shared)
    mask = fixed["mask"][..., None]
    y = np.tanh(rows @ kernel + bias)
    x = np.where(mask, y, 0)
    weights = np.cos(np.arange(x.size)).reshape(x.shape)
    dx = weights + scale[:, None, None]
    dy = np.where(mask, dx * (1 - y * y), 0)
    return (
        {"sum": x.sum(1) * scale[:, None], "all": x},
        {"rows": dy @ kernel.T, "scale": x.sum((1, 2))},
        (np.einsum("bld,blh->dh", rows, dy), dy.sum((0, 1))),
    )


def both(most, requests, fixed, shared):
    def total(requests, shared):
        out = in_tiles(function, requests, fixed, shared, most)
        weights = jnp.cos(jnp.arange(out["all"].size)).reshape(out["all"].shape)
        return (out["all"] * weights).sum() + out["sum"].sum(), out

    gradients, out = jax.grad(total, (0, 1), has_aux=True)(requests, shared)
    return out, *gradients


def loss_of(requests, fixed, shared):
    *weights, divisor = shared
    out = function(requests, fixed, weights)
    return ((out["all"] * fixed["weights"]).sum() + out["sum"].sum()) / divisor


def both_with_loss(most, requests, fixed, shared):
    """As `both`: of three times the loss, whose divisor is three; the value is that of `total`."""
    weights = jnp.cos(jnp.arange(fixed["mask"].size * H)).reshape(*fixed["mask"].shape, H)
    fixed = fixed | {"weights": weights}

    def total(requests, shared):
        return 3 * loss_in_tiles(loss_of, requests, fixed, (*shared, jnp.float32(3)), most)

    value, gradients = jax.value_and_grad(total, (0, 1))(requests, shared)
    return value, *gradients


def check_loss(got, arguments):
    out, *gradients = in_float64(*arguments)
    weights = np.cos(np.arange(out["all"].size)).reshape(out["all"].shape)
    expected = ((out["all"] * weights).sum() + out["sum"].sum(), *gradients)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def check(got, arguments):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(in_float64(*arguments)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("b, most", [(8, 8), (8, 3), (7, 3), (5, 1), (1, 4)])
def test_values_and_gradients_are_those_of_the_function(b, most):
    arguments = draw(b)
    check(jax.jit(functools.partial(both, most))(*arguments), arguments)
    check_loss(jax.jit(functools.partial(both_with_loss, most))(*arguments), arguments)


def test_a_loss_is_made_once_with_its_gradients():
    text = str(jax.make_jaxpr(functools.partial(both_with_loss, 2))(*draw()))
    assert text.count("tanh") == 1 and text.count("scan[") == 1
    of_value = functools.partial(loss_in_tiles, lambda x, y, z: function(x, y, z)["sum"].sum())
    requests, fixed, shared = draw()
    value = jax.jit(of_value, static_argnums=3)(requests, fixed, shared, 2)
    np.testing.assert_allclose(value, in_float64(*draw())[0]["sum"].sum(), rtol=1e-5)


def test_gradients_of_rounded_weights_are_summed_in_float32():
    requests, fixed, shared = draw(300)
    shared = jax.tree.map(lambda x: x.astype(jnp.bfloat16), shared)
    got = jax.jit(functools.partial(both, 1))(requests, fixed, shared)[2]
    exact = in_float64(requests, fixed, jax.tree.map(lambda x: np.asarray(x, np.float32), shared))
    for x, y in zip(got, exact[2], strict=True):
        assert x.dtype == jnp.bfloat16
        # Parts are rounded to 8 bits, one by one; sums in bfloat16 would be off by several percent.
        error = np.abs(np.asarray(x, np.float64) - y).max() / np.abs(y).max()
        assert error < 0.01, error


@pytest.mark.parametrize("most", [3, 8])
def test_a_loss_in_float64_is_summed_in_float64(most):
    with jax.enable_x64(True):
        arguments = jax.tree.map(lambda x: x if x.dtype == bool else np.float64(x), draw())
        value, *gradients = jax.jit(functools.partial(both_with_loss, most))(*arguments)
        assert value.dtype == jnp.float64
        out, *expected = in_float64(*arguments)
        weights = np.cos(np.arange(out["all"].size)).reshape(out["all"].shape)
        expected = (out["all"] * weights).sum() + out["sum"].sum(), *expected
        for x, y in zip(*map(jax.tree.leaves, ((value, *gradients), expected)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("data, table", [(4, 2), (8, 1), (1, 8)])
@pytest.mark.parametrize("run, checked, sums", [(both, check, 2), (both_with_loss, check_loss, 4)])
def test_on_a_mesh_only_sums_over_requests_are_sent_once(run, checked, sums, data, table):
    arguments = draw()
    mesh = jax.make_mesh((data, table), ("data", "table"), (AxisType.Auto,) * 2)
    with jax.set_mesh(mesh), dispatch.scope("auto", ("data",)):
        placed = tuple(
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip(arguments, (P("data"), P("data"), P()), strict=True)
        )
        compiled = jax.jit(functools.partial(run, 1)).lower(*placed).compile()
        checked(compiled(*placed), arguments)
    sent = hlo.traffic(compiled.as_text(), mesh.size)
    assert sent.keys() <= {"all-reduce"}
    assert sent["all-reduce"][0] <= sums  # not once for every tile
    assert bool(sent["all-reduce"][1]) == (data > 1)


def test_requests_that_xla_has_to_partition_stay_together():
    arguments = draw()
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    with jax.set_mesh(mesh):  # no scope: nothing says which axis holds the requests
        placed = jax.device_put(arguments[0], NamedSharding(mesh, P("data")))
        text = str(jax.make_jaxpr(functools.partial(both, 1))(placed, *arguments[1:]))
        assert "scan" not in text
        check(jax.jit(functools.partial(both, 1))(placed, *arguments[1:]), arguments)
        check_loss(jax.jit(functools.partial(both_with_loss, 1))(placed, *arguments[1:]), arguments)


@settings(deadline=None, max_examples=40)  # every size compiles
@given(b=st.integers(1, 3000), most=st.integers(-3, 3000))
def test_groups_are_of_one_size_and_lose_nothing(b, most):
    size = size_of_groups(b, most)
    assert 1 <= size <= max(1, most)
    groups = -(-b // size)
    assert groups * size - b < groups  # fewer zeros than groups
    x = np.arange(b)
    assert cut({"x": x}, size)["x"].shape == (groups, size)
    np.testing.assert_array_equal(whole(cut({"x": x}, size), b)["x"], x)


def test_an_axis_may_be_empty():
    """No columns of users: a profile of width 0. No history: behaviours of length 0."""
    for shape in ((5, 0), (5, 0, 3)):
        assert whole(cut(jnp.zeros(shape), 2), 5).shape == shape
    mesh = jax.make_mesh((2, 1), ("data", "table"), (AxisType.Auto,) * 2)
    x = jnp.zeros((8, 0, 3))
    with jax.set_mesh(mesh):
        parts = micro_batches.split(x, 2, mesh)
        assert parts.shape == (2, 4, 0, 3) and micro_batches.join(parts, mesh).shape == x.shape
