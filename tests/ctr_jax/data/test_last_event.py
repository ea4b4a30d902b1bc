"""The amazon and taobao builders on small raw files with the real logs' quirks, against plain
Python."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import defaultdict

import numpy as np
import pytest

from ctr_jax.data import amazon, open_data, taobao
from ctr_jax.data.errors import DataError
from ctr_jax.data.prepare import prepare
from ctr_jax.data.records import PreparedData
from ctr_jax.data.synthetic_last_event import LastEventLog, generate
from tests.ctr_jax.data import reference_preparation
from tests.ctr_jax.data.test_events import assert_equal

DAY = 86400


def number(*parts) -> int:
    """DuckDB's md5_number_lower of the texts joined."""
    text = "".join(map(str, parts))
    return int.from_bytes(hashlib.md5(text.encode()).digest()[8:], "little")


def draw_amazon(seed: int) -> tuple[list[dict], list[dict]]:
    rng = np.random.default_rng(seed)
    reviews = []
    for _ in range(700):
        review = {
            "reviewerID": f"A{rng.integers(0, 60)}",
            "asin": f"B{int(30 * rng.random() ** 2):03d}",
            "unixReviewTime": int(1_400_000_000 + DAY * rng.integers(0, 40)),
            "reviewText": 'says "x", y\nand\tz',
        }
        reviews.append(review)
    reviews += [{**reviews[0], "reviewerID": "alone"}, {**reviews[1], "reviewerID": "pair"},
                {**reviews[2], "reviewerID": "pair", "unixReviewTime":
                 reviews[1]["unixReviewTime"]}]  # fmt: skip
    items = [
        {"asin": f"B{i:03d}", "category": [] if i % 9 == 0 else ["Books", f"C{i % 4}"]}
        for i in range(28)
    ]
    items += [{"asin": "B003", "category": ["Books", "second"]}, {"asin": "B009"}]
    return reviews, items


def write_amazon(directory, reviews, items) -> None:
    directory.mkdir(parents=True)
    text = "\n".join(map(json.dumps, reviews)) + "\n"
    (directory / "Books_5.json.gz").write_bytes(gzip.compress(text.encode()))
    (directory / "meta_Books.json").write_text("\n".join(map(json.dumps, items)) + "\n")


def amazon_events(reviews, items):
    category = {}
    for item in items:
        shelf = item.get("category") or [None]
        category.setdefault(item["asin"], shelf[-1])
    events = [
        {"user": r["reviewerID"], "item": r["asin"], "time": r["unixReviewTime"], "seq": i}
        for i, r in enumerate(reviews)
    ]
    return events, {i: category.get(i) for i in {r["asin"] for r in reviews}}


def draw_taobao(seed: int) -> list[tuple]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(900):
        item = int(40 * rng.random() ** 2)
        time = taobao.FIRST_TIME + int(rng.integers(0, 9 * DAY))
        if rng.random() < 0.05:
            time = int(rng.choice([0, taobao.FIRST_TIME - 1, taobao.END_TIME, 2**31 - 1]))
        kind = str(rng.choice(["pv", "pv", "pv", "buy", "cart", "fav"]))
        rows.append((int(rng.integers(1, 70)), item, item % 6, kind, time))
    return rows


def taobao_events(rows):
    inside = [
        (i, r) for i, r in enumerate(rows) if taobao.FIRST_TIME <= r[4] < taobao.END_TIME
    ]  # fmt: skip
    events = [
        {"user": r[0], "item": r[1], "time": r[4], "seq": i} for i, r in inside if r[3] == "pv"
    ]
    return events, {r[1]: r[2] for _, r in inside}


def config(builder, directory, **changes) -> dict:
    return {
        "builder": builder,
        "raw_dir": str(directory / "raw"),
        "prepared_dir": str(directory / "prepared"),
        **changes,
    }


def user_range(user) -> str:
    share = number(user) % 1_000_000 / 1_000_000
    return "test" if share < 0.1 else "valid" if share < 0.2 else "train"


