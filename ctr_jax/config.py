"""The fields every experiment's config has; a file in configs/ starts from here and overrides."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

# What a run *is*: a checkpoint made under other values of these is refused on resume. Everything
# else (durations, logging, paths, mesh) may change between one start and the next.
IDENTITY = ("seed", "history_length", "batch_size", "dtype", "model", "loss",
            "optimizer", "table_optimizer", "clip_norm")  # fmt: skip

# Of it, what the scores of a checkpoint depend on: evaluation refuses other values of these.
SCORING = ("data", "history_length", "dtype", "model")
DTYPES = ("float32", "bfloat16")
MEASURES = ("auc", "gauc_user", "logloss", "normalised_entropy", "calibration", "count")

# For config.table_optimizer. Adagrad that starts from nothing: beside the usual .1 the gradients of
# single rows are so small that tables hardly move (docs/laser.md). It decays by itself.
ADAGRAD_TABLES = dict(name="adagrad", initial_accumulator=1e-6, learning_rate=0.02,
                      schedule="constant")  # fmt: skip


class ConfigError(ValueError):
    """A field has a value that cannot be; the message names both."""


def base_config() -> ConfigDict:
    """Defaults of all experiments. Durations are `<name>_steps | _epochs | _examples | _percent`,
    where an example is one request."""
    config = ConfigDict()
    config.name = ""
    config.seed = 0

    # Data: which builder, where its raw files are, where prepared data sets go.
    config.data = ConfigDict()
    config.data.builder = ""
    config.data.raw_dir = ""
    config.data.prepared_dir = "prepared"
    config.data.on_bad_row = "raise"
    config.data.memory_limit = "1GB"  # DuckDB's, while preparing; does not change the data set
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
        dict(name="adam", learning_rate=1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0,
             schedule="constant", warmup_steps=0, final_fraction=0.0)
    )  # fmt: skip
    config.table_optimizer = ConfigDict(
        dict(name="lazy_adam", learning_rate=1e-3, b1=0.9, b2=0.999, eps=1e-8,
             initial_accumulator=0.1, weight_decay=0.0, init_scale=0.01,
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
    config.slices = ()  # "candidate/<name>", "user/<name>": metrics by that column as well

    config.mesh = ConfigDict({"data": -1, "table": 1})
    config.profile_steps = 0  # > 0: trace that many steps, from the tenth after the start
    return config


def config_field(kind: type):
    """A placeholder: None until set, then checked to be of `kind`."""
    from ml_collections import config_dict

    return config_dict.placeholder(kind)


def scoring(identity: Mapping) -> dict:
    """What of a run's identity its scores depend on."""
    return {name: identity.get(name) for name in SCORING}


def identity(config: ConfigDict, content_hash: str) -> dict:
    """What must be equal for a checkpoint of one run to be resumed by another."""
    fields = config.to_dict()
    # Where they are off, as if there were no such field: runs from before it can be resumed.
    names = (*IDENTITY, "length_buckets") if config.length_buckets else IDENTITY
    return {"data": content_hash, **{name: fields[name] for name in names}}


def check(config: ConfigDict) -> None:
    """Refuses a page that cannot mean what it says, before anything is read or compiled.

    Raises:
      ConfigError: a field is unknown or missing, or its value cannot be.
    """
    try:
        module = importlib.import_module(config.model.module)
    except ImportError as error:
        raise ConfigError(f"config.model.module {config.model.module!r}: {error}") from error
    base = base_config()
    groups = {name: base[name] for name in ("optimizer", "table_optimizer", "mesh", "loss")}
    for name, known in (*groups.items(), ("model", module.default_config()), ("", base)):
        refuse_unknown(name, config[name] if name else config, known)
    for name, least in (
        ("batch_size", 1), ("eval_batch_size", 1), ("keep_last", 1), ("history_length", 0),
        ("micro_batch", 0), ("profile_steps", 0),
    ):  # fmt: skip
        if config[name] < least:
            raise ConfigError(f"{name} is {config[name]}; it must be {least} or more")
    if config.length_buckets:
        check_buckets(config.length_buckets, config.history_length)
    if config.dtype not in DTYPES:
        raise ConfigError(f"dtype {config.dtype!r}: choose one of {', '.join(DTYPES)}")
    split, _, measure = config.best_metric.removeprefix("-").partition("/")
    if split not in ("valid", "test") or measure not in MEASURES:
        raise ConfigError(
            f"best_metric {config.best_metric!r}: give valid/ or test/ and one of "
            f"{', '.join(MEASURES)}, after a '-' for the least"
        )


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
