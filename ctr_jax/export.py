"""A trained model as files that serve without this library (extra `export`).

    python -m ctr_jax.export --config=configs/laser_alibaba.py:demo --out=DIR
        [--shapes=1x100,8x100] [--platform=cpu|tpu|cuda] [--workdir=DIR] [--step=N]

writes into --out:

  model.json            inputs with shape, type and encoding; shapes; where all of it came from
  score_<B>x<C>.jax     jax.export of (weights, request) -> logits [B, C], one of each shape
  weights.safetensors   {path: array} of tables and parameters
  example.safetensors   a request of the first shape, and the "logits" that this host gave it
  vocabularies/         raw value -> id, parquet

`examples/serve_exported.py` reads them with jax, numpy, safetensors and pyarrow alone. XLA compiles
for one shape at a time, so shapes are fixed: pad candidates, and mask them, up to the next.

Axis letters: B requests, C candidates, L history.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.export
import numpy as np
from absl import flags, logging
from jax.sharding import AbstractDevice, AbstractMesh
from ml_collections import ConfigDict, config_flags

from ctr_jax import command_line, serving, sharding, steps
from ctr_jax.batch import RequestBatch
from ctr_jax.config import ConfigError
from ctr_jax.data import open_data
from ctr_jax.data.records import PreparedData
from ctr_jax.data.vocabulary import standard
from ctr_jax.features import GROUPS, DataSpec
from ctr_jax.writers import write_json

FORMAT = 1
PLATFORMS = ("cpu", "tpu", "cuda")
OF_REQUEST = ("request_time", "behaviour_time", "behaviour_mask", "candidate_mask")


def export(
    config: ConfigDict,
    workdir: str | Path,
    out: str | Path,
    shapes: Sequence[tuple[int, int]] = ((1, 100),),
    platform: str = "cpu",
    step: int | None = None,
) -> dict:
    """Writes a checkpoint of a training run into `out`, as the module's docstring says.

    The model is XLA's, whatever config.kernels is: an artifact with kernels would be of one kind of
    device. Nothing of the platform need be here.

    Args:
      shapes: (B, C) of each function.
      step: which checkpoint; None = the best measured one, else the newest.
    Returns:
      What model.json holds.
    Raises:
      ConfigError: `out` is there already, a platform or shape is not possible, or the extra is not
        installed.
      FileNotFoundError, Damaged, ConfigMismatch: as of serving.restore.
    """
    out = Path(out)
    if missing := [m for m in ("flatbuffers", "safetensors") if not importlib.util.find_spec(m)]:
        raise ConfigError(f"export needs {' and '.join(missing)}: pip install '.[export]'")
    if platform not in PLATFORMS:
        raise ConfigError(f"platform must be one of {', '.join(PLATFORMS)}, got {platform!r}")
    if not shapes or min(min(shape) for shape in shapes) < 1:
        raise ConfigError(f"shapes must be pairs of 1 or more, got {shapes}")
    if out.exists():
        raise ConfigError(f"{out} is there already; name another directory, or remove it")
    data = open_data(config)
    experiment, weights, at = serving.restore(config, workdir, step)
    flat_weights = _flat(weights)
    about = {
        "format": FORMAT,
        "name": config.name,
        "step": at,
        "data_hash": data.spec.content_hash,
        "encoding_hash": data.spec.encoding_hash,
        "platform": platform,
        "jax": jax.__version__,
        "history_length": config.history_length,
        "functions": [],
        "inputs": _inputs(data),
    }

    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        for requests, candidates in shapes:
            file = f"score_{requests}x{candidates}.jax"
            exported = lowered(experiment, weights, requests, candidates, platform)
            (temporary / file).write_bytes(exported.serialize())
            about["functions"].append(
                {"requests": requests, "candidates": candidates, "file": file}
            )
        _write_arrays(temporary / "weights.safetensors", flat_weights)
        request = flat(example(data, *shapes[0], config.history_length))
        with jax.set_mesh(experiment.mesh):
            logits = jax.jit(_score(experiment, weights, shapes[0][0]))(flat_weights, request)
        _write_arrays(temporary / "example.safetensors", {**request, "logits": logits})
        shutil.copytree(data.path / "vocabularies", temporary / "vocabularies")
        write_json(temporary / "model.json", about)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return about


def lowered(
    experiment: steps.Experiment, weights: Mapping, requests: int, candidates: int, platform: str
) -> jax.export.Exported:
    """(flat weights, flat request) -> logits [B, C], for one device of the platform.

    Args:
      weights: arrays or their shapes, as of serving.restore.
    """
    spec = dataclasses.replace(experiment.spec, max_candidates=candidates)
    batch = steps.empty_batch(spec, requests, experiment.config.history_length)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (_flat(weights), flat(batch))
    )
    with jax.sharding.use_abstract_mesh(_mesh(experiment, platform)):
        score = jax.jit(_score(experiment, weights, requests))
        return jax.export.export(score, platforms=[platform])(*arguments)


def flat(batch: RequestBatch) -> dict[str, np.ndarray]:
    """The inputs of an exported function: what a model sees of a batch, by name."""
    columns = {
        f"{group}/{name}": values
        for group in GROUPS
        for name, values in getattr(batch, group).items()
    }
    return {name: getattr(batch, name) for name in OF_REQUEST} | columns


def example(data: PreparedData, requests: int, candidates: int, history_length: int):
    """A RequestBatch of training requests, each with its candidates over and over up to C."""
    split = data.split("train")
    batch = split.read(np.arange(requests) % len(split), history_length)
    place = np.arange(candidates) % batch.candidate_mask.sum(1, keepdims=True)

    def repeated(values):
        return np.take_along_axis(values, place, 1)

    return batch.replace(
        candidate={name: repeated(values) for name, values in batch.candidate.items()},
        candidate_mask=repeated(batch.candidate_mask),
        label=repeated(batch.label),
        weight=None,
    )


def _score(experiment: steps.Experiment, weights: Mapping, requests: int):
    """(flat weights, flat request) -> logits [B, C]."""
    config = experiment.config.copy_and_resolve_references()
    config.kernels, config.eval_batch_size, config.micro_batch = "xla", requests, 0
    score = steps.score_step(dataclasses.replace(experiment, config=config))
    treedef = jax.tree.structure(weights)

    def score_flat(flat_weights, request):
        weights = jax.tree.unflatten(treedef, [flat_weights[name] for name in _names(treedef)])
        return score(weights, _batch(request, experiment.spec))

    return score_flat


def _flat(weights: Mapping) -> dict[str, jax.Array]:
    return {sharding.path_name(path): x for path, x in jax.tree.leaves_with_path(weights)}


def _names(treedef) -> list[str]:
    numbered = jax.tree.unflatten(treedef, range(treedef.num_leaves))
    return [sharding.path_name(path) for path, _ in jax.tree.leaves_with_path(numbered)]


def _batch(request: Mapping, spec: DataSpec) -> RequestBatch:
    """The inverse of `flat`; what a model does not see is zero."""
    groups = {g: {c.name: request[f"{g}/{c.name}"] for c in spec.group(g)} for g in GROUPS}
    number = jax.numpy.zeros_like(request["request_time"])
    label = jax.numpy.zeros(request["candidate_mask"].shape, np.float32)
    given = {name: request[name] for name in OF_REQUEST}
    return RequestBatch(user_id=number, request_id=number, label=label, **given, **groups)


def _mesh(experiment: steps.Experiment, platform: str) -> AbstractMesh:
    """One device of the platform, so that what depends on the target is chosen for it."""
    mesh = experiment.mesh
    device = AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
    sizes = tuple(mesh.shape.values())
    return AbstractMesh(sizes, mesh.axis_names, mesh.axis_types, abstract_device=device)


def _inputs(data: PreparedData) -> list[dict]:
    """name, shape, type and encoding of each input.

    Encoding of a column: {"vocabulary": name}, whose file holds values, or the lower edges of
    quantile buckets where they are floats; or {"mean", "scale"} of a standardised one.
    """
    spec, of_group = data.spec, {"behaviour": "BL", "candidate": "BC", "user": "B", "context": "B"}
    inputs = [
        {"name": "request_time", "shape": "B", "dtype": "int32", "encoding": "seconds"},
        {"name": "behaviour_time", "shape": "BL", "dtype": "int32", "encoding": "seconds"},
        {"name": "behaviour_mask", "shape": "BL", "dtype": "bool", "encoding": "mask"},
        {"name": "candidate_mask", "shape": "BC", "dtype": "bool", "encoding": "mask"},
    ]
    for column in spec.columns:
        name, encoding, dtype = f"{column.group}/{column.name}", {}, "int32"
        if column.kind == "dense":
            fitted = standard(data.path, name)
            encoding, dtype = {"mean": fitted.mean, "scale": fitted.scale}, "float32"
        else:
            encoding = {"vocabulary": column.vocabulary}
        inputs.append(
            {"name": name, "shape": of_group[column.group], "dtype": dtype, "encoding": encoding}
        )
    return inputs


def _write_arrays(path: Path, arrays: Mapping) -> None:
    from safetensors.numpy import save_file

    save_file({k: np.ascontiguousarray(jax.device_get(x)) for k, x in arrays.items()}, path)
    path.chmod(0o644)  # it makes files for their owner alone


def parse_shapes(texts: Sequence[str]) -> list[tuple[int, int]]:
    """["1x100"] -> [(1, 100)]. Raises ConfigError at what is no such pair."""
    shapes = []
    for text in texts:
        requests, _, candidates = text.partition("x")
        if not (requests.isdigit() and candidates.isdigit()):
            raise ConfigError(f"--shapes has {text!r}; write requests x candidates, as 1x100")
        shapes.append((int(requests), int(candidates)))
    return shapes


def main(argv):
    from ctr_jax.writers import quiet_checkpoint_logs

    del argv
    logging.set_verbosity(logging.INFO)
    quiet_checkpoint_logs()
    config = CONFIG.value
    workdir = Path(WORKDIR.value or Path("runs") / config.name)
    try:
        shapes = parse_shapes(SHAPES.value)
        about = export(config, workdir, OUT.value, shapes, PLATFORM.value, STEP.value)
    except (*command_line.mendable(), FileNotFoundError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"step {about['step']} of {workdir} for {about['platform']}: {OUT.value}")


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, "What was trained.", lock_config=True)
    WORKDIR = flags.DEFINE_string("workdir", None, "The training run (runs/<config name>).")
    OUT = flags.DEFINE_string("out", None, "The directory to make.")
    SHAPES = flags.DEFINE_list("shapes", ["1x100"], "Requests x candidates of a call, each.")
    PLATFORM = flags.DEFINE_enum("platform", "cpu", PLATFORMS, "What it is to run on.")
    STEP = flags.DEFINE_integer("step", None, "This checkpoint; default: the best measured one.")
    flags.mark_flag_as_required("out")
    command_line.run(main)
