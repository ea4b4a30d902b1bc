"""DIN on KuaiRand-Pure: the same data, loop and metrics as configs/sparsectr_kuairand.py.

python train.py --config=configs/din_kuairand.py --config.data.raw_dir=DIR
"""

from ml_collections import ConfigDict

from baselines_jax import din
from configs import sparsectr_kuairand


def get_config() -> ConfigDict:
    config = sparsectr_kuairand.get_config()
    config.name = "din_kuairand"
    exclude = config.model.exclude
    config.model = din.default_config()
    config.model.exclude = exclude
    # As measured (docs/results.md); Adagrad tables were not tried here.
    config.table_optimizer.name, config.table_optimizer.schedule = "lazy_adam", "cosine"
    config.table_optimizer.learning_rate = 1e-3
    return config
