"""The TFDS builder that all raw logs share: from a builder's three views to a prepared data set.

Nothing half-made is ever accepted: everything is written inside TFDS's `incomplete.*` directory,
which is renamed to its final name at the very end, after an fsync of every file.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder
from tqdm import tqdm

import seqvault
from ctr_jax.data import given_vocabularies, keys, raw, vocabulary
from ctr_jax.data import histories as histories_lib
from ctr_jax.data import requests as requests_lib
from ctr_jax.data.column_checks import check_columns
from ctr_jax.data.errors import DataError
from ctr_jax.data.plan import Field, Plan
from ctr_jax.data.records import HISTORIES, REQUEST, SPEC, record_dtype, request_features
from ctr_jax.data.report import Histogram, RecordStatistics, period, summary
from ctr_jax.features import DataSpec

VERSION = "1.0.0"
REPORT, VOCABULARIES, SCRATCH = "report.json", "vocabularies", "scratch"
SHARD_BYTES = 32 << 20
_LENGTH_CHUNK = 1 << 16

Report = dict[str, Any]


@dataclasses.dataclass(eq=False)
class PreparationConfig(tfds.core.BuilderConfig):
    """One data set: the options of the config and the raw files they name.

    `name` carries their fingerprint, so other options or files are another data set.
    """

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: tuple[Path, ...] = ()

    def __repr__(self) -> str:  # TFDS logs it
        return self.name


class PreparedBuilder(FileReaderBuilder, abc.ABC, skip_registration=True):
    """Base of the builders. A subclass says which files it reads, its plan, and loads the views.

    Shards are written as they stream, in TFDS's own layout but without its shuffler and its
    per-example Python (0.1 ms a record): training shuffles by itself, and every record being
    equally long, the protocol buffer around it is a constant prefix.
    """

    VERSION = tfds.core.Version(VERSION)
    read_table = staticmethod(raw.load)  # how `load` reads a raw table

    @staticmethod
    @abc.abstractmethod
    def raw_files(options: Mapping[str, Any]) -> list[Path]:
        """The raw files that the options name.

        Raises:
          DataError: one is absent; says what to put where.
        """

    @staticmethod
    @abc.abstractmethod
    def plan(options: Mapping[str, Any]) -> Plan:
        """The declaration of columns, requests and ties."""

    @staticmethod
    def shard_keys(options: Mapping[str, Any]) -> dict[str, str]:
        """{raw table: SQL of its user}: the tables that may be cut by user, the others are small.

        {} = the log cannot be prepared user by user.
        """
        del options
        return {}

    @abc.abstractmethod
    def load(self, con: duckdb.DuckDBPyConnection, report: Report) -> None:
        """Reads and checks the raw files and creates the views of plan.py."""

    @property
    def options(self) -> Mapping[str, Any]:
        return self.builder_config.options

    def spec(self) -> DataSpec:
        """The spec as far as it is known before preparation: names, columns, shapes."""
        plan = self.plan(self.options)
        return DataSpec(
            name=self.options.get("name") or self.name,
            columns=tuple(f.column for f in plan.fields),
            vocabularies={},
            max_candidates=plan.max_candidates,
            inline_history=plan.inline_history,
            weighted=plan.weighted,
        )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=request_features(self.spec()))

    def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
        del dl_manager, download_config
        directory = Path(self._data_dir)  # TFDS points this at the incomplete directory
        scratch = directory / SCRATCH
        scratch.mkdir()
        con = connect(scratch, self.options)
        try:
            self._report: Report = {"rows": {}, "skipped": {}, "dropped": {}}
            self._digest = hashlib.sha256()
            splits = []
            for split, (count, records) in self.prepare_splits(con, directory).items():
                template = self._get_filename_template(split_name=split)
                splits.append(write_split(template, self.spec(), records, count))
            self.info.set_splits(tfds.core.SplitDict(splits))
        finally:
            con.close()
        shutil.rmtree(scratch)
        self.finish(directory)
        _sync(directory)

    def _log_download_bytes(self) -> None:
        """Nothing is downloaded; TFDS would announce an "unknown size"."""

    def _log_download_done(self) -> None:
        """See _log_download_bytes."""

    def prepare_splits(
        self, con: duckdb.DuckDBPyConnection, directory: Path
    ) -> dict[str, tuple[int, Iterator[np.ndarray]]]:
        """Fits, builds the histories, and returns {split: (number of records, their stream)}."""
        plan, report = self.plan(self.options), self._report
        self.load(con, report)
        check_columns(con, plan)
        report["bounds"] = requests_lib.split_impressions(con, plan)
        sizes = requests_lib.group_sizes(con, plan)
        check_splits(sizes)
        dense = self.fit_vocabularies(con, plan, directory / VOCABULARIES)

        ends = directory / SCRATCH / "ends.parquet"
        history_hash = histories_lib.build_histories(con, plan, dense, directory / HISTORIES, ends)
        self._digest.update(history_hash.encode())
        self.report_counts(directory, requests_lib.known_behaviours(con), sizes)

        encoders = self.encoders(directory / VOCABULARIES, dense)
        encoded_users = requests_lib.encode_users(con, encoders["user"])
        keys.write_users(con, "user_ids", directory)
        request_type = keys.request_type(con, plan)
        dtype = record_dtype(self.spec())
        groups = requests_lib.group_sizes(con, plan, by_context=True)
        if groups != sizes:
            report["several_contexts"] = requests_lib.several_contexts(con, plan)
        prepared, first = {}, 0
        for split in requests_lib.SPLITS:
            count = requests_lib.num_records(groups[split], plan.max_candidates)
            records = requests_lib.split_records(
                con, plan, split, encoders["row"], encoded_users, dtype, directory / HISTORIES,
                ends, first,
            )  # fmt: skip
            blocks = ((block, raw_keys) for _, block, raw_keys in records)
            records = keys.written(directory, split, request_type, blocks)
            prepared[split] = (count, self.watched(split, count, records))
            first += report["requests"][split]
        return prepared

    def report_counts(
        self,
        directory: Path,
        known: tuple[int, int | None, int | None],
        sizes: Mapping[str, Mapping[int, int]],
    ) -> None:
        """Reports users, behaviours (of the log's `known_behaviours`) and the sizes of requests."""
        report = self._report
        kept = seqvault.Snapshot(directory / HISTORIES)
        number, first, last = known
        report["dropped"]["behaviours of users without impressions"] = number - kept.num_behaviours
        if number:
            report.setdefault("times", {})["behaviours"] = period(first, last)
        lengths = Histogram()
        for first in range(0, kept.num_users, _LENGTH_CHUNK):
            last = min(first + _LENGTH_CHUNK, kept.num_users)
            lengths.add(kept.lengths(np.arange(first, last)))
        report["users"] = kept.num_users
        report["behaviours"] = kept.num_behaviours
        report["impressions"] = {s: sum(k * n for k, n in c.items()) for s, c in sizes.items()}
        report["requests"] = {s: sum(c.values()) for s, c in sizes.items()}
        report["group_sizes"] = sizes
        report["history_lengths"] = {"all users": lengths.summary()}

    def encoders(
        self, vocabularies: Path, dense: dict[str, vocabulary.Dense]
    ) -> dict[str, list[vocabulary.Encoder]]:
        """The encoders of the "user" columns and of the columns of an impression's "row"."""
        plan = self.plan(self.options)
        groups = {"user": ("user",), "row": ("context", "candidate")}
        return {
            name: [vocabulary.Encoder(f, vocabularies, dense) for f in plan.group(*members)]
            for name, members in groups.items()
        }

    def fit_vocabularies(
        self,
        con: duckdb.DuckDBPyConnection,
        plan: Plan,
        directory: Path,
        counts: Callable[[list[Field]], str] | None = None,
    ) -> dict[str, vocabulary.Dense]:
        """Fits, or takes from `vocabularies_from`, and writes every vocabulary; returns the
        encodings of the dense columns.

        Args:
          counts: gives the SQL of vocabulary.counts of fields; None = over this database.
        """
        counts = counts or functools.partial(vocabulary.counts, con, plan)
        directory.mkdir()
        names = [*plan.vocabularies("id"), *plan.vocabularies("quantile")]
        if source := self.options.get("vocabularies_from"):
            taken = given_vocabularies.take(con, plan, Path(source), directory, counts)
            sizes, dense, self._report["known"] = taken
        else:
            sizes, dense = vocabulary.fit(con, plan, directory, counts)
        self._hashes = {
            name: self._hash_file(directory / f"{name}.parquet", not source) for name in names
        }
        self._report["vocabularies"] = sizes
        self._report["standardised (mean, scale)"] = {
            f.key: [dense[f.key].mean, dense[f.key].scale]
            for f in plan.fields
            if f.kind == "standard"
        }
        return dense

    def watched(
        self, split: str, count: int, records: Iterator[np.ndarray]
    ) -> Iterator[np.ndarray]:
        """The stream itself, hashed, counted and shown on a progress bar."""
        ends, waste, seen, found = Histogram(), 0, 0, RecordStatistics(self.spec())
        self._digest.update(split.encode())
        with tqdm(total=count, desc=split, unit=" records", disable=None, unit_scale=True) as bar:
            for block in records:
                self._digest.update(block.tobytes())
                seen += len(block)
                waste += int((block["label"].shape[1] - block["num_candidates"]).sum())
                lengths = "num_behaviours" if "num_behaviours" in block.dtype.names else "end"
                ends.add(block[lengths])
                found.add(block)
                bar.update(len(block))
                yield block
        if seen != count:
            raise RuntimeError(f"{split}: {count} records were announced, {seen} came")
        self._report["history_lengths"][split] = ends.summary()
        for name, value in found.report().items():
            self._report.setdefault(name, {})[split] = value
        self._report.setdefault("records", {})[split] = seen
        self._report.setdefault("empty_candidate_slots", {})[split] = waste

    def finish(self, directory: Path) -> None:
        """Writes report.json and spec.json, which carries the content hash; prints the tables."""
        report, plan = self._report, self.plan(self.options)
        spec = dataclasses.replace(
            self.spec(), vocabularies=report["vocabularies"], splits=report["records"]
        )
        fields = dataclasses.asdict(spec)
        del fields["encoding"], fields["weighted"]  # follow from what is hashed already
        self._digest.update(json.dumps(fields, sort_keys=True).encode())
        encoding = {
            "columns": [f"{f.key} {f.kind} {f.column.vocabulary}".rstrip() for f in plan.fields],
            "vocabularies": self._hashes,
            "standardised": report["standardised (mean, scale)"],
        }
        spec = dataclasses.replace(spec, content_hash=self._digest.hexdigest(), encoding=encoding)
        (directory / REPORT).write_text(json.dumps(report, indent=1))
        spec.save(directory / SPEC)
        print(summary(spec, report), flush=True)

    def _hash_file(self, path: Path, fitted: bool) -> str:
        """Adds a vocabulary's content, not its bytes: those change with the parquet writer. Counts
        are of the rows it was fitted on, so of this data set only where that was here.

        Returns:
          16 digits of the sha256 of its values and ids.
        """
        meaning = hashlib.sha256()
        self._digest.update(path.name.encode())
        for batch in pq.ParquetFile(path).iter_batches():
            values = "\0".join(map(str, batch["value"].to_pylist())).encode()
            for content in (values, batch["id"].to_numpy().astype("<i4").tobytes()):
                self._digest.update(content)
                meaning.update(content)
            if fitted:
                self._digest.update(batch["count"].to_numpy().astype("<i8").tobytes())
        return meaning.hexdigest()[:16]


def connect(scratch: Path, options: Mapping[str, Any]) -> duckdb.DuckDBPyConnection:
    """A DuckDB database in `scratch` that sorts and joins out of core.

    Options: `memory_limit` (DuckDB's, default 1GB; the process needs a few hundred MB more) and
    `threads` (0 = all cores). Neither changes the result.
    """
    con = duckdb.connect(str(scratch / "raw.duckdb"))
    spill = str(scratch / "spill").replace("'", "''")
    con.execute(f"SET temp_directory = '{spill}'")
    con.execute(f"SET memory_limit = '{options.get('memory_limit') or '1GB'}'")
    con.execute("SET enable_progress_bar = false")
    # A time with a zone is a moment and must not be read by the machine's clock. GLOBAL, because
    # cursors do not inherit what is set on a connection.
    con.execute("SET GLOBAL TimeZone = 'UTC'")
    if options.get("threads"):
        con.execute(f"SET threads = {int(options['threads'])}")
    return con


def check_splits(sizes: Mapping[str, Mapping[int, int]]) -> None:
    """Raises DataError if a split has no impressions."""
    for split, counts in sizes.items():
        if not counts:
            raise DataError(
                f"split {split!r} has no impressions; check the split options, valid_fraction and "
                "the times of the raw log"
            )


def write_split(
    template: Any, spec: DataSpec, records: Iterator[np.ndarray], count: int
) -> tfds.core.SplitInfo:
    """Writes one split's records to array_record shards of about 32 MiB, as TFDS reads them.

    Stored uncompressed: ids hardly compress one record at a time, and reading is twice as fast.

    Args:
      template: the TFDS file name template of the split.
      records: `count` records in blocks.
    """
    dtype = record_dtype(spec)
    example = request_features(spec).serialize_example({REQUEST: np.zeros((), dtype)})
    prefix = example[: len(example) - dtype.itemsize]  # the same for all: records are equally long
    per_shard = max(1, SHARD_BYTES // len(example))
    lengths = [min(per_shard, count - first) for first in range(0, count, per_shard)]
    paths = [
        template.sharded_filepath(shard_index=i, num_shards=len(lengths))
        for i in range(len(lengths))
    ]
    stream = (
        prefix + data[i : i + dtype.itemsize]
        for data in (block.tobytes() for block in records)
        for i in range(0, len(data), dtype.itemsize)
    )
    for path, length in zip(paths, lengths, strict=True):
        writer = array_record_module.ArrayRecordWriter(os.fspath(path), "group_size:1,uncompressed")
        for record in itertools.islice(stream, length):
            writer.write(record)
        writer.close()
    if next(stream, None) is not None:
        raise RuntimeError(f"more than the announced {count} records came")
    return tfds.core.SplitInfo(
        name=template.split,
        shard_lengths=lengths,
        num_bytes=sum(path.stat().length for path in paths),
        filename_template=template,
    )


def _sync(directory: Path) -> None:
    """Makes every file below `directory` durable, so that the rename cannot outrun the data."""
    for path in [*directory.rglob("*"), directory]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
