"""prepare(config.data): raw log -> prepared data set, once.

The directory is `<prepared_dir>/<builder>/<name>-<fingerprint>/<version>`, where the fingerprint
covers the builder's options and the raw files (name, size, time of change). The same options and
files are prepared once; anything else is another directory. `python -m ctr_jax.data.prepare
--config=configs/<file>.py` prepares without training.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import duckdb
from ml_collections import ConfigDict

from ctr_jax.data import given_vocabularies
from ctr_jax.data.errors import DataError
from ctr_jax.data.options import COMMON
from ctr_jax.data.raw_files import distinct_names

BUILDERS = {
    "alibaba": "ctr_jax.data.alibaba:Alibaba",
    "amazon": "ctr_jax.data.amazon:Amazon",
    "eleme": "ctr_jax.data.eleme:Eleme",
    "events": "ctr_jax.data.events:Events",
    "taobao": "ctr_jax.data.taobao:Taobao",
}
# Raised whenever preparation gives other files for the same options and raw files.
FORMAT = 5
# Options that say where and how, not what: they do not change the prepared data set. Of the given
# vocabularies their content counts, and whether they grow.
_NOT_CONTENT = tuple(name for name in COMMON if name != "builder")


def prepare(config: ConfigDict, engine: Callable[..., Any] | None = None) -> Path:
    """Prepares the data set that `config` (config.data) describes, unless it is there already.

    Args:
      engine: takes the place of PreparedBuilder.prepare_splits; None is that function itself.
    Returns:
      The directory of the prepared data set.
    Raises:
      DataError: raw files are absent or bad, or an option is wrong.
    """
    options = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    builder_class = find_builder(options.get("builder", ""))
    for name in ("raw_dir", "prepared_dir"):
        if not options.get(name):
            raise DataError(f"data.{name} is not set")
    if options.get("grow_vocabularies") and not options.get("vocabularies_from"):
        raise DataError(
            "data.grow_vocabularies needs data.vocabularies_from, the data set whose vocabularies "
            "are to grow"
        )
    files = builder_class.raw_files(options)
    builder = make_builder(builder_class, options, files)
    if engine is not None:
        builder.prepare_splits = functools.partial(engine, builder)
    directory = Path(builder.data_dir)
    if not is_complete(directory):
        if source := options.get("vocabularies_from"):  # before anything is read
            given_vocabularies.check(Path(source), builder_class.plan(options))
        with locked(directory.parent):
            if not is_complete(directory):
                _remove_leftovers(directory)
                try:
                    builder.download_and_prepare()
                except duckdb.Error as error:
                    hint = (
                        "; TRY_CAST gives NULL where an expression cannot convert a value"
                        if isinstance(error, duckdb.ConversionException)
                        else ""
                    )
                    raise DataError(
                        f"{options['raw_dir']}: {type(error).__name__}: {_short(error)}{hint}"
                    ) from error
    return directory


def generate(config: ConfigDict) -> None:
    """Writes the raw log that `config.generate` (of config.data) describes, unless it is there.

    Raises:
      DataError: the raw directory holds other files, or a size is impossible.
    """
    if config.get("generate") is None:
        return
    from ctr_jax.data import synthetic, synthetic_last_event

    raw_dir, builder = Path(config.raw_dir), config.builder
    with locked(raw_dir):
        if builder in ("amazon", "taobao"):
            log = synthetic_last_event.LastEventLog(**config.generate)
            synthetic_last_event.generate(builder, raw_dir, log)
        else:
            synthetic.generate(raw_dir, synthetic.SyntheticConfig(**config.generate))


def find_builder(name: str) -> type:
    """The builder class of `data.builder`."""
    if name not in BUILDERS:
        raise DataError(f"data.builder is {name!r}; use one of {sorted(BUILDERS)}")
    module, attribute = BUILDERS[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def make_builder(builder_class: type, options: Mapping[str, Any], files: list[Path]) -> Any:
    """The TFDS builder of these options and files."""
    from ctr_jax.data.builder import VERSION, PreparationConfig

    name = f"{options.get('name') or options['builder']}-{fingerprint(options, files)}"
    config = PreparationConfig(name=name, version=VERSION, options=options, files=tuple(files))
    return builder_class(
        data_dir=options["prepared_dir"], config=config, file_format="array_record"
    )


def fingerprint(options: Mapping[str, Any], files: list[Path]) -> str:
    """12 hex digits over FORMAT, the options that matter, each raw file's name, size and mtime.

    Raises:
      DataError: `vocabularies_from` is no prepared data set.
    """
    content = {k: v for k, v in options.items() if k not in _NOT_CONTENT}
    if source := options.get("vocabularies_from"):
        content["vocabularies_from"] = given_vocabularies.content_of(Path(source))
        if options.get("grow_vocabularies"):
            content["grow_vocabularies"] = True
    names = distinct_names(files)
    stats = [(names[p], p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    text = json.dumps([FORMAT, content, stats], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def is_complete(directory: Path) -> bool:
    """Whether `directory` is a finished data set; it gets its name only when everything is."""
    return (directory / "dataset_info.json").exists() and (directory / "spec.json").exists()


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Lets one process at a time write below `directory`; the others wait and find it done."""
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _remove_leftovers(directory: Path) -> None:
    """Removes what a killed preparation left; only the holder of the lock may."""
    for leftover in directory.parent.glob("incomplete.*"):
        shutil.rmtree(leftover)
    if directory.exists():
        shutil.rmtree(directory)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def main() -> None:
    from ml_collections import config_flags

    from ctr_jax import command_line

    config_flag = config_flags.DEFINE_config_file("config", None, "The experiment's config file.")

    def run(argv: list[str]) -> None:
        del argv
        try:
            generate(config_flag.value.data)
            print(prepare(config_flag.value.data))
        except command_line.mendable() as error:
            raise SystemExit(f"error: {error}") from None

    command_line.run(run)


if __name__ == "__main__":
    main()
