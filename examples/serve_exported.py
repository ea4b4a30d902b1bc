"""Scoring with an exported model: jax, numpy, safetensors and pyarrow, nothing of this library.

    python -m ctr_jax.export --config=configs/laser_alibaba.py:demo --out=DIR
    python examples/serve_exported.py DIR

Loads it, scores the request that was exported with it, compares with the logits that it had there,
and times the call. Take `Model` with you.
"""

import json
import numbers
import sys
import time
from pathlib import Path

import jax
import jax.export
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file

OOV, MISSING, FIRST_KNOWN = 1, 2, 3  # ids; 0 is padding


class Model:
    """What `ctr_jax.export` wrote into a directory.

    Attributes:
      about: model.json.
      functions: {(B, C): request -> logits [B, C]}; a request is {input's name: array}.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.about = json.loads((self.directory / "model.json").read_text())
        self._inputs = {i["name"]: i for i in self.about["inputs"]}
        self._vocabularies = {}
        weights = jax.device_put(load_file(self.directory / "weights.safetensors"))
        self.functions = {}
        for function in self.about["functions"]:
            exported = jax.export.deserialize((self.directory / function["file"]).read_bytes())
            shape = function["requests"], function["candidates"]
            self.functions[shape] = jax.tree_util.Partial(jax.jit(exported.call), weights)

    def encode(self, name: str, values) -> np.ndarray:
        """Raw values of an input, of any shape, as the model takes them: int32 or float32.

        As in preparation None and NaN are missing, and among texts "" and "nan"; what a vocabulary
        lacks is unknown.

        Raises:
          ValueError: a value is of another type than the raw log's: it would be unknown in silence.
        """
        encoding = self._inputs[name]["encoding"]
        table, kind = None, numbers.Real
        if "vocabulary" in encoding:
            table, kind = self._vocabulary(encoding["vocabulary"])
        no_text = ("", "nan") if kind is str else ()
        values = np.array(values, object)
        missing = _each(lambda v: v is None or v != v or v in no_text, values).astype(bool)
        for value in values[~missing]:
            odd = isinstance(value, bool) or not isinstance(value, kind)
            if odd or (isinstance(table, dict) and kind is not str and value % 1):
                raise ValueError(f"{name}: {value!r} is of another type than the raw log's")
        if isinstance(table, dict):
            ids = _each(lambda v: table.get(v, OOV), values)
            return np.where(missing, MISSING, ids).astype(np.int32)
        known = np.where(missing, np.nan, values).astype(float)
        if table is not None:
            ids = FIRST_KNOWN + np.searchsorted(table, known, side="right")
            return np.where(missing, MISSING, ids).astype(np.int32)
        known = np.where(np.isfinite(known), known, encoding["mean"])
        return np.float32((known - encoding["mean"]) / encoding["scale"])

    def _vocabulary(self, name: str) -> tuple[dict | np.ndarray, type]:
        """{value: id}, or the edges between buckets; and the type of raw values."""
        if name not in self._vocabularies:
            table = pq.read_table(self.directory / "vocabularies" / f"{name}.parquet")
            values, ids = table["value"].to_pylist(), table["id"].to_pylist()
            edges = pa.types.is_floating(table["value"].type)  # lower ones, the first is -inf
            known = np.array(values[1:]) if edges else dict(zip(values, ids, strict=True))
            number = edges or pa.types.is_integer(table["value"].type)
            self._vocabularies[name] = known, numbers.Real if number else str
        return self._vocabularies[name]


def _each(function, values: np.ndarray) -> np.ndarray:
    return np.frompyfunc(function, 1, 1)(values)


def main(directory: str) -> None:
    model = Model(directory)
    example = load_file(Path(directory) / "example.safetensors")
    expected = example.pop("logits")
    score = model.functions[expected.shape]

    began = time.perf_counter()
    logits = np.asarray(score(example))
    print(f"compiled and scored in {time.perf_counter() - began:.2f} s")
    difference = np.abs(logits - expected).max()
    print(f"logits differ from those at the export by {difference:.1e} at most")
    if not difference < 1e-2 * max(1.0, np.abs(expected).max()):
        raise SystemExit("that is too much: another model, or another device's arithmetic")

    seconds = []
    for _ in range(200):
        began = time.perf_counter()
        np.asarray(score(example))
        seconds.append(time.perf_counter() - began)
    p50, p99 = np.percentile(seconds, (50, 99)) * 1e3
    requests, candidates = expected.shape
    print(f"{requests} x {candidates} candidates: P50 {p50:.2f} ms, P99 {p99:.2f} ms")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/serve_exported.py DIR")
    main(sys.argv[1])
