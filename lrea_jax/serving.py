"""Serving LREA from caches: the history is read at a refresh, never at a request (3.1, Fig. 1).

    model = load(config, workdir)          # or ServedModel(module, variables, name)
    cache = precompute(model, histories)   # O(L r d) per user
    logits = score(model, cache, model.embed(candidates))

`score` computes what the absorbed training path computes, from C and E_aux alone: time and memory
do not depend on L. A cache holds, per user, the fields of `UserCache`; for r = 128, d = 16 those of
the long branch are 4,096 numbers (16 KiB in float32), against L d = 160,000 of the history itself.

Appending one behaviour moves all others to another position, so C and E_aux change as a whole and a
refresh is a new precompute. lrea_jax/cache_store.py keeps many users' caches on the device.

Axis letters: U users, C candidates, L history, S short history, r rank, d model width.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import flax.struct
import jax
import numpy as np
from ml_collections import ConfigDict

from ctr_jax import embedding, precision, sharding
from ctr_jax.batch import EmbeddedBatch, RequestBatch
from ctr_jax.features import Column
from ctr_jax.long_short import LongShort, Summary
from ctr_jax.serving import restore
from kernels import dispatch
from kernels.absorbed_target_attention import Memory


class StaleCache(ValueError):
    """A cache was built from other weights than those that are to score with it."""


@flax.struct.dataclass
class UserCache:
    """What is kept of U users' histories. `U` may be any number of rows of a store.

    Attributes:
      compressed: [U, r, d], C = E_comp^T = W_c^T E_s.
      auxiliary: [U, r, d], E_aux^T = W_d E_s.
      total: [U, d], sum_l e_l of the long history, which the split form weighs by phi(t W1) W_o.
      recent: [U, S, d], tokens of the short history.
      weights: the name of the weights that made it (`name_of`); checked wherever it is used.
    """

    compressed: jax.Array
    auxiliary: jax.Array
    total: jax.Array
    recent: jax.Array
    weights: str = flax.struct.field(pytree_node=False)


def name_of(run: str, step: int, data_hash: str, weights: Any, dtype: str = "float32") -> str:
    """ "run:step:data hash:dtype:digest of the weights", so that a run id used twice is noticed.

    Args:
      weights: all that a cache is made of: the model's variables, and the tables that embed.
      dtype: config.dtype, what it is computed in.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(weights):
        digest.update(jax.tree_util.keystr(path).encode())
        # As bytes in place: of a large table there is no second copy on the host.
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).reshape(-1).view(np.uint8))
    return f"{run}:{step}:{data_hash[:12]}:{dtype}:{digest.hexdigest()[:12]}"


class ServedModel:
    """Weights ready to serve, whichever path they were trained on.

    Args:
      module: what lrea_jax.model.build returned.
      variables: {"params", "batch_stats"}.
      name: from `name_of`.
      tables, columns: what embeds; left out where vectors come from elsewhere.
      dtype, kernels: as config.dtype and config.kernels, which evaluation scores by.
    Raises:
      ConfigError: no such dtype.
      CannotRun: `kernels` names kernels that the devices do not have.
    """

    def __init__(
        self,
        module: LongShort,
        variables: dict,
        name: str,
        *,
        tables: dict[str, jax.Array] | None = None,
        columns: tuple[Column, ...] = (),
        dtype: str = "float32",
        kernels: str = "auto",
    ):
        dispatch.check(kernels)
        self.module = module.clone(long=module.long.clone(path="absorbed"))
        self.variables = {**variables, "params": precision.rounded(variables["params"], dtype)}
        self.name, self.dtype, self.kernels = name, dtype, kernels
        self.tables, self.columns = tables, columns
        # Bound here, so that one model compiles each shape once.
        self._embed = jax.jit(self._embedded)
        self._summary = jax.jit(self._summarised)
        self._score = jax.jit(self._apply("score"))
        self._interest = jax.jit(self._apply("interest"))

    def _apply(self, method: str):
        def apply(variables, summary, candidates):
            if isinstance(candidates, EmbeddedBatch):
                candidates = self._rounded(candidates)
            with dispatch.scope(self.kernels, sharding.BATCH_AXES):
                return self.module.apply(variables, summary, candidates, method=method)

        return apply

    def _summarised(self, variables, tables, histories):
        if isinstance(histories, RequestBatch):
            columns = [c for c in self.columns if c.group == "behaviour"]
            histories = self._embedded(tables, histories, columns, as_rows=True)
        # Nothing in it has kernels to choose.
        return self.module.apply(variables, self._rounded(histories), method="summary")

    def _embedded(self, tables, batch, columns=None, as_rows=False):
        if tables is None:
            raise ValueError("this ServedModel has no tables: embed elsewhere, or pass tables=")
        columns = self.columns if columns is None else columns
        plan = embedding.lookup_ids(columns, batch, tables)
        rows = embedding.gather_rows(tables, plan)
        return self._rounded(embedding.embed(rows, plan, columns, batch, as_rows=as_rows))

    def _rounded(self, embedded):
        vectors, rows = precision.rounded((embedded.vectors, embedded.rows), self.dtype)
        return embedded.replace(vectors=vectors, rows=rows)

    def embed(self, batch: RequestBatch) -> EmbeddedBatch:
        """The vectors of a batch's columns, from the model's own tables, in its dtype.

        Raises:
          ValueError: the model was made without tables.
        """
        return self._embed(self.tables, batch)

    def check(self, cache: UserCache) -> None:
        """Raises StaleCache unless `cache` was made by these weights."""
        if cache.weights != self.name:
            raise StaleCache(
                f"the cache was made by weights {cache.weights}, these are {self.name}; "
                "precompute it again"
            )


