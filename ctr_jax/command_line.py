"""Running the commands: what is the user's to mend ends in one line."""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
from collections.abc import Iterator, Sequence

from absl import app, flags
from ml_collections import ConfigDict


def define_cpu_devices() -> flags.FlagHolder:
    """--cpu_devices, by default as many as divide the powers of 2 that batches are of."""
    devices = 1 << (min(os.cpu_count() or 1, 8).bit_length() - 1)
    text = "On a CPU: devices to split the batch over."
    return flags.DEFINE_integer("cpu_devices", devices, text, lower_bound=1)


def run(main) -> None:
    """`absl.app.run(main)` for a program with the flag --config."""
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=_parse)


def mendable() -> tuple[type[Exception], ...]:
    """The errors whose message is all that a user needs: no traceback."""
    from ctr_jax.checkpoints import ConfigMismatch, SaveFailed
    from ctr_jax.config import ConfigError
    from ctr_jax.data.errors import DataError
    from ctr_jax.manifests import Damaged
    from ctr_jax.planner import CannotPlan
    from ctr_jax.training import NonFiniteLoss
    from kernels.dispatch import CannotRun
    from seqvault import VaultError

    return (
        CannotPlan, CannotRun, ConfigError, ConfigMismatch, Damaged, DataError, NonFiniteLoss,
        SaveFailed, VaultError,
    )  # fmt: skip


@contextlib.contextmanager
def one_line(*others: type[Exception]) -> Iterator[None]:
    """Ends the program with one line at `mendable` errors, at files that cannot be read or written,
    and at `others`."""
    try:
        yield
    except (*mendable(), OSError, *others) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(argv)
    except AttributeError as error:  # what ml_collections raises for it
        message = unknown_field(page(argv), argv)
        if message is None:
            raise error
    sys.exit(message)


def page(argv: Sequence[str]) -> ConfigDict:
    """What --config was last given, as "--config=PAGE" or "--config PAGE", without overrides."""
    pages = []
    for arg, after in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = arg.partition("=")
        if name in ("-config", "--config"):
            pages.append(value if equals else after)
    return flags.FLAGS["config"].parser.parse(pages[-1])


def unknown_field(config: ConfigDict, argv: Sequence[str]) -> str | None:
    """Names the first override in `argv` of a field that `config` lacks, and fields spelled alike;
    None where there is no such override."""
    known = [f"config.{name}" for name in _names(config)]
    for name in (arg.lstrip("-").partition("=")[0] for arg in argv if arg.startswith("-")):
        if name.startswith("config.") and name not in known:
            near = difflib.get_close_matches(name, known, n=2, cutoff=0.8)
            hint = f"; did you mean {' or '.join(f'--{n}' for n in near)}?" if near else ""
            return f"--{name}: {config.name} has no such field{hint}"
    return None


def _names(config: ConfigDict, prefix: str = "") -> list[str]:
    """Dotted names of all fields and of the groups of fields."""
    names = []
    for key, value in config.items():
        names.append(prefix + key)
        if isinstance(value, ConfigDict):
            names += _names(value, f"{prefix}{key}.")
    return names
