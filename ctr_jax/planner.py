"""What a run would need on devices that are not here; `train.py --plan=v5e:4x4`.

The real train step is compiled ahead of time for the named slice, and the compiler says what one
device holds. Nothing is trained and no data is read; time is not known, and not guessed.

    v5e:4x4     a TPU slice, named as Cloud TPU does (v4, v5e, v5p, v6e); wants jax[tpu] on the host
    cpu:8       8 devices of this host
    auto        the smallest v5e slice that fits; auto:v5p, auto:v6e likewise
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from ctr_jax import flops, hlo, sharding, steps
from ctr_jax.config import ConfigError, check
from ctr_jax.data.expected import expected_spec
from ctr_jax.describe import training_pass
from ctr_jax.features import DataSpec
from kernels import ahead_of_time
from kernels.dispatch import CannotRun

GIB = 1 << 30
# Memory of one device, as the vendor's pages give it.
HBM = {"v4": 32 * GIB, "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB}
SLICES = {
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
}
PARTS = ("tables", "table_opt", "model", "model_state", "opt", "batch")


class CannotPlan(ValueError):
    """The target, or the config on it, makes no sense; the message says what would."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one device of the target needs. All sizes are bytes, as the compiler lays arrays out.

    Attributes:
      target, mesh: as "v5e:4x4", {"data": 4, "table": 4}.
      memory: of one device; None where it is not known.
      held: {part of the state, or "batch": bytes} of the step's arguments.
      outputs: of results that take no argument's place.
      temporaries, code: of the compiled step.
      operations: floating-point operations that one device does in a step.
      traffic: {collective: (how many a step, bytes that one device sends)}.
      largest: [(bytes, shape, where it comes from)] of arrays made within the step.
      compile_seconds: of this host.
      refused: what the compiler said where it does not fit; then only `held` is known.
    """

    target: str
    mesh: Mapping[str, int]
    memory: int | None
    held: Mapping[str, int]
    outputs: int = 0
    temporaries: int = 0
    code: int = 0
    operations: float = 0.0
    traffic: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    largest: tuple[tuple[int, str, str], ...] = ()
    compile_seconds: float = 0.0
    refused: str = ""

    @property
    def total(self) -> int:
        return sum(self.held.values()) + self.outputs + self.temporaries + self.code

    @property
    def fits(self) -> bool:
        return not self.refused and (self.memory is None or self.total <= self.memory)


def plan(config: ConfigDict, target: str, rows: Mapping[str, int] | None = None) -> str:
    """The plan as text.

    Args:
      target: see the module's docstring.
      rows: {vocabulary: rows} in place of what the data set has.
    Raises:
      CannotPlan: no such target, or the batch does not divide over it.
      ConfigError: the page cannot mean what it says.
      DataError: the sizes of vocabularies are not known.
    """
    check(config)
    spec, source = expected_spec(config, rows or {})
    name, _, what = target.partition(":")
    if name != "auto":
        return "\n".join(_lines(config, spec, source, make_plan(config, spec, target)))
    kind = what or "v5e"
    if kind not in SLICES:
        raise CannotPlan(f"--plan={target}: slices are known of {', '.join(SLICES)}")
    tried, found = [], None
    for one in _candidates(config, spec, kind):
        tried.append(_one_line(one))
        if one.fits:
            found = one
            break
    lines = ["tried, smallest first:", *(f"  {line}" for line in tried), ""]
    if found is None:
        return "\n".join([*lines, f"no {kind} slice of {', '.join(SLICES[kind])} fits"])
    return "\n".join([*lines, *_lines(config, spec, source, found)])


def parse_rows(texts: Sequence[str]) -> dict[str, int]:
    """["user_id=100000000"] -> {"user_id": 100000000}; raises CannotPlan."""
    rows = {}
    for text in texts:
        name, _, number = text.partition("=")
        if not name or not number.isdigit():
            raise CannotPlan(f"--rows={text}: write name=number, joined by commas")
        rows[name] = int(number)
    return rows


def make_plan(
    config: ConfigDict, spec: DataSpec, target: str, compiler_options: dict | None = None
) -> Plan:
    """Compiles the train step of `config` on data like `spec` for `target`.

    Args:
      compiler_options: XLA's, as `ahead_of_time.LEAST_EFFORT`.
    Raises:
      CannotPlan: no such target, or the batch does not divide over it.
    """
    mesh, memory = _mesh(config, target)
    with jax.set_mesh(mesh):
        try:
            experiment = steps.bind(config, spec, mesh, total_steps=1)
        except (ConfigError, CannotRun) as error:
            raise CannotPlan(f"--plan={target}: {error}") from error
        state = steps.state_shapes(experiment)
        batch = _batch_shapes(experiment)
        held = _held(state, batch)
        began = time.perf_counter()
        shape = dict(mesh.shape)
        try:
            lowered = steps.train_step(experiment).lower(state, batch)
            compiled = lowered.compile(compiler_options)
        except CannotRun as error:
            raise CannotPlan(f"--plan={target}: {error}") from error
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Plan(target, shape, memory, held, refused=_reason(error))
    stats, text = compiled.memory_analysis(), compiled.as_text()
    laid_out = collections.Counter()
    for argument, size in hlo.parameters(text):
        laid_out[_part(argument)] += size
    return Plan(
        target,
        shape,
        memory,
        held={part: laid_out[part] for part in (*PARTS, "other") if laid_out[part]},
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        operations=_operations(experiment) / mesh.shape[sharding.DATA],
        traffic=hlo.traffic(text, mesh.size),
        largest=tuple(hlo.largest(text, 8)),
        compile_seconds=time.perf_counter() - began,
    )


def _mesh(config: ConfigDict, target: str) -> tuple[Mesh, int | None]:
    """The config's mesh over the devices of the target, and the memory of one of them."""
    kind, _, shape = target.partition(":")
    if kind == "cpu":
        if not shape.isdigit() or not 1 <= int(shape) <= len(jax.devices("cpu")):
            most = len(jax.devices("cpu"))
            raise CannotPlan(f"--plan={target}: cpu:N with N from 1 to {most}")
        return sharding.make_mesh(**config.mesh, devices=jax.devices("cpu")[: int(shape)]), None
    if kind not in HBM or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise CannotPlan(
            f"--plan={target}: name a slice, as v5e:4x4 ({', '.join(HBM)}), cpu:8, or auto[:v5p]"
        )
    if not ahead_of_time.can_compile_for_tpu():
        raise CannotPlan(f"--plan={target}: the TPU compiler is missing; pip install 'jax[tpu]'")
    number = math.prod(int(n) for n in shape.split("x"))
    data, table = config.mesh.data, config.mesh.table
    data = number // table if data == -1 else data
    if data < 1 or data * table != number:
        raise CannotPlan(
            f"--plan={target}: mesh data={config.mesh.data} x table={table} does not make "
            f"{number} devices"
        )
    try:
        axes = (sharding.DATA, sharding.TABLE)
        return ahead_of_time.tpu_mesh(target, (data, table), axes), HBM[kind]
    except (RuntimeError, jax.errors.JaxRuntimeError) as error:
        raise CannotPlan(f"--plan={target}: {str(error).splitlines()[0]}") from error


