"""Preparation by many workers: the data set of ctr_jax.data.prepare, through Apache Beam.

    python -m ctr_jax.data.prepare_beam --config=configs/sparsectr_alibaba.py:demo --shards=8 \
        [--runner=... and other pipeline flags of Beam]

data.raw_dir and data.prepared_dir must be directories that all workers see. docs/preparation.md
tells when this pays.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from ctr_jax import command_line
from ctr_jax.data.errors import DataError
from ctr_jax.data.prepare import generate, prepare


def prepare_beam(config: ConfigDict, shards: int, pipeline_flags: Sequence[str] = ()) -> Path:
    """Prepares the data set of `config` (config.data) by `shards` shards of users.

    Returns:
      The directory of the prepared data set, the same and with the same content hash as prepare's.
    Raises:
      DataError: as prepare's; or Beam is not installed, or the builder does not go by users.
    """
    if shards < 1:
        raise DataError(f"--shards is {shards}; use at least 1")
    try:
        from ctr_jax.data.beam.engine import prepare_splits
    except ModuleNotFoundError as error:
        if error.name != "apache_beam":
            raise
        raise DataError("Apache Beam is not installed; pip install -e '.[beam]'") from None
    return prepare(
        config, functools.partial(prepare_splits, shards_wanted=shards, flags=pipeline_flags)
    )


def main() -> None:
    config_flag = config_flags.DEFINE_config_file("config", None, "The experiment's config file.")
    shards = flags.DEFINE_integer("shards", 8, "Shards of users; each must fit a worker's disk.")
    flags.mark_flag_as_required("config")
    pipeline_flags: list[str] = []

    def parse(argv: Sequence[str]) -> list[str]:
        """Leaves the flags that are not ours to Beam."""
        try:
            program, *rest = flags.FLAGS(argv, known_only=True)
        except AttributeError as error:  # what ml_collections raises for an unknown field
            message = command_line.unknown_field(command_line.page(argv), argv)
            raise SystemExit(message) if message else error from None
        pipeline_flags.extend(rest)
        return [program]

    def run(argv: Sequence[str]) -> None:
        del argv
        try:
            generate(config_flag.value.data)
            print(prepare_beam(config_flag.value.data, shards.value, pipeline_flags))
        except command_line.mendable() as error:
            raise SystemExit(f"error: {error}") from None

    app.run(run, argv=sys.argv, flags_parser=parse)


if __name__ == "__main__":
    main()
