"""DIN on Alibaba's display-ad log, beside sparsectr_alibaba (same data, lengths, durations).

python train.py --config=configs/din_alibaba.py:demo
"""

from ml_collections import ConfigDict

from baselines_jax import din
from configs import sparsectr_alibaba


def get_config(variant: str = "") -> ConfigDict:
    config = sparsectr_alibaba.get_config(variant)
    sparse, config.model = config.model, din.default_config()
    config.name = config.name.replace("sparsectr", "din")
    config.model.base_rate, config.model.exclude = sparse.base_rate, sparse.exclude
    return config
