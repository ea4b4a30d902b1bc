"""Vocabularies that grow from one day's log to the next, against the pure-Python preparation."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctr_jax.data.errors import DataError
from ctr_jax.data.prepare import prepare
from ctr_jax.data.records import PreparedData
from ctr_jax.data.vocabulary_hash import hash_of
from tests.ctr_jax.data import raw_logs, reference_preparation, test_events

COLUMNS = {
    "user/user_id": ("id", "user_id"),
    "candidate/item": ("id", "item"),
    "candidate/tab": ("id", "tab"),
    "behaviour/item": ("id", "item"),
    "behaviour/rating": ("id", "rating"),
}


def draw(day: int) -> dict:
    """The log of a day: each has users, items and a tab that the day before had not."""
    log = raw_logs.draw(day, users=8 + 4 * day, items=20 + 15 * day)
    for row, event in enumerate(log["events"]):
        event["tab"] = f"{day}" if row % 7 == 0 else event["tab"]
    return log


def page(directory: Path, **changes) -> dict:
    candidate = {"item": "e.item", "tab": "tab"}
    return test_events.config(directory, ties="order", candidate=candidate, **changes)


@pytest.fixture(scope="module")
def days(tmp_path_factory):
    """[(raw log, page, prepared directory)] of three days, each grown from the one before."""
    found, before = [], None
    for day in range(3):
        directory = tmp_path_factory.mktemp(f"day{day}")
        raw_logs.write(directory / "raw", draw(day), "parquet")
        more = dict(vocabularies_from=str(before), grow_vocabularies=True) if day else {}
        config = page(directory, **more)
        before = prepare(config)
        found.append((draw(day), config, before))
    return found


def vocabulary(path: Path, name: str) -> pa.Table:
    return pq.read_table(path / "vocabularies" / f"{name}.parquet")


def ids_of(path: Path, name: str) -> dict:
    table = vocabulary(path, name)
    return dict(zip(table["value"].to_pylist(), table["id"].to_pylist(), strict=True))


def test_known_values_keep_their_ids_and_new_ones_get_the_next(days):
    given: dict = {}
    for day, (log, _, path) in enumerate(days):
        rows = test_events.rows_of(log, request=lambda e, seq: seq)
        for row in rows:
            row["candidate/tab"] = row["context/tab"]
        expected = reference_preparation.prepare(
            rows, rows, test_events.users_of(log), COLUMNS, candidates=1, ties="order",
            valid_fraction=0.15, given=given,
        )  # fmt: skip
        test_events.assert_equal(path, expected)
        for name, ids in expected[1].items():
            assert list(ids_of(path, name).items()) == list(ids.items())
            old = given.get(name, {})
            assert list(ids.items())[: len(old)] == list(old.items())
        report = json.loads((path / "report.json").read_text())
        if day:
            added = {name: len(ids) - len(given[name]) for name, ids in expected[1].items()}
            assert report["added"] == added and added["item"] > 2 and added["tab"] > 0
            assert report["added"]["rating"] == 0 and report["known"]["rating"] == 1.0
            assert 0.3 < report["known"]["item"] < 1  # of the day before
        given = expected[1]


def test_counts_are_those_of_the_log_that_gave_a_value_its_id(days):
    first, second = (vocabulary(path, "item").to_pylist() for _, _, path in days[:2])
    assert second[: len(first)] == first
    _, config, _ = days[1]
    anew = prepare({**config, "vocabularies_from": "", "grow_vocabularies": False})
    counts = {row["value"]: row["count"] for row in vocabulary(anew, "item").to_pylist()}
    assert all(row["count"] == counts[row["value"]] for row in second[len(first) :])


def test_a_spec_tells_what_its_vocabularies_grew_from(days):
    specs = [PreparedData.open(path).spec for _, _, path in days]
    assert specs[0].grown_from == {} and "rating" not in specs[2].grown_from
    expected = {
        spec.encoding["vocabularies"]["item"]: spec.vocabularies["item"] for spec in specs[:2]
    }
    assert specs[2].grown_from["item"] == expected
    for hashed, rows in expected.items():  # of files, not of what specs say
        assert hash_of(days[2][2] / "vocabularies" / "item.parquet", rows - 3) == hashed
    assert len({spec.encoding_hash for spec in specs}) == 3


def test_taken_as_they_are_they_still_tell_what_they_grew_from(days, tmp_path):
    _, config, _ = days[2]
    config = {**config, "prepared_dir": str(tmp_path), "vocabularies_from": str(days[1][2])}
    asis = prepare({**config, "grow_vocabularies": False})
    grown = prepare(config)
    assert asis != grown  # an option that is content
    before, spec = (PreparedData.open(path).spec for path in (days[1][2], asis))
    assert spec.encoding == before.encoding and spec.grown_from == before.grown_from != {}
    # The same vocabularies by another way, of which other models are a part.
    source = shutil.copytree(days[1][2], tmp_path / "source")
    before = json.loads((source / "spec.json").read_text())
    (source / "spec.json").write_text(json.dumps({**before, "grown_from": {}}))
    assert prepare({**config, "vocabularies_from": str(source)}) != grown


def test_texts_and_numbers_that_are_written_alike_are_one_value(days, tmp_path):
    _, config, grown = days[1]
    config = {**config, "prepared_dir": str(tmp_path)}
    config["candidate"] = {**config["candidate"], "item": "CAST(e.item AS VARCHAR)"}
    config["behaviour"] = {**config["behaviour"], "item": "CAST(e.item AS VARCHAR)"}
    path = prepare(config)
    old, ids = ids_of(days[0][2], "item"), ids_of(path, "item")
    assert dict(list(ids.items())[: len(old)]) == {str(v): i for v, i in old.items()}
    assert ids.keys() == {str(v) for v in ids_of(grown, "item")}
    specs = [PreparedData.open(p).spec for p in (path, grown)]
    assert specs[0].grown_from == specs[1].grown_from
    config["candidate"]["item"] = config["behaviour"]["item"] = "CAST(e.item AS DOUBLE)"
    with pytest.raises(DataError, match="'item' there is of whole numbers.* fractions or texts"):
        prepare(config)


def test_whole_fractions_beside_integers_are_no_texts(days, tmp_path):
    raw = days[0][1]
    texts = {"item": "CAST(e.item AS VARCHAR)"}
    source = prepare({**raw, "prepared_dir": str(tmp_path), "candidate": {**raw["candidate"],
                      **texts}, "behaviour": {**raw["behaviour"], **texts}})  # fmt: skip
    config = {**days[1][1], "prepared_dir": str(tmp_path), "vocabularies_from": str(source)}
    config["behaviour"] = {**config["behaviour"], "item": "CAST(e.item AS DOUBLE)"}
    for grow in (False, True):
        with pytest.raises(DataError, match="'item' there is of texts.*cast them to BIGINT"):
            prepare({**config, "grow_vocabularies": grow})


def test_a_vocabulary_without_values_grows_into_one_of_any_type(days, tmp_path):
    raw = days[0][1]
    unknown = {"candidate": {**raw["candidate"], "tab": "CAST(NULL AS VARCHAR)"}}
    source = prepare({**raw, **unknown, "prepared_dir": str(tmp_path)})
    assert ids_of(source, "tab") == {}
    config = {**days[1][1], "prepared_dir": str(tmp_path), "vocabularies_from": str(source)}
    config["candidate"] = {**config["candidate"], "tab": "e.rating"}
    assert sorted(ids_of(prepare(config), "tab").items(), key=lambda x: x[1])[0][1] == 3
    asis = prepare({**config, "grow_vocabularies": False})
    assert json.loads((asis / "report.json").read_text())["known"]["tab"] == 0


def test_what_cannot_grow_is_refused_in_a_line(days, tmp_path):
    _, config, _ = days[1]
    with pytest.raises(DataError, match="grow_vocabularies needs data.vocabularies_from"):
        prepare({**config, "vocabularies_from": ""})
    source = shutil.copytree(days[0][2], tmp_path / "source")
    path = source / "vocabularies" / "item.parquet"
    items = pq.read_table(path)
    pq.write_table(items.set_column(0, "value", [items["value"].to_pylist()[::-1]]), path)
    config = {**config, "prepared_dir": str(tmp_path), "vocabularies_from": str(source)}
    with pytest.raises(DataError, match="'item' is not the one of its spec.json"):
        prepare(config)
