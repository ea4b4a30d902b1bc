"""Options of a builder (`config.data`): those every builder takes, and its own with defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ctr_jax.data.errors import DataError

COMMON = (
    "builder",
    "raw_dir",
    "prepared_dir",
    "memory_limit",
    "threads",
    "generate",
    "vocabularies_from",
    "grow_vocabularies",
)


def with_defaults(
    builder: str, options: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """The options, and `defaults` for those not given.

    Raises:
      DataError: an option is neither one of `defaults` nor one that every builder takes.
    """
    if unknown := sorted(set(options) - set(defaults) - set(COMMON)):
        raise DataError(
            f"data has no options {unknown}; the {builder} builder knows {sorted(defaults)}"
        )
    return {**defaults, **options}
