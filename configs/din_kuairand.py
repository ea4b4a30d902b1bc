"""DIN on KuaiRand-Pure: the same data, loop and metrics as configs/sparsectr_kuairand.py.

python train.py --config=configs/din_kuairand.py --config.data.raw_dir=DIR
"""

from ml_collections import ConfigDict

from baselines_jax import din
from configs import sparsectr_kuairand


def get_config() -> ConfigDict:
    config = sparsectr_kuairand.protocol()
    config.name = f"din_{config.name}"
    config.model = din.default_config()
    return config
