"""DIN beside configs/lrea_amazon.py: the same data, loop, short branch and head.

python train.py --config=configs/din_amazon.py             # the long history, at full rank
python train.py --config=configs/din_amazon.py:short       # the short history only
python train.py --config=configs/din_amazon.py:short,demo  # on the generated data
"""

from ml_collections import ConfigDict

from baselines_jax import din_long
from configs import lrea_amazon


def get_config(variant: str = "") -> ConfigDict:
    return din_long.beside(lrea_amazon.get_config, variant)
