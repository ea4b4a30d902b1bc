"""SparseCTR on KuaiRand-Pure, protocol KuaiRand-CTR v1 (docs/peers.md).

    python train.py --config=configs/sparsectr_kuairand.py --config.data.raw_dir=DIR
    python eval.py  --config=configs/sparsectr_kuairand.py --config.data.raw_dir=DIR

DIR holds val, test, user_sequences, user_features and item_features.parquet (CC BY-SA 4.0, not
shipped). Expected: README.md.
"""

from ml_collections import ConfigDict

from ctr_jax.config import ADAGRAD_TABLES, base_config
from sparsectr_jax.model import default_config

USER_IDS = ("user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author",
            "follow_user_num_range", "fans_user_num_range", "friend_user_num_range",
            "register_days_range", *(f"onehot_feat{i}" for i in range(18)))  # fmt: skip
USER_COUNTS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
# As prepared once.
ONEHOT_ROWS = (5, 10, 49, 1198, 18, 27, 6, 92, 422, 10, 8, 7, 5, 5, 5, 5, 5, 5)
EXPECTED_ROWS = dict(
    user_id=15_319, video=7_322, author=6_344, tag=114, type=8, tab=18, video_type=6,
    upload_type=14,
    music_type=8, user_active_degree=12, is_lowactive_period=4, is_live_streamer=5,
    is_video_author=5, follow_user_num_range=11, fans_user_num_range=12, friend_user_num_range=10,
    register_days_range=11, **{f"onehot_feat{i}": n for i, n in enumerate(ONEHOT_ROWS)},
)  # fmt: skip

# What a stored video was to its user; `p` is a row of user_sequences.
STORED_TYPE = (
    "CASE WHEN list_contains(p.like_seq, p.item) THEN 'stored like' "
    "WHEN list_contains(p.long_watch_seq, p.item) THEN 'stored long view' ELSE 'stored' END"
)


def protocol() -> ConfigDict:
    """Data, batches and rates of all models on KuaiRand: what their pages start from."""
    config = base_config()
    config.name = "kuairand"
    config.data.update(
        dict(builder="events", name="kuairand_v1", raw_dir="raw/kuairand_pure",
             events=("val.parquet", "test.parquet"), user="user_id", item="video_id",
             time="time_ms", time_unit="ms", label="is_click", request=60, ties="strict",
             train="e.filename = 'val.parquet'", test="e.filename = 'test.parquet'",
             valid_fraction=0.1, max_candidates=2,
             item_table="item_features.parquet", items_key="video_id",
             user_table="user_features.parquet", users_key="user_id",
             prior=dict(file="user_sequences.parquet", user="user_id", items="watch_seq",
                        time="last_time_ms", behaviour=dict(video="p.item", type=STORED_TYPE)),
             candidate=dict(video="e.video_id", author="i.author_id", tag="i.tag",
                            video_type="i.video_type", upload_type="i.upload_type",
                            music_type="i.music_type", duration="i.video_duration"),
             context=dict(tab="e.tab"),
             behaviour=dict(video="e.video_id", author="i.author_id", tag="i.tag",
                            type="CASE WHEN e.is_click = 1 THEN 'click' ELSE 'no click' END"),
             user_columns={name: name for name in ("user_id", *USER_IDS, *USER_COUNTS)},
             kinds={"candidate/duration": "quantile",
                    **{f"user/{name}": "quantile" for name in USER_COUNTS}})
    )  # fmt: skip
    config.expected_rows = ConfigDict(EXPECTED_ROWS)
    config.history_length = 100
    config.batch_size = 512
    config.optimizer.schedule = "cosine"
    config.table_optimizer.update(ADAGRAD_TABLES)
    return config


def get_config() -> ConfigDict:
    config = protocol()
    config.name = f"sparsectr_{config.name}"
    config.model = default_config()
    config.model.base_rate = 0.5
    # Chosen on the validation tail (docs/results.md). The head is DIN's. Tables start at .01, and
    # in so few steps a candidate does not outgrow what attention adds to it, unless both are
    # normalised.
    config.model.width = 64
    config.model.num_layers = 1
    config.model.local_window = 100
    config.model.slope_init = "zero"
    config.model.aggregate = "mean_residual"
    config.model.block = "suan"
    config.model.head_hidden = (512, 256, 128)
    return config
