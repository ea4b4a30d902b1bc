"""keys/ beside the records: every record and user is found again in the raw log."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctr_jax.data import keys
from ctr_jax.data import requests as requests_lib
from ctr_jax.data.errors import DataError
from ctr_jax.data.prepare import prepare
from ctr_jax.data.records import PreparedData
from ctr_jax.data.vocabulary import Vocabulary
from tests.ctr_jax.data import raw_logs, test_eleme
from tests.ctr_jax.data.test_events import config


@pytest.mark.parametrize(
    ("request_option", "key", "kind"),
    [
        ("e.session", lambda e: e["session"], pa.int64()),
        ("'s' || e.session", lambda e: f"s{e['session']}", pa.string()),
        ("time", lambda e: None, pa.null()),
        ("event", lambda e: None, pa.null()),
    ],
    ids=["numbers", "texts", "time", "event"],
)
def test_records_and_users_are_found_in_the_raw_log(
    tmp_path, monkeypatch, request_option, key, kind
):
    monkeypatch.setattr(requests_lib, "BATCH_ROWS", 37)  # requests go on over batches
    log = raw_logs.draw(1)
    raw_logs.write(tmp_path / "raw", log, "csv", parts=3)
    options = dict(events="events-*.csv", context={"tab": "tab"}, max_candidates=2)
    data = PreparedData.open(prepare(config(tmp_path, request=request_option, **options)))
    users = keys.user_keys(data.path).to_pylist()
    assert users == sorted({e["user"] for e in log["events"]})
    items = Vocabulary.load(data.path / "vocabularies" / "item.parquet")
    seen = []
    for split in requests_lib.SPLITS:
        table = keys.record_keys(data.path, split).read()
        assert table.schema.field("request").type == kind
        found = table.to_pylist()
        records = data.split(split).records(np.arange(len(data.split(split))))
        assert [row["record"] for row in found] == list(range(len(records)))
        for row, record in zip(found, records, strict=True):
            events = [log["events"][place] for place in row["rows"]]
            assert len(events) == record["num_candidates"]
            assert {users[record["user"]]} == {e["user"] for e in events}
            assert {row["request"]} == {key(e) for e in events}
            n = len(events)
            assert record["label"][:n].tolist() == [e["rating"] >= 4 for e in events]
            ids = items.encode(np.array([e["item"] for e in events]))
            assert record["candidate/item"][:n].tolist() == ids.tolist()
        seen += [place for row in found for place in row["rows"]]
    assert sorted(seen) == list(range(len(log["events"])))


def test_inline_histories_have_keys_too(tmp_path):
    rows = test_eleme.draw(0)
    test_eleme.write(tmp_path / "raw", rows)
    path = prepare(test_eleme.config(tmp_path))
    records = PreparedData.open(path).split("test")
    found = keys.record_keys(path, "test").read().to_pylist()
    assert len(found) == len(records) and {row["request"] for row in found} == {None}
    users = keys.user_keys(path).to_pylist()
    for row, record in zip(found, records.records(np.arange(len(records))), strict=True):
        (raw,) = (rows[place] for place in row["rows"])
        assert raw["day"] == 8 and raw["user_id"] == users[record["user"]]
        assert int(raw["label"]) == record["label"][0]


# Of the preparation as it was before it wrote keys.
HASH = "1e66119c1e607566dc592739d9262875973207a40b66317aa6fdf50b66321ea0"


def test_keys_are_no_content_and_may_be_absent(tmp_path):
    raw_logs.write(tmp_path / "raw", raw_logs.draw(0), "parquet")
    path = prepare(config(tmp_path, request="e.session", max_candidates=4))
    assert PreparedData.open(path).spec.content_hash == HASH
    assert pq.ParquetFile(path / "keys" / "users.parquet").schema_arrow.names == ["user", "key"]
    shutil.rmtree(path / "keys")
    PreparedData.open(path).split("test").read(np.arange(2), 5)
    with pytest.raises(DataError, match="users.parquet: no such file, .* and prepare it again"):
        keys.user_keys(path)
    with pytest.raises(DataError, match="valid.parquet: no such file"):
        keys.record_keys(path, "valid")
