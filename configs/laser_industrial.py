"""LASER at the lengths of its scaling study, up to L=4000, on a generated log.

    python train.py --config=configs/laser_industrial.py       # generated on first use
    python eval.py  --config=configs/laser_industrial.py
    python train.py --config=configs/laser_industrial.py:demo  # a tenth of the users

Other lengths: --config.history_length=500. Rows of the paper's table as in
configs/laser_alibaba.py, such as `:demo,din`. The paper's log is not public; this one has the
layout of Tianchi 56 (docs/synthetic.md), so its figures say nothing of those.
"""

from ml_collections import ConfigDict

from configs import laser_alibaba, lrea_industrial


def get_config(variant: str = "") -> ConfigDict:
    row, rest = laser_alibaba.split(variant, ("demo",))
    config = lrea_industrial.get_config(",".join(rest))
    config.name = "_".join([row, "industrial", *rest])
    config.history_length = 4000
    config.loss.weights = ConfigDict()
    theirs = config.model
    laser_alibaba.put_model(config, row, short_length=100)
    config.model.base_rate, config.model.exclude = theirs.base_rate, theirs.exclude
    return config
