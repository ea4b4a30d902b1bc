"""The optimizer of everything but the tables, learning-rate schedules, and durations.

Tables have their own (ctr_jax/embedding.py); both take their rate from `schedule`.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from ctr_jax.config import ConfigError

_SCHEDULES = ("constant", "cosine", "linear")
_OPTIMIZERS = ("adam", "adamw", "adagrad", "sgd")


def resolve_steps(
    name: str, config: Mapping, *, batch_size: int, examples: int, total: int | None = None
) -> int:
    """The duration `name` in steps, from whichever of `<name>_steps | _epochs | _examples |
    _percent` the config sets (exactly one; 0 and None are unset; percent is of `total` steps, where
    there is that).

    Raises:
      ConfigError: none or several are set, or it is negative.
    """
    units = ("steps", "epochs", "examples", "percent")[: 3 if total is None else 4]
    given = {u: config[f"{name}_{u}"] for u in units if config.get(f"{name}_{u}")}
    if len(given) != 1:
        raise ConfigError(
            f"set exactly one of {', '.join(f'{name}_{u}' for u in units)}; "
            f"{'set are ' + ', '.join(given) + '; unset one with 0' if given else 'none is set'}"
        )
    ((unit, value),) = given.items()
    if value < 0:
        raise ConfigError(f"{name}_{unit} is {value}; it must be positive")
    per_epoch = examples / batch_size
    steps = {
        "steps": lambda: value,
        "epochs": lambda: value * per_epoch,
        "examples": lambda: value / batch_size,
        "percent": lambda: value * total / 100,
    }[unit]()
    return max(1, int(-(-steps // 1)))


def schedule(config: Mapping, total_steps: int) -> optax.Schedule:
    """step -> learning rate: linear warm-up, then constant, cosine or linear decay, which reaches
    `final_fraction` of the peak where step = `total_steps`, one behind the last.

    config: learning_rate, schedule, warmup_steps, final_fraction.
    """
    kind, peak = config["schedule"], config["learning_rate"]
    if kind not in _SCHEDULES:
        raise ValueError(f"schedule {kind!r}: choose one of {_SCHEDULES}")
    warmup, final = config.get("warmup_steps", 0), config.get("final_fraction", 0.0)

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        done = jnp.clip((step - warmup) / max(1, total_steps - warmup), 0.0, 1.0)
        decay = {
            "constant": jnp.ones_like(done),
            "cosine": final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * done)),
            "linear": final + (1 - final) * (1 - done),
        }[kind]
        return peak * decay * jnp.clip((step + 1) / max(1, warmup), 0.0, 1.0)

    return rate


def dense_optimizer(config: Mapping, total_steps: int) -> optax.GradientTransformation:
    """The optax optimizer of the model's own parameters.

    config: name (adam | adamw | adagrad | sgd), b1, b2, eps, weight_decay (adamw), and what
    `schedule` reads. Clipping is not here: its norm spans the tables' row gradients too.
    """
    rate, name = schedule(config, total_steps), config["name"]
    if name not in _OPTIMIZERS:
        raise ValueError(f"optimizer {name!r}: choose one of {_OPTIMIZERS}")
    if name == "adamw":
        # Decay matrices only: biases, norms and attention slopes have one axis.
        return optax.adamw(
            rate,
            config["b1"],
            config["b2"],
            config["eps"],
            weight_decay=config["weight_decay"],
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        )
    if config.get("weight_decay", 0.0):
        raise ValueError(f"weight_decay needs optimizer 'adamw', not {name!r}")
    if name == "adam":
        return optax.adam(rate, config["b1"], config["b2"], config["eps"])
    if name == "adagrad":
        return optax.adagrad(rate, config.get("initial_accumulator", 0.1), config["eps"])
    return optax.sgd(rate)
