"""What is checked of each model of the self-attention family, against a reference of its own."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.baselines_jax.cases import IN_TILES, LENGTH, in_tiles, padded, tokens_of

LENGTHS, L, C = (11, 0, 6, 1), 11, 3  # full, empty, ragged, one behaviour; LENGTH is longer
FIELDS = (3, 2)  # columns of the profile


def case(lengths=LENGTHS, length=L, candidates=C, seed=0, fields=FIELDS):
    """Tokens with a profile."""
    rng = np.random.default_rng(seed + 1)
    profile = rng.normal(size=(len(lengths), sum(fields))).astype(np.float32)
    return tokens_of(lengths, length, candidates, seed).replace(profile=profile)


class Checks:
    """The checks of one model.

    Args:
      module: a function of tile_bytes.
      reference: (params in float64, tokens) -> [B, C, k].
      fields: FIELDS, or () for a model without a profile.
    """

    def __init__(self, module, reference, fields=FIELDS):
        self.module, self.reference, self.fields = module, reference, fields
        self.tokens = case(fields=fields)

    @functools.cached_property
    def variables(self):
        """Weights well away from their initial values, so that every one matters."""
        shapes = jax.eval_shape(lambda: self.module(0).init(jax.random.key(0), self.tokens, False))
        leaves, tree = jax.tree.flatten(shapes)
        rng = np.random.default_rng(1)
        leaves = [rng.normal(size=x.shape).astype(np.float32) * 0.6 for x in leaves]
        return jax.device_put(jax.tree.unflatten(tree, leaves))

    def of(self, variables, tokens, tiles):
        with in_tiles() if tiles else contextlib.nullcontext():
            module = self.module(IN_TILES["tile_bytes"] if tiles else 0)
            return module.apply(variables, tokens, False)

    @functools.cached_property
    def applied(self):
        return jax.jit(lambda v, t: self.of(v, t, False))

    def expected(self, variables, tokens):
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
        return np.array(self.reference(params, tokens))

    def values(self):
        """Equal to the formulas, two draws."""
        for seed in (0, 5):
            tokens = case(LENGTHS[::-1] if seed else LENGTHS, seed=seed, fields=self.fields)
            out = self.applied(self.variables, tokens)
            expected = self.expected(self.variables, tokens)
            np.testing.assert_allclose(out, expected, rtol=2e-4, atol=2e-4)

    def one_behaviour(self):
        """L = 1 = C."""
        tokens = case((1, 0), 1, 1, fields=self.fields)
        out = self.applied(self.variables, tokens)
        expected = self.expected(self.variables, tokens)
        np.testing.assert_allclose(out, expected, rtol=2e-4, atol=2e-4)

    def gradients(self):
        """In tiles: the values, and finite gradients, none of them forgotten, that are those of the
        formulas."""
        tokens, rng = self.tokens, np.random.default_rng(3)

        def loss(variables, *vectors):
            out = self.of(variables, _with(tokens, vectors), True)
            return jnp.sum(jnp.sin(out)), out

        arguments = (self.variables, tokens.candidates, tokens.behaviours, tokens.profile)
        both = jax.jit(jax.grad(loss, range(4), has_aux=True))
        grads, out = both(*arguments)
        expected = self.expected(self.variables, tokens)
        np.testing.assert_allclose(out, expected, rtol=2e-4, atol=2e-4)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
        forgotten = [x for x in jax.tree.leaves(grads) if x.size and not np.abs(x).max() > 0]
        assert not forgotten
        padding = ~tokens.batch.behaviour_mask
        assert (np.asarray(grads[2])[padding] == 0).all()

        directions = jax.tree.map(lambda x: rng.normal(size=x.shape), arguments)
        directions[2][padding] = 0

        def moved(by):
            variables, *vectors = jax.tree.map(
                lambda x, to: np.asarray(x, np.float64) + by * to, arguments, directions
            )
            return np.sum(np.sin(self.expected(variables, _with(tokens, vectors))))

        difference = (moved(1e-6) - moved(-1e-6)) / 2e-6
        products = jax.tree.map(lambda g, to: np.sum(g * to), grads, directions)
        np.testing.assert_allclose(sum(jax.tree.leaves(products)), difference, rtol=2e-3)

    def isolation(self):
        """A candidate's row does not know what the others are, nor in which order."""
        out = np.asarray(self.applied(self.variables, self.tokens))
        given = self.tokens.candidates
        others = given.copy()
        others[:, [0, 2]] += 3.0
        again = np.asarray(self.applied(self.variables, self.tokens.replace(candidates=others)))
        np.testing.assert_allclose(again[:, 1], out[:, 1], rtol=1e-5, atol=1e-5)
        assert np.abs(again[:, 0] - out[:, 0]).max() > 1e-2
        turned = self.tokens.replace(candidates=given[:, [2, 0, 1]])
        again = self.applied(self.variables, turned)
        np.testing.assert_allclose(again, out[:, [2, 0, 1]], rtol=1e-5, atol=1e-5)

    def padding(self):
        """What stands in it changes nothing, and more of it changes nothing."""
        tokens = self.tokens
        out = self.applied(self.variables, tokens)
        hidden = ~tokens.batch.behaviour_mask
        noise = np.where(hidden[..., None], 50.0, tokens.behaviours).astype(np.float32)
        times = np.where(hidden, -5, tokens.batch.behaviour_time).astype(np.int32)
        noisy = tokens.replace(behaviours=noise, batch=tokens.batch.replace(behaviour_time=times))
        again = self.applied(self.variables, noisy)
        np.testing.assert_allclose(again, out, rtol=1e-5, atol=1e-5)
        again = self.applied(self.variables, padded(tokens, LENGTH - L))
        np.testing.assert_allclose(again, out, rtol=1e-5, atol=1e-5)

    def halves(self):
        """bfloat16 in, bfloat16 out, near float32."""
        halved = functools.partial(
            jax.tree.map, lambda x: x.astype(jnp.bfloat16) if x.dtype == np.float32 else x
        )
        vectors = halved((self.tokens.candidates, self.tokens.behaviours, self.tokens.profile))
        small = jax.tree.map(lambda x: x / 3, self.variables)
        out = self.applied(halved(small), _with(self.tokens, vectors))
        assert out.dtype == jnp.bfloat16
        expected = self.applied(small, self.tokens)
        np.testing.assert_allclose(out.astype(np.float32), expected, rtol=0.1, atol=0.1)


def _with(tokens, vectors):
    candidates, behaviours, profile = vectors
    return tokens.replace(candidates=candidates, behaviours=behaviours, profile=profile)


EVERY, SLOW = ("values", "gradients", "isolation", "padding"), ("one_behaviour", "halves")


def names(*slow: str) -> list:
    """Of the checks, those of SLOW and `slow` for the longer tests."""
    slow = (*SLOW, *slow)
    return [
        pytest.param(name, marks=pytest.mark.slow if name in slow else ())
        for name in (*EVERY, *SLOW)
    ]
