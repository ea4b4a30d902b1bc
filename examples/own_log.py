"""Your own log: copy this page, name your columns, train.

    python train.py --config=examples/own_log.py --config.data.raw_dir=DIR
    python eval.py  --config=examples/own_log.py --config.data.raw_dir=DIR

DIR holds the events (Parquet or CSV, one file or a glob), one row per impression or behaviour, and
optionally one table of users and one of items. Every field below is a column name or an SQL
expression (DuckDB) over the event `e` and its item `i`; ctr_jax/data/event_options.py has all.
"""

from ml_collections import ConfigDict

from ctr_jax.config import base_config
from sparsectr_jax.model import default_config


def get_config() -> ConfigDict:
    config = base_config()
    config.name = "own_log"
    config.data.update(
        dict(
            builder="events",
            raw_dir="raw/own_log",
            events=("events-*.parquet",),
            # Who, when, and what is to be predicted.
            user="user_id",
            # A number, or a date-time (of a CSV: ISO's), which is UTC's where it has no zone.
            time="timestamp",
            time_unit="s",  # s | ms | us
            # 0 or 1, or a condition such as "rating >= 4". Where clicks are rows of their own (and
            # train and test take the impressions alone, see docs/preparation.md):
            # "bool_or(event_type = 'click') OVER (PARTITION BY request_id, e.item_id)".
            label="clicked",
            # One request = the impressions of one user at one time; also "event", a number of
            # seconds to bucket by, or the name of a request id column.
            request="time",
            max_candidates=8,
            # A behaviour at the request's own time is not in its history. Where each event is its
            # own request and the file's order is known to be true, ties="order" uses that order.
            ties="strict",
            is_behaviour="clicked = 1",
            # Which events are targets of which split; valid is the last part of train, or what a
            # condition valid="..." takes out of it. Of date-times: "timestamp < '2023-11-15'".
            train="timestamp < 1700000000",
            test="timestamp >= 1700000000",
            valid_fraction=0.05,
            # Columns. One name in two groups shares its vocabulary and table.
            candidate=dict(item="e.item_id", category="i.category", price="i.price"),
            behaviour=dict(item="e.item_id", category="i.category"),
            context=dict(slot="e.slot"),
            user_columns=dict(age="age", city="city"),
            kinds={"candidate/price": "quantile"},
            item_table="items.parquet",
            items_key="item_id",
            item="item_id",
            user_table="users.parquet",
            users_key="user_id",
        )
    )
    config.history_length = 500
    config.model = default_config()
    config.model.timezone_hours = 0.0  # the users' local time less UTC: their hours and weekends
    return config
