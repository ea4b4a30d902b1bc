"""What a plan refuses, before the log is read."""

from __future__ import annotations

import pytest

from ctr_jax import command_line
from ctr_jax.data.errors import DataError
from ctr_jax.data.plan import Field, Plan
from ctr_jax.data.prepare import prepare
from seqvault import VaultError
from tests.ctr_jax.data import raw_logs
from tests.ctr_jax.data.test_events import config


def plan(*fields: Field, **options) -> Plan:
    return Plan(fields=fields, max_candidates=1, **options)


def test_names_that_differ_in_case_alone_are_refused():
    message = "'candidate/item' and 'candidate/Item' have one name, case not counting"
    with pytest.raises(DataError, match=f"^columns {message}"):
        plan(Field("candidate", "item"), Field("candidate", "Item", vocabulary="other"))
    with pytest.raises(DataError, match="^vocabularies 'item' and 'Item' have one name"):
        plan(Field("candidate", "item"), Field("context", "Item"))
    plan(Field("candidate", "item"), Field("context", "Item", vocabulary="item"))


@pytest.mark.parametrize("name", ["time", "user", "mask", "a b", "é"])
def test_behaviours_that_the_store_cannot_name_are_refused_before_the_log_is_read(tmp_path, name):
    raw_logs.write(tmp_path / "raw", raw_logs.draw(3), "csv")
    (tmp_path / "raw" / "events-0.csv").write_text("never read")
    options = config(tmp_path, events="events-*.csv", behaviour={name: "e.item"})
    with pytest.raises(DataError, match=f"behaviour columns: column name '{name}'"):
        prepare(options)
    plan(Field("behaviour", name), inline_history=5)


def test_what_is_the_users_to_mend_is_one_line_at_the_command_line():
    assert VaultError in command_line.mendable() and DataError in command_line.mendable()
    for error in (DataError("no such column"), OSError("no space left"), KeyError("other")):
        with pytest.raises(SystemExit, match=f"^{type(error).__name__}: "):
            with command_line.one_line(KeyError):
                raise error
    with pytest.raises(KeyError), command_line.one_line():
        raise KeyError


@pytest.mark.parametrize("name", ["", 'a"b'])
def test_names_that_sql_cannot_hold_are_refused(name):
    with pytest.raises(DataError, match="a name needs a character, and none may be"):
        Field("context", name)


@pytest.mark.parametrize("option", ["max_candidates", "min_count", "buckets"])
def test_counts_are_whole_numbers(tmp_path, option):
    raw_logs.write(tmp_path / "raw", raw_logs.draw(3), "parquet")
    for value in ("3", 2.5, None):
        with pytest.raises(DataError, match=f"^{option} is {value!r}; use a whole number$"):
            prepare(config(tmp_path, **{option: value}))
    with pytest.raises(DataError, match="^valid_fraction is '.5'; use a fraction"):
        prepare(config(tmp_path, valid_fraction=".5"))


def test_only_what_is_wrong_is_named():
    with pytest.raises(DataError, match="^ties is 'sometimes'; use 'strict' or 'order'$"):
        plan(ties="sometimes")
    with pytest.raises(DataError, match="^no such request 'day'$"):
        plan(request="day")
