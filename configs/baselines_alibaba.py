"""The rivals of SparseCTR's Table 2 on Alibaba's display-ad log (Tianchi 56): the data and the loop
of configs/sparsectr_alibaba.py, another model. The first word of the variant is the model:

    python train.py --config=configs/baselines_alibaba.py:sim_soft       # the real files
    python eval.py  --config=configs/baselines_alibaba.py:sim_soft
    python train.py --config=configs/baselines_alibaba.py:sim_soft,demo  # generated files

`din`, `can`; two stages: `sim_soft`, `sim_hard`, `eta`, `sdim`, `twin`, `twin_v2`; self-attention:
`bst`, `hstu`, `transformer`, `longer`, `suan`. The other words are sparsectr_alibaba's variants.
Paper, AUC (Table 2): DIN .6209, CAN .6198, SoftSIM .6227, HardSIM .6247, ETA .6231, TWIN-V2 .6237,
BST .6422, HSTU .6448, LONGER .6457, SUAN .6479, SparseCTR .6530. Nothing is
expected of the demo: its rate is SparseCTR's. More: docs/baselines.md.
"""

import importlib
from collections.abc import Mapping

from ml_collections import ConfigDict

from configs import sparsectr_alibaba

# Row: module, and what of its default_config is not the row's.
ROWS = {
    "din": ("din", {}),
    "can": ("can", {}),
    "sim_soft": ("sim", dict(search="soft")),
    "sim_hard": ("sim", dict(search="hard")),
    "eta": ("eta", {}),
    "sdim": ("sdim", {}),
    "twin": ("twin", {}),
    "twin_v2": ("twin_v2", {}),
    "bst": ("bst", {}),
    "hstu": ("hstu", {}),
    "transformer": ("transformer", {}),
    "longer": ("longer", {}),
    "suan": ("suan", {}),
}


# What a model takes of SparseCTR's config, where it has such a field.
SIZE = ("base_rate", "exclude", "embedding_width", "width", "num_layers", "num_heads")


def get_config(variant: str = "din") -> ConfigDict:
    row, rest = split(variant)
    config = sparsectr_alibaba.get_config(rest)
    config.name = config.name.replace("sparsectr", row)
    put_model(config, row, {name: config.model[name] for name in SIZE}, category="cate")
    return config


def split(variant: str) -> tuple[str, str]:
    """(row, the rest) of a variant whose first word is a row.

    Raises:
      ValueError: it is not.
    """
    row, _, rest = variant.partition(",")
    if row not in ROWS:
        raise ValueError(f"variant {variant!r}: it begins with one of {', '.join(ROWS)}")
    return row, rest


def put_model(config: ConfigDict, row: str, size: Mapping, *, category: str) -> None:
    """Gives `config` the model of a row; after config.history_length is set.

    Args:
      size: fields of config.model; those that the row's model does not have are left out.
      category: the column that SIM's hard search goes by.
    """
    module, changes = ROWS[row]
    config.model = importlib.import_module(f"baselines_jax.{module}").default_config()
    size = dict(size, length=config.history_length, category=category, **changes)
    config.model.update({name: value for name, value in size.items() if name in config.model})
    if row == "sim_soft":
        config.loss.weights.search = 1.0
