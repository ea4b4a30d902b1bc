"""DIN beside configs/lrea_taobao.py: the same data, loop, short branch and head.

python train.py --config=configs/din_taobao.py             # the long history, at full rank
python train.py --config=configs/din_taobao.py:short       # the short history only
python train.py --config=configs/din_taobao.py:short,demo  # on the generated data
"""

from ml_collections import ConfigDict

from baselines_jax import din_long
from configs import lrea_taobao


def get_config(variant: str = "") -> ConfigDict:
    return din_long.beside(lrea_taobao.get_config, variant)
