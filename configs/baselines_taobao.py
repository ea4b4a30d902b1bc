"""LREA's rivals on Taobao user behaviour (Tianchi 649), as configs/baselines_amazon.py.

    python train.py --config=configs/baselines_taobao.py:sim_hard       # the real file
    python eval.py  --config=configs/baselines_taobao.py:sim_hard
    python train.py --config=configs/baselines_taobao.py:sim_hard,demo  # a generated one

Paper, AUC (Table 2): SIM .8667, ETA .8651, SDIM .8734, TWIN .8838, LREA .8904.
"""

from ml_collections import ConfigDict

from configs import baselines_amazon, lrea_taobao


def get_config(variant: str = "sim_hard") -> ConfigDict:
    return baselines_amazon.beside(lrea_taobao.get_config, variant)