def _batch_shapes(experiment: steps.Experiment):
    config = experiment.config
    batch = steps.empty_batch(experiment.spec, config.batch_size, config.history_length)
    split = NamedSharding(experiment.mesh, sharding.BATCH)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), batch)


def _held(state: dict, batch) -> dict[str, int]:
    """Bytes of one device's shards, less what the layout adds."""

    def size(tree) -> int:
        return sum(
            math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
            for x in jax.tree.leaves(tree)
        )

    return {part: size(state[part]) for part in PARTS if part in state} | {"batch": size(batch)}


def _part(argument: str) -> str:
    """The part that an argument of the step belongs to, by its name in the program."""
    match = re.match(r"state\['(\w+)'\]", argument)
    name = match.group(1) if match else "batch" if argument.startswith("batch") else "other"
    return name if name in PARTS else "other"


def _operations(experiment: steps.Experiment) -> float:
    """Floating-point operations of the model's forward and backward pass on a global batch.

    Counted on the traced program of XLA's path, as XLA's own count takes the rounds of a loop for
    one, and kernels make anew what they do not keep.
    """
    gradient, arguments = training_pass(experiment, "xla")
    return float(sum(flops.count(gradient, *arguments).values()))


def _candidates(config: ConfigDict, spec: DataSpec, kind: str) -> Iterator[Plan]:
    """Plans of ever larger slices, each with tables over ever more of its devices."""
    for shape in SLICES[kind]:
        number, table = math.prod(int(n) for n in shape.split("x")), 1
        while table <= number:
            trial = config.copy_and_resolve_references()
            trial.mesh.data, trial.mesh.table = number // table, table
            at_once = trial.mesh.data * max(1, trial.micro_batch)
            if not trial.batch_size % at_once and not trial.eval_batch_size % at_once:
                yield make_plan(trial, spec, f"{kind}:{shape}")
            table *= 2


