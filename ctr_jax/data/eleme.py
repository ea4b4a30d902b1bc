"""Builder `eleme`: Tianchi 131047, Ele.me recommendation logs with inline histories (L = 50).

Files D<day>_<part>.csv, day 1..8, without a header: 39 columns, lists joined by ';'. Train is days
1 to 7 (valid their last tail), test day 8. Every row is a request of one candidate and brings its
own history, so there is no history store.

The log has no absolute times. A pseudo-epoch stands in: the request's is day 1 at a Monday-aligned
date + (day - 1) days + its hour; a behaviour's is t_request - timediff. The unit and sign of
timediff are measured on the files at hand against hours_list and weekdays_list, and printed; the
option `timediff` = (seconds per unit, sign) overrides them. Weekday numbers are taken as 0 = Monday
.. 6, or 1 = Monday .. 7 where a 7 occurs; nothing in the log can tell which day they begin with.

Options, beside those of every builder: `files` (glob), `days` ({file name: day}, for files that are
named otherwise), `test_day`, `behaviour` (columns of the history, see BEHAVIOUR; the default are
the five of SUAN) and `timediff`. With on_bad_row = "skip" files that cannot be read are left out
as well: users report that many are corrupt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from ctr_jax.data import keys, raw, vocabulary
from ctr_jax.data import requests as requests_lib
from ctr_jax.data.builder import VOCABULARIES, PreparedBuilder, Report, check_splits
from ctr_jax.data.errors import DataError
from ctr_jax.data.inline import DAY, HOUR, flat_numbers, inline_records
from ctr_jax.data.options import with_defaults
from ctr_jax.data.plan import DEFAULT_BUCKETS, Field, Plan
from ctr_jax.data.raw_files import find_files
from ctr_jax.data.records import record_dtype
from ctr_jax.data.report import table
from ctr_jax.data.row_checks import check_rows

COLUMNS = tuple(
    "label user_id gender visit_city avg_price is_supervip ctr_30 ord_30 total_amt_30 "
    "shop_id item_id city_id district_id shop_aoi_id shop_geohash_6 shop_geohash_12 brand_id "
    "category_1_id merge_standard_food_id rank_7 rank_30 rank_90 "
    "shop_id_list item_id_list category_1_id_list merge_standard_food_id_list brand_id_list "
    "price_list shop_aoi_id_list shop_geohash6_list timediff_list hours_list time_type_list "
    "weekdays_list times hours time_type weekdays geohash12".split()
)
HISTORY_LENGTH = 50
MONDAY = 1635696000  # 2021-11-01 00:00 UTC+8; which week it is carries no meaning
NULLS = ("", "-1", "-99", "\\N")
USER = ("user_id", "gender", "visit_city", "is_supervip")
USER_DENSE = ("ctr_30", "ord_30", "avg_price", "total_amt_30")
CONTEXT = ("hours", "time_type", "weekdays", "geohash12")
CANDIDATE = {  # column: (raw column, vocabulary)
    "shop": ("shop_id", "shop"),
    "item": ("item_id", "item"),
    "city": ("city_id", "city"),
    "district": ("district_id", "district"),
    "shop_aoi": ("shop_aoi_id", "shop_aoi"),
    "shop_geohash6": ("shop_geohash_6", "shop_geohash6"),
    "shop_geohash12": ("shop_geohash_12", "shop_geohash12"),
    "brand": ("brand_id", "brand"),
    "category_1": ("category_1_id", "category_1"),
    "food": ("merge_standard_food_id", "food"),
}
RANKS = ("rank_7", "rank_30", "rank_90")
BEHAVIOUR = {
    "shop": "shop_id_list",
    "item": "item_id_list",
    "category_1": "category_1_id_list",
    "food": "merge_standard_food_id_list",
    "brand": "brand_id_list",
    "shop_aoi": "shop_aoi_id_list",
    "shop_geohash6": "shop_geohash6_list",
    "hours": "hours_list",
    "time_type": "time_type_list",
    "weekdays": "weekdays_list",
}
UNITS = {"milliseconds": 0.001, "seconds": 1.0, "minutes": 60.0, "hours": 3600.0, "days": 86400.0}
DEFAULTS: dict[str, Any] = {
    "name": "",
    "max_candidates": 1,
    "min_count": 2,
    "valid_fraction": 0.05,
    "on_bad_row": "raise",
    "buckets": DEFAULT_BUCKETS,
    "files": "D*.csv*",
    "days": {},
    "test_day": 8,
    "behaviour": ("shop", "item", "category_1", "shop_aoi", "hours"),
    "timediff": (),
}
_SAMPLE_ROWS = 20_000
_ENOUGH = 0.5  # share of behaviours whose hour and weekday must fit the measured timediff


class Eleme(PreparedBuilder, skip_registration=True):
    """See the module's docstring."""

    @staticmethod
    def raw_files(options: Mapping[str, Any]) -> list[Path]:
        options = complete(options)
        files = find_files(options["raw_dir"], options["files"])
        for path in files:
            day_of(path, options)
        return files

    @staticmethod
    def plan(options: Mapping[str, Any]) -> Plan:
        options = complete(options)
        return Plan(
            fields=(
                *(Field("user", name) for name in USER),
                *(Field("user", name, "quantile") for name in USER_DENSE),
                *(Field("context", name) for name in CONTEXT),
                *(Field("behaviour", name) for name in options["behaviour"]),
                *(Field("candidate", name, "id", v) for name, (_, v) in CANDIDATE.items()),
                *(Field("candidate", name, "quantile") for name in RANKS),
            ),
            max_candidates=options["max_candidates"],
            inline_history=HISTORY_LENGTH,
            buckets=options["buckets"],
            min_count=options["min_count"],
            valid_fraction=options["valid_fraction"],
        )

    def load(self, con: duckdb.DuckDBPyConnection, report: Report) -> None:
        options = complete(self.options)
        files = self.raw_files(options)
        log = raw.load(
            con,
            "log",
            files,
            report,
            on_bad_row=options["on_bad_row"],
            columns=dict.fromkeys(COLUMNS, "VARCHAR"),
            nulls=NULLS,
            quote="",
            header=False,
            skip_files=True,
        )
        # A list whose only element is missing reads as NULL: timediff_list tells it from no list.
        width = "len(string_split({}, ';'))".format
        aligned = {
            c: f"CASE WHEN timediff_list IS NOT NULL THEN coalesce({c}, '') END"
            for c in BEHAVIOUR.values()
        }
        widths = " OR ".join(f"{width(c)} <> {width('timediff_list')}" for c in aligned.values())
        checks = {
            "label not 0 or 1": ("label IS NULL OR label NOT IN ('0', '1')", "label"),
            "missing user": ("user_id IS NULL", "user_id"),
            "hour not in 0..23": (
                "coalesce(TRY_CAST(hours AS INTEGER), -1) NOT BETWEEN 0 AND 23",
                "hours",
            ),
            "weekday not in 0..7": (
                "coalesce(TRY_CAST(weekdays AS INTEGER), -1) NOT BETWEEN 0 AND 7",
                "weekdays",
            ),
            "lists of different lengths": (
                f"(timediff_list IS NULL AND item_id_list IS NOT NULL) OR {widths}",
                "item_id_list",
            ),
            "unparsable timediff": (
                "list_bool_or([TRY_CAST(x AS DOUBLE) IS NULL "
                "FOR x IN string_split(timediff_list, ';')])",
                "timediff_list",
            ),
        }
        good = check_rows(con, log, "log", "rowid", checks, report, options["on_bad_row"])
        cases = " ".join(f"WHEN '{p.name}' THEN {day_of(p, options)}" for p in files)
        lists = ", ".join(f"{sql} AS {c}" for c, sql in aligned.items())
        con.execute(
            "CREATE OR REPLACE VIEW days AS "
            f"SELECT * REPLACE ({lists}), rowid AS seq, CASE filename {cases} END AS day "
            f"FROM log WHERE {good}"
        )
        first = _monday_aligned(con, report)
        self._timediff = measure_timediff(con, options, report)
        columns = [
            f'user_id AS "user/{n}"' if n == "user_id" else f'{n} AS "user/{n}"' for n in USER
        ]
        columns += [f'TRY_CAST({n} AS DOUBLE) AS "user/{n}"' for n in USER_DENSE]
        columns += [f'{n} AS "context/{n}"' for n in CONTEXT]
        columns += [f'{source} AS "candidate/{n}"' for n, (source, _) in CANDIDATE.items()]
        columns += [f'TRY_CAST({n} AS DOUBLE) AS "candidate/{n}"' for n in RANKS]
        time = f"CAST({first} + (day - 1) * {DAY} + CAST(hours AS INTEGER) * {HOUR} AS INTEGER)"
        lists = ", ".join(f'{BEHAVIOUR[n]} AS "list/{n}"' for n in options["behaviour"])
        con.execute(
            f"""
            CREATE OR REPLACE VIEW impressions AS
            SELECT user_id AS user_key, {time} AS order_time, {time} AS time, seq,
                   CASE WHEN day = {options["test_day"]} THEN 'test'
                        WHEN day < {options["test_day"]} THEN 'train' END AS "range",
                   CAST(label AS UTINYINT) AS label, {", ".join(columns)}, timediff_list,
                   hours_list, {lists}
            FROM days"""
        )
        missing = ", ".join(f"'{n}'" for n in NULLS)
        unnested = ", ".join(
            f"""unnest([CASE WHEN x NOT IN ({missing}) THEN x END
                FOR x IN string_split("list/{n}", ';')]) AS "behaviour/{n}\""""
            for n in options["behaviour"]
        )
        con.execute(
            f"""
            CREATE OR REPLACE VIEW behaviours AS
            SELECT user_key, order_time, TRUE AS keep, {unnested} FROM impressions
            WHERE timediff_list IS NOT NULL"""
        )

    def prepare_splits(
        self, con: duckdb.DuckDBPyConnection, directory: Path
    ) -> dict[str, tuple[int, Iterator[np.ndarray]]]:
        plan, report = self.plan(self.options), self._report
        self.load(con, report)
        report["bounds"] = requests_lib.split_impressions(con, plan)
        sizes = requests_lib.group_sizes(con, plan)
        check_splits(sizes)
        dense = self.fit_vocabularies(con, plan, directory / VOCABULARIES)
        encoders = {
            f.key: vocabulary.Encoder(f, directory / VOCABULARIES, dense) for f in plan.fields
        }
        report["users"] = con.execute("SELECT count(*) FROM user_ids").fetchone()[0]
        report["impressions"] = report["requests"] = {s: sum(c.values()) for s, c in sizes.items()}
        report["group_sizes"] = sizes
        report["history_lengths"] = {}
        keys.write_users(con, "user_ids", directory)
        dtype = record_dtype(self.spec())
        prepared, first = {}, 0
        for split in requests_lib.SPLITS:
            count = report["requests"][split]
            blocks = inline_records(con, plan, split, encoders, dtype, self._timediff, NULLS, first)
            records = keys.written(directory, split, keys.request_type(con, plan), blocks)
            prepared[split] = (count, self.watched(split, count, records))
            first += count
        return prepared


