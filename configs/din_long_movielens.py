"""DIN beside configs/lrea_movielens.py: the same data, loop, short branch and head.

    python train.py --config=configs/din_long_movielens.py --config.data.raw_dir=DIR
    python train.py --config=configs/din_long_movielens.py:short --config.data.raw_dir=DIR

The first reads the long history at full rank. `:short` reads the short one only; v1 and L500 as
there, such as `:short,L500`. configs/din_movielens.py is the DIN of its own paper.
"""

from ml_collections import ConfigDict

from baselines_jax import din_long
from configs import lrea_movielens


def get_config(variant: str = "") -> ConfigDict:
    return din_long.beside(lrea_movielens.get_config, variant)
