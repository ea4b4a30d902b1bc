"""Synthetic logs in the raw layout of Tianchi 56 ("Ad Display/Click Data on Taobao").

    python -m ctr_jax.data.synthetic --out=DIR --users=2000 --behaviours=300 \
        --effects=interest,hour=1.5,popularity

Writes `raw_sample.csv`, `ad_feature.csv`, `user_profile.csv` and `behavior_log.csv` with the
columns and quirks of the real files, and `oracle.parquet`, which no builder reads: the true click
probability of each row of raw_sample. docs/synthetic.md tells what is planted and why.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from absl import app, flags

from ctr_jax.data.errors import DataError
from ctr_jax.data.synthetic_impressions import EFFECTS, Simulation
from ctr_jax.data.synthetic_random import hashed_uniform
from ctr_jax.data.synthetic_users import (
    BTAGS,
    FIRST_DAY,
    PIDS,
    TEST_DAY,
)

BLOCK_USERS = 500  # users in memory at a time; changes the order of rows, never the rows
MARKER, ORACLE = "synthetic.json", "oracle.parquet"
_AUC_COLUMNS = ["time_stamp", "clk", "probability"]  # of the oracle
HEADERS = {
    "raw_sample.csv": "user,time_stamp,adgroup_id,pid,nonclk,clk",
    "ad_feature.csv": "adgroup_id,cate_id,campaign_id,customer,brand,price",
    # The real header ends with a blank.
    "user_profile.csv": "userid,cms_segid,cms_group_id,final_gender_code,age_level,pvalue_level,"
    "shopping_level,occupation,new_user_class_level ",
    "behavior_log.csv": "user,time_stamp,btag,cate,brand",
}


# effect: (its strength in a study, what else is on whether it is on or off). Two stand alone, as a
# model of the demo's size does not get to them beside interests in its two epochs.
STUDIES = {
    "interest": (2.0, {"local": 1.5}),
    "transition": (5.0, {}),
    "local": (2.2, {"interest": 1.5}),
    "recency": (5.0, {}),
    "hour": (1.5, {"interest": 1.5}),
    "weekend": (1.2, {"interest": 1.5}),
}


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """Size and planted structure. An effect's number is its strength in logits; 0 is off.

    Attributes:
      users, behaviours, sessions: number of users; mean behaviours and sessions of a user.
      test_users: share of users with impressions on the last day only, all others having theirs
        before it: the usual split by day is then one by user too. 0: everybody on all days.
      click_rate: mean click probability (of the first 256 users, where it is calibrated).
      interest .. profile: strengths of the effects, see docs/synthetic.md.
      bursts: False stretches sessions until the next begins, so that no gap stands out.
      noise, decoys: share of noise in bursts; rate of announcing categories in mid-session.
      categories, noise_categories, ads: sizes of the catalogue.
      bad_stamps: share of behaviours with a time outside the 22 days, as in the real log.
    """

    users: int = 2000
    behaviours: float = 320.0
    sessions: float = 16.0
    seed: int = 0
    test_users: float = 0.3
    click_rate: float = 0.2
    interest: float = 2.4
    transition: float = 1.8
    local: float = 0.7
    recency: float = 1.0
    hour: float = 1.1
    weekend: float = 0.5
    popularity: float = 0.7
    position: float = 0.5
    profile: float = 0.3
    bursts: bool = True
    noise: float = 0.15
    decoys: float = 0.1
    categories: int = 30
    noise_categories: int = 20
    ads: int = 200
    bad_stamps: float = 1e-4

    def only(self, *effects: str, **strengths: float) -> SyntheticConfig:
        """This configuration with every effect off but the named ones.

        Raises:
          DataError: an unknown effect.
        """
        for name in (*effects, *strengths):
            if name not in EFFECTS:
                raise DataError(f"no effect {name!r}; there are {', '.join(EFFECTS)}")
        off = {name: 0.0 for name in EFFECTS if name not in effects}
        return dataclasses.replace(self, **{**off, **strengths})

    def study(self, effect: str, on: bool) -> SyntheticConfig:
        """The effect, or not, beside a little of what STUDIES keeps on in both cases.

        Raises:
          DataError: no study of this effect.
        """
        if effect not in STUDIES:
            raise DataError(f"no study of {effect!r}; there are {', '.join(STUDIES)}")
        strength, kept = STUDIES[effect]
        kept = {**kept, "popularity": 0.4, "position": 0.3}
        return self.only(**kept, **({effect: strength} if on else {}))

    @property
    def hash(self) -> str:
        """Of the fields and of this version of the generator."""
        fields = json.dumps(["synthetic-2", dataclasses.asdict(self)], sort_keys=True)
        return hashlib.sha256(fields.encode()).hexdigest()[:16]


def generate(out_dir: str | Path, config: SyntheticConfig) -> dict[str, object]:
    """Writes the data set into `out_dir` unless it is there already, users a block at a time.

    Returns:
      Counts of users, behaviours, requests, impressions, clicks, and `oracle_auc`: {"train",
      "test"}, None where a split has not both classes.
    Raises:
      DataError: impossible sizes, or `out_dir` holds files that are not of this generator.
    """
    out = Path(out_dir)
    _check(config)
    marker = out / MARKER
    if marker.exists():
        known = json.loads(marker.read_text())
        if known["hash"] == config.hash and all((out / f).exists() for f in (*HEADERS, ORACLE)):
            return known["counts"]
    elif strangers := [name for name in HEADERS if (out / name).exists()]:
        raise DataError(f"{out / strangers[0]}: not made by this generator; name another directory")
    out.mkdir(parents=True, exist_ok=True)
    partial = out / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    counts = _write(partial, config)
    # A marker without a hash says: ours, but not whole. A crash from here on is then made good by
    # the next call, and never taken for a finished set or for a stranger's.
    marker.write_text(json.dumps({"hash": "", "note": "being written"}))
    for name in (*HEADERS, ORACLE):
        os.replace(partial / name, out / name)
    oracle = read_oracle(out, _AUC_COLUMNS)
    aucs = {split: _split_auc(oracle, split) for split in ("train", "test")}
    counts["oracle_auc"] = {s: None if np.isnan(a) else round(a, 6) for s, a in aucs.items()}
    partial.rmdir()
    temporary = out / (MARKER + ".new")
    temporary.write_text(
        json.dumps(
            {"hash": config.hash, "config": dataclasses.asdict(config), "counts": counts}, indent=1
        )
    )
    os.replace(temporary, marker)
    return counts


def _check(config: SyntheticConfig) -> None:
    if (
        config.users < 1
        or not 1 <= config.sessions <= 60
        or config.behaviours < 3 * config.sessions
    ):
        raise DataError(
            f"users={config.users}, sessions={config.sessions}, behaviours={config.behaviours}: "
            "want at least 1 user, 1 to 60 sessions and 3 behaviours per session"
        )
    if config.categories < 8 or config.noise_categories < 1 or config.ads < config.categories:
        raise DataError(
            f"categories={config.categories}, noise_categories={config.noise_categories}, "
            f"ads={config.ads}: want at least 8, at least 1, and an ad per category"
        )
    if not (0 <= config.test_users < 1 and 0 < config.click_rate < 1):
        raise DataError(
            f"test_users={config.test_users}, click_rate={config.click_rate}: are shares"
        )


def _write(out: Path, config: SyntheticConfig) -> dict[str, object]:
    simulation = Simulation(config)
    catalogue = simulation.catalogue
    raw_id = _raw_user_ids(config)
    counts = {"users": config.users, "behaviours": 0, "requests": 0, "impressions": 0, "clicks": 0}
    sinks = {name: open(out / name, "wb") for name in HEADERS}
    try:
        for name, header in HEADERS.items():
            sinks[name].write(header.encode() + b"\n")
        order = np.random.default_rng([config.seed, 2]).permutation(len(catalogue.ad_category))
        brand = np.where(catalogue.ad_brand < 0, -1, catalogue.brand_id[catalogue.ad_brand])
        ads = {
            "adgroup_id": catalogue.adgroup_id,
            "cate_id": catalogue.category_id[catalogue.ad_category],
            "campaign_id": catalogue.campaign_id,
            "customer": catalogue.customer,
            "brand": _nullable(brand, "NULL"),
            "price": catalogue.ad_price,
        }
        _append(sinks["ad_feature.csv"], {k: v.take(order) for k, v in ads.items()})

        oracle = None
        for first in range(0, config.users, BLOCK_USERS):
            block = simulation.block(first, min(first + BLOCK_USERS, config.users))
            profiles, behaviours, samples = (
                _shuffled(block[name], config.seed)
                for name in ("profiles", "behaviours", "samples")
            )
            user = raw_id[profiles.pop("user")]
            _append(
                sinks["user_profile.csv"],
                {"userid": user, **{k: _nullable(v, "") for k, v in profiles.items()}},
            )
            _append(
                sinks["behavior_log.csv"],
                {
                    "user": raw_id[behaviours["user"]],
                    "time_stamp": behaviours["time"],
                    "btag": pa.array(BTAGS).take(pa.array(behaviours["btag"])),
                    "cate": catalogue.category_id[behaviours["category"]],
                    "brand": catalogue.brand_id[behaviours["brand"]],
                },
            )
            _append(
                sinks["raw_sample.csv"],
                {
                    "user": raw_id[samples["user"]],
                    "time_stamp": samples["time"],
                    "adgroup_id": catalogue.adgroup_id[samples["ad"]],
                    "pid": pa.array(PIDS).take(pa.array(samples["pid"])),
                    "nonclk": 1 - samples["click"],
                    "clk": samples["click"],
                },
            )
            table = _oracle_table(samples, raw_id)
            oracle = oracle or pq.ParquetWriter(out / ORACLE, table.schema)
            oracle.write_table(table)
            counts["behaviours"] += len(behaviours["user"])
            counts["requests"] += len(np.unique(samples["user"] * 2**32 + samples["time"]))
            counts["impressions"] += len(samples["user"])
            counts["clicks"] += int(samples["click"].sum())
        oracle.close()
    finally:
        for sink in sinks.values():
            sink.flush()
            os.fsync(sink.fileno())
            sink.close()
    return counts


def _raw_user_ids(config: SyntheticConfig) -> np.ndarray:
    """[users] distinct ids without order, below 1.2 million where that suffices."""
    rng = np.random.default_rng([config.seed, 3])
    return 1 + rng.choice(max(1_200_000, config.users), config.users, replace=False)


def _shuffled(columns: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Rows of a block in an order without meaning: the real files are not sorted by user."""
    rows = len(columns["user"])
    key = columns["user"].astype(np.uint64) + np.uint64(seed)
    order = np.argsort(hashed_uniform(key, "shuffle", np.arange(rows)), kind="stable")
    return {name: value[order] for name, value in columns.items()}