def _reason(error: Exception) -> str:
    """The compiler's own figures of what does not fit."""
    text = " ".join(str(error).split())
    match = re.search(r"total memory required .*?exceeds available HBM \([^)]*\)", text)
    return match.group(0) if match else text[:200]


def _mesh_text(mesh: Mapping[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in mesh.items())


def _one_line(one: Plan) -> str:
    says = "fits" if one.fits else "does not fit" + (f": {one.refused}" if one.refused else "")
    total = f"{one.total / GIB:.2f} GiB" if not one.refused else ""
    return f"{one.target:10} {_mesh_text(one.mesh):20} {total:>12}  {says}"


def _lines(config: ConfigDict, spec: DataSpec, source: str, one: Plan) -> list[str]:
    mib = lambda size: f"{size / (1 << 20):>14,.1f}"  # noqa: E731
    lines = [
        f"{config.name} on {one.target}, mesh {_mesh_text(one.mesh)}: batch {config.batch_size}, "
        f"L = {config.history_length}, C = {spec.max_candidates}",
        f"vocabulary sizes: {source}",
        "",
        f"{'MiB per device':44}",
    ]
    names = {
        "tables": "embedding tables",
        "table_opt": "their optimizer",
        "model": "model parameters",
        "model_state": "model state",
        "opt": "their optimizer",
        "batch": "batch",
        "other": "other arguments",
    }
    lines += [f"  {names[part]:42}{mib(size)}" for part, size in one.held.items()]
    if one.refused:
        return [*lines, "", f"does not fit: {one.refused}", _advice(config, one)]
    lines.append(f"  {'results beside the updated state':42}{mib(one.outputs)}")
    lines.append(f"  {'temporaries of the step':42}{mib(one.temporaries)}")
    lines.append(f"  {'program':42}{mib(one.code)}")
    of = f" of {one.memory / (1 << 20):,.0f}" if one.memory else ""
    lines.append(f"  {'all':42}{mib(one.total)}{of}")
    if one.memory:
        lines.append("  " + ("fits" if one.fits else f"does not fit. {_advice(config, one)}"))
    lines += ["", "largest arrays made within the step (they need not live at one time)"]
    lines += [f"{mib(size)}  {shape:28} {name}" for size, shape, name in one.largest]
    lines += ["", f"{'sent by one device in a step (ring algorithms)':44}{'number':>8}{'MiB':>14}"]
    lines += [f"  {name:42}{n:>8,}{mib(size)}" for name, (n, size) in sorted(one.traffic.items())]
    if not one.traffic:
        lines.append("  nothing")
    lines += [
        "",
        f"operations of one device in a step {one.operations:>22,.0f}   "
        "(model, forward and backward; counted on the traced program)",
        f"compiled in {one.compile_seconds:.0f} s",
        "Not known: time. Not counted: a second batch in flight, evaluation, the runtime's own.",
    ]
    return lines


def _advice(config: ConfigDict, one: Plan) -> str:
    tables = sum(one.held.get(part, 0) for part in ("tables", "table_opt"))
    if one.memory and tables > one.memory / 2:
        return f"Most of it is tables: try --config.mesh.table={2 * config.mesh.table}."
    return (
        f"Most of it is the batch's: try --config.batch_size={config.batch_size // 2} or "
        "--config.micro_batch."
    )
