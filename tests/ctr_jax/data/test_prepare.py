"""prepare(): once per options and files, the same hash for the same content, nothing half-made."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from ctr_jax.data import builder as builder_lib
from ctr_jax.data import histories as histories_lib
from ctr_jax.data import prepare as prepare_lib
from ctr_jax.data import requests as requests_lib
from ctr_jax.data import synthetic
from ctr_jax.data.prepare import prepare
from ctr_jax.data.records import PreparedData
from ctr_jax.data.report import Histogram, table
from ctr_jax.data.vocabulary import Vocabulary
from tests.ctr_jax.data import raw_logs
from tests.ctr_jax.data.test_events import config


def content_hash(path: Path) -> str:
    return PreparedData.open(path).spec.content_hash


def test_the_same_options_and_files_are_prepared_once(tmp_path, monkeypatch):
    raw_logs.write(tmp_path / "raw", raw_logs.draw(0), "parquet")
    first = prepare(config(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(builder_lib, "connect", None)  # any further preparation would fail
        assert prepare(config(tmp_path)) == first
        assert prepare(config(tmp_path, threads=1, memory_limit="500MB")) == first
    other = prepare(config(tmp_path, min_count=30))
    assert other != first and content_hash(other) != content_hash(first)
    file = tmp_path / "raw" / "events-0.parquet"
    os.utime(file, ns=(1, 1))
    touched = prepare(config(tmp_path))
    assert touched != first and content_hash(touched) == content_hash(first)


@pytest.mark.parametrize(
    "changes", [{"request": "time", "max_candidates": 2}, {"request": "event", "ties": "order"}]
)
def test_the_hash_depends_on_content_only(tmp_path, monkeypatch, changes):
    log = raw_logs.draw(0, events=5000)
    raw_logs.write(tmp_path / "raw", log, "csv", parts=2)
    changes = {"events": "events-*.csv", **changes}
    hashes = set()
    for i, threads in enumerate((1, 2)):
        directory = str(tmp_path / f"prepared-{i}")
        path = prepare(config(tmp_path, prepared_dir=directory, threads=threads, **changes))
        hashes.add(content_hash(path))
    with monkeypatch.context() as patch:  # cut everything into other pieces
        patch.setattr(builder_lib, "SHARD_BYTES", 2000)
        patch.setattr(requests_lib, "BATCH_ROWS", 100)
        patch.setattr(histories_lib, "BLOCK_ROWS", 100)
        directory = str(tmp_path / "prepared-small")
        path = prepare(config(tmp_path, prepared_dir=directory, **changes))
        assert len(list(path.glob("events-train.array_record-*"))) > 5
        hashes.add(content_hash(path))
    assert len(hashes) == 1
    log["events"][100]["rating"] = 5 if log["events"][100]["rating"] < 4 else 1
    raw_logs.write(tmp_path / "raw", log, "csv", parts=2)
    path = prepare(config(tmp_path, **changes))
    assert content_hash(path) not in hashes


def test_tfds_reads_what_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(builder_lib, "SHARD_BYTES", 2000)
    raw_logs.write(tmp_path / "raw", raw_logs.draw(0), "parquet")
    path = prepare(config(tmp_path))
    source = tfds.builder_from_directory(path).as_data_source("test")
    records = PreparedData.open(path).split("test").records(np.arange(len(source)))
    for i in (0, 1, len(source) - 1):
        decoded = source[i]["request"]
        assert set(decoded) == set(records.dtype.names)
        for name, value in decoded.items():
            np.testing.assert_array_equal(value, records[name][i])


STAGES = {
    "load": "ctr_jax.data.events.Events.load",
    "histories": "ctr_jax.data.histories.build_histories",
    "records": "ctr_jax.data.builder.write_split",
    "spec": "ctr_jax.data.builder.PreparedBuilder.finish",
    "sync": "ctr_jax.data.builder._sync",
}


@pytest.mark.parametrize("stage", STAGES)
def test_an_error_leaves_nothing(tmp_path, monkeypatch, stage):
    raw_logs.write(tmp_path / "raw", raw_logs.draw(0), "parquet")

    def crash(*_):
        raise RuntimeError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(STAGES[stage], crash)
        with pytest.raises(RuntimeError, match="crash"):
            prepare(config(tmp_path))
    assert not [p for p in (tmp_path / "prepared").rglob("*") if p.is_file() and p.name != ".lock"]
    PreparedData.open(prepare(config(tmp_path)))


KILLED = """
import os, signal, sys
from pathlib import Path
from unittest import mock
sys.path.insert(0, {root!r})
from ctr_jax.data.prepare import prepare
from tests.ctr_jax.data.test_events import config
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
with mock.patch({target!r}, die):
    prepare(config(Path({directory!r})))
