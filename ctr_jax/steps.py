"""The pure functions of a run: initial state, one training step, scores of a batch.

State: {"tables", "table_opt", "model", "model_state", "opt", "step"}. A step looks the batch's
rows up once, differentiates with respect to those rows and the model's parameters only, and
updates only the rows it touched: nothing in it grows with the vocabulary.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ctr_jax import (
    embedding,
    losses,
    micro_batches,
    optimizers,
    precision,
    sharding,
    table_optimizers,
)
from ctr_jax.batch import EmbeddedBatch, RequestBatch
from ctr_jax.config import ConfigError
from ctr_jax.features import GROUPS, Column, DataSpec, table_scales, table_shapes
from kernels import dispatch


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config bound to a data set and a mesh: everything static that the steps close over."""

    config: ConfigDict
    spec: DataSpec
    mesh: Mesh
    model: Any
    columns: tuple[Column, ...]
    optimizer: optax.GradientTransformation
    table_optimizer: Any


def bind(config: ConfigDict, spec: DataSpec, mesh: Mesh, total_steps: int) -> Experiment:
    """Builds the model that the config names, its columns and its optimizers.

    Everything below runs under `jax.set_mesh(mesh)`.

    Raises:
      ConfigError: a batch size does not divide over the mesh's data axis, or what the model and the
        optimizers refuse.
      CannotRun: config.kernels names kernels that the devices do not have.
    """
    dispatch.check(config.kernels)
    _check_slices(config, spec)
    for name in ("batch_size", "eval_batch_size"):
        if config[name] % mesh.shape[sharding.DATA]:
            raise ConfigError(
                f"{name} {config[name]} does not divide over mesh {dict(mesh.shape)}; set it, "
                "config.mesh.data, or on a CPU --cpu_devices"
            )
    module, tables = importlib.import_module(config.model.module), config.table_optimizer
    try:
        model, columns = module.build(config.model, spec)
        table_optimizer = table_optimizers.table_optimizer(
            tables.name,
            learning_rate=optimizers.schedule(tables, total_steps),
            b1=tables.b1,
            b2=tables.b2,
            eps=tables.eps,
            initial_accumulator=tables.initial_accumulator,
            weight_decay=tables.weight_decay,
        )
        dense = optimizers.dense_optimizer(config.optimizer, total_steps)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Experiment(config, spec, mesh, model, columns, dense, table_optimizer)


def _check_slices(config: ConfigDict, spec: DataSpec) -> None:
    """Raises ConfigError at a slice that the data set has no column for."""
    known = [f"{g}/{c.name}" for g in ("candidate", "user", "context") for c in spec.group(g)]
    for name in config.slices:
        if name not in known:
            raise ConfigError(f"slices has {name!r}; the columns are {', '.join(known)}")


def empty_batch(spec: DataSpec, rows: int, history_length: int) -> RequestBatch:
    """`rows` requests that hold nothing: the shapes of a batch, for initialisation and tracing."""
    leading = {
        "user": (rows,),
        "context": (rows,),
        "behaviour": (rows, history_length),
        "candidate": (rows, spec.max_candidates),
    }
    groups = {
        g: {
            c.name: np.zeros(leading[g], np.int32 if c.kind == "id" else np.float32)
            for c in spec.group(g)
        }
        for g in GROUPS
    }
    zeros = np.zeros((rows,), np.int32)
    return RequestBatch(
        user_id=zeros,
        request_id=zeros,
        request_time=zeros,
        **groups,
        behaviour_time=np.zeros(leading["behaviour"], np.int32),
        behaviour_mask=np.zeros(leading["behaviour"], bool),
        candidate_mask=np.zeros(leading["candidate"], bool),
        label=np.zeros(leading["candidate"], np.float32),
        weight=np.zeros(leading["candidate"], np.float32) if spec.weighted else None,
    )


def init_state(experiment: Experiment, seed: int) -> dict:
    """The initial state, made directly in its sharded layout."""
    init = _init_fn(experiment)
    rng = jax.random.key(seed)
    layout = sharding.shardings(jax.eval_shape(init, rng), experiment.mesh)
    return jax.jit(init, out_shardings=layout)(rng)


def state_shapes(experiment: Experiment) -> dict:
    """Shapes and shardings of the state, without making it: what a restore fills."""
    init = _init_fn(experiment)
    # The key is made while tracing: the mesh may be of devices that are not here (planner.py).
    shapes = jax.eval_shape(lambda: init(jax.random.key(0)))
    layout = sharding.shardings(shapes, experiment.mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout
    )


