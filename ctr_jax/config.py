"""The fields every experiment's config has; a file in configs/ starts from here and overrides."""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

# What a run *is*: a checkpoint made under other values of these is refused on resume. Everything
# else (durations, logging, paths, mesh) may change between one start and the next.
IDENTITY = ("seed", "history_length", "batch_size", "dtype", "model", "loss",
            "optimizer", "table_optimizer", "clip_norm")  # fmt: skip

# Of it, what the scores of a checkpoint depend on, beside the encoding of the data: evaluation
# refuses other values of these.
SCORING = ("history_length", "dtype", "model")
DTYPES = ("float32", "bfloat16")
MEASURES = ("auc", "gauc_user", "logloss", "normalised_entropy", "calibration", "count")
# What a checkpoint can be chosen by: on the validation split, and the right way round.
BEST_METRICS = ("valid/auc", "valid/gauc_user", "-valid/logloss", "-valid/normalised_entropy")
# Fields of config.model that only say how the same numbers are computed, to rounding: like
# config.kernels no part of what a run is.
SPEED_ONLY = ("tile_bytes", "rows_per_tile", "order", "sparse_last_layer")
INITIAL_ACCUMULATOR = 0.1  # Adagrad's

# For config.table_optimizer. Adagrad that starts from nothing: beside the usual .1 the gradients of
# single rows are so small that tables hardly move (docs/laser.md). It decays by itself.
ADAGRAD_TABLES = dict(name="adagrad", initial_accumulator=1e-6, learning_rate=0.02,
                      schedule="constant")  # fmt: skip


def of_both(*fields: str) -> tuple[str, ...]:
    """The fields of both optimizers."""
    return tuple(f"{of}.{name}" for of in ("optimizer", "table_optimizer") for name in fields)


# (fields, test, what they must be); NaN and infinity pass none.
BOUNDS = (
    (("batch_size", "eval_batch_size", "keep_last", "mesh.table"), lambda x: x >= 1, "1 or more"),
    (("mesh.data",), lambda x: x >= 1 or x == -1, "1 or more, or -1: all that mesh.table leaves"),
    (
        (
            "history_length",
            "micro_batch",
            "profile_steps",
            "patience",
            "clip_norm",
            "table_optimizer.init_scale",
        )
        + of_both("learning_rate", "eps", "initial_accumulator", "weight_decay", "warmup_steps"),
        lambda x: 0 <= x < math.inf,
        "0 or more",
    ),
    (of_both("b1", "b2"), lambda x: 0 <= x < 1, "0 or more and less than 1"),
    (of_both("final_fraction"), lambda x: 0 <= x <= 1, "from 0 to 1"),
    (("model.base_rate",), lambda x: 0 < x < 1, "more than 0 and less than 1"),
)


class ConfigError(ValueError):
    """A field has a value that cannot be; the message names both."""


def base_config() -> ConfigDict:
    """Defaults of all experiments. Durations are `<name>_steps | _epochs | _examples | _percent`,
    where an example is one request."""
    config = ConfigDict()
    config.name = ""
    config.seed = 0

    # A run ("WORKDIR", or "WORKDIR@STEP"; else its best measured step) whose state this one begins
    # with, under its own schedule from step 0 (docs/training.md). "" = from scratch.
    config.start_from = ""

    # Data: which builder, where its raw files are, where prepared data sets go.
    config.data = ConfigDict()
    config.data.builder = ""
    config.data.raw_dir = ""
    config.data.prepared_dir = "prepared"
    config.data.on_bad_row = "raise"
    config.data.memory_limit = "1GB"  # DuckDB's, while preparing; does not change the data set
    # Directory of a prepared data set whose vocabularies are taken as they are: a new day of a log,
    # for a model that is there already (docs/training.md). "" = fit them.
    config.data.vocabularies_from = ""
    config.data.threads = 0  # of the preparation; 0 = all cores
    # {vocabulary: rows} for plans made where the data set is not (train.py --plan).
    config.expected_rows = ConfigDict()
    config.history_length = 200
    # Ascending lengths, the last one history_length: batches of requests alike in length, cut to
    # it (docs/input.md). () = every batch is history_length long.
    config.length_buckets = ()
    config.batch_size = 1024
    config.eval_batch_size = 1024
    # Requests of a data shard that go through the model at a time, gradients adding up; 0 = all.
    # On a CPU a few at a time stay in cache, which is faster; on an accelerator it saves memory.
    config.micro_batch = 0
    config.dtype = "float32"  # of the model's activations: float32 | bfloat16 (precision.py)
    # Of its attention: auto (what was measured to be fastest) | xla | pallas (docs/kernels.md).
    config.kernels = "auto"

    # Model: config.model.module has build(config.model, spec) -> (flax module, columns), and
    # default_config(), whose fields are all that config.model has.
    config.model = ConfigDict()
    config.loss = ConfigDict({"per_request": False, "weights": ConfigDict()})

    # Optimizers: one for the tables, one for the rest, clipped by their joint norm (0 = never).
    config.optimizer = ConfigDict(
        dict(name="adam", learning_rate=1e-3, b1=0.9, b2=0.999, eps=1e-8,
             initial_accumulator=INITIAL_ACCUMULATOR, weight_decay=0.0, schedule="constant",
             warmup_steps=0, final_fraction=0.0)
    )  # fmt: skip
    config.table_optimizer = ConfigDict(
        dict(name="lazy_adam", learning_rate=1e-3, b1=0.9, b2=0.999, eps=1e-8,
             initial_accumulator=INITIAL_ACCUMULATOR, weight_decay=0.0, init_scale=0.01,
             schedule="constant", warmup_steps=0, final_fraction=0.0)
    )  # fmt: skip
    config.clip_norm = 0.0

    # Durations; the units not used stay None.
    for name in ("total", "log", "checkpoint"):
        for unit in ("steps", "epochs", "examples", "percent"):
            if (name, unit) == ("total", "percent"):
                continue
            config[f"{name}_{unit}"] = config_field(int if unit == "steps" else float)
    config.total_epochs = 1.0
    config.log_steps = 50
    config.checkpoint_percent = 25.0

    # After each checkpoint the trainer itself measures the validation split; turn it off where a
    # separate `eval.py --watch` does that.
    config.validate = True
    config.keep_last = 2
    config.best_metric = "valid/auc"
    # Training ends after that many checkpoints in a row that are no better by best_metric; 0 = not.
    config.patience = 0
    # "candidate/<name>", "user/<name>", "context/<name>": metrics by that column as well.
    config.slices = ()

    config.mesh = ConfigDict({"data": -1, "table": 1})
    config.profile_steps = 0  # > 0: trace that many steps, from the tenth after the start
    return config