def _nullable(values: np.ndarray, missing: str) -> pa.Array:
    """Negative values become `missing`."""
    text = pc.cast(pa.array(values), pa.string())
    return pc.if_else(pa.array(values < 0), pa.scalar(missing), text)


def _append(sink, columns: dict[str, np.ndarray | pa.Array]) -> None:
    options = pa.csv.WriteOptions(include_header=False, quoting_style="none")
    pa.csv.write_csv(pa.table(columns), sink, options)


def _oracle_table(samples: dict[str, np.ndarray], raw_id: np.ndarray) -> pa.Table:
    columns = {
        "user": raw_id[samples["user"]],
        "time_stamp": samples["time"],
        "clk": samples["click"].astype(np.uint8),
        "probability": samples["probability"],
    }
    parts = {k: v.astype(np.float32) for k, v in samples.items() if k.startswith("part/")}
    return pa.table({**columns, **parts})


def read_oracle(raw_dir: str | Path, columns: list[str] | None = None) -> dict[str, np.ndarray]:
    """{"user", "time_stamp", "clk", "probability", "part/<effect>"}: one value per row of
    raw_sample.csv, in its order. A part is the effect's share of the logit.

    Args:
      columns: the columns to read; None = all.
    """
    table = pq.read_table(Path(raw_dir) / ORACLE, columns=columns)
    return {name: table[name].to_numpy() for name in table.column_names}


