"""Builder `taobao`: UserBehavior.csv of Tianchi 649, "User Behavior Data from Taobao".

    UserBehavior.csv[.gz]  no header: user, item, category, behaviour (pv, buy, cart, fav), seconds

A behaviour is a click (pv), 89 of the log's 100 million rows. Times outside 2017-11-25..12-03
(UTC+8) occur in the real log; such rows are counted and skipped. An item's category is the same on
all its rows. Targets, negatives, splits and options: ctr_jax/data/last_event.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb

from ctr_jax.data import last_event, raw
from ctr_jax.data.builder import PreparedBuilder, Report
from ctr_jax.data.errors import DataError
from ctr_jax.data.plan import Plan
from ctr_jax.data.row_checks import check_rows

FILE = "UserBehavior.csv"
FIRST_TIME = 1511539200  # 2017-11-25 00:00 UTC+8
END_TIME = 1512316800  # 2017-12-04 00:00 UTC+8
CLICK = "pv"
BEHAVIOURS = ("pv", "buy", "cart", "fav")
COLUMNS = {
    "user": "BIGINT",
    "item": "BIGINT",
    "category": "BIGINT",
    "behaviour": "VARCHAR",
    "time_stamp": "BIGINT",
}
DEMO = "python train.py --config=configs/lrea_taobao.py:demo"


class Taobao(PreparedBuilder, skip_registration=True):
    """See the module's docstring."""

    @staticmethod
    def raw_files(options: Mapping[str, Any]) -> list[Path]:
        raw_dir = Path(options["raw_dir"])
        for suffix in ("", ".gz"):
            if (raw_dir / f"{FILE}{suffix}").is_file():
                return [raw_dir / f"{FILE}{suffix}"]
        raise DataError(
            f"{raw_dir}: {FILE} not there. This data set needs {FILE} (or {FILE}.gz) of Tianchi "
            f'data set 649, "User Behavior Data from Taobao for Recommendation" '
            f"(https://tianchi.aliyun.com/dataset/649), in {raw_dir} or in the directory "
            f"--config.data.raw_dir. Without it, the generated data set: {DEMO}"
        )

    @staticmethod
    def plan(options: Mapping[str, Any]) -> Plan:
        return last_event.plan(last_event.complete("taobao", options))

    def load(self, con: duckdb.DuckDBPyConnection, report: Report) -> None:
        options = last_event.complete("taobao", self.options)
        on_bad_row = options["on_bad_row"]
        table = raw.load(
            con,
            "log",
            self.raw_files(options),
            report,
            on_bad_row=on_bad_row,
            columns=COLUMNS,
            quote="",
            header=False,
        )
        checks = {
            f"missing {name}": (f'"{name}" IS NULL', f'"{name}"')
            for name in ("user", "item", "time_stamp")
        }
        known = ", ".join(f"'{b}'" for b in BEHAVIOURS)
        checks[f"behaviour not one of {', '.join(BEHAVIOURS)}"] = (
            f"behaviour IS NULL OR behaviour NOT IN ({known})",
            "behaviour",
        )
        good = check_rows(con, table, "log", "rowid", checks, report, on_bad_row)
        inside = f"time_stamp BETWEEN {FIRST_TIME} AND {END_TIME - 1}"
        report["skipped"]["time outside 2017-11-25..2017-12-03"] = con.execute(
            f"SELECT count(*) FROM log WHERE {good} AND NOT ({inside})"
        ).fetchone()[0]
        con.execute(
            f"""
            CREATE OR REPLACE VIEW events AS
            SELECT "user" AS user_key, item, time_stamp AS order_time, rowid AS seq
            FROM log WHERE {good} AND {inside} AND behaviour = '{CLICK}'"""
        )
        con.execute(
            f"""
            CREATE OR REPLACE TABLE catalogue AS
            SELECT item, min(category) AS category FROM log WHERE {good} AND {inside}
            GROUP BY item"""
        )
        last_event.create_views(con, options, report)
