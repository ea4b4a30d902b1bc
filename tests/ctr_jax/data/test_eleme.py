"""The eleme builder on small generated files with a known clock, against plain Python."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from ctr_jax.data import eleme
from ctr_jax.data.errors import DataError
from ctr_jax.data.prepare import prepare
from ctr_jax.data.records import PreparedData
from ctr_jax.data.vocabulary import Vocabulary

DAY1 = 3  # weekday of day 1, 0 = Monday
MEALS = ("breakfast", "lunch", "tea", "dinner", "night")
LISTS = {name: source for name, source in eleme.BEHAVIOUR.items()}


def draw(seed: int, unit: float = 60.0, sign: int = 1, newest_first: bool = True) -> list[dict]:
    """Rows with an exact clock: seconds since Monday 00:00 before day 1, in UTC+8."""
    rng = np.random.default_rng(seed)
    rows = []
    for day in range(1, 9):
        for _ in range(25):
            user = int(rng.integers(0, 8))
            request = (DAY1 + day - 1) * 86400 + int(rng.integers(0, 86400))
            ages = np.unique(rng.integers(60, 30 * 86400, int(rng.integers(0, 60)))) // 60 * 60
            ages = np.sort(np.concatenate([[0], ages, ages[:5]]))  # the request's own time; ties
            ages = ages[: rng.integers(0, 70)]
            if not newest_first:
                ages = ages[::-1]
            times = [request - int(a) for a in ages]
            row = {name: str(int(rng.integers(0, 12))) for name in eleme.COLUMNS}
            row.update(
                day=day,
                label=str(int(rng.random() < 0.3)),
                user_id=f"u{user}",
                gender="-99" if user == 3 else "1",
                avg_price=str(round(float(rng.gamma(2.0)), 2)),
                hours=str(request // 3600 % 24),
                weekdays=str(request // 86400 % 7),
                time_type=str(rng.choice(MEALS)),
            )
            for source in [*LISTS.values(), "price_list"]:
                row[source] = ";".join(str(x) for x in rng.integers(0, 9, len(times)))
            row["hours_list"] = ";".join(str(t // 3600 % 24) for t in times)
            row["weekdays_list"] = ";".join(str(t // 86400 % 7) for t in times)
            row["time_type_list"] = ";".join(str(rng.choice(MEALS)) for _ in times)
            # What the log says is the age at the full hour of the request.
            row["timediff_list"] = ";".join(str(int(sign * (request - t) / unit)) for t in times)
            rows.append(row)
    return rows


def write(directory, rows) -> None:
    directory.mkdir()
    for day in range(1, 9):
        lines = [",".join(r[c] for c in eleme.COLUMNS) for r in rows if r["day"] == day]
        half = len(lines) // 2 if day == 3 else len(lines)
        (directory / f"D{day}_0.csv").write_text("\n".join(lines[:half]) + "\n")
        if lines[half:]:
            (directory / f"D{day}_1.csv").write_text("\n".join(lines[half:]) + "\n")


def config(directory, **changes) -> dict:
    return {
        "builder": "eleme",
        "raw_dir": str(directory / "raw"),
        "prepared_dir": str(directory / "prepared"),
        "valid_fraction": 0.1,
        **changes,
    }


@pytest.mark.parametrize("newest_first", [True, False])
def test_equals_the_reference(tmp_path, newest_first):
    rows = draw(0, newest_first=newest_first)
    write(tmp_path / "raw", rows)
    path = prepare(config(tmp_path))
    data = PreparedData.open(path)
    report = json.loads((path / "report.json").read_text())
    assert report["timediff"]["unit"] == "minutes" and report["timediff"]["sign"] == 1
    assert data.histories is None and data.spec.inline_history == 50

    monday = eleme.MONDAY
    users = {u: i for i, u in enumerate(sorted({r["user_id"] for r in rows}))}
    for seq, row in enumerate(rows):
        row["seq"] = seq
        row["time"] = monday + (DAY1 + row["day"] - 1) * 86400 + int(row["hours"]) * 3600
    train = sorted((r for r in rows if r["day"] < 8), key=lambda r: r["time"])
    start = valid_start(train, 0.1)
    splits = {
        "train": [r for r in train if r["time"] < start],
        "valid": [r for r in train if r["time"] >= start],
        "test": [r for r in rows if r["day"] == 8],
    }
    shops: dict[str, int] = {}
    for row in splits["train"]:
        for shop in [row["shop_id"], *row["shop_id_list"].split(";")]:
            if shop:
                shops[shop] = shops.get(shop, 0) + 1
    order = sorted((s for s in shops if shops[s] >= 2), key=lambda s: (-shops[s], s))
    ids = {s: 3 + i for i, s in enumerate(order)}
    for split, expected in splits.items():
        requests = data.split(split)
        found = requests.records(np.arange(len(requests)))
        assert len(found) == len(expected)
        expected = sorted(expected, key=lambda r: (r["time"], users[r["user_id"]], r["seq"]))
        for record, row in zip(found, expected, strict=True):
            assert record["user"] == users[row["user_id"]] and record["label"][0] == int(
                row["label"]
            )
            assert record["request_time"] == row["time"]
            assert record["candidate/shop"][0] == ids.get(row["shop_id"], 1)
            assert record["user/gender"] == (2 if row["gender"] == "-99" else 3)
            history = []
            if row["timediff_list"]:
                columns = [row[c].split(";") for c in ("timediff_list", "shop_id_list")]
                history = [
                    (row["time"] - 60 * int(d), i, s)
                    for i, (d, s) in enumerate(zip(*columns, strict=True))
                ]
                if newest_first:
                    history = [(t, -i, s) for t, i, s in history]
            history = sorted(h for h in history if h[0] < row["time"])[-50:]
            n = record["num_behaviours"]
            assert n == len(history) == record["end"]
            assert record["behaviour_time"][50 - n :].tolist() == [t for t, _, _ in history]
            assert not record["behaviour_time"][: 50 - n].any()
            shop = [ids.get(s, 1) for *_, s in history]
            assert record["behaviour/shop"][50 - n :].tolist() == shop
            assert not record["behaviour/shop"][: 50 - n].any()


def valid_start(train: list[dict], fraction: float) -> int:
    """The earliest hour from which at most `fraction` of the rows lie."""
    start = train[-1]["time"]
    for time in sorted({r["time"] for r in train}, reverse=True):
        if sum(r["time"] >= time for r in train) > fraction * len(train):
            break
        start = time
    return start


@pytest.mark.parametrize(("unit", "name", "sign"), [(1.0, "seconds", -1), (60.0, "minutes", 1)])
def test_unit_and_sign_of_timediff_are_measured(tmp_path, capsys, unit, name, sign):
    write(tmp_path / "raw", draw(1, unit, sign))
    path = prepare(config(tmp_path))
    measured = json.loads((path / "report.json").read_text())["timediff"]
    assert (measured["unit"], measured["sign"]) == (name, sign) and measured["fits"] > 0.95
    assert "timediff_list" in capsys.readouterr().out


def test_an_unexplained_timediff_is_refused_unless_given(tmp_path):
    rows = draw(2)
    rng = np.random.default_rng(0)
    for row in rows:
        if row["timediff_list"]:
            row["timediff_list"] = ";".join(
                str(int(rng.integers(1, 10**6))) for _ in row["timediff_list"].split(";")
            )
    write(tmp_path / "raw", rows)
    with pytest.raises(DataError, match="data.timediff"):
        prepare(config(tmp_path))
    prepare(config(tmp_path, timediff=(60.0, 1)))


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("label", "2", "label not 0 or 1"),
        ("hours", "24", "hour not in 0..23"),
        ("weekdays", "x", "weekday not in 0..7"),
        ("user_id", "", "missing user"),
        ("shop_id_list", "1;2", "lists of different lengths"),
        ("geohash12", "a,b", "wrong width"),
    ],
)
def test_bad_rows_are_named_or_counted(tmp_path, column, value, problem):
    rows = draw(3)
    [row] = [r for r in rows if r["day"] == 2 and len(r["item_id_list"]) > 20][:1]
    line = [r for r in rows if r["day"] == 2].index(row) + 1
    row[column] = value
    write(tmp_path / "raw", rows)
    with pytest.raises(DataError, match=rf"D2_0.csv: line {line}.*{problem}"):
        prepare(config(tmp_path))
    if column in ("label", "geohash12"):
        path = prepare(config(tmp_path, on_bad_row="skip"))
        skipped = json.loads((path / "report.json").read_text())["skipped"]
        assert sum(n for what, n in skipped.items() if problem in what) == 1


def test_a_corrupt_file_is_refused_or_left_out(tmp_path):
    write(tmp_path / "raw", draw(4))
    file = tmp_path / "raw" / "D3_1.csv"
    content = gzip.compress(file.read_bytes() * 50)
    file.unlink()
    (tmp_path / "raw" / "D3_1.csv.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"D3_1.csv.gz.*truncated"):
        prepare(config(tmp_path))
    path = prepare(config(tmp_path, on_bad_row="skip"))
    report = json.loads((path / "report.json").read_text())
    assert report["skipped"]["unreadable files"] == 1 and report["rows"]["D3_1.csv.gz"] == 0
    assert sum(report["impressions"].values()) == 200 - 13


def test_files_need_a_day(tmp_path):
    write(tmp_path / "raw", draw(4))
    (tmp_path / "raw" / "D8_0.csv").rename(tmp_path / "raw" / "Dlast.csv")
    with pytest.raises(DataError, match=r"Dlast.csv: no day in the name"):
        prepare(config(tmp_path))
    prepare(config(tmp_path, days={"Dlast.csv": 8}))


def test_a_history_of_one_behaviour_may_lack_its_item(tmp_path):
    rows = draw(5)
    [row] = [r for r in rows if r["day"] == 2][:1]
    for column in [*LISTS.values(), "price_list", "timediff_list"]:
        row[column] = "7"
    row.update(item_id_list="-1", shop_id_list="1", hours_list="", timediff_list="60")
    write(tmp_path / "raw", rows)
    data = PreparedData.open(prepare(config(tmp_path, min_count=1)))
    ids = Vocabulary.load(data.path / "vocabularies" / "shop.parquet")
    found = [
        record
        for split in ("train", "valid")
        for record in data.split(split).records(np.arange(len(data.split(split))))
        if record["num_behaviours"] == 1 and record["behaviour/item"][-1] == 2
    ]
    assert len(found) == 1
    assert found[0]["behaviour/shop"][-1] == ids.encode(np.array("1"))
    assert found[0]["behaviour/hours"][-1] == 2
    assert found[0]["behaviour_time"][-1] == found[0]["request_time"] - 3600


@pytest.mark.parametrize("ages", ["60;120", ""])
def test_an_item_list_of_another_length_than_its_ages_is_a_bad_row(tmp_path, ages):
    rows = draw(5)
    number, row = next((n, r) for n, r in enumerate(rows) if len(r["timediff_list"]) > 20)
    line = number - rows.index(next(r for r in rows if r["day"] == row["day"])) + 1
    row.update(item_id_list="" if ages else "7", timediff_list=ages)
    write(tmp_path / "raw", rows)
    with pytest.raises(DataError, match=rf"D{row['day']}_0.csv: line {line}: lists of different"):
        prepare(config(tmp_path, timediff=(60.0, 1)))