"""


@pytest.mark.parametrize(
    "stage", ["sync", *(pytest.param(s, marks=pytest.mark.slow) for s in STAGES if s != "sync")]
)
def test_a_killed_preparation_is_never_accepted(tmp_path, stage):
    raw_logs.write(tmp_path / "raw", raw_logs.draw(0), "parquet")
    root = str(Path(__file__).parents[3])
    code = KILLED.format(root=root, target=STAGES[stage], directory=str(tmp_path))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert result.returncode == -signal.SIGKILL, result.stderr[-2000:]
    leftovers = list((tmp_path / "prepared").rglob("incomplete.*"))
    assert leftovers
    path = prepare(config(tmp_path))
    shutil.rmtree(tmp_path / "raw")
    PreparedData.open(path)
    assert not list((tmp_path / "prepared").rglob("incomplete.*"))


def test_of_two_at_once_one_prepares(tmp_path, monkeypatch):
    raw_logs.write(tmp_path / "raw", raw_logs.draw(0), "parquet")
    times = []
    finish = builder_lib.PreparedBuilder.finish
    monkeypatch.setattr(
        builder_lib.PreparedBuilder, "finish", lambda *a: (times.append(1), finish(*a))
    )
    paths = []
    threads = [
        threading.Thread(target=lambda: paths.append(prepare(config(tmp_path)))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 2 and paths[0] == paths[1] and len(times) == 1


def test_vocabulary_encodes_like_the_records(tmp_path):
    log = raw_logs.draw(0)
    raw_logs.write(tmp_path / "raw", log, "parquet")
    path = prepare(config(tmp_path, context={"tab": "tab"}, ties="order"))
    tests = [e for e in log["events"] if e["ts"] >= raw_logs.TEST_FROM]
    tests.sort(key=lambda e: (e["ts"], e["user"]))  # the order of records
    records = PreparedData.open(path).split("test").records(np.arange(len(tests)))
    items = Vocabulary.load(path / "vocabularies" / "item.parquet")
    found = items.encode(np.array([e["item"] for e in tests]))
    np.testing.assert_array_equal(found, records["candidate/item"][:, 0])
    tabs = Vocabulary.load(path / "vocabularies" / "tab.parquet")
    missing = np.array([e["tab"] is None for e in tests])
    found = tabs.encode(np.array([e["tab"] or "" for e in tests]), missing)
    np.testing.assert_array_equal(found, records["context/tab"])
    assert tabs.encode(np.array([["zzz"]])).tolist() == [[1]]


def test_one_long_text_does_not_widen_a_vocabulary(tmp_path):
    values = np.array(["x" * 100_000, *(f"item{i}" for i in range(2000))], object)
    ids = np.arange(3, 3 + len(values), dtype=np.int32)
    path = tmp_path / "item.parquet"
    pq.write_table(pa.table({"value": pa.array(values), "id": ids, "count": ids}), path)
    tracemalloc.start()
    try:
        vocabulary = Vocabulary.load(path)
        found = vocabulary.encode_column(pa.array([*values, None, "item", "item7\0"]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.tolist() == [*ids, 2, 1, 1]
    assert peak < 10e6  # as wide as its longest text everywhere, each array would be 800 MB


def test_texts_of_every_length_get_their_own_ids():
    rng = np.random.default_rng(0)
    letters = list("abcé|")
    texts = sorted({"".join(rng.choice(letters, rng.integers(1, 41))) for _ in range(600)})
    wanted = [str(t) for t in rng.permutation(texts)]
    for size in (0, 1, 2, 3, 7, 8, 300):
        known = {str(t): i for i, t in enumerate(rng.permutation(texts)[:size], 3)}
        ids = np.array(list(known.values()), np.int32)
        vocabulary = Vocabulary(np.array(list(known), np.dtypes.StringDType()), ids)
        for some in (wanted, wanted[:40], wanted[-1:]):  # where they lie in memory must not matter
            found = vocabulary.encode_column(pa.array(some))
            assert found.tolist() == [known.get(t, 1) for t in some]


LOGS = {
    "alibaba": {"users": 40, "behaviours": 60, "sessions": 4},
    "amazon": {"users": 50, "behaviours": 10.0, "items": 100, "categories": 5},
}


@pytest.mark.parametrize("builder", LOGS)
def test_a_log_is_generated_where_its_options_say_so(tmp_path, builder):
    data = {"builder": builder, "raw_dir": str(tmp_path / "new" / "raw"), "generate": LOGS[builder]}
    prepare_lib.generate(ConfigDict(data))
    prepare_lib.generate(ConfigDict({**data, "generate": None}))
    path = prepare({**data, "prepared_dir": str(tmp_path / "prepared")})
    assert len(PreparedData.open(path).split("test")) > 0


def run_module(module: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"ctr_jax.data.{module}", *arguments]
    return subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)


PAGE = """
from ml_collections import ConfigDict
def get_config():
    return ConfigDict({"name": "small", "data": %r})
