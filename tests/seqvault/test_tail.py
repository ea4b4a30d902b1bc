"""The fresh tail against lists: any column types, users whose rows are not in order, compaction."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqvault.index import ENTRY
from seqvault.schema import TIME, Schema
from seqvault.tail import Tail

COLUMNS = {"a": "bool", "b": "int8", "c": "uint16", "d": "float32", "e": "int64", "f": "float64"}


@settings(max_examples=40, deadline=None)
@given(
    appends=st.lists(st.lists(st.integers(0, 4), max_size=9), max_size=6),
    columns=st.lists(st.sampled_from(sorted(COLUMNS)), unique=True),
    dropped=st.lists(st.integers(0, 4), unique=True),
    seed=st.integers(0, 99),
)
def test_rows_are_those_of_lists(appends, columns, dropped, seed):
    rng = np.random.default_rng(seed)
    schema = Schema({name: COLUMNS[name] for name in columns})
    tail, entries = Tail(schema, capacity=2), np.zeros(5, ENTRY)
    expected = [[] for _ in entries]
    for users in appends:
        rows = {TIME: rng.integers(0, 5, len(users)).astype(np.int32)}
        rows |= {n: rng.integers(0, 2, len(users)).astype(COLUMNS[n]) for n in columns}
        tail.add(entries, np.array(users, np.int64), rows)
        for i, user in enumerate(users):
            expected[user].append({name: values[i] for name, values in rows.items()})

    def check(tail):
        assert tail.live == sum(map(len, expected))
        starts, numbers = tail.rows(entries["tail"])
        assert np.diff(starts).tolist() == [len(rows) for rows in expected]
        records = tail.take(numbers)
        for user, rows in enumerate(expected):
            rows = sorted(rows, key=lambda row: row[TIME])  # stable, as ties keep their order
            for name in (TIME, *columns):
                found = records[name][starts[user] : starts[user + 1]]
                assert found.dtype == schema.stored[name]
                assert found.tolist() == [row[name].item() for row in rows]

    check(tail)
    tail.drop(entries, np.array(dropped, np.int64))
    for user in dropped:
        expected[user] = []
    check(tail)
    check(tail.compacted(entries))


@pytest.mark.parametrize("columns", [{}, COLUMNS, {"b": "int8"}])
def test_a_row_takes_what_its_columns_do(columns):
    tail = Tail(Schema(columns), capacity=1)
    width = 8 + sum(np.dtype(dtype).itemsize for dtype in columns.values())
    assert width <= tail.nbytes < width + 8
