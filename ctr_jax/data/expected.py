"""What a data set offers before it is there: sizes for plans, from the config's own figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from ctr_jax.data import prepare
from ctr_jax.data.errors import DataError
from ctr_jax.features import FIRST_KNOWN, DataSpec


def expected_spec(config: ConfigDict, rows: Mapping[str, int]) -> tuple[DataSpec, str]:
    """(spec, where its sizes come from): the prepared data set's where it is there, else the
    columns that the builder declares with the vocabularies of `config.expected_rows`.

    Args:
      rows: {vocabulary: rows}, in place of either.
    Raises:
      DataError: the size of a vocabulary is not known, or `rows` names one that is not used.
    """
    spec, source = _prepared_spec(config), "the prepared data set"
    if spec is None:
        spec, source = _declared_spec(config), "config.expected_rows"
    used = {c.vocabulary for c in spec.columns if c.kind == "id"}
    if unknown := sorted(set(rows) - used):
        raise DataError(f"no such vocabulary {unknown} in {spec.name!r}; it has {sorted(used)}")
    sizes = {**spec.vocabularies, **rows}
    if missing := sorted(used - set(sizes)):
        raise DataError(
            f"{spec.name!r} is not prepared and config.expected_rows lacks {missing}; give "
            f"--rows={','.join(f'{name}=N' for name in missing)}"
        )
    if rows:
        source += ", but " + ", ".join(f"{name} {n:,}" for name, n in sorted(rows.items()))
    return dataclasses.replace(spec, vocabularies=sizes), source


def _prepared_spec(config: ConfigDict) -> DataSpec | None:
    options = config.data.to_dict()
    builder_class = prepare.find_builder(options["builder"])
    try:
        files = builder_class.raw_files(options)
    except DataError:  # not there
        return None
    directory = Path(prepare.make_builder(builder_class, options, files).data_dir)
    return DataSpec.load(directory / "spec.json") if prepare.is_complete(directory) else None


def _declared_spec(config: ConfigDict) -> DataSpec:
    options = config.data.to_dict()
    plan = prepare.find_builder(options["builder"]).plan(options)
    sizes = {name: FIRST_KNOWN + plan.buckets for name in plan.vocabularies("quantile")}
    return DataSpec(
        name=options.get("name") or options["builder"],
        columns=tuple(f.column for f in plan.fields),
        vocabularies={**sizes, **config.expected_rows.to_dict()},
        max_candidates=plan.max_candidates,
        inline_history=plan.inline_history,
    )