"""


@pytest.mark.parametrize(
    "module", ["prepare", pytest.param("prepare_beam", marks=pytest.mark.slow)]
)
def test_the_programs_generate_prepare_and_name_unknown_fields(tmp_path, module):
    data = {"builder": "alibaba", "generate": LOGS["alibaba"], "min_count": 2}
    data.update(raw_dir=str(tmp_path / "raw"), prepared_dir=str(tmp_path / "prepared"))
    page = tmp_path / "page.py"
    page.write_text(PAGE % data)
    done = run_module(module, f"--config={page}", "--config.data.min_counts=3")
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1] == (
        "--config.data.min_counts: small has no such field; did you mean --config.data.min_count?"
    )
    if module == "prepare_beam":
        pytest.importorskip("apache_beam", reason="Apache Beam is not installed")
    done = run_module(module, f"--config={page}", "--config.data.min_count=3")
    assert done.returncode == 0, done.stderr[-2000:]
    PreparedData.open(Path(done.stdout.splitlines()[-1]))


def test_the_true_probabilities_alone_are_read_for_their_auc(tmp_path, monkeypatch):
    read = []
    table = synthetic.pq.read_table

    def read_table(path, columns=None):
        read.append(columns)
        return table(path, columns=columns)

    monkeypatch.setattr(synthetic.pq, "read_table", read_table)
    counts = synthetic.generate(tmp_path, synthetic.SyntheticConfig(**LOGS["alibaba"]))
    assert read == [["time_stamp", "clk", "probability"]]
    assert counts["oracle_auc"]["test"] == pytest.approx(synthetic.oracle_auc(tmp_path), abs=1e-6)


def test_histogram_and_table():
    values = np.random.default_rng(0).integers(0, 50, 1000)
    histogram = Histogram()
    for part in np.array_split(values, 7):
        histogram.add(part)
    found = histogram.summary()
    assert found["number"] == 1000 and found["p100"] == values.max()
    assert found["mean"] == pytest.approx(values.mean(), abs=1e-3)
    assert found["p50"] == np.sort(values)[499]
    text = table("split", {"train": {"a": 1000}, "test": {"b": 2.5}})
    assert text.splitlines() == ["split      a    b", "train  1,000", "test          2.5"]