def _init_fn(experiment: Experiment) -> Callable:
    config, columns = experiment.config, experiment.columns

    def init(rng):
        table_rng, model_rng = jax.random.split(rng)
        tables = embedding.init_tables(
            table_rng,
            table_shapes(columns, experiment.spec),
            scale=table_scales(columns, config.table_optimizer.init_scale),
            mesh=experiment.mesh,
        )
        batch = empty_batch(experiment.spec, experiment.mesh.size, config.history_length)
        embedded = _embed(experiment, tables, batch)
        variables = dict(experiment.model.init({"params": model_rng}, embedded, train=False))
        params = variables.pop("params")
        return {
            "tables": tables,
            "table_opt": experiment.table_optimizer.init(tables),
            "model": params,
            "model_state": variables,
            "opt": experiment.optimizer.init(params),
            "step": jnp.zeros((), jnp.int32),
        }

    return init


def _embed(experiment: Experiment, tables, batch) -> EmbeddedBatch:
    plan = embedding.lookup_ids(experiment.columns, batch, tables)
    rows = embedding.gather_rows(tables, plan)
    return _embed_rows(experiment, rows, plan, batch)


def _embed_rows(experiment: Experiment, rows, plan, batch) -> EmbeddedBatch:
    as_rows = getattr(experiment.model, "takes_rows", False)  # it reads them by ctr_jax.tokens
    return embedding.embed(rows, plan, experiment.columns, batch, as_rows=as_rows)


def train_step(experiment: Experiment, earlier_updates: int = 0) -> Callable:
    """(state, batch) -> (state, scalars), jitted; the state is donated.

    With `config.micro_batch` the model sees the batch in parts whose gradients add up; ids are made
    distinct, and tables updated, once for the whole batch.

    Args:
      earlier_updates: updates that the tables' moments saw before step 0, in the run that this one
        started from.

    scalars: loss (what is minimised), logloss, and the norms of gradients, of the model's
    parameters and their updates, and of the tables' rows in the batch, updated.

    Raises:
      ConfigError: batches do not divide into micro-batches, or the model does not allow them.
    """
    config, columns = experiment.config, experiment.columns
    shapes = state_shapes(experiment)
    gradients = _gradients(experiment, has_statistics="batch_stats" in shapes["model_state"])

    def step_fn(state, batch):
        plan = embedding.lookup_ids(columns, batch, state["tables"])
        rows = embedding.gather_rows(state["tables"], plan)

        def embed(rows):
            embedded = _embed_rows(experiment, rows, plan, batch)
            return (embedded.vectors, embedded.rows), embedded.slots

        looked_up, to_rows, slots = jax.vjp(embed, rows, has_aux=True)
        embedded = EmbeddedBatch(batch, *looked_up, slots)
        # A function of the step alone, so that a resumed run draws what it would have drawn.
        dropout = jax.random.fold_in(jax.random.key(config.seed + 1), state["step"])
        (loss, logloss, model_state), (grads, looked_up_grads) = gradients(
            state["model"], state["model_state"], embedded, dropout
        )
        (row_grads,) = to_rows(looked_up_grads)

        norm = jnp.sqrt(
            optax.tree.norm(grads, squared=True) + embedding.row_grad_squared_norm(row_grads, plan)
        )
        if config.clip_norm > 0:
            factor = jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, 1e-12))
            grads, row_grads = jax.tree.map(lambda g: g * factor, (grads, row_grads))

        updates, opt = experiment.optimizer.update(grads, state["opt"], state["model"])
        tables, table_opt = experiment.table_optimizer.update(
            row_grads, state["table_opt"], state["tables"], plan, state["step"], earlier_updates
        )
        params = optax.apply_updates(state["model"], updates)
        scalars = {
            "loss": loss,
            "logloss": logloss,
            "norm_gradients": norm,
            "norm_parameters": optax.tree.norm(params),
            "norm_updates": optax.tree.norm(updates),
            "norm_rows": jnp.sqrt(table_optimizers.touched_squared_norm(tables, plan)),
        }
        state = {
            "tables": tables,
            "table_opt": table_opt,
            "model": params,
            "model_state": model_state,
            "opt": opt,
            "step": state["step"] + 1,
        }
        return state, scalars

    layout = jax.tree.map(lambda x: x.sharding, shapes)
    return jax.jit(step_fn, donate_argnums=0, out_shardings=(layout, None))


