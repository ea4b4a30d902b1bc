"""LREA at the size of the paper's industrial data set: 64 + 10,000 behaviours, r=128 (4.1).

    python train.py --config=configs/lrea_industrial.py       # generated on first use
    python eval.py  --config=configs/lrea_industrial.py
    python train.py --config=configs/lrea_industrial.py:demo  # a tenth of the users

The paper's log is not public (AUC .7154, DIN-long .7149, DIN-short .7005); this one is generated in
the layout of Tianchi 56 (docs/synthetic.md), so its figures say nothing of those. The DINs beside
it: configs/din_industrial.py.
"""

from ml_collections import ConfigDict

from configs.sparsectr_alibaba import GENERATED_ROWS
from ctr_jax.config import base_config
from lrea_jax.model import default_config


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "demo"):
        raise ValueError(f"variant {variant!r}: choose demo, or none for the whole size")
    config = base_config()
    config.name = "lrea_industrial"
    config.data.update(
        dict(builder="alibaba", raw_dir="raw/industrial", max_candidates=8, min_count=2)
    )
    config.data.generate = ConfigDict(dict(users=2000, behaviours=12000.0, sessions=40.0, seed=0))
    config.expected_rows = ConfigDict(GENERATED_ROWS)
    config.batch_size = config.eval_batch_size = 128
    config.optimizer.name = config.table_optimizer.name = "adagrad"
    config.optimizer.learning_rate = config.table_optimizer.learning_rate = 0.01
    config.loss.weights.non_negativity = 0.3  # lambda of eq. 11

    config.model = default_config()
    config.model.short_length, config.model.long_length, config.model.rank = 64, 10_000, 128
    config.model.base_rate = 0.2
    # Test users are none of the training users: what is measured is the history alone.
    config.model.exclude = ("user/user_id",)
    config.history_length = 10_064

    if variant == "demo":
        config.name += "_demo"
        config.data.raw_dir = "raw/industrial_demo"
        config.data.generate.users = 200
        config.batch_size = config.eval_batch_size = 32
    config.expected_rows.user_id = config.data.generate.users
    return config
