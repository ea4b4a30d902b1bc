"""Scoring with an exported model: jax, numpy, safetensors and pyarrow, nothing of this library.

    python -m ctr_jax.export --config=configs/laser_alibaba.py:demo --out=DIR
    python examples/serve_exported.py DIR

Loads it, scores the request that was exported with it, compares with the logits that it had there,
and times the call. Take `Model` with you.
"""

import json
import sys
import time
from pathlib import Path

import jax
import jax.export
import numpy as np
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

    def encode(self, name: str, values: list) -> np.ndarray:
        """Raw values of an input as the model takes them: [N] int32 or float32.

        Values are numbers where the vocabulary's are, else texts; None and NaN are missing, and
        among texts "" and "nan".
        """
        encoding = self._inputs[name]["encoding"]
        missing = np.array([v is None or v != v or v in ("", "nan") for v in values], bool)
        if "mean" in encoding:
            known = np.where(missing, encoding["mean"], values).astype(float)
            return np.float32((known - encoding["mean"]) / encoding["scale"])
        table = self._vocabulary(encoding["vocabulary"])
        if isinstance(table, np.ndarray):  # lower edges of buckets, the first one's -inf
            known = np.where(missing, 0, values).astype(float)
            ids = FIRST_KNOWN + np.searchsorted(table[1:], known, side="right")
        else:
            ids = [table.get(v, OOV) for v in values]
        return np.where(missing, MISSING, ids).astype(np.int32)

    def _vocabulary(self, name: str) -> dict | np.ndarray:
        if name not in self._vocabularies:
            table = pq.read_table(self.directory / "vocabularies" / f"{name}.parquet")
            values, ids = table["value"].to_pylist(), table["id"].to_pylist()
            edges = values and isinstance(values[0], float)
            known = np.array(values) if edges else dict(zip(values, ids, strict=True))
            self._vocabularies[name] = known
        return self._vocabularies[name]


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
    main(sys.argv[1])