def oracle_auc(raw_dir: str | Path, split: str = "test", rows: np.ndarray | None = None) -> float:
    """AUC of the true click probability: what no model beats, but by luck.

    Args:
      split: "train" (the days before the last), "test" (the last day) or "all".
      rows: if given, row numbers of raw_sample.csv (from 0), or a mask, taken instead of a split.
    Raises:
      DataError: an unknown split, or rows of one class only.
    """
    oracle = read_oracle(raw_dir, _AUC_COLUMNS)
    if rows is None:
        return _split_auc(oracle, split)
    return _auc(oracle["clk"][rows], oracle["probability"][rows])


def _split_auc(oracle: Mapping[str, np.ndarray], split: str) -> float:
    late = oracle["time_stamp"] >= FIRST_DAY + TEST_DAY * 86400
    splits = {"train": ~late, "test": late, "all": np.ones(len(late), bool)}
    if split not in splits:
        raise DataError(f"split {split!r}: want one of {', '.join(splits)}")
    return _auc(oracle["clk"][splits[split]], oracle["probability"][splits[split]])


def _auc(label: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve by ranks, ties counted half; nan if one class only."""
    _, inverse, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[inverse]
    positives, rows = int(label.sum()), len(label)
    if positives in (0, rows):
        return float("nan")
    return float(
        (rank[label == 1].sum() - positives * (positives + 1) / 2)
        / (positives * (rows - positives))
    )


def parse_effects(items: Iterable[str], config: SyntheticConfig) -> SyntheticConfig:
    """`config` with the effects of `items` alone: names, "name=strength", "all" or "none".

    Raises:
      DataError: an unknown name or a strength that is no number.
    """
    strengths = {}
    for item in items:
        name, _, value = item.partition("=")
        if name == "all":
            strengths.update({effect: getattr(config, effect) for effect in EFFECTS})
        elif name != "none":
            try:
                strengths[name] = float(value) if value else getattr(config, name, 0.0)
            except ValueError:
                raise DataError(f"effect {item!r}: the strength is not a number") from None
    return config.only(**strengths)


def define_flags() -> None:
    """The command line; only defined when run as a program, so that importers keep their names."""
    default = SyntheticConfig()
    flags.DEFINE_string("out", None, "Directory to write to.", required=True)
    flags.DEFINE_integer("users", default.users, "Number of users.")
    flags.DEFINE_float("behaviours", default.behaviours, "Mean behaviours a user.")
    flags.DEFINE_float("sessions", default.sessions, "Mean sessions a user.")
    flags.DEFINE_integer("seed", default.seed, "Same seed, same files.")
    flags.DEFINE_float(
        "test_users", default.test_users, "Share of users seen on the last day only."
    )
    flags.DEFINE_bool("bursts", default.bursts, "Sessions with long gaps between them.")
    help_text = f"What clicks depend on: all, none, or some of {', '.join(EFFECTS)}[=strength]."
    flags.DEFINE_list("effects", ["all"], help_text)


def main(_) -> None:
    args = flags.FLAGS
    names = ("users", "behaviours", "sessions", "seed", "test_users", "bursts")
    config = SyntheticConfig(**{name: getattr(args, name) for name in names})
    try:
        counts = generate(args.out, parse_effects(args.effects, config))
    except DataError as error:
        raise SystemExit(str(error)) from None
    print(json.dumps(counts, indent=1))


if __name__ == "__main__":
    define_flags()
    app.run(main)