def _gradients(experiment: Experiment, has_statistics: bool) -> Callable:
    """(params, model_state, embedded, rng) -> (loss, logloss, model_state), gradients with respect
    to params and to (embedded.vectors, embedded.rows)."""
    config, model, mesh = experiment.config, experiment.model, experiment.mesh
    parts = micro_batches.parts_of(config.batch_size, config.micro_batch, mesh.shape[sharding.DATA])
    if parts > 1 and has_statistics:
        raise ConfigError("batch statistics span the whole batch: set config.micro_batch = 0")

    def loss_of(logits, batch, denominator):
        return losses.binary_cross_entropy(
            logits,
            batch.label,
            batch.candidate_mask,
            weights=batch.weight,
            per_request=config.loss.per_request,
            denominator=denominator,
        )

    takes_loss = getattr(model, "takes_loss", False)  # a few requests at a time go to it and back

    def loss_fn(params, looked_up, model_state, embedded, denominator, rng):
        params, (vectors, rows) = precision.rounded((params, looked_up), config.dtype)
        arguments = dict(loss=loss_of, denominator=denominator) if takes_loss else {}
        with dispatch.scope(config.kernels, sharding.BATCH_AXES):
            (found, out), model_state = model.apply(
                {"params": params, **model_state},
                embedded.replace(vectors=vectors, rows=rows),
                train=True,
                rngs={"dropout": rng},
                mutable=list(model_state),
                **arguments,
            )
        logloss = found if takes_loss else loss_of(found, embedded.batch, denominator)
        if set(config.loss.weights) != set(out["losses"]):
            raise ConfigError(
                f"config.loss.weights has {sorted(config.loss.weights)}, the model the losses "
                f"{sorted(out['losses'])}; give each of these a weight in the page, 0 to leave it "
                "out"
            )
        extra = sum(weight * out["losses"][name] for name, weight in config.loss.weights.items())
        return logloss + extra / parts, (logloss, model_state)

    value_and_grad = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)

    def gradients(params, model_state, embedded, rng):
        denominator = losses.loss_denominator(
            embedded.batch.candidate_mask, config.loss.per_request, embedded.batch.weight
        )
        vectors, rows = embedded.vectors, embedded.rows
        if parts == 1:
            (loss, (logloss, model_state)), grads = value_and_grad(
                params, (vectors, rows), model_state, embedded, denominator, rng
            )
            return (loss, logloss, model_state), grads

        def part(totals, xs):
            embedded, number = xs
            (loss, (logloss, _)), (grads, (vector_grads, row_grads)) = value_and_grad(
                params,
                (embedded.vectors, rows),
                model_state,
                embedded,
                denominator,
                jax.random.fold_in(rng, number),
            )
            return jax.tree.map(jnp.add, totals, (loss, logloss, grads, row_grads)), vector_grads

        zeros = (jnp.zeros(()), jnp.zeros(()), *jax.tree.map(jnp.zeros_like, (params, rows)))
        xs = (micro_batches.split(embedded.replace(rows={}), parts, mesh), jnp.arange(parts))
        (loss, logloss, grads, row_grads), vector_grads = jax.lax.scan(part, zeros, xs)
        vector_grads = micro_batches.join(vector_grads, mesh)
        return (loss, logloss, model_state), (grads, (vector_grads, row_grads))

    return gradients


def score_step(experiment: Experiment) -> Callable:
    """(weights, batch) -> logits [B, C], jitted; weights is the state less its optimizers.

    The batch may be of any size; with `config.micro_batch` one that divides goes in parts.

    An id outside its vocabulary reads zeros or NaN, and one that no row of a table is for makes all
    logits of the batch NaN where `embedding.takes_dense_path`: serving.request_batch refuses it.

    Raises:
      ConfigError: evaluation batches do not divide into micro-batches.
    """
    config, mesh = experiment.config, experiment.mesh
    shards = mesh.shape[sharding.DATA]
    micro_batches.parts_of(config.eval_batch_size, config.micro_batch, shards)

    def score(weights, batch):
        parts = micro_batches.parts_of_any(batch.shape[0], config.micro_batch, shards)
        params = precision.rounded(weights["model"], config.dtype)
        variables = {"params": params, **weights["model_state"]}

        embedded = _embed(experiment, weights["tables"], batch)
        rows = precision.rounded(embedded.rows, config.dtype)

        def part(embedded):
            vectors = precision.rounded(embedded.vectors, config.dtype)
            embedded = embedded.replace(vectors=vectors, rows=rows)
            with dispatch.scope(config.kernels, sharding.BATCH_AXES):
                return experiment.model.apply(variables, embedded, train=False)[0]

        if parts == 1:
            return part(embedded)
        split = micro_batches.split(embedded.replace(rows={}), parts, mesh)
        return micro_batches.join(jax.lax.map(part, split), mesh)

    return jax.jit(score)
