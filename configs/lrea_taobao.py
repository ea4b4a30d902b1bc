"""LREA on Taobao user behaviour (Tianchi 649): 64 + 500 clicks, d=16, Adagrad, batch 1024 (4.1).

    python train.py --config=configs/lrea_taobao.py       # UserBehavior.csv in raw/taobao
    python eval.py  --config=configs/lrea_taobao.py
    python train.py --config=configs/lrea_taobao.py:demo  # a generated file, same layout

Paper: AUC .8904 (Table 2; DIN-long .8903, DIN-short .8535). It does not say r here; 64 is ours. Its
"first 64 behaviors" as the short history is read as the most recent 64. The DINs beside it:
configs/din_taobao.py.
"""

from ml_collections import ConfigDict

from configs import lrea_amazon


def get_config(variant: str = "") -> ConfigDict:
    config = lrea_amazon.get_config(variant)
    config.name = config.name.replace("amazon", "taobao")
    config.data.builder = "taobao"
    config.expected_rows = ConfigDict(dict(item=4_162_027, category=9_442))
    config.data.raw_dir = config.data.raw_dir.replace("amazon", "taobao")
    config.model.short_length, config.model.long_length, config.model.rank = 64, 500, 64
    config.history_length = 564
    if variant == "demo":
        config.data.generate.update(dict(users=4000, behaviours=400.0))
    return config
