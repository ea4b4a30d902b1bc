"""Builder `amazon`: Amazon Books, the 2018 reviews (Ni, Li and McAuley, EMNLP 2019).

    Books_5.json[.gz]     5-core reviews, one JSON object a line: reviewerID, asin, unixReviewTime
    meta_Books.json[.gz]  items, one JSON object a line: asin, category (a list)

A behaviour is a review; its category is the last of the item's list, as in DIN's preprocessing. The
metadata names some items twice; the first line counts and the others are reported. Review times are
days, so what a user reviewed on the day of his last review is not in its history. Targets,
negatives, splits and options: ctr_jax/data/last_event.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb

from ctr_jax.data import json_lines, last_event
from ctr_jax.data.builder import PreparedBuilder, Report
from ctr_jax.data.errors import DataError
from ctr_jax.data.plan import Plan
from ctr_jax.data.row_checks import check_rows

REVIEWS, ITEMS = "Books_5.json", "meta_Books.json"
END_TIME = 2**31 - 1
DEMO = "python train.py --config=configs/lrea_amazon.py:demo"


class Amazon(PreparedBuilder, skip_registration=True):
    """See the module's docstring."""

    @staticmethod
    def raw_files(options: Mapping[str, Any]) -> list[Path]:
        raw_dir = Path(options["raw_dir"])
        found = {name: _raw_file(raw_dir, name) for name in (REVIEWS, ITEMS)}
        if missing := [name for name, path in found.items() if path is None]:
            raise DataError(
                f"{raw_dir}: {', '.join(missing)} not there. This data set needs {REVIEWS} and "
                f"{ITEMS} (or .json.gz) of the 2018 Amazon reviews, category Books "
                f"(https://nijianmo.github.io/amazon/), in {raw_dir} or in the directory "
                f"--config.data.raw_dir. Without them, the generated data set: {DEMO}"
            )
        return [path for path in found.values() if path is not None]

    @staticmethod
    def plan(options: Mapping[str, Any]) -> Plan:
        return last_event.plan(last_event.complete("amazon", options))

    def load(self, con: duckdb.DuckDBPyConnection, report: Report) -> None:
        options = last_event.complete("amazon", self.options)
        on_bad_row = options["on_bad_row"]
        reviews, items = self.raw_files(options)
        fields = {"user": "$.reviewerID", "item": "$.asin", "time": "$.unixReviewTime"}
        table = json_lines.load(con, "reviews", reviews, fields, report)
        checks = {
            **json_lines.BAD_LINE,
            "missing user": ('"user" IS NULL', '"user"'),
            "missing item": ("item IS NULL", "item"),
            "unparsable time": ("TRY_CAST(time AS BIGINT) IS NULL", "time"),
            "negative time, or after 2038": (
                f"TRY_CAST(time AS BIGINT) NOT BETWEEN 0 AND {END_TIME}",
                "time",
            ),
        }
        # Blank lines are rows, so that a rowid is a line, but no reviews.
        source = "(SELECT rowid, * FROM reviews WHERE is_json IS NOT NULL)"
        good = check_rows(con, table, source, "rowid", checks, report, on_bad_row)
        con.execute(
            f"""
            CREATE OR REPLACE VIEW events AS
            SELECT "user" AS user_key, item, CAST(time AS BIGINT) AS order_time, rowid AS seq
            FROM {source} WHERE {good}"""
        )
        # [#-1] is the last of a list.
        fields = {"item": "$.asin", "category": "$.category[#-1]"}
        table = json_lines.load(con, "metadata", items, fields, report)
        checks = {**json_lines.BAD_LINE, "missing item": ("item IS NULL", "item")}
        source = "(SELECT rowid, * FROM metadata WHERE is_json IS NOT NULL)"
        good = check_rows(con, table, source, "rowid", checks, report, on_bad_row)
        lines, known = con.execute(
            f"SELECT count(*), count(DISTINCT item) FROM {source} WHERE {good}"
        ).fetchone()
        report["skipped"]["metadata of an item that an earlier line has"] = lines - known
        con.execute(
            f"""
            CREATE OR REPLACE TABLE catalogue AS
            SELECT e.item, c.category FROM (SELECT DISTINCT item FROM events) e
            LEFT JOIN (SELECT item, arg_min(category, rowid) AS category
                       FROM (SELECT item, coalesce(category, '') AS category, rowid
                             FROM {source} WHERE {good}) GROUP BY item) c USING (item)"""
        )
        last_event.create_views(con, options, report)


def _raw_file(raw_dir: Path, name: str) -> Path | None:
    paths = (raw_dir / f"{name}{suffix}" for suffix in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)
