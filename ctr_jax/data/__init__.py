"""Raw logs -> prepared data set -> RequestBatch stream."""

from __future__ import annotations

from ml_collections import ConfigDict


def open_data(config: ConfigDict):
    """The prepared data set that `config.data` describes, generated and prepared if need be.

    Returns:
      PreparedData.
    Raises:
      DataError: raw files are absent or bad; one line that names file, place and value.
    """
    from ctr_jax.data import prepare, records

    prepare.generate(config.data)
    return records.PreparedData.open(prepare.prepare(config.data))
