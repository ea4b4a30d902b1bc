"""Records: the fixed-width rows of a prepared data set, and how batches of them are read.

A record is one row of a request as a little-endian numpy structure (`record_dtype`). TFDS keeps it
in array_record files as a tf.Example whose only feature is the structure's bytes. All records
being equally long, so is the protocol buffer around them: a constant prefix, then the record. A
batch is therefore decoded by joining its records and reading the columns out of one buffer.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module

import seqvault
from ctr_jax.batch import RequestBatch
from ctr_jax.data.errors import DataError
from ctr_jax.features import DataColumn, DataSpec

REQUEST = "request"  # the one feature of the TFDS data set
HISTORIES = "histories"
SPEC = "spec.json"
_RECORDS_AT_ONCE = 1 << 14


def record_dtype(spec: DataSpec) -> np.dtype:
    """The packed little-endian structure of one record.

    Fields, in order: user, end, request_id, request_time (int32), user/<name>, context/<name>
    (int32 ids or float32 values), candidate/<name> [C], label [C] uint8, with weights weight [C]
    float32, num_candidates int32; with
    inline histories also behaviour/<name> [L] and behaviour_time [L] int32, right-aligned, and
    num_behaviours int32.
    """
    value = {"id": "<i4", "dense": "<f4"}
    fields: list[tuple] = [(n, "<i4") for n in ("user", "end", "request_id", "request_time")]
    for group in ("user", "context"):
        fields += [(f"{group}/{c.name}", value[c.kind]) for c in spec.group(group)]
    candidates = (spec.max_candidates,)
    fields += [(f"candidate/{c.name}", value[c.kind], candidates) for c in spec.group("candidate")]
    fields += [("label", "u1", candidates)]
    fields += [("weight", "<f4", candidates)] if spec.weighted else []
    fields += [("num_candidates", "<i4")]
    if spec.inline_history:
        history = (spec.inline_history,)
        fields += [(f"behaviour/{c.name}", "<i4", history) for c in spec.group("behaviour")]
        fields += [("behaviour_time", "<i4", history), ("num_behaviours", "<i4")]
    return np.dtype(fields)


class PackedRequest(tfds.features.FeatureConnector):
    """The TFDS feature that stores one record as its bytes.

    Encodes a scalar of `record_dtype(spec)` (or its bytes, or a mapping of its fields); decodes
    to a dict of numpy arrays named after the fields.
    """

    def __init__(self, spec: DataSpec, *, doc: Any = None):
        super().__init__(doc=doc)
        self.spec = dataclasses.replace(spec, vocabularies={}, content_hash="", splits={})
        self.record_dtype = record_dtype(spec)

    def get_tensor_info(self) -> dict[str, tfds.features.TensorInfo]:
        fields = self.record_dtype.fields.items()
        return {
            name: tfds.features.TensorInfo(shape=field.shape, dtype=field.base)
            for name, (field, *_) in fields
        }

    def get_serialized_info(self) -> tfds.features.TensorInfo:
        return tfds.features.TensorInfo(shape=(), dtype=np.object_)

    def encode_example(self, example_data: Any) -> bytes:
        """The record's bytes.

        Raises:
          DataError: it is not a record of this layout.
        """
        if isinstance(example_data, Mapping):
            record = np.zeros((), self.record_dtype)
            if set(example_data) != set(self.record_dtype.names):
                raise DataError(
                    f"a record has fields {sorted(example_data)}; the layout has "
                    f"{sorted(self.record_dtype.names)}"
                )
            for name, value in example_data.items():
                record[name] = value
            return record.tobytes()
        if not isinstance(example_data, bytes):
            if getattr(example_data, "dtype", None) != self.record_dtype:
                kind = getattr(example_data, "dtype", type(example_data).__name__)
                raise DataError(f"a record is {kind}; the layout is {self.record_dtype}")
            example_data = example_data.tobytes()
        if len(example_data) != self.record_dtype.itemsize:
            raise DataError(
                f"a record has {len(example_data)} bytes; the layout has "
                f"{self.record_dtype.itemsize}"
            )
        return example_data

    def decode_example(self, tfexample_data: Any) -> Any:
        raise NotImplementedError("records are decoded by numpy; read them with as_data_source()")

    def decode_example_np(self, example_data: bytes) -> dict[str, np.ndarray]:
        record = np.frombuffer(example_data, self.record_dtype)[0]
        return {name: record[name] for name in self.record_dtype.names}

    def to_json_content(self) -> dict[str, Any]:
        return {
            "name": self.spec.name,
            "columns": [dataclasses.asdict(c) for c in self.spec.columns],
            "max_candidates": self.spec.max_candidates,
            "inline_history": self.spec.inline_history,
            "weighted": self.spec.weighted,
        }

    @classmethod
    def from_json_content(cls, value: Mapping[str, Any], doc: Any = None) -> PackedRequest:
        columns = tuple(DataColumn(**c) for c in value["columns"])
        spec = DataSpec(
            value["name"],
            columns,
            {},
            value["max_candidates"],
            value["inline_history"],
            weighted=value.get("weighted", False),
        )
        return cls(spec, doc=doc)


def request_features(spec: DataSpec) -> tfds.features.FeaturesDict:
    """The features of a prepared data set; a builder yields {"request": record}."""
    return tfds.features.FeaturesDict({REQUEST: PackedRequest(spec)})


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """An immutable prepared data set: its description, its requests and their histories.

    Attributes:
      path: its directory.
      spec: the columns, vocabularies, splits and content hash.
      histories: the history store, or None where records carry their own histories.
    """

    path: Path
    spec: DataSpec
    histories: seqvault.Snapshot | None
    _shards: dict[str, tuple[tuple[str, int], ...]]  # {split: ((file, records), ...)}

    @classmethod
    def open(cls, path: str | os.PathLike) -> PreparedData:
        """Opens the data set in `path`; nothing but descriptions is read.

        Raises:
          DataError: something is missing, damaged or does not fit together; the message names it.
        """
        path = Path(path)
        try:
            spec = DataSpec.load(path / SPEC)
        except FileNotFoundError:
            raise DataError(f"{path / SPEC}: no such file, so this is no prepared data") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path / SPEC}: damaged ({error})") from None
        try:
            info = tfds.builder_from_directory(path).info
        except Exception as error:  # TFDS raises whatever its JSON and protos do
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{path}: TFDS cannot read the data set ({reason})") from error
        feature = dict(info.features or {}).get(REQUEST)
        if not isinstance(feature, PackedRequest) or feature.record_dtype != record_dtype(spec):
            raise DataError(f"{path}: the record layouts of features.json and {SPEC} differ")
        shards = {
            name: tuple(zip(map(str, split.filepaths), split.shard_lengths, strict=True))
            for name, split in info.splits.items()
        }
        counts = {name: sum(n for _, n in files) for name, files in shards.items()}
        if any(counts.get(name, 0) != records for name, records in spec.splits.items()):
            raise DataError(f"{path}: {SPEC} counts {spec.splits}, dataset_info.json {counts}")
        return cls(path, spec, _open_histories(path, spec), shards)

    def split(self, name: str) -> Requests:
        """The requests of one split: "train", "valid" or "test".

        Raises:
          DataError: there is no such split, or one of its files is damaged.
        """
        if name not in self._shards and name not in self.spec.splits:
            raise DataError(f"{self.path}: no split {name!r}; it has {sorted(self.spec.splits)}")
        return Requests(name, self._shards.get(name, ()), self.spec, self.histories)


class Requests:
    """The requests of one split, read in batches by index; thread-safe."""

    def __init__(
        self,
        name: str,
        shards: tuple[tuple[str, int], ...],
        spec: DataSpec,
        histories: seqvault.Snapshot | None,
    ):
        self.name = name
        self.spec = spec
        self._histories = histories
        self._dtype = record_dtype(spec)
        self._prefix = _constant_prefix(spec)
        self._files = [file for file, records in shards if records]
        self._ends = np.cumsum([records for _, records in shards if records], dtype=np.int64)
        self._readers = [_open_shard(file, records) for file, records in shards if records]
        for shard in range(len(self._files)):
            self._read_shard(shard, np.zeros(1, np.int64))  # refuse an unknown layout now

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __repr__(self) -> str:
        return f"Requests({self.spec.name!r}, {self.name!r}, {len(self)} records)"

    def records(self, indices: np.ndarray) -> np.ndarray:
        """The records `indices` [N]: a [N] array of `record_dtype(spec)`.

        Raises:
          IndexError: an index is out of range.
          DataError: a file is damaged.
        """
        indices = np.asarray(indices, np.int64)
        bad = (indices < 0) | (indices >= len(self))
        if bad.any():
            raise IndexError(f"record {indices[bad.argmax()]} of {self!r}")
        shard_of = np.searchsorted(self._ends, indices, side="right")
        raw = np.empty((len(indices), len(self._prefix) + self._dtype.itemsize), np.uint8)
        for shard in np.unique(shard_of):
            here = np.flatnonzero(shard_of == shard)
            first = self._ends[shard - 1] if shard else 0
            raw[here] = self._read_shard(shard, indices[here] - first)
        framed = np.dtype([("prefix", "V", len(self._prefix)), ("record", self._dtype)])
        return raw.view(framed)[:, 0]["record"]

    def history_lengths(self) -> np.ndarray:
        """How many behaviours each request may see: [len(self)] int32. Reads every record.

        Raises:
          DataError: a file is damaged.
        """
        field = "num_behaviours" if self.spec.inline_history else "end"
        lengths = np.empty(len(self), np.int32)
        for start in range(0, len(self), _RECORDS_AT_ONCE):
            rows = np.arange(start, min(start + _RECORDS_AT_ONCE, len(self)))
            lengths[rows] = self.records(rows)[field]
        return lengths

    def read(self, indices: np.ndarray, history_length: int) -> RequestBatch:
        """The requests `indices` [B] with their last `history_length` behaviours, as numpy arrays.

        Histories are right-aligned, oldest first; ids, times and values of padding are 0.

        Raises:
          IndexError: an index is out of range.
          DataError: a file is damaged.
        """
        rows = self.records(indices)
        behaviour, time, mask = self._histories_of(rows, history_length)
        candidate_mask = np.arange(self.spec.max_candidates) < rows["num_candidates"][:, None]

        def columns(group: str) -> dict[str, np.ndarray]:
            names = (c.name for c in self.spec.group(group))
            return {name: np.ascontiguousarray(rows[f"{group}/{name}"]) for name in names}

        return RequestBatch(
            user_id=np.ascontiguousarray(rows["user"]),
            request_id=np.ascontiguousarray(rows["request_id"]),
            request_time=np.ascontiguousarray(rows["request_time"]),
            user=columns("user"),
            context=columns("context"),
            behaviour=behaviour,
            behaviour_time=time,
            behaviour_mask=mask,
            candidate=columns("candidate"),
            candidate_mask=candidate_mask,
            label=rows["label"].astype(np.float32),
            weight=np.ascontiguousarray(rows["weight"]) if self.spec.weighted else None,
        )

    def _histories_of(
        self, rows: np.ndarray, length: int
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Behaviour columns, times and mask, each [B, length]."""
        names = [c.name for c in self.spec.group("behaviour")]
        if self._histories is not None:
            found = self._histories.last_n(rows["user"], length, end=rows["end"], columns=names)
            behaviour = {name: found[name].astype(np.int32, copy=False) for name in names}
            return behaviour, found["time"], found["mask"]
        mask = np.arange(length) >= length - rows["num_behaviours"][:, None]
        kept = min(length, self.spec.inline_history)

        def last(values: np.ndarray) -> np.ndarray:
            out = np.zeros(mask.shape, np.int32)
            out[:, length - kept :] = values[:, self.spec.inline_history - kept :]
            return out * mask

        behaviour = {name: last(rows[f"behaviour/{name}"]) for name in names}
        return behaviour, last(rows["behaviour_time"]), mask

    def _read_shard(self, shard: int, positions: np.ndarray) -> np.ndarray:
        """The stored bytes of records of one file: [N, prefix + record] uint8."""
        file, width = self._files[shard], len(self._prefix) + self._dtype.itemsize
        try:
            raw = b"".join(self._readers[shard].read(positions.tolist()))
        except Exception as error:  # array_record raises what its C++ side says
            raise DataError(f"{file}: cannot be read, damaged or changed ({error})") from error
        if len(raw) == len(positions) * width:
            rows = np.frombuffer(raw, np.uint8).reshape(-1, width)
            if (rows[:, : len(self._prefix)] == self._prefix).all():
                return rows
        raise DataError(
            f"{file}: records are not {self._dtype.itemsize} bytes behind the expected "
            f"{len(self._prefix)} of a tf.Example; another writer's layout, prepare the data again"
        )


