"""Preparation through Beam's direct runner: the embedded engine's data set, for any sharding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ctr_jax.data import requests, synthetic
from ctr_jax.data.errors import DataError
from ctr_jax.data.prepare import prepare
from ctr_jax.data.prepare_beam import prepare_beam
from ctr_jax.data.records import PreparedData
from tests.ctr_jax.data import raw_logs, test_alibaba, test_events

pytest.importorskip("apache_beam", reason="Apache Beam is not installed (pip install -e '.[beam]')")
from ctr_jax.data.beam import engine, merging  # noqa: E402


def files(path: Path) -> dict[str, bytes]:
    """Everything that must be equal: descriptions, vocabularies, histories, records."""
    found = {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    for name in [n for n in found if n.endswith(("report.json", ".parquet"))]:
        del found[name]
    return found


def assert_same(first: Path, second: Path) -> None:
    assert (first / "spec.json").read_text() == (second / "spec.json").read_text()
    reports = [json.loads((path / "report.json").read_text()) for path in (first, second)]
    assert reports[0] == reports[1]
    assert files(first) == files(second)
    for name in ("users", *requests.SPLITS):
        assert pq.read_table(first / "keys" / f"{name}.parquet").equals(
            pq.read_table(second / "keys" / f"{name}.parquet")
        )
    assert PreparedData.open(second).histories.verify() == []


def compare(config: dict, tmp_path: Path, shards: tuple[int, ...]) -> None:
    path = prepare({**config, "prepared_dir": str(tmp_path / "embedded")})
    for n in shards:
        directory = str(tmp_path / f"beam-{n}")
        assert_same(path, prepare_beam({**config, "prepared_dir": directory}, n))


def check_same_message(config: dict, shards: int, match: str) -> None:
    messages = []
    for run in (prepare, lambda c: prepare_beam(c, shards)):
        with pytest.raises(DataError, match=match) as error:
            run(config)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.slow
def test_the_demo_layout_for_any_number_of_shards(tmp_path):
    synthetic.generate(
        tmp_path / "raw", synthetic.SyntheticConfig(users=300, behaviours=120, bad_stamps=0.01)
    )
    config = {"builder": "alibaba", "raw_dir": str(tmp_path / "raw"), "valid_fraction": 0.1}
    compare(config, tmp_path, (1, 3, 8))


@pytest.mark.slow
def test_bad_rows_are_counted_the_same_and_users_may_be_disjoint(tmp_path):
    log = test_alibaba.draw(0)
    test_alibaba.write(tmp_path / "raw", log)
    with open(tmp_path / "raw" / "raw_sample.csv", "a") as file:
        file.write("7,1494000000,1,430548_1007,0,0\nx,1494000000,1,430548_1007,0,1\n")
        file.write(",1494000000,1,430548_1007,0,1\n1,2\n")
    config = test_alibaba.config(tmp_path, on_bad_row="skip", disjoint_users=0.3)
    compare(config, tmp_path, (3,))


SESSIONS = {
    "request": "e.session",
    "max_candidates": 2,
    "item_table": "items.parquet",
    "user_table": "users.parquet",
    "prior": {
        "file": "prior.parquet",
        "user": "user",
        "items": "seen",
        "time": "last",
        "behaviour": {"item": "p.item", "rating": "NULL"},
    },
    "context": {"tab": "tab"},
    "candidate": {"item": "e.item", "author": "author", "length": "length"},
    "user_columns": {"user_id": '"user"', "age": "age", "fans": "fans"},
    "kinds": {"candidate/length": "standard", "user/fans": "quantile"},
    "buckets": 4,
}


def test_a_log_of_sessions_with_every_kind_of_column(tmp_path):
    raw_logs.write(tmp_path / "raw", raw_logs.draw(0), "parquet", parts=3)
    compare(test_events.config(tmp_path, **SESSIONS), tmp_path, (3,))


def test_labels_from_the_users_own_rows_and_a_column_that_a_file_lacks(tmp_path):
    log = raw_logs.draw(0)
    for event in log["events"][250:]:
        del event["tab"]
    raw_logs.write(tmp_path / "raw", log, "parquet", parts=2)
    later = 'lead(rating) OVER (PARTITION BY "user" ORDER BY ts, e.rowid)'
    label = f"coalesce({later} >= 4, FALSE)"
    config = test_events.config(tmp_path, label=label, user='e."user"', weight="1.5 * rating")
    compare(config, tmp_path, (3,))
    config["label"] = "count(*) OVER (PARTITION BY session) > 5"
    with pytest.raises(DataError, match="data.label 'count.* may look at rows of other users"):
        prepare_beam(config, 2)


def test_given_vocabularies_of_another_log(tmp_path):
    for day in (0, 1):
        raw_logs.write(tmp_path / f"{day}" / "raw", raw_logs.draw(day), "parquet", parts=2)
    source = prepare(test_events.config(tmp_path / "0", **SESSIONS))
    options = {**SESSIONS, "candidate": {**SESSIONS["candidate"], "item": "2 * e.item"}}
    options |= {"vocabularies_from": str(source), "min_count": 40}  # which plays no part then
    config = test_events.config(tmp_path / "1", **options)
    compare(config, tmp_path, (3,))
    path = prepare({**config, "prepared_dir": str(tmp_path / "embedded")})
    report = json.loads((path / "report.json").read_text())
    assert 0.5 < report["known"]["item"] < 1
    spec = PreparedData.open(path).spec
    assert spec.encoding == PreparedData.open(source).spec.encoding


@pytest.mark.slow
@pytest.mark.parametrize("changes", [SESSIONS, {"ties": "order"}], ids=["sessions", "order"])
def test_a_log_of_events_for_any_number_of_shards(tmp_path, changes):
    raw_logs.write(tmp_path / "raw", raw_logs.draw(1), "parquet", parts=2)
    compare(test_events.config(tmp_path, **changes), tmp_path, (1, 3, 8))


def test_columns_and_folders_of_any_name_and_rows_that_do_not_fit(tmp_path):
    log = raw_logs.draw(0)
    for number, event in enumerate(log["events"]):
        event.update(file=number % 2, first=7, shard=number % 2)
    directory = tmp_path / "b[1]*"
    raw_logs.write(directory / "raw", log, "csv", parts=2)
    for name in ("events-0.csv", "events-1.csv"):
        with open(directory / "raw" / name, "a") as file:
            file.write("7,3.5,1000300,4,a,10000,0,7,0\n")
    types = {"item": "BIGINT"}
    config = test_events.config(
        directory, events="events-*.csv", types=types, ties="order", on_bad_row="skip"
    )
    compare(config, directory, (3,))


def test_columns_that_cannot_share_ids_get_the_same_message(tmp_path):
    log = raw_logs.draw(0)
    for number, event in enumerate(log["events"]):
        event["clicked"] = event["item"] + (0.5 if number == 100 else 0.0)
    raw_logs.write(tmp_path / "raw", log, "parquet")
    config = test_events.config(tmp_path, behaviour={"item": "clicked"})
    check_same_message(config, 2, "vocabulary 'item'")


def test_of_several_bad_rows_the_embedded_engines_first_is_named(tmp_path):
    log = raw_logs.draw(0)
    for row in (120, 60, 61, 300):
        log["events"][row]["ts"] = -1 - row
    raw_logs.write(tmp_path / "raw", log, "parquet", parts=2)
    config = test_events.config(tmp_path)
    check_same_message(config, 8, "negative time: '-61'")


@pytest.mark.parametrize("column", ["user", "session"])
def test_nan_is_missing_beside_numbers_of_the_same_file(tmp_path, column):
    log = raw_logs.draw(0)
    for number, event in enumerate(log["events"]):
        event[column] = float("nan") if number == 60 else float(event[column])
    raw_logs.write(tmp_path / "raw", log, "parquet")
    config = test_events.config(tmp_path, request="e.session", max_candidates=4)
    check_same_message(config, 2, "row group 1, row 10: missing")


def test_a_user_that_occurs_twice_is_named_before_a_bad_event(tmp_path):
    log = raw_logs.draw(0)
    log["events"][60]["ts"] = -1
    log["users"].append(dict(log["users"][2]))
    raw_logs.write(tmp_path / "raw", log, "parquet")
    config = test_events.config(tmp_path, user_table="users.parquet")
    check_same_message(config, 3, "users.parquet: .* occurs twice")


def test_a_malformed_row_gets_the_same_message(tmp_path):
    raw_logs.write(tmp_path / "raw", raw_logs.draw(0), "csv", parts=2)
    with open(tmp_path / "raw" / "events-1.csv", "a") as file:
        file.write("1,2\n")
    config = test_events.config(tmp_path, events="events-*.csv")
    check_same_message(config, 2, "row of the wrong width")


def test_a_line_behind_skipped_ones_gets_the_same_message(tmp_path):
    raw_logs.write(tmp_path / "raw", raw_logs.draw(0), "csv", parts=2)
    lines = ["user,age", "x,y,z", *(f"{user},20" for user in range(100, 120)), "7.5,1", "105,30"]
    (tmp_path / "raw" / "users.csv").write_text("\n".join(lines))
    options = {"events": "events-*.csv", "user_table": "users.csv", "on_bad_row": "skip"}
    options["types"] = {"user": "BIGINT"}
    config = test_events.config(tmp_path, **options)
    check_same_message(config, 2, "users.csv: line 24: user 105 occurs twice")


@pytest.mark.slow
def test_files_of_one_name_in_several_folders(tmp_path):
    log = raw_logs.draw(0)
    for name, part in (("a", log["events"][:100]), ("b", log["events"][100:])):
        (tmp_path / "raw" / name).mkdir(parents=True)
        raw_logs.write_rows(tmp_path / "raw" / name / "part-0.parquet", part)
    compare(test_events.config(tmp_path, events="*/part-*.parquet"), tmp_path, (3,))


@pytest.mark.slow
def test_a_run_that_dies_leaves_nothing_that_is_accepted(tmp_path, monkeypatch):
    raw_logs.write(tmp_path / "raw", raw_logs.draw(0), "parquet")
    config = test_events.config(tmp_path)

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_merge_records", die)  # all four pipelines are through
        with pytest.raises(KeyboardInterrupt):
            prepare_beam(config, 2)
    left = list((tmp_path / "prepared").rglob("spec.json"))
    assert left == []
    assert PreparedData.open(prepare_beam(config, 2)).spec.content_hash


def test_what_cannot_be_cut_by_user_is_refused(tmp_path):
    with pytest.raises(DataError, match="--shards is 0; use at least 1"):
        prepare_beam({}, 0)
    raw_logs.write(tmp_path / "raw", raw_logs.draw(0), "parquet")
    config = test_events.config(tmp_path, item_table="items.parquet", user="i.author")
    with pytest.raises(DataError, match="cannot be told from raw_events alone"):
        prepare_beam(config, 2)
    for name in ("taobao", "amazon", "eleme"):
        from ctr_jax.data.prepare import find_builder

        assert find_builder(name).shard_keys({}) == {}


@pytest.mark.parametrize("seed", range(5))
def test_merged_streams_are_the_sorted_whole(seed):
    rng = np.random.default_rng(seed)
    order, user = rng.integers(0, 30, (2, 500))
    place = np.arange(500)
    streams = []
    for shard in range(4):
        mine = np.flatnonzero(user % 4 == shard)
        mine = mine[np.lexsort([place[mine], user[mine], order[mine]])]
        cuts = np.sort(rng.integers(0, len(mine), 6))
        streams.append(
            [
                {"order": order[part], "user": user[part], "place": place[part]}
                for part in np.split(mine, cuts)
            ]
        )
    blocks = list(merging.merged(streams, ("order", "user")))
    found = np.concatenate([block["place"] for block in blocks])
    assert found.tolist() == np.lexsort([place, user, order]).tolist()
    assert max(len(block["place"]) for block in blocks) < 500
