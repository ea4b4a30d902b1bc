"""Builder `alibaba`: the four CSV files of Tianchi 56, "Ad Display/Click Data on Taobao".

    raw_sample.csv    user,time_stamp,adgroup_id,pid,nonclk,clk             impressions, 8 days
    ad_feature.csv    adgroup_id,cate_id,campaign_id,customer,brand,price
    user_profile.csv  userid,cms_segid,...,new_user_class_level             (header ends in a blank)
    behavior_log.csv  user,time_stamp,btag,cate,brand                       22 days, not sorted

Each may be compressed (.csv.gz). A request is what one user was shown at one time stamp. Times
outside 2017-04-22..05-13 (UTC+8) occur in the real log; such rows are counted and skipped. Train is
the first seven days of impressions (valid their last tail by time), test the last day.

Options, beside those of every builder:
  max_candidates: default 8. Requests of this log are small; the printed distribution of candidates
    per request tells what a smaller or larger C costs in empty slots or split requests.
  disjoint_users: share of users, drawn by a hash of the user id, whose requests of all days go only
    to test; the other users' requests of the test day are dropped. A further `valid_fraction` of
    users gives valid in the same way. 0 (default) splits by time alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb

from ctr_jax.data.builder import PreparedBuilder, Report
from ctr_jax.data.errors import DataError
from ctr_jax.data.options import with_defaults
from ctr_jax.data.plan import DEFAULT_BUCKETS, Field, Plan
from ctr_jax.data.row_checks import check_rows, unique_key

FIRST_TIME = 1492790400  # 2017-04-22 00:00 UTC+8
TEST_TIME = 1494604800  # 2017-05-13 00:00 UTC+8
END_TIME = 1494691200  # 2017-05-14 00:00 UTC+8
NULLS = ("", "NULL", "null")
COLUMNS: dict[str, dict[str, str]] = {
    "raw_sample": {
        "user": "BIGINT",
        "time_stamp": "BIGINT",
        "adgroup_id": "BIGINT",
        "pid": "VARCHAR",
        "nonclk": "BIGINT",
        "clk": "BIGINT",
    },
    "ad_feature": {
        "adgroup_id": "BIGINT",
        "cate_id": "BIGINT",
        "campaign_id": "BIGINT",
        "customer": "BIGINT",
        "brand": "BIGINT",
        "price": "DOUBLE",
    },
    "user_profile": dict.fromkeys(
        (
            "userid",
            "cms_segid",
            "cms_group_id",
            "final_gender_code",
            "age_level",
            "pvalue_level",
            "shopping_level",
            "occupation",
            "new_user_class_level",
        ),
        "BIGINT",
    ),
    "behavior_log": {
        "user": "BIGINT",
        "time_stamp": "BIGINT",
        "btag": "VARCHAR",
        "cate": "BIGINT",
        "brand": "BIGINT",
    },
}
PROFILE = tuple(COLUMNS["user_profile"])[1:]
CANDIDATE = {  # name of the column: name in ad_feature
    "adgroup": "adgroup_id",
    "cate": "cate_id",
    "campaign": "campaign_id",
    "customer": "customer",
    "brand": "brand",
    "price": "price",
}
DEFAULTS: dict[str, Any] = {
    "name": "",
    "max_candidates": 8,
    "min_count": 2,
    "valid_fraction": 0.05,
    "on_bad_row": "raise",
    "buckets": DEFAULT_BUCKETS,
    "disjoint_users": 0.0,
}
DEMO = "python train.py --config=configs/sparsectr_alibaba.py:demo"
# Which part of [0, 1) a user falls into; fixed by the id alone.
_USER_SHARE = "(md5_number_lower(CAST(user_key AS VARCHAR)) % 1000000) / 1000000.0"


class Alibaba(PreparedBuilder, skip_registration=True):
    """See the module's docstring."""

    @staticmethod
    def raw_files(options: Mapping[str, Any]) -> list[Path]:
        raw_dir = Path(options["raw_dir"])
        found = {name: _raw_file(raw_dir, name) for name in COLUMNS}
        if missing := [f"{name}.csv" for name, path in found.items() if path is None]:
            raise DataError(
                f"{raw_dir}: {', '.join(missing)} not there. This data set needs "
                f"{', '.join(f'{n}.csv' for n in COLUMNS)} (or .csv.gz) of Tianchi data set 56, "
                f'"Ad Display/Click Data on Taobao.com" (https://tianchi.aliyun.com/dataset/56), '
                f"in {raw_dir} or in the directory --config.data.raw_dir. "
                f"Without them, the generated data set: {DEMO}"
            )
        return [path for path in found.values() if path is not None]

    @staticmethod
    def plan(options: Mapping[str, Any]) -> Plan:
        options = complete(options)
        users = [Field("user", "user_id"), *(Field("user", name) for name in PROFILE)]
        kinds = {"price": "quantile"}
        return Plan(
            fields=(
                *users,
                Field("context", "pid"),
                *(Field("behaviour", name) for name in ("cate", "brand", "btag")),
                *(Field("candidate", name, kinds.get(name, "id")) for name in CANDIDATE),
            ),
            max_candidates=options["max_candidates"],
            request="time",
            # Users are disjoint by hash, so what they did at any time before the test day is
            # training data of training users, and of nobody else.
            fit_behaviours=f"order_time < {TEST_TIME} AND {_user_range(options)} = 'train'"
            if options["disjoint_users"]
            else "",
            buckets=options["buckets"],
            min_count=options["min_count"],
            valid_fraction=options["valid_fraction"],
        )

    @staticmethod
    def shard_keys(options: Mapping[str, Any]) -> dict[str, str]:
        del options
        return {"raw_sample": '"user"', "behavior_log": '"user"', "user_profile": "userid"}

    def load(self, con: duckdb.DuckDBPyConnection, report: Report) -> None:
        options = complete(self.options)
        on_bad_row = options["on_bad_row"]
        tables = {
            name: self.read_table(
                con,
                name,
                [_raw_file(Path(options["raw_dir"]), name)],
                report,
                on_bad_row=on_bad_row,
                columns=columns,
                nulls=NULLS,
                quote="",
            )
            for name, columns in COLUMNS.items()
        }
        unique_key(con, tables["ad_feature"], "adgroup_id")
        unique_key(con, tables["user_profile"], "userid")
        inside = f"time_stamp BETWEEN {FIRST_TIME} AND {END_TIME - 1}"
        keyed = {
            "missing user": ('"user" IS NULL', '"user"'),
            "missing time": ("time_stamp IS NULL", "time_stamp"),
        }
        labels = {
            "label not 0 or 1": ("clk IS NULL OR clk NOT IN (0, 1)", "clk"),
            "nonclk is not 1 - clk": ("nonclk IS DISTINCT FROM 1 - clk", "nonclk"),
        }
        good = {}
        for name, checks in (("raw_sample", {**keyed, **labels}), ("behavior_log", keyed)):
            good[name] = check_rows(con, tables[name], name, "rowid", checks, report, on_bad_row)
            report["skipped"][f"{name}: time outside 2017-04-22..2017-05-13"] = con.execute(
                f"SELECT count(*) FROM {name} WHERE {good[name]} AND NOT ({inside})"
            ).fetchone()[0]
        split = _user_range(options)
        by_time = f"CASE WHEN time_stamp < {TEST_TIME} THEN 'train' ELSE 'test' END"
        if options["disjoint_users"]:
            split = f"CASE WHEN {split} = 'test' OR time_stamp < {TEST_TIME} THEN {split} END"
            report["dropped"]["test-day impressions of users outside test"] = con.execute(
                f"""
                SELECT count(*) FROM (SELECT *, "user" AS user_key FROM raw_sample
                WHERE {good["raw_sample"]} AND {inside}) WHERE ({split}) IS NULL"""
            ).fetchone()[0]
        else:
            split = by_time
        ads = ", ".join(f'a.{source} AS "candidate/{name}"' for name, source in CANDIDATE.items())
        ads = ads.replace("a.adgroup_id", "s.adgroup_id")  # known even if the ad's row is missing
        con.execute(
            f"""
            CREATE OR REPLACE VIEW impressions AS
            SELECT s.user_key, s.time_stamp AS order_time, CAST(s.time_stamp AS INTEGER) AS time,
                   s.seq, ({split}) AS "range", CAST(s.clk AS UTINYINT) AS label,
                   s.pid AS "context/pid", {ads}
            FROM (SELECT rowid AS seq, "user" AS user_key, * FROM raw_sample
                  WHERE {good["raw_sample"]} AND {inside}) s
            LEFT JOIN ad_feature a ON a.adgroup_id = s.adgroup_id"""
        )
        con.execute(
            f"""
            CREATE OR REPLACE VIEW behaviours AS
            SELECT "user" AS user_key, time_stamp AS order_time,
                   CAST(time_stamp AS INTEGER) AS time,
                   rowid AS seq, TRUE AS keep, cate AS "behaviour/cate",
                   brand AS "behaviour/brand", btag AS "behaviour/btag"
            FROM behavior_log WHERE {good["behavior_log"]} AND {inside}"""
        )
        profile = ", ".join(f'p.{name} AS "user/{name}"' for name in PROFILE)
        con.execute(
            f"""
            CREATE OR REPLACE VIEW users AS
            SELECT u.user_key, u.user_key AS "user/user_id", {profile}
            FROM (SELECT DISTINCT user_key FROM impressions) u
            LEFT JOIN user_profile p ON p.userid = u.user_key"""
        )


def complete(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with their defaults.

    Raises:
      DataError: an option is unknown or has no possible value.
    """
    full = with_defaults("alibaba", options, DEFAULTS)
    if not 0 <= full["disjoint_users"] < 1 - full["valid_fraction"]:
        raise DataError(
            f"data.disjoint_users is {full['disjoint_users']}; use a share of users in "
            f"[0, {1 - full['valid_fraction']})"
        )
    return full


def _user_range(options: Mapping[str, Any]) -> str:
    """SQL of the range that a user's requests belong to when users are disjoint."""
    test, valid = options["disjoint_users"], options["disjoint_users"] + options["valid_fraction"]
    return (
        f"CASE WHEN {_USER_SHARE} < {test} THEN 'test' WHEN {_USER_SHARE} < {valid} THEN 'valid' "
        "ELSE 'train' END"
    )


def _raw_file(raw_dir: Path, name: str) -> Path | None:
    paths = (raw_dir / f"{name}{suffix}" for suffix in (".csv", ".csv.gz"))
    return next((path for path in paths if path.is_file()), None)
