"""examples/score_file.py: raw rows of the test split get the scores that eval.py gives them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from ctr_jax.data.errors import DataError
from ctr_jax.evaluation import evaluate
from examples.score_file import rows_of_users, score_file, seconds
from tests.ctr_jax.test_serving import saved

DAY = 86400


@pytest.fixture
def config(small_config):
    """Requests of a user's day, whose other behaviours of that day they must not see."""
    small_config.data.update(
        dict(request=str(DAY), time_floor=DAY, ties="strict", max_candidates=3)
    )
    small_config.data.candidate["liked"] = (
        "CASE WHEN item % 3 = 0 THEN 'NA' ELSE '00' || item % 3 END"
    )
    small_config.data.candidate["age"] = "user % 7"
    small_config.data.kinds = {"candidate/age": "standard", "user/age": "quantile"}
    return small_config


@pytest.fixture
def raw(config):
    """The raw log with the columns that the data set has, by their names."""
    log = pq.read_table(Path(config.data.raw_dir) / "events.parquet").to_pandas()
    log["liked"] = [["NA", "001", "002"][item % 3] for item in log["item"]]
    log["note"] = [["007", 'a "b",\nc', "null"][item % 3] for item in log["item"]]
    log["candidate/age"], log["user/age"] = log["user"] % 7, log["user"] % 5
    return log


def scored(config, workdir, table, kind="parquet"):
    """`table` with its probabilities, by way of files of a kind."""
    path, out = workdir / f"requests.{kind}", workdir / f"scored.{kind}"
    write = pq.write_table if kind == "parquet" else pa.csv.write_csv
    write(pa.Table.from_pandas(table, preserve_index=False), path)
    assert score_file(config, workdir, path, out, user="user", time="ts") == len(table)
    return (pq.read_table(out).to_pandas() if kind == "parquet" else
            pd.read_csv(out, dtype={"note": str, "liked": str}, keep_default_na=False))  # fmt: skip


def test_raw_rows_of_the_test_split_get_its_scores(config, raw, tmp_path, capsys):
    saved(config, tmp_path)
    evaluate(config, tmp_path, splits=("test",), scores=tmp_path / "scores")
    expected = pq.read_table(tmp_path / "scores" / "test.parquet").to_pandas().set_index("row")
    assert expected.position.max() == 2 and (expected.request_time % DAY == 0).all()
    rows = raw[raw.index.isin(expected.index)]
    assert len(rows) == len(expected) > 300
    expected = expected.probability[rows.index].to_numpy()
    for kind in ("parquet", "csv"):
        found = scored(config, tmp_path, rows, kind)
        assert list(found) == [*rows, "probability"]
        for name in ("item", "liked", "note"):  # as they stood
            assert found[name].tolist() == rows[name].tolist()
        np.testing.assert_allclose(found["probability"], expected, rtol=1e-5)
    assert capsys.readouterr().out.count("unknown values: none") == 2
    # Histories matter, so that equal scores say that they are the same.
    later = scored(config, tmp_path, rows.assign(ts=rows.ts + DAY))["probability"]
    assert not np.allclose(later, expected, rtol=1e-5)

    # An unknown user is one without behaviours.
    never = rows.assign(liked="never")
    unknown = scored(config, tmp_path, never.assign(user=10**6 + rows.user))["probability"]
    out = capsys.readouterr().out
    assert "unknown values: user 100.0%, candidate/liked 100.0%\n" in out
    nothing = scored(config, tmp_path, never.assign(ts=0))["probability"]
    np.testing.assert_allclose(unknown, nothing, rtol=1e-6)

    for table, says in (
        (rows.drop(columns="item"), r"no columns \['item'\]; it has \['user', "),
        (rows.assign(liked=1), "candidate/liked holds texts, such as 'NA', .*; 1 .int. is none"),
        (rows.assign(user="a"), "user keys are .*string; those of the log are int64"),
        (rows.assign(ts="1"), "times are .*string; use numbers or date-times"),
        (rows.assign(ts=rows.ts * 1000), "times reach from .*; see data.time_unit"),
        (rows.assign(probability=1.0), "has a column 'probability' already"),
    ):
        with pytest.raises(DataError, match=says):
            scored(config, tmp_path, table)
    assert not list(tmp_path.glob(".*"))


def test_times_are_read_as_preparation_reads_them():
    options = {"time_unit": "ms", "time_floor": 60}
    assert seconds(pa.array([60_999, 119_999]), options).tolist() == [60, 60]
    assert seconds(pa.array([60_999.5, 121_000.0]), options).tolist() == [60, 120]
    for zone in (None, "Asia/Tokyo"):
        moments = pa.array([61_000, 121_999], pa.timestamp("ms", zone))
        assert seconds(moments, options).tolist() == [60, 120]
    moments = pa.array([60_999_999_999, 121_000_000_001], pa.timestamp("ns"))
    assert seconds(moments, options).tolist() == [60, 120]
    assert seconds(pa.array([1, 2], pa.date32()), {}).tolist() == [DAY, 2 * DAY]
    with pytest.raises(DataError, match="a time is missing"):
        seconds(pa.array([1, None]), options)


def test_users_are_found_whatever_holds_their_texts():
    users = pa.chunked_array([["a"], ["b", "c"]])
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary("i1", "string")):
        column = pa.array(["c", None, "a", "d"]).cast(kind)
        assert rows_of_users(column, users).tolist() == [2, -1, 0, -1]