def config_field(kind: type):
    """A placeholder: None until set, then checked to be of `kind`."""
    from ml_collections import config_dict

    return config_dict.placeholder(kind)


def scoring(*identities: Mapping) -> list[dict]:
    """What of each identity the scores depend on: with it the encoding of the data where all of
    them know theirs, else the data set itself."""
    known = all(identity.get("encoding") for identity in identities)
    names = ("encoding" if known else "data", *SCORING)
    return [{name: identity.get(name) for name in names} for identity in identities]


def identity(config: ConfigDict, content_hash: str, encoding: Mapping | None = None) -> dict:
    """What must be equal for a checkpoint of one run to be resumed by another.

    Args:
      content_hash, encoding: of the DataSpec.
    """
    fields = config.to_dict()
    # Where they are off, as if there were no such field: runs from before it can be resumed.
    names = (*IDENTITY, "length_buckets") if config.length_buckets else IDENTITY
    if fields["optimizer"]["initial_accumulator"] == INITIAL_ACCUMULATOR:
        del fields["optimizer"]["initial_accumulator"]
    data = {"data": content_hash, **({"encoding": encoding} if encoding else {})}
    return without_speed({**data, **{name: fields[name] for name in names}})


def without_speed(identity: Mapping) -> dict:
    """An identity less the model's fields that only its speed depends on."""
    model = {k: v for k, v in identity.get("model", {}).items() if k not in SPEED_ONLY}
    return {**identity, "model": model}


def check(config: ConfigDict) -> None:
    """Refuses a page that cannot mean what it says, before anything is read or compiled.

    Raises:
      ConfigError: a field is unknown or missing, or its value cannot be.
    """
    named = f"config.model.module {config.model.module!r}"
    try:
        module = importlib.import_module(config.model.module)
    except (ImportError, ValueError, TypeError) as error:  # the last two: "" and ".name"
        raise ConfigError(f"{named}: {error}") from error
    if not (hasattr(module, "build") and hasattr(module, "default_config")):
        raise ConfigError(f"{named} is no model: it has no build and default_config")
    base = base_config()
    groups = {name: base[name] for name in ("optimizer", "table_optimizer", "mesh", "loss")}
    for name, known in (*groups.items(), ("model", module.default_config()), ("", base)):
        refuse_unknown(name, config[name] if name else config, known)
    for names, holds, says in BOUNDS:
        for name in names:
            value = value_of(config, name)
            if value is not None and not holds(value):
                raise ConfigError(f"{name} is {value}; it must be {says}")
    if config.length_buckets:
        check_buckets(config.length_buckets, config.history_length)
    if config.dtype not in DTYPES:
        raise ConfigError(f"dtype {config.dtype!r}: choose one of {', '.join(DTYPES)}")
    if config.best_metric not in BEST_METRICS:
        raise ConfigError(
            f"best_metric {config.best_metric!r}: choose one of {', '.join(BEST_METRICS)} ('-' = "
            "the least)"
        )
    if config.patience and not config.validate:
        raise ConfigError("patience needs config.validate: it counts what the trainer measures")


def value_of(config: ConfigDict, name: str):
    """The field of a dotted name, None where there is none."""
    for part in name.split("."):
        config = config.get(part)
        if config is None:
            return None
    return config


def check_buckets(length_buckets: Sequence[int], history_length: int) -> None:
    """Raises ConfigError unless the lengths ascend from 1 on and end with history_length."""
    edges = list(length_buckets)
    if edges[0] < 1 or edges[-1] != history_length or sorted(set(edges)) != edges:
        raise ConfigError(
            f"length_buckets {tuple(edges)}: give ascending lengths from 1 on, the last of them "
            f"history_length = {history_length}"
        )


def refuse_unknown(name: str, given: ConfigDict, known: ConfigDict) -> None:
    """Raises ConfigError at the first field of the group `name` that is not known, or not there."""
    where = f"config.{name}" if name else "config"
    for field in sorted(set(given) - set(known)):
        near = difflib.get_close_matches(field, list(known), n=2, cutoff=0.7)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"{where} has no field {field!r}{hint}")
    for field in sorted(set(known) - set(given)):
        raise ConfigError(f"{where} lacks the field {field!r}; start from the defaults")
