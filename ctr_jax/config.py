"""The fields every experiment's config has; a file in configs/ starts from here and overrides."""

from __future__ import annotations

from ml_collections import ConfigDict

# What a run *is*: a checkpoint made under other values of these is refused on resume. Everything
# else (durations, logging, paths, mesh) may change between one start and the next.
IDENTITY = ("seed", "history_length", "batch_size", "dtype", "model", "loss",
            "optimizer", "table_optimizer", "clip_norm")  # fmt: skip

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

    # Model: config.model.module has build(config.model, spec) -> (flax module, columns).
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


def identity(config: ConfigDict, content_hash: str) -> dict:
    """What must be equal for a checkpoint of one run to be resumed by another."""
    fields = config.to_dict()
    # Where they are off, as if there were no such field: runs from before it can be resumed.
    names = (*IDENTITY, "length_buckets") if config.length_buckets else IDENTITY
    return {"data": content_hash, **{name: fields[name] for name in names}}
