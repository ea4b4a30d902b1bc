"""Tokens and weights that the tests of the baselines share."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baselines_jax.hstu import HSTU
from baselines_jax.transformer import Transformer
from baselines_jax.twin import TWIN
from ctr_jax import query_tiles
from ctr_jax.batch import RequestBatch
from ctr_jax.history_model import Tokens

D, LENGTH = 8, 13  # width, config.length
# Small enough for every case to be in several tiles of several blocks, some ragged.
IN_TILES = dict(tile_bytes=200, block=5)
MODULES = {
    "twin": lambda **kw: TWIN(heads=2, top_k=3, **kw),
    "hstu": lambda **kw: HSTU(layers=2, heads=2, length=LENGTH, **kw),
    "transformer": lambda **kw: Transformer(layers=2, heads=2, length=LENGTH, **kw),
}


def tokens_of(lengths, length, candidates, seed=0):
    """Right-aligned histories of `lengths`, times from seconds to months apart, some equal."""
    rng, size = np.random.default_rng(seed), len(lengths)
    mask = np.arange(length) >= length - np.asarray(lengths)[:, None]
    gaps = np.exp(rng.uniform(0, 16, (size, length + 1))) * rng.integers(0, 2, (size, length + 1))
    times = 1_500_000_000 + np.cumsum(gaps.astype(np.int64), 1)
    zeros = np.zeros(size, np.int32)
    batch = RequestBatch(
        user_id=zeros, request_id=zeros, request_time=times[:, -1].astype(np.int32), user={},
        context={}, behaviour={}, candidate={}, behaviour_mask=mask,
        behaviour_time=np.where(mask, times[:, :-1], 0).astype(np.int32),
        candidate_mask=np.ones((size, candidates), bool),
        label=np.zeros((size, candidates), np.float32),
    )  # fmt: skip
    behaviours = rng.normal(size=(size, length, D)) * mask[..., None]
    return Tokens(
        rng.normal(size=(size, candidates, D)).astype(np.float32),
        behaviours.astype(np.float32),
        np.zeros((size, 0), np.float32),
        batch,
    )


def padded(tokens, by):
    """The same requests with `by` more places of padding on the left, noise as their times."""
    batch, left = tokens.batch, ((0, 0), (by, 0))
    batch = batch.replace(
        behaviour_mask=np.pad(batch.behaviour_mask, left),
        behaviour_time=np.pad(batch.behaviour_time, left, constant_values=7),
    )
    return tokens.replace(behaviours=np.pad(tokens.behaviours, (*left, (0, 0))), batch=batch)


def of_candidates(tokens, which):
    batch = tokens.batch
    batch = batch.replace(
        candidate_mask=batch.candidate_mask[:, which], label=batch.label[:, which]
    )
    return tokens.replace(candidates=tokens.candidates[:, which], batch=batch)


@functools.cache
def variables_of(name):
    """Weights well away from their initial values, so that every one matters."""
    module, tokens = MODULES[name](), tokens_of((2,), 3, 1)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), tokens, False))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(1)
    leaves = [rng.normal(size=x.shape).astype(np.float32) * 0.6 for x in leaves]
    return jax.device_put(jax.tree.unflatten(tree, leaves))


@functools.cache
def applied(name, tiles=False):
    """A jitted (variables, tokens) -> [B, C, d]; in tiles, or as it comes."""
    return jax.jit(lambda v, t: interest(name, v, t, tiles))


def interest(name, variables, tokens, tiles=False):
    with in_tiles() if tiles else contextlib.nullcontext():
        module = MODULES[name](tile_bytes=IN_TILES["tile_bytes"] if tiles else 0)
        return module.apply(variables, tokens, False)


@functools.cache
def differentiated(name, tiles=False):
    """A jitted (variables, candidates, behaviours, tokens) -> gradients of a sum of sines."""

    def loss(variables, candidates, behaviours, tokens):
        tokens = tokens.replace(candidates=candidates, behaviours=behaviours)
        return jnp.sum(jnp.sin(interest(name, variables, tokens, tiles)))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))


@contextlib.contextmanager
def in_tiles():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(query_tiles, "CAUSAL_BLOCK", IN_TILES["block"])
        yield