def precompute(model: ServedModel, histories: RequestBatch | EmbeddedBatch) -> UserCache:
    """Caches of U users from their histories; a row is a user, and only behaviours are read.

    Costs O(L r d) per user. Of a RequestBatch, which the model embeds in the same computation,
    memory is that of the tokens [U, L, d], and of the behaviours' vectors where
    `embedding.reads_rows` does not hold; of an EmbeddedBatch, for vectors from elsewhere, those
    are there already.

    Raises:
      ValueError: a RequestBatch, and the model was made without tables.
    """
    summary = model._summary(model.variables, model.tables, histories)
    long = summary.long
    return UserCache(long.keys, long.values, long.total, summary.recent, weights=model.name)


def score(model: ServedModel, cache: UserCache, candidates: EmbeddedBatch) -> jax.Array:
    """Logits [U, C] of each user's candidates (eq. 9), with the short branch and the head.

    Args:
      candidates: C candidates, user and context of each row of `cache`; its history is not read
        and may have length 0.
    Raises:
      StaleCache: the cache was made by other weights.
    """
    model.check(cache)
    return model._score(model.variables, _summary(cache), _without_history(candidates))


def long_interest(model: ServedModel, cache: UserCache, query: jax.Array) -> jax.Array:
    """The long branch alone: candidate tokens [U, C, d] -> LREA(E_s, E_t) [U, C, d] (eq. 9).

    Raises:
      StaleCache: the cache was made by other weights.
    """
    model.check(cache)
    return model._interest(model.variables, _summary(cache), query)


def _summary(cache: UserCache) -> Summary:
    return Summary(Memory(cache.compressed, cache.auxiliary, cache.total), cache.recent)


def _without_history(embedded: EmbeddedBatch) -> EmbeddedBatch:
    """The same candidates with a history of length 0, so that one shape is compiled for all."""
    batch = embedded.batch
    cut = batch.replace(
        behaviour={k: x[:, :0] for k, x in batch.behaviour.items()},
        behaviour_time=batch.behaviour_time[:, :0],
        behaviour_mask=batch.behaviour_mask[:, :0],
    )
    vectors = {k: v for k, v in embedded.vectors.items() if not k.startswith("behaviour/")}
    return EmbeddedBatch(cut, vectors)


def load(config: ConfigDict, workdir: str | Path, step: int | None = None) -> ServedModel:
    """The weights of a training run, ready to serve; arguments and errors as of `restore`."""
    experiment, weights, at = restore(config, workdir, step)
    variables = {"params": weights["model"], **weights["model_state"]}
    run, data_hash = config.name or Path(workdir).name, experiment.spec.content_hash
    name = name_of(run, at, data_hash, weights, config.dtype)
    return ServedModel(
        experiment.model,
        variables,
        name,
        tables=weights["tables"],
        columns=experiment.columns,
        dtype=config.dtype,
        kernels=config.kernels,
    )
