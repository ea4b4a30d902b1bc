"""The scoring unit at any rank: both forms, both tilings, against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.absorbed_target_attention import (
    FORMS,
    TILINGS,
    Memory,
    Weights,
    absorbed_target_attention,
)
from tests.kernels.cases import sizes
from tests.lrea_jax import reference

# (B, C, K, d, h, tile bytes in float32 numbers): one tile; ragged tiles of rows; of candidates too;
# tiles rounded up to 16; a single row; groups of requests, the last one filled up.
SHAPES = [
    (2, 3, 7, 4, 5, 10**6),
    (2, 3, 7, 4, 5, 2 * 3 * 5 * 3),
    (1, 11, 7, 3, 6, 4),
    (1, 40, 50, 2, 3, 1000),
    (2, 1, 1, 2, 3, 1),
    (7, 2, 5, 4, 5, 3 * 2 * 5 * 5),
]


def draw(shape, dtype=np.float32, seed=0):
    b, c, k, d, h, _ = shape
    rng = np.random.default_rng(seed)
    normal = lambda *s: rng.normal(size=s).astype(dtype)  # noqa: E731
    memory = Memory(normal(b, k, d), normal(b, k, d), normal(b, d))
    return normal(b, c, d), memory, Weights(normal(d, h), normal(d, h), normal(d, h), normal(h))


def expected(query, memory, weights, form, slope):
    kernel = np.concatenate([weights.of_query, weights.of_key, weights.of_product]).astype(float)
    return np.stack(
        [
            [
                reference.unit(
                    t.astype(float), memory.keys[b].astype(float), memory.values[b].astype(float),
                    kernel, weights.out.astype(float), form, slope, memory.total[b].astype(float),
                )
                for t in query[b]
            ]
            for b in range(len(query))
        ]
    )  # fmt: skip


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loops_whatever_the_tiles(form, tiling):
    for shape in SHAPES:
        query, memory, weights = draw(shape)
        run = jax.jit(
            lambda *a, size=shape[-1]: absorbed_target_attention(
                *a, form=form, slope=0.2, tiling=tiling, tile_bytes=4 * size
            )
        )
        want = expected(query, memory, weights, form, 0.2)
        np.testing.assert_allclose(run(query, memory, weights), want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[-1]])
def test_gradients_equal_finite_differences_in_float64(shape, form, tiling):
    with jax.enable_x64(True):
        arguments = draw(shape, np.float64)
        direction = draw(shape, np.float64, seed=1)
        weigh = np.random.default_rng(2).normal(size=arguments[0].shape)

        def total(arguments):
            size = 8 * shape[-1]
            out = absorbed_target_attention(*arguments, form=form, tiling=tiling, tile_bytes=size)
            return jnp.sum(out * weigh)

        slope = sum(
            jax.tree.leaves(
                jax.tree.map(
                    lambda g, x: float(jnp.vdot(g, x)),
                    jax.jit(jax.grad(total))(arguments),
                    direction,
                )
            )
        )
        sides = []
        for step in (1e-6, -1e-6):
            moved = [x + step * y for x, y in zip(*map(jax.tree.leaves, (arguments, direction)),
                                                  strict=True)]  # fmt: skip
            moved = jax.tree.unflatten(jax.tree.structure(arguments), moved)
            sides.append((expected(*moved, form, 0.01) * weigh).sum())
        assert slope == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-5)


def test_no_rows_give_zero_and_bad_switches_are_refused():
    query, memory, weights = draw((2, 3, 0, 4, 5, 0))
    assert not np.asarray(absorbed_target_attention(query, memory, weights, form="split")).any()
    for switch in ({"form": "both"}, {"tiling": "pallas"}):
        with pytest.raises(ValueError, match="must be one of"):
            absorbed_target_attention(query, memory, weights, **switch)


@pytest.mark.parametrize("form", FORMS)
def test_no_array_over_candidates_rows_and_hidden_units(form):
    b, c, k, d, h = 8, 2, 300, 4, 64
    query, memory, weights = draw((b, c, k, d, h, 0))

    def run(tiling):
        options = dict(form=form, tiling=tiling, tile_bytes=b * c * h * 4 * 10)
        return lambda *a: absorbed_target_attention(*a, **options).sum()

    grad = jax.make_jaxpr(jax.grad(run("keys"), (0, 1, 2)))(query, memory, weights)
    assert max(sizes(grad.jaxpr)) <= 10 * b * c * h + b * k * d + b * k * c
    b, c, k = 1, 500, 64
    query, memory, weights = draw((b, c, k, d, h, 0))
    forward = jax.make_jaxpr(run("hidden"))(query, memory, weights)
    assert max(sizes(forward.jaxpr)) <= c * k
