"""LREA on Amazon Books (2018, 5-core): 10 + 90 behaviours, d=16, Adagrad, batch 1024 (4.1).

    python train.py --config=configs/lrea_amazon.py       # Books_5 and meta_Books in raw/amazon
    python eval.py  --config=configs/lrea_amazon.py
    python train.py --config=configs/lrea_amazon.py:demo  # generated files, same layout

Paper: AUC .8098 (Table 2; DIN-long .8101, DIN-short .7833). It does not say r here, nor which
negatives; r = 32 and uniform ones are ours. The paths: --config.model.training_path=absorbed.
The DINs beside it: configs/din_amazon.py.
"""

from ml_collections import ConfigDict

from ctr_jax.config import base_config
from lrea_jax.model import default_config

# Books of the 5-core; categories are an assumption on the safe side.
EXPECTED_ROWS = dict(item=704_096, category=5_000)


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "demo"):
        raise ValueError(f"variant {variant!r}: choose demo, or none for the paper's setting")
    config = base_config()
    config.name = "lrea_amazon"
    config.data.update(
        dict(builder="amazon", raw_dir="raw/amazon", negatives="catalogue", seed=0, min_count=2)
    )
    config.expected_rows = ConfigDict(EXPECTED_ROWS)
    config.batch_size = config.eval_batch_size = 512  # requests of two candidates
    config.optimizer.name = config.table_optimizer.name = "adagrad"
    config.optimizer.learning_rate = config.table_optimizer.learning_rate = 0.01
    config.loss.weights.non_negativity = 0.3  # lambda of eq. 11

    config.model = default_config()
    config.model.short_length, config.model.long_length, config.model.rank = 10, 90, 32
    config.history_length = 100

    if variant == "demo":
        config.name += "_demo"
        config.data.raw_dir = "raw/amazon_demo"
        config.data.generate = ConfigDict(
            dict(users=6000, behaviours=100.0, items=2000, categories=40, seed=0)
        )
        # Few users and requests: small batches, larger steps, more than one epoch.
        config.batch_size = config.eval_batch_size = 128
        config.table_optimizer.init_scale = 0.1
        config.optimizer.learning_rate = config.table_optimizer.learning_rate = 0.05
        config.total_epochs = 3.0
    return config
