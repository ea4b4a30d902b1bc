"""LASER on MovieLens 1M, protocol ML-1M-CTR v2 (docs/peers.md), L=200.

    python train.py --config=configs/laser_movielens.py --config.data.raw_dir=DIR
    python eval.py  --config=configs/laser_movielens.py --config.data.raw_dir=DIR

Variants: `:v1` the small protocol, and the rows of the paper's table as in
configs/laser_alibaba.py, such as `:din` or `:hstu,v1`; `:base` reads the last 50. DIR as in
configs/sparsectr_movielens.py. Expected: docs/laser.md.
"""

from ml_collections import ConfigDict

from configs import laser_alibaba, sparsectr_movielens


def get_config(variant: str = "") -> ConfigDict:
    row, rest = laser_alibaba.split(variant, ("v1",))
    config = sparsectr_movielens.protocol(",".join(rest))
    config.name = "_".join([row, "movielens", *rest])
    config.history_length = 200
    laser_alibaba.put_model(config, row, short_length=50)
    config.model.width, config.model.base_rate = 64, 0.575
    return config
