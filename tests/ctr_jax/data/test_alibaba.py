"""The alibaba builder on small raw files with the real log's quirks, against plain Python."""

from __future__ import annotations

import gzip
import hashlib
import json

import numpy as np
import pytest

from ctr_jax.data import alibaba
from ctr_jax.data.errors import DataError
from ctr_jax.data.prepare import prepare
from tests.ctr_jax.data import reference_preparation
from tests.ctr_jax.data.test_events import assert_equal

FIRST_IMPRESSION = 1494000000  # 2017-05-06 00:00 UTC+8
DAY = 86400
PROFILE_HEADER = (
    "userid,cms_segid,cms_group_id,final_gender_code,age_level,pvalue_level,shopping_level,"
    "occupation,new_user_class_level "
)


def draw(seed: int) -> dict[str, list[tuple]]:
    """Rows of the four files; None is written as NULL or as nothing."""
    rng = np.random.default_rng(seed)
    sample = []
    for _ in range(150):
        user, time = int(rng.integers(0, 30)), FIRST_IMPRESSION + int(rng.integers(0, 8 * DAY))
        if rng.random() < 0.03:
            time = 1494691200 + 5
        for _ in range(int(rng.integers(1, 6))):
            click = int(rng.random() < 0.3)
            pid = "ab"[int(rng.random() < 0.1)]
            sample.append((user, time, int(rng.integers(0, 20)), pid, 1 - click, click))
    ads = [
        (
            ad,
            ad % 5,
            ad // 2,
            ad // 4,
            None if ad % 3 == 0 else ad % 4,
            round(float(rng.gamma(2.0, 100.0)), 2),
        )
        for ad in range(18)  # two ads have no row
    ]
    profiles = [
        (user, *(None if rng.random() < 0.3 else int(rng.integers(0, 3)) for _ in range(8)))
        for user in range(0, 30, 2)
    ]
    log = []
    for _ in range(1500):
        time = 1492790400 + int(rng.integers(0, 22 * DAY))
        if rng.random() < 0.05:
            time = int(rng.choice([0, -5, 1492790399, 1494691200, 2037788761]))
        brand = None if rng.random() < 0.1 else int(rng.integers(0, 5))
        btag = str(rng.choice(["pv", "cart", "fav", "buy"]))
        log.append((int(rng.integers(0, 33)), time, btag, int(rng.integers(0, 6)), brand))
    log += [(u, t, "pv", 1, 1) for u, t, *_ in sample[:40]]  # at the very time of a request
    return {"raw_sample": sample, "ad_feature": ads, "user_profile": profiles, "behavior_log": log}


def write(directory, files) -> None:
    directory.mkdir(parents=True)
    for name, rows in files.items():
        header = PROFILE_HEADER if name == "user_profile" else ",".join(alibaba.COLUMNS[name])
        null = "NULL" if name == "ad_feature" else ""
        lines = [header, *(",".join(null if v is None else str(v) for v in row) for row in rows)]
        content = "\n".join(lines) + "\n"
        if name == "behavior_log":
            (directory / f"{name}.csv.gz").write_bytes(gzip.compress(content.encode()))
        else:
            (directory / f"{name}.csv").write_text(content)


def config(directory, **changes) -> dict:
    return {
        "builder": "alibaba",
        "raw_dir": str(directory / "raw"),
        "prepared_dir": str(directory / "prepared"),
        "max_candidates": 2,
        "valid_fraction": 0.1,
        **changes,
    }


def user_range(user: int, test: float, valid: float) -> str:
    number = int.from_bytes(hashlib.md5(str(user).encode()).digest()[8:], "little")
    share = number % 1_000_000 / 1_000_000
    return "test" if share < test else "valid" if share < test + valid else "train"


def expected(files, disjoint: float = 0.0, candidates: int = 2):
    inside = lambda t: alibaba.FIRST_TIME <= t < alibaba.END_TIME  # noqa: E731
    ads = {row[0]: row for row in files["ad_feature"]}
    impressions = []
    for seq, (user, time, ad, pid, _, click) in enumerate(files["raw_sample"]):
        split = "train" if time < alibaba.TEST_TIME else "test"
        if disjoint:
            split = user_range(user, disjoint, 0.1)
            if split != "test" and time >= alibaba.TEST_TIME:
                continue
        if not inside(time):
            continue
        values = ads.get(ad, (ad, None, None, None, None, None))
        names = ("adgroup", "cate", "campaign", "customer", "brand", "price")
        impressions.append(
            {
                "user": user,
                "order": time,
                "time": time,
                "seq": seq,
                "range": split,
                "label": click,
                "request": time,
                "context/pid": pid,
                **{f"candidate/{n}": v for n, v in zip(names, values, strict=True)},
            }
        )
    behaviours = [
        {
            "user": user,
            "order": time,
            "time": time,
            "seq": seq,
            "keep": True,
            "behaviour/cate": cate,
            "behaviour/brand": brand,
            "behaviour/btag": btag,
        }
        for seq, (user, time, btag, cate, brand) in enumerate(files["behavior_log"])
        if inside(time)
    ]
    profiles = {row[0]: row[1:] for row in files["user_profile"]}
    users = {
        user: {
            "user/user_id": user,
            **{
                f"user/{name}": value
                for name, value in zip(alibaba.PROFILE, profiles.get(user, [None] * 8), strict=True)
            },
        }
        for user in range(33)
    }
    columns = {
        "user/user_id": ("id", "user_id"),
        **{f"user/{name}": ("id", name) for name in alibaba.PROFILE},
        "context/pid": ("id", "pid"),
        **{f"behaviour/{name}": ("id", name) for name in ("cate", "brand", "btag")},
        **{
            f"candidate/{name}": ("quantile" if name == "price" else "id", name)
            for name in alibaba.CANDIDATE
        },
    }
    fit = None
    if disjoint:
        fit = lambda b: (  # noqa: E731
            b["order"] < alibaba.TEST_TIME and user_range(b["user"], disjoint, 0.1) == "train"
        )
    return reference_preparation.prepare(
        impressions,
        behaviours,
        users,
        columns,
        candidates=candidates,
        ties="strict",
        valid_fraction=0.1,
        add_groups=True,
        own_valid=bool(disjoint),
        fit_behaviour=fit,
    )