def complete(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with their defaults.

    Raises:
      DataError: an option is unknown or has no possible value.
    """
    full = with_defaults("eleme", options, DEFAULTS)
    if unknown := sorted(set(full["behaviour"]) - set(BEHAVIOUR)):
        raise DataError(f"data.behaviour names {unknown}; there are {sorted(BEHAVIOUR)}")
    if full["max_candidates"] != 1:
        raise DataError("data.max_candidates must be 1: every row of this log is its own request")
    return full


def day_of(path: Path, options: Mapping[str, Any]) -> int:
    """The day of a file: from `days`, else from a name like D3_0.csv."""
    if path.name in options["days"]:
        return int(options["days"][path.name])
    found = re.match(r"D(\d+)[_.]", path.name)
    if not found:
        raise DataError(f"{path}: no day in the name; name it D<day>_<part>.csv or set data.days")
    return int(found[1])


def _monday_aligned(con: duckdb.DuckDBPyConnection, report: Report) -> int:
    """The pseudo-epoch of day 1, 00:00, by the weekday that most of its rows have."""
    rows = con.execute(
        "SELECT day, CAST(weekdays AS INTEGER), count(*) FROM days GROUP BY ALL "
        "ORDER BY 3 DESC, 1, 2"
    ).fetchall()
    if not rows:
        raise DataError("no row of the log can be used; see what was skipped")
    sunday_is_7 = any(weekday == 7 for _, weekday, _ in rows)
    day, weekday, _ = rows[0]
    shift = (weekday - int(sunday_is_7) - (day - 1)) % 7
    agree = sum(n for d, w, n in rows if (w - int(sunday_is_7) - (d - 1)) % 7 == shift)
    report["weekdays"] = {
        "first": "1 = Monday" if sunday_is_7 else "0 = Monday",
        "share of rows whose weekday fits their day": agree / sum(n for *_, n in rows),
    }
    return MONDAY + shift * DAY


def measure_timediff(
    con: duckdb.DuckDBPyConnection, options: Mapping[str, Any], report: Report
) -> tuple[float, int]:
    """(seconds per unit, sign) of timediff: t_behaviour = t_request - sign * unit * timediff.

    Tried: every unit of UNITS and both signs, on up to 20,000 rows. The score is the share of
    behaviours whose clock hour and weekday, so computed, are hours_list's (the request's own minute
    is unknown, so one hour either way passes) and weekdays_list's, in the past. Prints the scores.

    Raises:
      DataError: no choice explains half of the behaviours.
    """
    if options["timediff"]:
        unit, sign = options["timediff"]
        return float(unit), int(sign)
    sample = con.cursor().sql(
        f"SELECT timediff_list, hours_list, weekdays_list, CAST(hours AS DOUBLE) AS hours, "
        f"CAST(weekdays AS DOUBLE) AS weekdays FROM days WHERE timediff_list IS NOT NULL "
        f"ORDER BY seq LIMIT {_SAMPLE_ROWS}"
    )
    rows = sample.to_arrow_table()
    if not len(rows):
        raise DataError("no row has a history; set data.timediff = (seconds per unit, 1)")
    difference, owner = flat_numbers(rows["timediff_list"])
    hour, weekday = (flat_numbers(rows[c])[0] for c in ("hours_list", "weekdays_list"))
    request = (rows["weekdays"].to_numpy() * DAY + rows["hours"].to_numpy() * HOUR)[owner]
    scores = {}
    for name, unit in UNITS.items():
        for sign in (1, -1):
            age = sign * unit * difference
            time = request - age
            off = (np.floor(time / HOUR) - hour) % 24
            # Days carry no hour of their own: hours_list gives it, the weekday alone must fit.
            near = True if name == "days" else (off <= 1) | (off >= 23)
            days = np.stack([np.floor((time + d) / DAY) for d in (-HOUR, 0, HOUR)])
            fits = near & ((days - weekday) % 7 == 0).any(0) & (age >= 0)
            scores[name, sign] = float(np.mean(fits))
    # Days pass on the weekday alone, which happens by chance: they must win clearly.
    best = max(scores, key=lambda key: scores[key] - (0.2 if key[0] == "days" else 0.0))
    shown = {f"{n}, {'+-'[s < 0]}timediff": {"fits": round(v, 4)} for (n, s), v in scores.items()}
    print(table("timediff_list", shown), flush=True)
    report["timediff"] = {"unit": best[0], "sign": best[1], "fits": scores[best]}
    if scores[best] < _ENOUGH:
        raise DataError(
            f"timediff_list fits hours_list and weekdays_list in {scores[best]:.0%} of the "
            f"behaviours at best ({best[0]}, sign {best[1]:+d}); if you know its unit, set "
            "data.timediff = (seconds per unit, sign)"
        )
    return UNITS[best[0]], best[1]
