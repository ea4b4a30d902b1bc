"""The page to copy prepares a log that has the columns it names, from Parquet and from CSV."""

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from ctr_jax.data.prepare import prepare
from ctr_jax.data.records import PreparedData
from examples import own_log


def write(directory, kind):
    rng = np.random.default_rng(0)
    n, users, items = 400, 10, 20
    tables = {
        "events-0": {
            "user_id": [f"u{user}" for user in rng.integers(0, users, n)],
            "item_id": [f"i{item}" for item in rng.integers(0, items, n)],
            "timestamp": 1_699_999_000 + 5 * np.arange(n),
            "clicked": rng.integers(0, 2, n),
            "slot": rng.integers(0, 3, n),
        },
        "items": {
            "item_id": [f"i{item}" for item in range(items)],
            "category": np.arange(items) % 4,
            "price": np.arange(items) + 0.5,
        },
        "users": {
            "user_id": [f"u{user}" for user in range(users)],
            "age": 20 + np.arange(users),
            "city": ["Köln, Süd", "Bonn"] * (users // 2),
        },
    }
    directory.mkdir()
    for name, columns in tables.items():
        writer = pyarrow.csv.write_csv if kind == "csv" else pq.write_table
        writer(pa.table(columns), directory / f"{name}.{kind}")


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_the_page_prepares_a_log_of_its_columns(tmp_path, kind):
    write(tmp_path / "raw", kind)
    options = own_log.get_config().data.to_dict()
    options.update(raw_dir=str(tmp_path / "raw"), prepared_dir=str(tmp_path / "prepared"))
    files = {"events": "events-*", "item_table": "items", "user_table": "users"}
    options |= {option: f"{name}.{kind}" for option, name in files.items()}
    data = PreparedData.open(prepare(options))
    assert data.spec.vocabularies["item"] == 3 + 20 and data.spec.vocabularies["city"] == 3 + 2
    assert data.spec.splits["test"] == 200
    records = data.split("test").records(np.arange(200))
    assert (records["candidate/price"][:, 0] >= 3).all() and (records["user/age"] >= 3).all()
    assert not records["candidate/item"][:, 1:].any() and (records["end"] > 0).any()
