"""The tables of the events builder: types of keys, names of columns, odd values."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctr_jax.data.errors import DataError
from ctr_jax.data.prepare import prepare
from ctr_jax.data.records import PreparedData
from tests.ctr_jax.data import raw_logs
from tests.ctr_jax.data.test_events import config

PRIOR = {"file": "prior.parquet", "user": "user", "items": "seen", "time": "last"}
PRIOR["behaviour"] = {"item": "p.item", "rating": "NULL"}
ITEMS = {"item_table": "items.parquet", "candidate": {"item": "e.item", "author": "i.author"}}
USERS = {"user_table": "users.parquet", "user_columns": {"user_id": '"user"', "age": "age"}}


def content_hash(path: Path) -> str:
    return PreparedData.open(path).spec.content_hash


def skipped(path: Path) -> dict[str, int]:
    return json.loads((path / "report.json").read_text())["skipped"]


def written(directory: Path, kind: str = "parquet", **changes) -> Path:
    """A log of which `changes` = {table: function of a row's number and the row} alters rows."""
    log = raw_logs.draw(3)
    for name, change in changes.items():
        for number, row in enumerate(log[name]):
            change(number, row)
    raw_logs.write(directory / "raw", log, kind)
    return directory


def hashes(tmp_path: Path, options: dict, changed_options: dict, **changes) -> tuple[str, str]:
    """Of the log as it is, and of the changed log with other options."""
    plain = prepare(config(written(tmp_path / "plain"), **options))
    changed = prepare(
        config(written(tmp_path / "changed", **changes), **{**options, **changed_options})
    )
    return content_hash(plain), content_hash(changed)


def renamed(row: dict, old: str, new: str) -> None:
    row[new] = row.pop(old)


# Ids of one vocabulary


def floats(every: int):
    def change(number, event):
        event["clicked"] = None if number % every else float(event["item"])

    return change


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_whole_floats_share_the_ids_of_integers(tmp_path, kind):
    options = {"events": f"events-*.{kind}", "min_count": 1}
    written(tmp_path / "floats", kind, events=floats(3))
    written(
        tmp_path / "integers",
        kind,
        events=lambda n, e: e.update(clicked=None if n % 3 else e["item"]),
    )
    found = {
        content_hash(prepare(config(tmp_path / name, behaviour={"item": sql}, **options)))
        for name, sql in (
            ("floats", "clicked"),
            ("integers", "clicked"),
            ("floats", "1.0 * clicked"),
        )
    }
    assert len(found) == 1


@pytest.mark.parametrize("sql", ["clicked + .5", "clicked > 3", "CAST(clicked AS DECIMAL(9, 2))"])
def test_other_kinds_beside_integers_are_refused(tmp_path, sql):
    written(tmp_path, events=floats(3))
    with pytest.raises(
        DataError, match="vocabulary 'item': 'behaviour/item' is .*'candidate/item'"
    ):
        prepare(config(tmp_path, behaviour={"item": sql}))
    prepare(config(tmp_path, behaviour={"other": sql}))


@pytest.mark.parametrize(
    "options",
    [
        {"user": "[e.user]"},
        {"request": "[e.session]", "max_candidates": 3},
        {"context": {"tags": "[e.tab]"}},
        {"kinds": {"candidate/n": "quantile"}, "candidate": {"item": "e.item", "n": "[e.ts]"}},
        {"item_table": "items.parquet", "item": "[e.item]"},
    ],
)
def test_lists_are_refused(tmp_path, options):
    written(tmp_path)
    with pytest.raises(DataError, match=r"(data.user|data.request|data.item|column).* is a list, "):
        prepare(config(tmp_path, **options))


# Missing users and requests


@pytest.mark.parametrize("nothing", [float("nan"), None])
@pytest.mark.parametrize("column", ["user", "session"])
def test_nan_is_a_missing_user_or_request(tmp_path, column, nothing):
    def lose(number, event):
        event[column] = nothing if number == 50 else float(event[column])

    written(tmp_path, events=lose)
    what = "missing user" if column == "user" else "missing request id"
    options = {"request": "e.session", "max_candidates": 4}
    with pytest.raises(DataError, match=rf"row group 1, row 0: {what}"):
        prepare(config(tmp_path, **options))
    assert skipped(prepare(config(tmp_path, on_bad_row="skip", **options))) == {what: 1}


@pytest.mark.parametrize("nothing", ["nan", ""])
def test_texts_that_mean_nothing_are_missing_users(tmp_path, nothing):
    written(tmp_path, events=lambda n, e: e.update(user=nothing if n == 50 else f"u{e['user']}"))
    with pytest.raises(DataError, match="row group 1, row 0: missing user"):
        prepare(config(tmp_path))


# Names of columns


def test_a_column_named_as_our_key_of_the_item_changes_nothing(tmp_path):
    first, second = hashes(tmp_path, ITEMS, {}, events=lambda _, e: e.update({"item_of_event": 3}))
    assert first == second


def test_a_users_column_named_as_our_key_changes_nothing(tmp_path):
    first, second = hashes(tmp_path, USERS, {}, users=lambda _, u: u.update(user_key=3))
    assert first == second


def test_quotes_in_the_names_of_keys(tmp_path):
    changed = {"items_key": 'i "d"', "users_key": 'u\'s "d"'}
    options = {**ITEMS, **USERS, "prior": PRIOR, "user_columns": {"age": "age"}}
    names = {"user": 'the "user"', "items": 'the "items"', "time": 'the "time"'}
    first, second = hashes(
        tmp_path,
        options,
        {**changed, "prior": {**PRIOR, **names}},
        items=lambda _, row: renamed(row, "item", changed["items_key"]),
        users=lambda _, row: renamed(row, "user", changed["users_key"]),
        prior=lambda _, row: [
            renamed(row, old, new)
            for old, new in zip(("user", "seen", "last"), names.values(), strict=True)
        ],
    )
    assert first == second


@pytest.mark.parametrize("name", ["item", "seq", "position", "Item"])
def test_a_prior_column_of_any_name(tmp_path, name):
    first, second = hashes(tmp_path, {"prior": PRIOR}, {}, prior=lambda n, p: p.update({name: n}))
    assert first == second
    items = {"prior": {**PRIOR, "items": name}}
    first, second = hashes(
        tmp_path, {"prior": PRIOR}, items, prior=lambda _, p: renamed(p, "seen", name)
    )
    assert first == second


# Times of prior histories


def test_prior_histories_at_date_times(tmp_path):
    def moment(_, row):
        row["last"] = datetime.datetime.fromtimestamp(row["last"], datetime.UTC)

    first, second = hashes(tmp_path, {"prior": PRIOR}, {}, prior=moment)
    assert first == second


def test_prior_items_that_are_no_lists_are_refused(tmp_path):
    written(tmp_path)
    with pytest.raises(DataError, match="prior.parquet: column 'last' is BIGINT, not one of lists"):
        prepare(config(tmp_path, prior={**PRIOR, "items": "last"}))


# Values of another type than is wanted


def test_texts_that_are_no_keys_are_bad_rows(tmp_path):
    def word(column):
        return lambda n, e: e.update({column: "x7" if n == 50 else str(e[column])})

    for column, options in (("item", ITEMS), ("user", USERS)):
        what = f"value that is no BIGINT, as {column}s_key is"
        directory = written(tmp_path / column, events=word(column))
        with pytest.raises(DataError, match=f"row group 1, row 0: {what}: 'x7'"):
            prepare(config(directory, **options))
        found = prepare(config(directory, on_bad_row="skip", **options))
        assert skipped(found) == {what: 1}


def test_keys_that_are_texts_beside_numbers(tmp_path):
    for column, options in (("item", ITEMS), ("user", USERS)):
        table = f"{column}s"
        first, second = hashes(
            tmp_path / column,
            options,
            {},
            **{table: lambda _, row, column=column: row.update({column: str(row[column])})},
        )
        assert first == second
        for value, what in (("x", "'x' is no BIGINT"), ("07", "occurs twice"), ("7.5", "'7.5' is")):

            def change(n, row, column=column, value=value):
                row[column] = value if n == 3 else "7" if n == 2 else str(row[column] + 100)

            directory = written(tmp_path / column / what, **{table: change})
            with pytest.raises(DataError, match=rf"{table}.parquet: row group 0, row 3: .*{what}"):
                prepare(config(directory, **options))


@pytest.mark.parametrize(
    ("column", "options", "kind", "first"),
    [("item", ITEMS, np.float64, 2**53), ("user", USERS, np.float32, 2**24)],
)
def test_floats_that_equal_several_whole_keys_are_bad_rows(tmp_path, column, options, kind, first):
    """DuckDB's own comparison finds two keys for one event, which then comes twice."""
    table = f"{column}s"
    log = raw_logs.draw(3)
    for row in log["events"]:
        row[column] = kind(row[column] + (first if row is log["events"][50] else 0))
    log[table] += [{**log[table][0], column: first + number} for number in range(200)]
    raw_logs.write(tmp_path / "raw", {**log, "events": []}, "parquet")
    columns = {name: [row[name] for row in log["events"]] for name in raw_logs.COLUMNS}
    columns[column] = np.array(columns[column], kind)
    pq.write_table(pa.table(columns), tmp_path / "raw" / "events-0.parquet", row_group_size=50)
    what = f"value that is no BIGINT, as {table}_key is"
    with pytest.raises(DataError, match=f"row group 1, row 0: {what}"):
        prepare(config(tmp_path, **options))
    path = prepare(config(tmp_path, on_bad_row="skip", **options))
    assert skipped(path) == {what: 1}
    assert sum(json.loads((path / "report.json").read_text())["impressions"].values()) == 399


def test_a_float_key_that_several_events_equal_is_refused(tmp_path):
    for column, options in (("item", ITEMS), ("user", USERS)):

        def grow(n, row, column=column):
            row[column] = float(2**53 if n == 3 else row[column])

        directory = written(tmp_path / column, **{f"{column}s": grow})
        with pytest.raises(
            DataError, match=rf"{column}s.parquet: row group 0, row 3: .* no BIGINT"
        ):
            prepare(config(directory, **options))


def test_users_of_prior_histories_are_read_as_the_events_users_are(tmp_path):
    """A float among long whole numbers is the user of none of them, not of the nearest ones."""

    def lengthen(_, row):
        row["user"] += 2**53

    options = {"prior": PRIOR}
    as_floats = lambda _, row: row.update(user=float(row["user"]))  # noqa: E731
    first, second = hashes(tmp_path, options, {}, prior=as_floats)
    assert first == second
    as_texts = lambda _, row: row.update(user=str(row["user"]))  # noqa: E731
    texts = written(tmp_path / "texts", prior=as_texts)
    assert content_hash(prepare(config(texts, **options))) == first
    merged = written(
        tmp_path / "long",
        events=lengthen,
        prior=lambda n, row: (lengthen(n, row), as_floats(n, row)),
    )
    what = "value of the wrong type in column 'user', which is BIGINT"
    with pytest.raises(DataError, match=f"prior.parquet: row group 0, row 0: {what}"):
        prepare(config(merged, **options))


def test_dense_values_that_are_no_numbers_are_bad_rows(tmp_path):
    written(
        tmp_path,
        events=lambda n, e: e.update(price="n/a" if n == 50 else f"{n}.5"),
        users=lambda n, u: u.update(age="old" if n == 2 else str(u["age"])),
    )
    what = "value of candidate/price that is no number"
    for kind in ("quantile", "standard"):
        options = {"candidate": {"item": "e.item", "price": "price"}}
        options["kinds"] = {"candidate/price": kind}
        with pytest.raises(DataError, match=f"row group 1, row 0: {what}: 'n/a'"):
            prepare(config(tmp_path, **options))
        assert skipped(prepare(config(tmp_path, on_bad_row="skip", **options))) == {what: 1}
        options = {**USERS, "kinds": {"user/age": kind}}
        with pytest.raises(DataError, match=f"column 'user/age' is '{kind}' and has .*'old'"):
            prepare(config(tmp_path, **options))


def test_a_text_that_is_no_truth_value_is_a_bad_row(tmp_path):
    written(
        tmp_path,
        events=lambda n, e: e.update(liked="maybe" if n == 50 else str(e["rating"] > 2)),
    )
    what = "is_behaviour that is not true or false"
    with pytest.raises(DataError, match=f"row group 1, row 0: {what}: 'maybe'"):
        prepare(config(tmp_path, is_behaviour="liked"))
    assert skipped(prepare(config(tmp_path, is_behaviour="liked", on_bad_row="skip"))) == {what: 1}


def test_nan_among_whole_floats_is_a_missing_id(tmp_path):
    def change(number, event):
        event["clicked"] = float("nan") if number % 3 else float(event["item"])

    written(tmp_path, events=change)
    path = prepare(config(tmp_path, behaviour={"item": "clicked"}, min_count=1))
    values = pq.read_table(path / "vocabularies" / "item.parquet")["value"].to_pylist()
    assert all(isinstance(value, int) and 0 <= value < 25 for value in values)
    data = PreparedData.open(path)
    ids = data.histories.last_n(np.arange(data.histories.num_users), 100)["item"]
    assert (ids == 2).sum() > (ids > 2).sum() > 0


def test_an_expression_that_cannot_convert_a_value_hints_at_try_cast(tmp_path):
    written(tmp_path, events=lambda n, e: e.update(code="x" if n == 50 else str(n)))
    with pytest.raises(DataError, match="'x'.*; TRY_CAST gives NULL"):
        prepare(config(tmp_path, context={"code": "CAST(code AS INTEGER)"}))
    prepare(config(tmp_path, context={"code": "TRY_CAST(code AS INTEGER)"}))


def test_an_event_of_train_and_test_is_of_train_and_valid_goes_before_both(tmp_path):
    written(tmp_path)
    apart = {"train": "ts < 1000400", "test": "ts >= 1000500"}
    apart["valid"] = "ts BETWEEN 1000400 AND 1000499"
    both = {"train": "ts < 1000500", "test": "ts >= 1000300", "valid": apart["valid"]}
    found = {content_hash(prepare(config(tmp_path, **splits))) for splits in (apart, both)}
    assert len(found) == 1