def expected(events, category, negatives="catalogue", seed=0, min_history=1, candidates=2):
    """The records, and how many users were dropped for want of a history."""
    by_user = defaultdict(list)
    for e in events:
        by_user[e["user"]].append(e)
    pool = sorted(category) if negatives == "catalogue" else [e["item"] for e in events]
    impressions, dropped = [], 0
    for user, own in by_user.items():
        last = max(own, key=lambda e: (e["time"], e["seq"]))
        if sum(e["time"] < last["time"] for e in own) < min_history:
            dropped += 1
            continue
        draws = [pool[number(user, ":", seed, ":", k) % len(pool)] for k in range(6)]
        negative = next(i for i in draws if i != last["item"])
        coin = number(user, ":", seed, ":", "order") % 2
        for item, label, place in ((last["item"], 1, coin), (negative, 0, 1 - coin)):
            impressions.append(
                {
                    "user": user,
                    "order": last["time"],
                    "time": last["time"],
                    "seq": 2 * last["seq"] + place,
                    "range": user_range(user),
                    "label": label,
                    "request": last["time"],
                    "candidate/item": item,
                    "candidate/category": category[item],
                }
            )
    behaviours = [
        {
            "user": e["user"],
            "order": e["time"],
            "time": e["time"],
            "seq": e["seq"],
            "keep": True,
            "behaviour/item": e["item"],
            "behaviour/category": category[e["item"]],
        }
        for e in events
    ]
    columns = {
        f"{group}/{name}": ("id", name)
        for group in ("behaviour", "candidate")
        for name in ("item", "category")
    }
    records = reference_preparation.prepare(
        impressions,
        behaviours,
        {},
        columns,
        candidates=candidates,
        ties="strict",
        valid_fraction=0.05,
        own_valid=True,
        add_groups=True,
        fit_behaviour=lambda b: user_range(b["user"]) == "train",
    )
    return records, dropped


@pytest.mark.parametrize(
    ("seed", "changes"),
    [(0, {}), (1, {"negatives": "events", "seed": 5, "min_history": 4, "max_candidates": 1})],
)
def test_amazon_equals_the_reference(tmp_path, seed, changes):
    reviews, items = draw_amazon(seed)
    write_amazon(tmp_path / "raw", reviews, items)
    path = prepare(config("amazon", tmp_path, **changes))
    options = {("candidates" if k == "max_candidates" else k): v for k, v in changes.items()}
    records, dropped = expected(*amazon_events(reviews, items), **options)
    assert_equal(path, records)
    report = json.loads((path / "report.json").read_text())
    assert report["skipped"]["metadata of an item that an earlier line has"] == 2
    least = changes.get("min_history", 1)
    assert report["dropped"][f"users with fewer than {least} earlier events"] == dropped >= 2
    assert report["rows"] == {"Books_5.json.gz": 703, "meta_Books.json": 30}


@pytest.mark.parametrize("negatives", ["catalogue", "events"])
def test_taobao_equals_the_reference(tmp_path, negatives):
    rows = draw_taobao(0)
    (tmp_path / "raw").mkdir()
    text = "".join(",".join(map(str, row)) + "\n" for row in rows)
    (tmp_path / "raw" / taobao.FILE).write_text(text)
    path = prepare(config("taobao", tmp_path, negatives=negatives))
    records, dropped = expected(*taobao_events(rows), negatives)
    assert_equal(path, records)
    report = json.loads((path / "report.json").read_text())
    outside = sum(not taobao.FIRST_TIME <= r[4] < taobao.END_TIME for r in rows)
    assert report["skipped"]["time outside 2017-11-25..2017-12-03"] == outside
    assert report["dropped"]["users with fewer than 1 earlier events"] == dropped


def test_one_negative_for_each_positive_and_users_apart(tmp_path):
    generate("taobao", tmp_path / "raw", LastEventLog(users=150, behaviours=30, items=200))
    data = PreparedData.open(prepare(config("taobao", tmp_path)))
    users, first = [], []
    for split in ("train", "valid", "test"):
        records = data.split(split).records(np.arange(len(data.split(split))))
        assert (records["label"].sum(1) == 1).all() and (records["num_candidates"] == 2).all()
        items = records["candidate/item"]
        assert ((items[:, 0] != items[:, 1]) | (items[:, 0] <= 1)).all()  # unless both unknown
        users.append(set(records["user"].tolist()))
        first += records["label"][:, 0].tolist()
    assert not (users[0] & users[1] | users[1] & users[2] | users[0] & users[2])
    assert 0.3 < np.mean(first) < 0.7  # a candidate's place tells nothing


