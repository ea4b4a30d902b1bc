"""SparseCTR on Alibaba's display-ad log (Tianchi 56), the paper's setting: L=1024, d=32, l=2, H=8,
Sparsity-2 (|P|=16, m=2, w=5), Adam, one epoch.

    python train.py --config=configs/sparsectr_alibaba.py       # the four real files in raw/alibaba
    python eval.py  --config=configs/sparsectr_alibaba.py
    python train.py --config=configs/sparsectr_alibaba.py:demo  # generated files, same layout

Paper: AUC .6530 (Table 2, three runs; DIN .6209). Not reproduced here: the files need a Tianchi
account. The demo's expected figures stand in README.md.
"""

from ml_collections import ConfigDict

from ctr_jax.config import base_config
from sparsectr_jax.model import default_config


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "demo"):
        raise ValueError(f"variant {variant!r}: choose demo, or none for the paper's setting")
    config = base_config()
    config.name = "sparsectr_alibaba"
    config.data.update(
        dict(builder="alibaba", raw_dir="raw/alibaba", max_candidates=8, min_count=2,
             valid_fraction=0.05)
    )  # fmt: skip
    config.history_length = 1024
    config.batch_size = 512
    config.eval_batch_size = 512

    config.model = default_config()

    if variant == "demo":
        config.name += "_demo"
        config.data.raw_dir = "raw/alibaba_demo"
        config.data.generate = ConfigDict(dict(users=4000, seed=0))
        # Test users are none of the training users: what is measured is the history alone.
        config.model.exclude = ("user/user_id",)
        config.model.base_rate = 0.2
        config.history_length = 256
        config.batch_size = config.eval_batch_size = 128
        config.micro_batch = 16
        # Of what was tried on the validation tail, the setting that learns most in so few steps.
        config.model.num_layers = 1
        config.model.aggregate = "mean"
        config.table_optimizer.init_scale = 1.0
        config.total_epochs = 4.0
        config.optimizer.learning_rate = config.table_optimizer.learning_rate = 3e-3
    return config
