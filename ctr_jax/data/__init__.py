"""Raw logs -> prepared data set -> RequestBatch stream."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict


def open_data(config: ConfigDict):
    """The prepared data set that `config.data` describes, generated and prepared if need be.

    Returns:
      PreparedData.
    Raises:
      DataError: raw files are absent or bad; one line that names file, place and value.
    """
    from ctr_jax.data import prepare, records, synthetic, synthetic_last_event

    if config.data.get("generate") is not None:
        raw_dir, builder = Path(config.data.raw_dir), config.data.builder
        with prepare.locked(raw_dir):
            if builder in ("amazon", "taobao"):
                log = synthetic_last_event.LastEventLog(**config.data.generate)
                synthetic_last_event.generate(builder, raw_dir, log)
            else:
                synthetic.generate(raw_dir, synthetic.SyntheticConfig(**config.data.generate))
    return records.PreparedData.open(prepare.prepare(config.data))
