"""LREA's rivals on Amazon Books: data, lengths, width and rates of configs/lrea_amazon.py, another
model, in the frame of ctr_jax/history_model.py. The first word of the variant is the model:

    python train.py --config=configs/baselines_amazon.py:sim_hard       # the real files
    python eval.py  --config=configs/baselines_amazon.py:sim_hard
    python train.py --config=configs/baselines_amazon.py:sim_hard,demo  # generated files

The rows of configs/baselines_alibaba.py. Paper, AUC (Table 2): SIM .7919, ETA .7984, SDIM .8013,
TWIN .8015, LREA .8098; of the SIMs it does not say which. The DINs: configs/din_amazon.py.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs import baselines_alibaba, lrea_amazon


def get_config(variant: str = "sim_hard") -> ConfigDict:
    return beside(lrea_amazon.get_config, variant)


def beside(lrea_config: Callable[[str], ConfigDict], variant: str) -> ConfigDict:
    """LREA's experiment with a row's model: `variant` is a row, or a row, a comma and one of
    lrea_config's."""
    row, rest = baselines_alibaba.split(variant)
    config = lrea_config(rest)
    config.name = config.name.replace("lrea", row)
    config.loss.weights = ConfigDict()
    same = ("embedding_width", "exclude", "width", "short_length", "base_rate")
    size = {name: config.model[name] for name in same}
    baselines_alibaba.put_model(config, row, size, category="category")
    return config
