"""Raw values of every kind of column against what preparation stored for the same rows."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctr_jax.data import keys
from ctr_jax.data.errors import DataError
from ctr_jax.data.prepare import prepare
from ctr_jax.data.records import PreparedData
from ctr_jax.raw_values import OUT_OF_VOCABULARY, RawValues
from tests.ctr_jax.data import raw_logs
from tests.ctr_jax.data.test_events import config

COLUMNS = {
    "candidate": {
        "item": "e.item", "author": "author", "length": "length", "amount": "i.length",
        "price": "CAST(rating AS DOUBLE)", "title": "'item number ' || e.item || ' of the shop'",
    },
    "context": {"tab": "tab"},
    "user_columns": {"user_id": '"user"', "fans": "fans"},
    "kinds": {
        "candidate/length": "standard", "candidate/amount": "quantile", "user/fans": "quantile",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def log():
    log = raw_logs.draw(2)
    log["events"][5]["tab"] = "missing"
    log["events"][6]["tab"] = "missing"
    log["events"][7]["tab"] = log["events"][8]["tab"] = "'missing'"
    return log


@pytest.fixture(scope="module")
def data(log, tmp_path_factory):
    directory = tmp_path_factory.mktemp("raw_values")
    raw_logs.write(directory / "raw", log, "parquet")
    how = dict(
        request="time", max_candidates=3, item_table="items.parquet", user_table="users.parquet"
    )
    return PreparedData.open(prepare(config(directory, buckets=4, **how, **COLUMNS)))


def raw_rows(log):
    """{"group/column": raw value of each event}."""
    items = {row["item"]: row for row in log["items"]}
    users = {row["user"]: row for row in log["users"]}
    events = log["events"]
    of_item = {k: [items.get(e["item"], {}).get(k) for e in events] for k in ("author", "length")}
    return {
        "candidate/item": [e["item"] for e in events],
        "candidate/author": of_item["author"],
        "candidate/length": of_item["length"],
        "candidate/amount": of_item["length"],
        "candidate/price": [f"{e['rating']}.0" for e in events],
        "candidate/title": [f"item number {e['item']} of the shop" for e in events],
        "context/tab": [e["tab"] for e in events],
        "user/user_id": [e["user"] for e in events],
        "user/fans": [users.get(e["user"], {}).get("fans") for e in events],
    }


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_kind_is_encoded_as_preparation_did_and_decoded_again(data, log, split):
    raw, values = RawValues(data), raw_rows(log)
    encoded = raw.encode(values)
    assert set(encoded) == {f"{c.group}/{c.name}" for c in data.spec.columns} - {
        "behaviour/item", "behaviour/rating"
    }  # fmt: skip
    found = keys.record_keys(data.path, split).read()["rows"].to_pylist()
    records = data.split(split).records(np.arange(len(found)))
    for key, stored in encoded.items():
        for rows, record in zip(found, records, strict=True):
            if key.startswith("candidate/"):
                np.testing.assert_array_equal(record[key][: len(rows)], stored[rows], err_msg=key)
            else:
                assert (record[key] == stored[rows]).all(), key
        decoded = raw.decode(key, stored).tolist()
        for value, again in zip(values[key], decoded, strict=True):
            if key == "candidate/length":
                mean = raw.decode(key, np.zeros(1))[0]
                assert again == pytest.approx(mean if value is None else value, abs=1e-6)
            elif value is None:
                assert again is None
            elif isinstance(again, tuple):
                assert again[0] <= value < again[1]
            else:
                assert again in (value, OUT_OF_VOCABULARY)
        assert key == "candidate/length" or OUT_OF_VOCABULARY not in decoded[:50]


def test_arrays_of_any_shape_and_type(data):
    raw = RawValues(data)
    items = raw.encode({"candidate/item": [[0, 1], [None, 10**9]]})["candidate/item"]
    assert items.dtype == np.int32 and items.shape == (2, 2)
    assert items[0].min() >= 3 and items[1].tolist() == [2, 1]
    for array in (np.array([0, 1]), np.array([0, 1], np.uint8), np.array([0.0, 1.0]), (0, 1.0)):
        assert raw.encode({"candidate/item": array})["candidate/item"].tolist() == items[0].tolist()
    assert raw.encode({"candidate/item": np.array([np.nan])})["candidate/item"].tolist() == [2]
    (known,) = raw.encode({"candidate/title": ["item number 0 of the shop"]}).values()
    for kind in (str, object, np.dtypes.StringDType()):
        texts = np.array(["item number 0 of the shop", "", "nan", "else"], kind)
        ids = raw.encode({"candidate/title": texts})["candidate/title"]
        assert ids.tolist() == [known[0], 2, 2, 1]
    lengths = raw.encode({"candidate/length": [1, np.float32(1), None, np.inf]})["candidate/length"]
    assert lengths.dtype == np.float32 and lengths[0] == lengths[1] != 0
    assert lengths[2:].tolist() == [0, 0]
    kinds = [raw.type(f"candidate/{name}") for name in ("item", "title", "length", "amount")]
    assert kinds == [pa.int64(), pa.string(), pa.float64(), pa.float64()]


def test_a_vocabulary_is_read_once_to_encode(data, monkeypatch):
    """It may hold all items there are."""
    raw, read, files = RawValues(data), pq.read_table, []
    monkeypatch.setattr(
        pq, "read_table", lambda path, **how: files.append(path) or read(path, **how)
    )
    for _ in range(2):
        raw.encode({"candidate/item": [0], "candidate/title": ["a"], "candidate/amount": [1.0]})
    assert sorted(path.stem for path in files) == ["amount", "item", "title"]


def test_names_are_for_people_and_distinct(data):
    raw = RawValues(data)
    ids = raw.encode({"context/tab": [None, "nowhere", "a", "missing", "'missing'"]})
    names = raw.names("context/tab", ids["context/tab"])
    assert names == ["missing", "out of vocabulary", "a", "'missing'", "\"'missing'\""]
    names = raw.names("user/fans", np.arange(2, 7))
    assert names[0] == "missing" and names[1].startswith("[-inf, ") and names[4].endswith(", inf)")
    assert names[1].split(", ")[1][:-1] == names[2].split(", ")[0][1:]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("candidate/shoe", 1, "has no column 'candidate/shoe'; it has user/user_id, user/fans"),
        ("candidate/item", "1", r"item holds integers, such as \d+, \d+, \d+; '1' \(str\) is none"),
        ("candidate/item", 1.5, r"item holds integers, .*; 1.5 \(float\) is none"),
        ("candidate/item", 2**63, r"item holds integers, .* is none"),
        ("candidate/item", True, r"item holds integers, .*; True \(bool\) is none"),
        ("candidate/price", 4, r"price holds texts, such as '\d.0', .*; 4 \(int\) is none"),
        ("candidate/price", 4.0, r"price holds texts, such as '\d.0', .*; 4.0 \(float\) is none"),
        ("context/tab", b"a", r"tab holds texts, such as .*; b'a' \(bytes\) is none"),
        ("candidate/amount", "1.5", "amount holds numbers; '1.5' is none"),
        ("candidate/length", "1.5", "length holds numbers; '1.5' is none"),
        ("candidate/length", True, "length holds numbers; True is none"),
    ],
)
def test_a_value_of_another_type_is_refused_in_one_line(data, key, value, says):
    for values in ([None, value], np.array([value])):
        with pytest.raises(DataError, match=says):
            RawValues(data).encode({key: values})


def test_an_id_that_is_none_is_refused(data):
    last = data.spec.vocabularies["tab"] - 1
    RawValues(data).decode("context/tab", np.array([last]))
    for number in (0, last + 1):
        with pytest.raises(DataError, match=f"context/tab has ids .*it knows 1 to {last}"):
            RawValues(data).decode("context/tab", np.array([number, last]))