BAD = [
    ("amazon", 9, '{"reviewerID": "A1", "asin": "B1"', "line that is not JSON"),
    ("amazon", 9, '{"asin": "B1", "unixReviewTime": 1400000000}', "missing user"),
    ("amazon", 9, '{"reviewerID": "A1", "unixReviewTime": 1400000000}', "missing item"),
    ("amazon", 9, '{"reviewerID": "A", "asin": "B", "unixReviewTime": "noon"}', "unparsable time"),
    ("amazon", 9, '{"reviewerID": "A", "asin": "B", "unixReviewTime": -5}', "negative time"),
    ("amazon", 9, "[1, 2]", "missing user"),
    ("taobao", 9, "1,2,3,pv", "wrong width"),
    ("taobao", 9, "1,2,3,look,1511540000", "behaviour not one of"),
    ("taobao", 9, "1,2,3,pv,noon", "wrong type"),
    ("taobao", 9, ",2,3,pv,1511540000", "missing user"),
    ("taobao", 9, "1,2,3,pv,", "missing time_stamp"),
]


@pytest.mark.parametrize(("builder", "line", "text", "problem"), BAD)
def test_bad_rows_are_named_or_counted(tmp_path, builder, line, text, problem):
    raw = tmp_path / "raw"
    if builder == "amazon":
        write_amazon(raw, *draw_amazon(0))
        path = raw / "Books_5.json"
        lines = gzip.decompress((raw / "Books_5.json.gz").read_bytes()).decode().splitlines()
        (raw / "Books_5.json.gz").unlink()
        lines[2] = ""  # a blank line is no row, but counts in line numbers
    else:
        raw.mkdir()
        path = raw / taobao.FILE
        lines = [",".join(map(str, row)) for row in draw_taobao(0)]
    lines[line - 1] = text
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=rf"{path.name}: line {line}.*{problem}"):
        prepare(config(builder, tmp_path))
    report = prepare(config(builder, tmp_path, on_bad_row="skip")) / "report.json"
    skipped = json.loads(report.read_text())["skipped"]
    assert sum(n for what, n in skipped.items() if problem in what) == 1


def test_bad_metadata_truncated_files_and_options(tmp_path):
    write_amazon(tmp_path / "raw", *draw_amazon(0))
    metadata = tmp_path / "raw" / "meta_Books.json"
    good = metadata.read_text()
    metadata.write_text(good + "{\n")
    with pytest.raises(DataError, match="meta_Books.json: line 31: line that is not JSON"):
        prepare(config("amazon", tmp_path))
    metadata.write_text(good)
    for changes, match in [
        ({"negatives": "hard"}, "data.negatives"),
        ({"test_users": 0.0}, "shares of users"),
        ({"max_candidates": 3}, "max_candidates"),
        ({"shares": 1}, "no options"),
    ]:
        with pytest.raises(DataError, match=match):
            prepare(config("amazon", tmp_path, **changes))
    path = tmp_path / "raw" / "Books_5.json.gz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="Books_5.json.gz: cannot be read, truncated or corrupt"):
        prepare(config("amazon", tmp_path))


@pytest.mark.parametrize(
    ("builder", "names"), [("amazon", [amazon.REVIEWS, amazon.ITEMS]), ("taobao", [taobao.FILE])]
)
def test_missing_files_are_named_with_the_demo_command(tmp_path, builder, names):
    with pytest.raises(DataError) as error:
        prepare(config(builder, tmp_path))
    message = str(error.value)
    assert all(name in message for name in names) and str(tmp_path / "raw") in message
    assert f"python train.py --config=configs/lrea_{builder}.py:demo" in message
    assert "\n" not in message


@pytest.mark.parametrize("builder", ["amazon", "taobao"])
def test_generated_files_are_made_once_and_prepared(tmp_path, builder):
    from ml_collections import ConfigDict

    log = dict(users=80, behaviours=12, items=60, categories=8, seed=3)
    whole = ConfigDict({"data": config(builder, tmp_path, generate=log)})
    data = open_data(whole)
    assert data.spec.splits["train"] > 40
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "raw").iterdir()}
    assert open_data(whole).spec.content_hash == data.spec.content_hash
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "raw").iterdir()}
    # The same seed gives the same data set elsewhere, another seed another one.
    for seed, same in ((3, True), (4, False)):
        other = config(builder, tmp_path / f"seed{seed}", generate={**log, "seed": seed})
        found = open_data(ConfigDict({"data": other})).spec.content_hash
        assert (found == data.spec.content_hash) == same
    (tmp_path / "raw" / "synthetic.json").unlink()
    with pytest.raises(DataError, match="not made by this generator"):
        open_data(whole)
