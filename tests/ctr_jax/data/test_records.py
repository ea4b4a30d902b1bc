"""Records through TFDS and back, and batches against a reader that takes one record at a time."""

import dataclasses
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds

import seqvault
from ctr_jax.data.errors import DataError
from ctr_jax.data.records import PackedRequest, PreparedData, record_dtype, request_features
from ctr_jax.features import DataColumn, DataSpec

COLUMNS = (
    DataColumn("user", "age"),
    DataColumn("user", "activity", "dense"),
    DataColumn("context", "slot"),
    DataColumn("behaviour", "item"),
    DataColumn("behaviour", "kind"),
    DataColumn("candidate", "item"),
    DataColumn("candidate", "price", "dense"),
)
SIZES = {"train": 23, "test": 5}
USERS = 7
RNG = np.random.default_rng(2)


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes given records with TFDS itself."""

    VERSION = tfds.core.Version("1.0.0")
    name = "records"

    def __init__(self, spec, splits, **kwargs):
        self.spec, self.splits = spec, splits
        super().__init__(file_format="array_record", **kwargs)

    def _info(self):
        features = request_features(self.spec)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(rows) for name, rows in self.splits.items()}

    def _generate_examples(self, rows):
        for i, row in enumerate(rows):
            yield i, {"request": row}


def random_records(spec, size, lengths, rng):
    rows = np.zeros(size, record_dtype(spec))
    rows["user"] = rng.integers(0, USERS, size)
    rows["end"] = rng.integers(0, lengths[rows["user"]] + 1)
    rows["request_id"], rows["request_time"] = np.arange(size), rng.integers(0, 2**31, size)
    rows["num_candidates"] = rng.integers(1, spec.max_candidates + 1, size)
    rows["label"] = rng.integers(0, 2, rows["label"].shape)
    for column in spec.columns:
        field = f"{column.group}/{column.name}"
        if column.group != "behaviour":
            rows[field] = rng.integers(0, 1000, rows[field].shape) / (
                2 if column.kind == "dense" else 1
            )
    if spec.inline_history:
        rows["num_behaviours"] = rng.integers(0, spec.inline_history + 1, size)
        for row in rows:
            seen = slice(spec.inline_history - row["num_behaviours"], None)
            for field in ("behaviour/item", "behaviour/kind", "behaviour_time"):
                row[field][seen] = rng.integers(1, 2**31 - 1, row["num_behaviours"])
    return rows


def prepare(directory, inline_history=0, max_candidates=3):
    """A data set as a builder leaves it, with the records and histories that it holds."""
    spec = DataSpec("records", COLUMNS, {}, max_candidates, inline_history, splits=SIZES)
    rng = np.random.default_rng(0)
    lengths = np.array([0, 1, 30, 4, 12, 0, 9])
    splits = {name: random_records(spec, size, lengths, rng) for name, size in SIZES.items()}
    builder = Builder(spec, splits, data_dir=directory)
    builder.download_and_prepare()
    spec.save(builder.data_path / "spec.json")
    rows = int(lengths.sum())
    block = {
        "user": np.repeat(np.arange(USERS), lengths),
        "time": np.arange(rows),
        "item": rng.integers(1, 70_000, rows),
        "kind": rng.integers(1, 5, rows),
    }
    if not inline_history:
        schema = seqvault.Schema({"item": np.int32, "kind": np.uint8})
        seqvault.bulk_build(builder.data_path / "histories", schema, USERS, [block])
    return builder.data_path, splits, block


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("stored"))


@pytest.fixture(scope="module")
def inline(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("inline"), inline_history=6, max_candidates=1)


def reference_row(row, spec, block, length):
    """One row of a batch, field by field in plain Python."""
    if spec.inline_history:
        seen = int(row["num_behaviours"])
        history = {
            name: row[field][spec.inline_history - seen :].tolist()
            for name, field in (
                ("item", "behaviour/item"),
                ("kind", "behaviour/kind"),
                ("time", "behaviour_time"),
            )
        }
    else:
        mine = [i for i in range(len(block["user"])) if block["user"][i] == row["user"]]
        mine = mine[: row["end"]]
        history = {name: [int(block[name][i]) for i in mine] for name in ("item", "kind", "time")}
    history = {name: values[max(0, len(values) - length) :] for name, values in history.items()}
    pad = [0] * (length - len(history["time"]))
    count = int(row["num_candidates"])
    return {
        "user_id": row["user"],
        "request_id": row["request_id"],
        "request_time": row["request_time"],
        "user": {"age": row["user/age"], "activity": row["user/activity"]},
        "context": {"slot": row["context/slot"]},
        "behaviour": {name: pad + history[name] for name in ("item", "kind")},
        "behaviour_time": pad + history["time"],
        "behaviour_mask": [False] * len(pad) + [True] * len(history["time"]),
        "candidate": {"item": row["candidate/item"], "price": row["candidate/price"]},
        "candidate_mask": [True] * count + [False] * (spec.max_candidates - count),
        "label": row["label"],
    }


@pytest.mark.parametrize("kind", ["stored", "inline"])
@pytest.mark.parametrize("length", [1, 4, 6, 40])
def test_batches_equal_single_records(kind, length, request):
    path, splits, block = request.getfixturevalue(kind)
    data = PreparedData.open(path)
    for name, rows in splits.items():
        requests = data.split(name)
        assert len(requests) == len(rows)
        indices = np.random.default_rng(1).permutation(len(rows))
        batch = requests.read(indices, length)
        assert batch.shape == (len(rows), length, data.spec.max_candidates)
        for position, index in enumerate(indices):
            wanted = reference_row(rows[index], data.spec, block, length)
            for field, value in wanted.items():
                found = getattr(batch, field)
                for part in value if isinstance(value, dict) else [None]:
                    array = found if part is None else found[part]
                    expected = value if part is None else value[part]
                    np.testing.assert_array_equal(array[position], expected, f"{field} {part}")


def test_types_of_a_batch(stored):
    batch = PreparedData.open(stored[0]).split("train").read(np.arange(2), 4)
    for ids in (batch.user_id, batch.request_id, batch.request_time, batch.behaviour_time):
        assert ids.dtype == np.int32
    assert {x.dtype for x in batch.behaviour.values()} == {np.dtype(np.int32)}
    assert batch.user["activity"].dtype == batch.candidate["price"].dtype == np.float32
    assert batch.label.dtype == np.float32
    assert batch.candidate_mask.dtype == batch.behaviour_mask.dtype == bool


def test_as_data_source_gives_named_arrays(stored):
    path, splits, _ = stored
    source = tfds.builder_from_directory(path).as_data_source("train")
    assert len(source) == SIZES["train"]
    for i in (0, 7, 22):
        found = source[i]["request"]
        assert list(found) == list(splits["train"].dtype.names)
        for name, value in found.items():
            np.testing.assert_array_equal(value, splits["train"][i][name])


def test_encoding_accepts_a_record_its_bytes_or_its_fields():
    spec = DataSpec("records", COLUMNS, {}, 2)
    feature, row = PackedRequest(spec), random_records(spec, 1, np.ones(USERS, int), RNG)[0]
    fields = {name: row[name] for name in row.dtype.names}
    assert feature.encode_example(row) == row.tobytes()
    assert feature.encode_example(fields) == feature.encode_example(row.tobytes()) == row.tobytes()
    for wrong in (row.tobytes()[1:], np.zeros(3), dict(list(fields.items())[1:])):
        with pytest.raises(DataError, match="layout"):
            feature.encode_example(wrong)


def test_the_layout_is_fixed():
    spec = DataSpec("records", COLUMNS, {}, 2, inline_history=3)
    assert record_dtype(spec).descr == [
        ("user", "<i4"),
        ("end", "<i4"),
        ("request_id", "<i4"),
        ("request_time", "<i4"),
        ("user/age", "<i4"),
        ("user/activity", "<f4"),
        ("context/slot", "<i4"),
        ("candidate/item", "<i4", (2,)),
        ("candidate/price", "<f4", (2,)),
        ("label", "|u1", (2,)),
        ("num_candidates", "<i4"),
        ("behaviour/item", "<i4", (3,)),
        ("behaviour/kind", "<i4", (3,)),
        ("behaviour_time", "<i4", (3,)),
        ("num_behaviours", "<i4"),
    ]


def test_indices_out_of_range(stored):
    requests = PreparedData.open(stored[0]).split("test")
    for index in (-1, 5):
        with pytest.raises(IndexError, match=f"record {index} "):
            requests.read(np.array([0, index]), 4)


def test_no_rows_at_all(stored):
    batch = PreparedData.open(stored[0]).split("test").read(np.zeros(0, int), 4)
    assert batch.shape == (0, 4, 3) and batch.user["age"].shape == (0,)


def test_broken_data_sets_are_named(tmp_path):
    path, _, _ = prepare(tmp_path)

    def refused(file, content, message, then=lambda: PreparedData.open(path)):
        whole = file.read_bytes()
        file.write_bytes(content(whole)) if content else file.unlink()
        with pytest.raises(DataError, match=message):
            then()
        file.write_bytes(whole)

    shard = next(path.glob("*train*array_record*"))
    train = lambda: PreparedData.open(path).split("train")  # noqa: E731
    refused(path / "spec.json", None, "no prepared data")
    refused(path / "spec.json", lambda b: b[:-9], "spec.json: damaged")
    refused(path / "features.json", lambda b: b[:-9], "TFDS cannot read")
    refused(path / "dataset_info.json", None, "TFDS cannot read")
    refused(path / "histories" / "index.sv", lambda b: b[:-1], "index.sv: .* bytes")
    refused(shard, None, f"{shard.name}: missing", train)
    refused(shard, lambda b: b[: len(b) // 2], f"{shard.name}: damaged", train)
    refused(shard, lambda b: b"", f"{shard.name}: damaged", train)

    spec = DataSpec.load(path / "spec.json")
    fields = json.loads((path / "spec.json").read_text())
    for change, message in (
        ({"max_candidates": 4}, "record layouts .* differ"),
        ({"splits": {"train": 24, "test": 5}}, "'train': 24"),
    ):
        other = json.dumps(fields | change).encode()
        refused(path / "spec.json", lambda _, other=other: other, message)
    columns = tuple(c for c in spec.columns if c.name != "kind") + (
        DataColumn("behaviour", "shop"),
    )
    dataclasses.replace(spec, columns=columns).save(path / "spec.json")
    with pytest.raises(DataError, match="shop"):
        PreparedData.open(path)
    spec.save(path / "spec.json")
    with pytest.raises(DataError, match="no split 'dev'; it has .'test', 'train'."):
        PreparedData.open(path).split("dev")


def test_another_writers_layout_is_refused(tmp_path):
    """Equal counts, but records that TFDS did not write around our bytes."""
    from array_record.python import array_record_module

    path, splits, _ = prepare(tmp_path)
    shard = next(path.glob("*train*array_record*"))
    for change in (lambda b: b[:-1], lambda b: b"\x0b" + b[1:]):
        writer = array_record_module.ArrayRecordWriter(str(shard), "group_size:1")
        features = request_features(DataSpec.load(path / "spec.json"))
        for row in splits["train"]:
            writer.write(change(features.serialize_example({"request": row})))
        writer.close()
        with pytest.raises(DataError, match="another writer's layout"):
            PreparedData.open(path).split("train")


def test_a_flipped_byte_never_becomes_data(tmp_path):
    path, splits, _ = prepare(tmp_path)
    shard = next(path.glob("*train*array_record*"))
    whole, refusals = shard.read_bytes(), 0
    for i in range(0, len(whole), 331):
        shard.write_bytes(whole[:i] + bytes([whole[i] ^ 16]) + whole[i + 1 :])
        try:
            found = PreparedData.open(path).split("train").records(np.arange(SIZES["train"]))
        except DataError as error:
            assert shard.name in str(error)
            refusals += 1
        else:
            assert found.tobytes() == splits["train"].tobytes()
    assert refusals