@pytest.mark.parametrize(
    ("seed", "candidates", "disjoint"), [(0, 2, 0.0), (1, 8, 0.0), (2, 2, 0.3)]
)
def test_equals_the_reference(tmp_path, seed, candidates, disjoint):
    files = draw(seed)
    write(tmp_path / "raw", files)
    path = prepare(config(tmp_path, max_candidates=candidates, disjoint_users=disjoint))
    records = expected(files, disjoint, candidates)
    assert_equal(path, records)

    report = json.loads((path / "report.json").read_text())
    times = [row[1] for row in files["behavior_log"]]
    outside = sum(not alibaba.FIRST_TIME <= t < alibaba.END_TIME for t in times)
    assert report["skipped"]["behavior_log: time outside 2017-04-22..2017-05-13"] == outside
    sample = [row for row in files["raw_sample"] if row[1] < alibaba.END_TIME]
    dropped = report["dropped"].get("test-day impressions of users outside test", 0)
    assert sum(report["impressions"].values()) + dropped == len(sample)
    if disjoint:
        assert dropped == sum(
            user_range(u, disjoint, 0.1) != "test" and t >= alibaba.TEST_TIME for u, t, *_ in sample
        )
        users = [{r["user"] for r in records[0][split]} for split in ("train", "valid", "test")]
        assert all(users) and not (users[0] & users[1] | users[1] & users[2] | users[0] & users[2])


def test_missing_files_are_named_with_the_demo_command(tmp_path):
    write(tmp_path / "raw", draw(0))
    (tmp_path / "raw" / "ad_feature.csv").unlink()
    with pytest.raises(DataError) as error:
        prepare(config(tmp_path))
    message = str(error.value)
    assert "ad_feature.csv not there" in message and str(tmp_path / "raw") in message
    assert "python train.py --config=configs/sparsectr_alibaba.py:demo" in message
    assert all(f"{name}.csv" in message for name in alibaba.COLUMNS) and "\n" not in message


@pytest.mark.parametrize(
    ("name", "line", "text", "problem"),
    [
        ("raw_sample", 9, "3,1494000100,1,a,1,1", "nonclk is not 1 - clk"),
        ("raw_sample", 9, "3,1494000100,1,a,1,2", "label not 0 or 1"),
        ("raw_sample", 9, "3,noon,1,a,1,0", "wrong type"),
        ("raw_sample", 9, "3,,1,a,1,0", "missing time"),
        ("raw_sample", 9, "3,1494000100,1,a,1", "wrong width"),
        ("user_profile", 4, "4,1,1,1,1,1,1,1,1,1", "wrong width"),
        ("raw_sample", 1, "user,time_stamp,adgroup_id,pid,clk,x", "no column 'nonclk'"),
    ],
)
def test_bad_rows_are_named_or_counted(tmp_path, name, line, text, problem):
    write(tmp_path / "raw", draw(0))
    path = tmp_path / "raw" / f"{name}.csv"
    lines = path.read_text().splitlines()
    lines[line - 1] = text
    path.write_text("\n".join(lines) + "\n")
    place = rf"{name}.csv" if line == 1 else rf"{name}.csv: line {line}"
    with pytest.raises(DataError, match=rf"{place}.*{problem}"):
        prepare(config(tmp_path))
    if line > 1:
        report = prepare(config(tmp_path, on_bad_row="skip")) / "report.json"
        skipped = json.loads(report.read_text())["skipped"]
        assert sum(n for what, n in skipped.items() if problem in what) == 1


def test_options_are_checked(tmp_path):
    write(tmp_path / "raw", draw(0))
    with pytest.raises(DataError, match="disjoint_users"):
        prepare(config(tmp_path, disjoint_users=0.95))
    with pytest.raises(DataError, match="no options"):
        prepare(config(tmp_path, disjoint=0.5))
