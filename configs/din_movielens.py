"""DIN on MovieLens 1M: the same data, loop and metrics as configs/sparsectr_movielens.py.

python train.py --config=configs/din_movielens.py[:v1] --config.data.raw_dir=DIR
"""

from ml_collections import ConfigDict

from baselines_jax import din
from configs import sparsectr_movielens
from ctr_jax.config import ADAGRAD_TABLES


def get_config(variant: str = "") -> ConfigDict:
    config = sparsectr_movielens.protocol(variant)
    config.name = f"din_{config.name}"
    config.model = din.default_config()
    config.optimizer.learning_rate = 1e-3
    config.table_optimizer.update(ADAGRAD_TABLES)  # as SparseCTR's page; so chosen there
    return config
