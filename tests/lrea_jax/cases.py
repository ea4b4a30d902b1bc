"""Small models and batches that the LREA tests share."""

import jax
import numpy as np

from baselines_jax import din_long
from ctr_jax.batch import EmbeddedBatch, RequestBatch
from ctr_jax.features import DataColumn, DataSpec
from lrea_jax import model

B, N, C = 5, 12, 3  # requests, behaviours (short 3 + long 9), candidates
LENGTHS = (12, 0, 7, 2, 11)
SPEC = DataSpec(
    "test",
    (
        DataColumn("user", "age", "id", "age"),
        DataColumn("context", "slot", "id", "slot"),
        DataColumn("behaviour", "item", "id", "item"),
        DataColumn("behaviour", "type", "id", "type"),
        DataColumn("candidate", "item", "id", "item"),
        DataColumn("candidate", "price", "dense"),
    ),
    dict.fromkeys(("age", "slot", "item", "type"), 9),
    C,
)


def small(module=model, **changes):
    """config.model of a model that fits the batches here."""
    config = module.default_config()
    config.update(
        embedding_width=3, width=4, hidden=5, short_length=3, long_length=9, head_hidden=(6, 4),
        slope=0.2, tile_bytes=B * C * 5 * 4 * 4,
    )  # fmt: skip
    if module is model:
        config.rank = 4
    config.update(changes)
    config.lock()
    return config


def batch_of(columns, seed=0, length=N, lengths=LENGTHS, candidates=C):
    rng = np.random.default_rng(seed)
    size = len(lengths)
    mask = np.arange(length) >= length - np.asarray(lengths)[:, None]
    leading = {"user": (size,), "context": (size,), "behaviour": (size, length),
               "candidate": (size, candidates)}  # fmt: skip
    vectors = {
        c.key: rng.normal(size=leading[c.group] + (c.width,)).astype(np.float32) for c in columns
    }
    zeros = np.zeros(size, np.int32)
    batch = RequestBatch(
        user_id=zeros, request_id=zeros, request_time=zeros, user={}, context={}, behaviour={},
        behaviour_time=np.zeros((size, length), np.int32), behaviour_mask=mask, candidate={},
        candidate_mask=np.ones((size, candidates), bool),
        label=rng.integers(0, 2, (size, candidates)).astype(np.float32),
    )  # fmt: skip
    return EmbeddedBatch(batch, vectors)


def built(config, **kwargs):
    """(module, variables, batch, columns); weights and statistics away from their initial values,
    and nothing to compile."""
    build = din_long.build if config.module == din_long.__name__ else model.build
    module, columns = build(config, SPEC)
    embedded = batch_of(columns, **kwargs)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(1), embedded, False))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(2)
    leaves = [rng.normal(size=x.shape).astype(np.float32) * 0.5 + (x.ndim < 2) for x in leaves]
    variables = jax.tree.unflatten(tree, leaves)
    norms = variables["batch_stats"]["head"]
    for norm in norms.values():
        norm["variance"] = np.abs(norm["variance"]) + 0.5
    return module, variables, embedded, columns


def applied(module, train=False):
    """A jitted (variables, embedded) -> logits."""
    return jax.jit(lambda v, x: module.apply(v, x, train)[0])


def double(tree):
    """float32 arrays as float64."""
    return jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, tree)


def changed(embedded, rows=slice(None), candidates=slice(None), padding=0, seed=0):
    """The same requests: some rows, some candidates in some order, more left padding of noise."""
    rng = np.random.default_rng(seed)
    batch, vectors = jax.tree.map(lambda x: x[rows], (embedded.batch, dict(embedded.vectors)))
    for key, x in vectors.items():
        if key.startswith("candidate/"):
            vectors[key] = x[:, candidates]
        if key.startswith("behaviour/"):
            noise = rng.normal(size=(len(x), padding, x.shape[-1])).astype(x.dtype)
            vectors[key] = np.concatenate([noise, x], 1)
    left = ((0, 0), (padding, 0))
    batch = batch.replace(
        behaviour_time=np.pad(batch.behaviour_time, left),
        behaviour_mask=np.pad(batch.behaviour_mask, left),
        candidate_mask=batch.candidate_mask[:, candidates],
        label=batch.label[:, candidates],
    )
    return EmbeddedBatch(batch, vectors)
