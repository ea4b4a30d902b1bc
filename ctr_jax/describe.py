"""What an experiment's model costs: parameters, operations, memory; `train.py --describe`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from ctr_jax import embedding, flops, precision, sharding, steps
from ctr_jax.batch import EmbeddedBatch
from ctr_jax.config import check
from ctr_jax.data import open_data
from ctr_jax.features import DataSpec
from kernels import dispatch


def describe(config: ConfigDict) -> str:
    """The account of `config`'s model on its data set, as text; the data set is prepared if need
    be. Operations and bytes are of the model behind the embeddings: looking rows up multiplies
    nothing."""
    check(config)
    mesh = sharding.make_mesh(data=1, table=1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        experiment = steps.bind(config, open_data(config).spec, mesh, total_steps=1)
        return "\n".join(_lines(experiment))


def _lines(experiment: steps.Experiment) -> list[str]:
    config, spec = experiment.config, experiment.spec
    state = steps.state_shapes(experiment)
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    lines = [f"{config.name}: {config.model.module} on {spec.name}, L = {config.history_length}"]
    lines += ["", "parameters"]
    for name, table in sorted(state["tables"].items()):
        lines.append(
            f"  {'table ' + name:44} {' x '.join(map(str, table.shape)):>17} {table.size:>13,}"
        )
    for name, tree in sorted(state["model"].items()):
        lines.append(f"  {name:62} {count(tree):>13,}")
    lines.append(f"  {'all':62} {count((state['tables'], state['model'])):>13,}")

    many = max(spec.max_candidates, 2)
    of = {c: operations(experiment, c) for c in (1, many, many + 1)}
    names = list(dict.fromkeys(name for counts in of.values() for name in counts))
    lines += ["", "operations of the forward pass (2 per multiply-add), one request"]
    lines.append(
        f"  {'':32} {'C = 1':>14} {f'C = {many}':>14} {'shared':>14} {'per candidate':>14}"
    )
    totals = np.zeros(4)
    for name in names:
        one, some, more = (of[c].get(name, 0) for c in (1, many, many + 1))
        row = np.array([one, some, some - many * (more - some), more - some])
        totals += row
        lines.append(f"  {name or '(the model itself)':32} " + " ".join(f"{x:>14,}" for x in row))
    lines.append(f"  {'all':32} " + " ".join(f"{int(x):>14,}" for x in totals))
    lines.append(f"  shared and per candidate: at C = {many}, by one candidate more")

    forward, training = activation_bytes(experiment)
    device = jax.devices()[0].device_kind
    lines += ["", f"activations, as compiled for {device}"]
    lines.append(f"  forward, {config.eval_batch_size} requests {forward:>40,} bytes")
    lines.append(f"  forward and backward, {config.batch_size} requests {training:>27,} bytes")
    return lines


def operations(experiment: steps.Experiment, candidates: int, requests: int = 1) -> dict[str, int]:
    """{component: operations} of the forward pass for requests of C = `candidates`."""
    variables = _variables(experiment)
    embedded = _embedded(experiment, requests, candidates)
    with dispatch.scope("xla"):
        counts = flops.count(
            lambda v, x: experiment.model.apply(v, x, False)[0], variables, embedded, depth=4
        )
    model = type(experiment.model).__name__  # the outermost component, of all alike
    return {name.removeprefix(model).lstrip("/"): n for name, n in counts.items()}


def activation_bytes(experiment: steps.Experiment) -> tuple[int, int]:
    """Bytes of temporaries of the compiled forward pass (an evaluation batch) and of the gradient
    (a training batch)."""
    config, model = experiment.config, experiment.model
    candidates = experiment.spec.max_candidates
    variables = _variables(experiment)

    def forward(variables, embedded):
        params, vectors = precision.rounded((variables["params"], embedded.vectors), config.dtype)
        with dispatch.scope(config.kernels):
            variables = {**variables, "params": params}
            return model.apply(variables, embedded.replace(vectors=vectors), False)[0]

    evaluated = _embedded(experiment, config.eval_batch_size, candidates)
    gradient, arguments = training_pass(experiment, config.kernels)
    programs = (
        jax.jit(forward).lower(variables, evaluated),
        jax.jit(gradient).lower(*arguments),
    )
    return tuple(p.compile().memory_analysis().temp_size_in_bytes for p in programs)


def training_pass(experiment: steps.Experiment, kernels: str) -> tuple[Callable, tuple]:
    """(gradient, its arguments as shapes): forward and backward of the model on a global training
    batch, with respect to its parameters and the looked-up vectors; kernels: as of the config."""
    config, model = experiment.config, experiment.model

    def loss(variables, vectors, embedded):
        params, vectors = precision.rounded((variables["params"], vectors), config.dtype)
        with dispatch.scope(kernels):
            (logits, _), _ = model.apply(
                {**variables, "params": params},
                EmbeddedBatch(embedded.batch, vectors),
                True,
                rngs={"dropout": jax.random.key(0)},
                mutable=["batch_stats"],
            )
        return logits.sum()

    embedded = _embedded(experiment, config.batch_size, experiment.spec.max_candidates)
    return jax.grad(loss, argnums=(0, 1)), (_variables(experiment), embedded.vectors, embedded)


def _variables(experiment: steps.Experiment) -> dict:
    state = steps.state_shapes(experiment)
    return {"params": state["model"], **state["model_state"]}


def _embedded(experiment: steps.Experiment, requests: int, candidates: int) -> EmbeddedBatch:
    """Shapes of an EmbeddedBatch."""
    config = experiment.config
    spec = DataSpec(**{**experiment.spec.__dict__, "max_candidates": candidates})
    batch = steps.empty_batch(spec, requests, config.history_length)
    tables = steps.state_shapes(experiment)["tables"]

    def embed(tables, batch):
        plan = embedding.lookup_ids(experiment.columns, batch, tables)
        return embedding.embed(embedding.gather_rows(tables, plan), plan, experiment.columns, batch)

    return jax.eval_shape(embed, tables, batch)