def _constant_prefix(spec: DataSpec) -> np.ndarray:
    """What TFDS writes in front of every record: [P] uint8."""
    record = np.zeros((), record_dtype(spec))
    stored = request_features(spec).serialize_example({REQUEST: record})
    return np.frombuffer(stored, np.uint8)[: len(stored) - record.nbytes]


def _open_shard(file: str, records: int) -> Any:
    """A reader of one array_record file, which must hold `records` records."""
    if not os.path.isfile(file):  # the reader itself takes it for an empty one
        raise DataError(f"{file}: missing from the prepared data")
    try:
        # Read ahead helps only sequential reads; batches of a shuffled epoch jump.
        reader = array_record_module.ArrayRecordReader(file, options="readahead_buffer_size:0")
        found = reader.num_records()
    except Exception as error:  # array_record raises what its C++ side says
        raise DataError(f"{file}: damaged ({error})") from error
    if found != records:
        raise DataError(f"{file}: damaged ({found} records, dataset_info.json says {records})")
    return reader


def _open_histories(path: Path, spec: DataSpec) -> seqvault.Snapshot | None:
    """The store beside the records, with the behaviour columns that the spec names."""
    if spec.inline_history:
        return None
    try:
        snapshot = seqvault.Snapshot(path / HISTORIES)
    except seqvault.VaultError as error:
        raise DataError(str(error)) from error
    wanted = {c.name for c in spec.group("behaviour")}
    if not wanted <= set(snapshot.schema.columns):
        raise DataError(
            f"{path / HISTORIES}: has columns {sorted(snapshot.schema.columns)}, {SPEC} names "
            f"{sorted(wanted)}"
        )
    return snapshot
