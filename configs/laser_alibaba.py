"""LASER on Alibaba's display-ad log (Tianchi 56), at the paper's size: L=1000, w=10, d=128, 2 heads
of 16, M=2; Adam (.9, .9999) for the model, Adagrad for the tables.

    python train.py --config=configs/laser_alibaba.py       # the four real files in raw/alibaba
    python eval.py  --config=configs/laser_alibaba.py
    python train.py --config=configs/laser_alibaba.py:demo  # generated files, same layout

Variants, joined by a comma: `:demo`; `:long`, generated files with the histories of the paper's
length, for the ablations; and a row of the paper's table in LASER's place: `:base` (the
last 100 only), `:din`, `:twin`, `:hstu`, `:transformer`. The paper's log is not public (AUC .7826,
Base .7802); what is expected of the generated one stands in docs/laser.md.
"""

import importlib

from ml_collections import ConfigDict

from configs import sparsectr_alibaba
from ctr_jax.config import ADAGRAD_TABLES

# The rows of the paper's table.
ROWS = {
    "laser": "laser_jax.model",
    "base": "baselines_jax.base",
    "din": "baselines_jax.din",
    "twin": "baselines_jax.twin",
    "hstu": "baselines_jax.hstu",
    "transformer": "baselines_jax.transformer",
}


def get_config(variant: str = "") -> ConfigDict:
    row, rest = split(variant, ("demo", "long"))
    config = sparsectr_alibaba.get_config("demo" if rest else "")
    config.name = "_".join([row, "alibaba", *rest])
    if "demo" not in rest:
        config.history_length = 1000
    if "long" in rest:
        config.data.raw_dir = "raw/alibaba_long"
        config.data.generate.update(users=4000, behaviours=1300.0)
    theirs = config.model
    put_model(config, row, short_length=20 if rest else 100)
    config.model.base_rate, config.model.exclude = theirs.base_rate, theirs.exclude
    if rest:  # generated: few users and categories
        config.model.width, config.model.embedding_width = 64, 8
    if "long" in rest:  # what learns most in the five minutes a core has for a run (docs/laser.md)
        config.model.width, config.optimizer.learning_rate = 32, 3e-3
    return config


def split(variant: str, others: tuple[str, ...]) -> tuple[str, list[str]]:
    """(row, the rest in order) of a page's variant.

    Raises:
      ValueError: a word that is neither a row nor in `others`, or two rows.
    """
    words = [word for word in variant.split(",") if word]
    rows = [word for word in words if word in ROWS]
    rest = sorted(word for word in words if word not in ROWS)
    if len(rows) > 1 or len(rest) > 1 or set(rest) - set(others):
        raise ValueError(
            f"variant {variant!r}: choose one of {', '.join(ROWS)}"
            + f" and one of {', '.join(others)}, joined by a comma"
        )
    return (rows or ["laser"])[0], rest


def put_model(config: ConfigDict, row: str, *, short_length: int) -> None:
    """Gives `config` the model of a row, in the frame they share (ctr_jax/history_model.py), and
    LASER's optimizers; after config.history_length is set."""
    config.model = importlib.import_module(ROWS[row]).default_config()
    config.model.width = 128
    config.model.short_length = short_length
    if "length" in config.model:  # the longest history of HSTU and Transformer
        config.model.length = config.history_length
    if row == "base":  # reads no more
        config.history_length = short_length
    config.optimizer.update(dict(name="adam", learning_rate=1e-3, b2=0.9999, schedule="constant"))
    config.table_optimizer.update(ADAGRAD_TABLES)
