"""DIN beside configs/lrea_industrial.py: the same data, loop, short branch and head.

python train.py --config=configs/din_industrial.py             # the long history, at full rank
python train.py --config=configs/din_industrial.py:short       # the short history only
python train.py --config=configs/din_industrial.py:short,demo  # on the generated data
"""

from ml_collections import ConfigDict

from baselines_jax import din_long
from configs import lrea_industrial


def get_config(variant: str = "") -> ConfigDict:
    return din_long.beside(lrea_industrial.get_config, variant)
