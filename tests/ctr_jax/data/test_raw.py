"""Raw files as others write them: read as they are, or refused with the file, the row and why."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctr_jax.data import json_lines, raw
from ctr_jax.data.errors import DataError
from ctr_jax.data.prepare import prepare
from ctr_jax.data.raw_files import file_columns, find_files
from ctr_jax.data.records import PreparedData
from tests.ctr_jax.data import raw_logs
from tests.ctr_jax.data.test_events import config


def content_hash(path: Path) -> str:
    return PreparedData.open(path).spec.content_hash


def loaded(files, on_bad_row="raise", **how):
    """The rows of `files` without their file names, the raw table, and what was skipped."""
    con = duckdb.connect()
    report = {"rows": {}, "skipped": {}}
    table = raw.load(con, "log", files, report, on_bad_row=on_bad_row, **how)
    rows = con.execute("SELECT * EXCLUDE (filename) FROM log ORDER BY rowid").fetchall()
    return rows, table, report["skipped"]


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def parquet(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


# Whole numbers


@pytest.mark.parametrize("value", ["3.5", "0.7", "1e3", "0x10", "1_000", "10000000000000000000"])
def test_what_is_no_whole_number_is_a_bad_row_of_a_column_of_whole_numbers(tmp_path, value):
    first = text(tmp_path / "1.csv", "a,b\n1,x\n2,y\n")
    second = text(tmp_path / "2.csv", f'a,b\n3,"x\ny"\n\n4,x\n{value},z\n5,z\n')
    with pytest.raises(DataError) as error:
        loaded([first, second])
    place = f"{second}: line 6: value of the wrong type in column 'a', which is BIGINT: '{value}'"
    assert str(error.value).startswith(place) and "data.types" in str(error.value)
    rows, table, skipped = loaded([first, second], "skip")
    assert [row[0] for row in rows] == [1, 2, 3, 4, 5]
    assert skipped == {"value of the wrong type": 1}
    assert [table.place(i).split(": ")[1] for i in range(5)] == [
        "line 2", "line 3", "line 3", "line 5", "line 7",
    ]  # fmt: skip


def test_whole_numbers_may_have_blanks_signs_and_empty_fractions(tmp_path):
    first = text(tmp_path / "1.csv", "a,b\n1,x\n")
    values = [" 5 ", "+4", "2.0", "9007199254740993.0", "-3", ""]
    second = text(tmp_path / "2.csv", "a,b\n" + "".join(f"{value},x\n" for value in values))
    rows = [row[0] for row in loaded([first, second])[0]]
    assert rows == [1, 5, 4, 2, 9007199254740993, -3, None]


def test_decimals_behind_the_rows_that_tell_the_type(tmp_path):
    lines = ["a,price", *(f"{i},{10 if i < 20_500 else 10.99}" for i in range(21_000))]
    path = text(tmp_path / "1.csv", "\n".join(lines))
    with pytest.raises(DataError, match=r"1.csv: line 20502: .*'price', which is BIGINT: '10.99'"):
        loaded([path])
    rows, _, skipped = loaded([path], "skip")
    assert len(rows) == 20_500 and skipped == {"value of the wrong type": 500}
    assert loaded([path], types={"price": "DOUBLE"})[0][-1] == (20_999, 10.99)


def test_the_first_of_several_kinds_of_bad_rows_is_named(tmp_path):
    good = "a,b\n" + "1,1.5\n" * 200
    types = {"a": "BIGINT", "b": "DOUBLE"}
    for bad, line, what in (
        ("1.5,2\n1\n", 202, "wrong type in column 'a'"),
        ("1\n1.5,2\n", 202, "wrong width"),
        ("2,x\n1.5,2\n", 202, "wrong type in column 'b'"),
    ):
        path = text(tmp_path / "1.csv", good + bad)
        with pytest.raises(DataError, match=rf"line {line}: .*{what}"):
            loaded([path], types=types)
        rows, _, skipped = loaded([path], "skip", types=types)
        assert len(rows) == 200 and sum(skipped.values()) == 2


def test_a_file_with_bad_rows_among_many_keeps_its_places(tmp_path):
    count = 300_000
    values = [f"{i}.5" if i in (7, 150_000) else str(i) for i in range(count)]
    path = text(tmp_path / "1.csv", "a\n" + "\n".join(values) + "\n")
    files = [path, text(tmp_path / "2.csv", "a\n-1\n")]
    rows, table, _ = loaded(files, "skip", types={"a": "BIGINT"})
    assert len(rows) == count - 1 and rows[-1] == (-1,)
    for number in (6, 7, 149_998, 149_999, count - 3):
        assert table.place(number) == f"{path}: line {rows[number][0] + 2}"
    assert table.place(count - 2) == f"{tmp_path / '2.csv'}: line 2"


# Types over parquet files


def test_whole_and_other_numbers_of_parquet_files_are_of_both(tmp_path):
    whole = parquet(tmp_path / "1.parquet", a=[1, 2, 3])
    gaps = parquet(tmp_path / "2.parquet", a=pa.array([4.0, np.nan, None], pa.float64()))
    parts = parquet(tmp_path / "3.parquet", a=[3.5, 4.0])
    rows, table, _ = loaded([whole, gaps])
    assert rows == [(1,), (2,), (3,), (4,), (None,), (None,)] and table.columns == {"a": "BIGINT"}
    rows, table, _ = loaded([whole, parts])
    assert rows == [(1.0,), (2.0,), (3.0,), (3.5,), (4.0,)] and table.columns == {"a": "DOUBLE"}
    long = parquet(tmp_path / "4.parquet", a=[1, 2, 2**53 + 1])
    with pytest.raises(DataError, match=rf"4.parquet: row group 1, row 0: .*'{2**53 + 1}'"):
        loaded([parts, long])
    narrow = parquet(tmp_path / "5.parquet", a=pa.array([1], pa.int8()))
    assert loaded([narrow, long])[0][-1] == (2**53 + 1,)


@pytest.mark.parametrize(("kind", "first"), [(np.float64, 2**53), (np.float32, 2**24)])
def test_a_float_that_several_whole_numbers_are_is_a_bad_row_beside_them(tmp_path, kind, first):
    whole = parquet(tmp_path / "1.parquet", a=[1, 2])
    lost = parquet(tmp_path / "2.parquet", a=np.array([3, first - 1, first, 4], kind))
    with pytest.raises(DataError, match=r"2.parquet: row group 1, row 0: .*'a', which is BIGINT"):
        loaded([whole, lost])
    rows, _, skipped = loaded([whole, lost], "skip")
    assert [row[0] for row in rows] == [1, 2, 3, first - 1, 4]
    assert skipped == {"value of the wrong type": 1}


def test_a_parquet_column_without_values_takes_the_type_of_another_file(tmp_path):
    for nothing in (pa.nulls(2), pa.array([None, None], pa.float64())):
        empty = parquet(tmp_path / "1.parquet", a=nothing, b=[1, 2])
        texts = parquet(tmp_path / "2.parquet", a=["A7", "x"], b=[3, 4])
        for files in ([empty, texts], [texts, empty]):
            rows, table, _ = loaded(files)
            assert table.columns["a"] == "VARCHAR"
            assert {row[0] for row in rows} == {None, "A7", "x"}


def test_a_parquet_column_without_values_in_any_file(tmp_path):
    files = [
        parquet(tmp_path / "1.parquet", a=pa.nulls(2), b=[1, 2]),
        parquet(tmp_path / "2.parquet", a=pa.array([None], pa.float64()), b=[3]),
    ]
    for order in (files, files[::-1], files[:1]):
        assert {row[0] for row in loaded(order)[0]} == {None}


def test_a_parquet_value_that_another_files_type_does_not_hold_is_a_bad_row(tmp_path):
    first = parquet(tmp_path / "1.parquet", a=[1, 2])
    second = parquet(tmp_path / "2.parquet", a=["3", "4", "5", "A7", "1.5", "6"])
    with pytest.raises(DataError, match=r"2.parquet: row group 1, row 1: .*'a', .*BIGINT: 'A7'"):
        loaded([first, second])
    rows, table, skipped = loaded([first, second], "skip")
    assert [row[0] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert skipped == {"value of the wrong type": 2}
    assert table.place(5) == f"{second}: row group 2, row 1"
    assert [row[0] for row in loaded([first, second], types={"a": "VARCHAR"})[0]][-3] == "A7"
    with pytest.raises(DataError, match=r"1.parquet: column 'a' is DOUBLE, but VARCHAR in .*types"):
        loaded([second, parquet(tmp_path / "1.parquet", a=[1.0, 2.0])])


# Names of files


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_brackets_and_stars_in_paths_are_read_as_they_stand(tmp_path, kind):
    log = raw_logs.draw(3)
    plain = tmp_path / "plain"
    odd = tmp_path / "od[d]*"
    raw_logs.write(plain / "raw", log, kind, parts=2)
    options = dict(events=f"events-*.{kind}", ties="order")
    expected = content_hash(prepare(config(plain, **options)))
    (odd / "raw").mkdir(parents=True)
    names = (f"events-[1].{kind}", f"events-1.{kind}")  # the first, as a glob, is the second
    for name, part in zip(names, (0, 1), strict=True):
        (odd / "raw" / name).write_bytes((plain / "raw" / f"events-{part}.{kind}").read_bytes())
    (tmp_path / "odd1").mkdir()
    assert content_hash(prepare(config(odd, **{**options, "events": names}))) == expected
    table = loaded([odd / "raw" / name for name in names])[1]
    assert table.place(0).startswith(str(odd / "raw" / names[0]))


def test_brackets_in_paths_of_json_lines(tmp_path):
    for name, user in (("od[d]", "right"), ("odd", "wrong")):
        (tmp_path / name).mkdir()
        text(tmp_path / name / "log.json", json.dumps({"user": user}) + "\n")
    con, report = duckdb.connect(), {"rows": {}}
    path = tmp_path / "od[d]" / "log.json"
    json_lines.load(con, "log", path, {"user": "$.user"}, report)
    assert con.execute("SELECT user FROM log").fetchall() == [("right",)]


def test_each_file_is_read_once(tmp_path):
    raw_logs.write(tmp_path / "raw", raw_logs.draw(3), "parquet", parts=2)
    once = prepare(config(tmp_path))
    for events in (
        ("events-*.parquet", "events-1.parquet"),
        ("events-0.parquet", "events-*.parquet", str(tmp_path / "raw" / "events-*.parquet")),
    ):
        assert content_hash(prepare(config(tmp_path, events=events))) == content_hash(once)
    absolute = str(tmp_path / "raw" / "events-*.parquet")
    assert find_files("nowhere", absolute) == find_files(tmp_path / "raw", "events-*.parquet")


@pytest.mark.parametrize("events", [(), "", ("events-0.parquet", "")])
def test_no_file_at_all_is_refused(tmp_path, events):
    raw_logs.write(tmp_path / "raw", raw_logs.draw(3), "parquet")
    with pytest.raises(DataError, match="names no raw file"):
        prepare(config(tmp_path, events=events))
    with pytest.raises(DataError, match="/absent/x.csv: no such file"):
        prepare(config(tmp_path, events="/absent/x.csv"))


def test_suffixes_in_capitals(tmp_path):
    raw_logs.write(tmp_path / "raw", raw_logs.draw(3), "parquet")
    expected = content_hash(prepare(config(tmp_path)))
    files = tmp_path / "raw"
    (files / "events-0.parquet").rename(files / "log.PARQUET")
    assert content_hash(prepare(config(tmp_path, events="log.PARQUET"))) == expected
    raw_logs.write(files, raw_logs.draw(3), "csv")
    (files / "log.CSV.GZ").write_bytes(gzip.compress((files / "events-0.csv").read_bytes()))
    assert content_hash(prepare(config(tmp_path, events="log.CSV.GZ"))) == expected


@pytest.mark.parametrize("name", ["log.csv.zst", "log.CSV.ZST"])
def test_zstandard_files(tmp_path, name):
    raw_logs.write(tmp_path / "raw", raw_logs.draw(3), "csv")
    content = (tmp_path / "raw" / "events-0.csv").read_bytes()
    (tmp_path / "raw" / name).write_bytes(pa.compress(content, "zstd", asbytes=True))
    found, expected = (
        content_hash(prepare(config(tmp_path, events=events))) for events in (name, "events-0.csv")
    )
    assert found == expected
    text = content.replace(b"\n", b"\nx,", 3)
    (tmp_path / "raw" / name).write_bytes(pa.compress(text, "zstd", asbytes=True))
    with pytest.raises(DataError, match=f"{name}: line 2: row of the wrong width"):
        prepare(config(tmp_path, events=name))


@pytest.mark.parametrize(
    "content",
    [gzip.compress(b"a,b\n1,2\n" * 99), b"PAR1\x15\x04\x15\x84", "a,b\n".encode("utf-16")],
    ids=["gzip", "parquet", "utf-16"],
)
def test_a_file_that_is_not_what_its_name_says(tmp_path, content):
    path = tmp_path / "1.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"1.csv: the header is no text in UTF-8; .*suffix, .parq"):
        loaded([path])


# Headers and cells


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("user;item;ts", r"separated by ';' \('user;item;ts'\); separate columns by commas"),
        ("user\titem", r"separated by '\\t'"),
        ("user,item,item", "'item' and 'item' have one name"),
        ("user,item,Item", "'item' and 'Item' have one name, case not counting"),
    ],
)
def test_a_header_that_cannot_be_meant_is_refused(tmp_path, header, message):
    path = text(tmp_path / "1.csv", f"{header}\n1,2,3\n")
    with pytest.raises(DataError, match=message):
        loaded([path])


def test_the_nameless_column_of_pandas_is_left_out(tmp_path):
    path = text(tmp_path / "1.csv", ",user,item,\n0,7,a,\n1,8,b,\n")
    rows, table, _ = loaded([path])
    assert rows == [(7, "a"), (8, "b")] and list(table.columns) == ["user", "item"]


def test_a_byte_order_mark_before_a_quoted_header(tmp_path):
    path = tmp_path / "1.csv"
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["user", "item"], [7, "a"]])
    assert file_columns(path) == ["user", "item"]
    assert loaded([path])[0] == [(7, "a")]


def test_a_bad_row_behind_a_very_long_cell_is_named(tmp_path):
    long = "x" * 200_000
    path = text(tmp_path / "1.csv", f"a,b\n1,{long}\n2,y\nz,y\n" + "3,y\n" * 300)
    with pytest.raises(DataError, match=r"1.csv: line 4: .*'z'"):
        loaded([path])


# Times


def test_date_times_of_a_csv(tmp_path):
    def moment(second: int, zone: str) -> str:
        return str(np.datetime64(second + (19_800 if zone else 0), "s")) + zone

    expected = None
    for number, zone in enumerate(("", "+05:30")):
        log = raw_logs.draw(3)
        for event in log["events"]:
            event["seconds"], event["ts"] = event["ts"], moment(event["ts"], zone)
        directory = tmp_path / str(number)
        raw_logs.write(directory / "raw", log, "csv")
        cut = raw_logs.TEST_FROM
        splits = {"train": f"seconds < {cut}", "test": f"seconds >= {cut}"}
        time = "ts" if zone else 'e."TS"'
        path = prepare(config(directory, events="events-*.csv", time=time, **splits))
        if expected is None:
            raw_logs.write(tmp_path / "raw", raw_logs.draw(3), "csv")
            expected = content_hash(prepare(config(tmp_path, events="events-*.csv")))
        assert content_hash(path) == expected


def test_times_in_texts_are_floored_as_numbers_are(tmp_path):
    hashes = set()
    for number, write in enumerate((lambda t: t + 0.7, lambda t: f"{t}.7", lambda t: t, str)):
        log = raw_logs.draw(3)
        for event in log["events"]:
            event["ts"] = write(event["ts"])
        directory = tmp_path / str(number)
        raw_logs.write(directory / "raw", log, "parquet")
        cut = raw_logs.TEST_FROM
        splits = {"train": f"CAST(ts AS DOUBLE) < {cut}", "test": f"CAST(ts AS DOUBLE) >= {cut}"}
        hashes.add(content_hash(prepare(config(directory, **splits))))
    assert len(hashes) == 1


def test_skipped_rows_are_counted_in_the_report(tmp_path):
    raw_logs.write(tmp_path / "raw", raw_logs.draw(3), "csv")
    with open(tmp_path / "raw" / "events-0.csv", "a") as file:
        file.write("7,3.5,1000005,4,a,10000\n7,3,1000005,4,a\n7,3,-5,4,a,10000\n")
    types = {"item": "BIGINT"}
    path = prepare(config(tmp_path, events="events-*.csv", on_bad_row="skip", types=types))
    report = json.loads((path / "report.json").read_text())
    assert report["skipped"] == {
        "value of the wrong type": 1,
        "row of the wrong width": 1,
        "negative time": 1,
    }
