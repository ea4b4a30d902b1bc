"""TWIN, HSTU and Transformer against their formulas in float64, and what may not change them."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.baselines_jax import references
from tests.baselines_jax.cases import (
    LENGTH,
    MODULES,
    applied,
    differentiated,
    interest,
    of_candidates,
    padded,
    tokens_of,
    variables_of,
)

# L and C. 11 = two blocks in tiles, 1 = a single pair, LENGTH = all of the position tables.
SHAPES = [(11, 3), (1, 1), (LENGTH, 2)]
TILES = [False, True]
SIZE = 3  # requests


@st.composite
def cases(draw):
    length, candidates = draw(st.sampled_from(SHAPES))
    lengths = draw(st.lists(st.integers(0, length), min_size=SIZE, max_size=SIZE))
    return tokens_of(lengths, length, candidates, seed=draw(st.integers(0, 99)))


def case():
    return tokens_of((11, 0, 6), 11, 3)


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("name", MODULES)
@settings(max_examples=15, deadline=None)
@given(tokens=cases())
def test_equal_to_the_formulas(name, tiles, tokens):
    variables = variables_of(name)
    out = applied(name, tiles)(variables, tokens)
    expected = getattr(references, name)(variables, tokens)
    np.testing.assert_allclose(out, expected, rtol=2e-4, atol=2e-4)


def gradients(name, tiles):
    tokens = case()
    of = differentiated(name, tiles)
    return of(variables_of(name), tokens.candidates, tokens.behaviours, tokens)


@pytest.mark.parametrize("name", MODULES)
def test_gradients_are_finite_and_do_not_depend_on_the_tiles(name):
    grads = [gradients(name, tiles) for tiles in TILES]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *grads)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads[0]))  # nothing is left out


@pytest.mark.parametrize("name", MODULES)
def test_gradients_equal_differences_of_the_formulas(name):
    tokens, rng = case(), np.random.default_rng(3)
    directions = (
        jax.tree.map(lambda x: rng.normal(size=x.shape), variables_of(name)),
        rng.normal(size=tokens.candidates.shape),
        rng.normal(size=tokens.behaviours.shape) * tokens.batch.behaviour_mask[..., None],
    )

    def moved(by):
        variables, candidates, behaviours = jax.tree.map(
            lambda x, to: np.asarray(x, np.float64) + by * to,
            (variables_of(name), tokens.candidates, tokens.behaviours),
            directions,
        )
        given = tokens.replace(candidates=candidates, behaviours=behaviours)
        return np.sum(np.sin(getattr(references, name)(variables, given)))

    expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
    products = jax.tree.map(lambda g, to: np.sum(g * to), gradients(name, True), directions)
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), expected, rtol=2e-3)


@pytest.mark.parametrize("name", MODULES)
def test_candidates_do_not_see_one_another(name):
    tokens, variables = case(), variables_of(name)
    out = np.asarray(applied(name)(variables, tokens))
    for which in ([2, 0, 1], [1]):
        other = applied(name)(variables, of_candidates(tokens, which))
        np.testing.assert_allclose(other, out[:, which], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("name", MODULES)
def test_more_left_padding_changes_nothing(name, tiles):
    tokens, variables = case(), variables_of(name)
    out = applied(name, tiles)(variables, tokens)
    again = applied(name, tiles)(variables, padded(tokens, LENGTH - 11))
    np.testing.assert_allclose(again, out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_what_stands_in_padding_changes_nothing(name):
    tokens, variables = case(), variables_of(name)
    out = applied(name)(variables, tokens)
    hidden = ~tokens.batch.behaviour_mask
    noise = np.where(hidden[..., None], 50.0, tokens.behaviours).astype(np.float32)
    times = np.where(hidden, -5, tokens.batch.behaviour_time).astype(np.int32)
    batch = tokens.batch.replace(behaviour_time=times)
    again = applied(name)(variables, tokens.replace(behaviours=noise, batch=batch))
    np.testing.assert_allclose(again, out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["hstu", "transformer"])
def test_a_history_longer_than_the_position_table_is_refused(name):
    with pytest.raises(ValueError, match="config.model.length=13"):
        interest(name, variables_of(name), tokens_of((3,), LENGTH + 1, 1))
