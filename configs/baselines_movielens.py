"""SparseCTR's and LREA's rivals on MovieLens 1M, protocol ML-1M-CTR v2 (docs/peers.md), L=200:
data, loop, frame and rates of configs/laser_movielens.py, another model.

    python train.py --config=configs/baselines_movielens.py:eta --config.data.raw_dir=DIR
    python eval.py  --config=configs/baselines_movielens.py:eta --config.data.raw_dir=DIR

The rows of configs/baselines_alibaba.py; `:eta,v1` is the small protocol. DIR as in
configs/sparsectr_movielens.py. Expected: docs/baselines.md.
"""

from ml_collections import ConfigDict

from configs import baselines_alibaba, laser_movielens


def get_config(variant: str = "din") -> ConfigDict:
    row, rest = baselines_alibaba.split(variant)
    config = laser_movielens.get_config(rest)
    config.name = config.name.replace("laser", row)
    size = dict(width=64, short_length=50, base_rate=0.575)
    baselines_alibaba.put_model(config, row, size, category="genres")
    return config
