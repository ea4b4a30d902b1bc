"""The optimizer of everything but the tables, learning-rate schedules, and durations.

Tables have their own (ctr_jax/table_optimizers.py); both take their rate from `schedule`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction

import jax
import jax.numpy as jnp
import optax

from ctr_jax.config import ConfigError
from ctr_jax.sharding import path_name

_SCHEDULES = ("constant", "cosine", "linear")
_OPTIMIZERS = ("adam", "adamw", "adagrad", "sgd")
# Parameters that weight decay spares, whatever their shape: what is added (to logits of attention
# too, by distance or time), what scales a normalised input or a time difference, learned tokens.
UNDECAYED = (
    r"(^|[/_])(bias|scale)(_\d+)?$",
    r"(^|/)(slopes|t5|alpha_\d+|cls|user_token)$",
    r"(^|/)(layer_\d+|self|attention)/(position|time)$",
)


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
    per_unit = {
        "steps": lambda: 1,
        "epochs": lambda: Fraction(examples, batch_size),
        "examples": lambda: Fraction(1, batch_size),
        "percent": lambda: Fraction(total, 100),
    }[unit]()
    # Of the number as it is written: .07 of 100 steps are 7, in floating point a little more.
    return max(1, math.ceil(Fraction(str(value)) * per_unit))


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

    config: name (adam | adamw | adagrad | sgd), b1, b2, eps, weight_decay (adamw),
    initial_accumulator (adagrad), and what `schedule` reads. Clipping is not here: its norm spans
    the tables' row gradients too.
    """
    rate, name = schedule(config, total_steps), config["name"]
    if name not in _OPTIMIZERS:
        raise ValueError(f"optimizer {name!r}: choose one of {_OPTIMIZERS}")
    if name == "adamw":
        return optax.adamw(
            rate,
            config["b1"],
            config["b2"],
            config["eps"],
            weight_decay=config["weight_decay"],
            mask=decayed,
        )
    if config.get("weight_decay", 0.0):
        raise ValueError(f"weight_decay needs optimizer 'adamw', not {name!r}")
    if name == "adam":
        return optax.adam(rate, config["b1"], config["b2"], config["eps"])
    if name == "adagrad":
        return optax.adagrad(rate, config["initial_accumulator"], config["eps"])
    return optax.sgd(rate)


def restarted(state):
    """The state of a `dense_optimizer` whose schedule begins again. Moments stay, and with them the
    count that their bias is corrected by."""

    def of(part):
        is_schedule = isinstance(part, optax.ScaleByScheduleState)
        return part._replace(count=jnp.zeros_like(part.count)) if is_schedule else part

    return jax.tree.map(of, state, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState))


def decayed(params):
    """The tree of `params` with True where weight decay takes a parameter: all but UNDECAYED."""

    def rule_for(path, _):
        return not any(re.search(pattern, path_name(path)) for pattern in UNDECAYED)

    return jax.tree_util.tree_map_with_path(rule_for, params)
