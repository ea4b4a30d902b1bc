"""Exported models: the same scores without this library, for platforms that are not here."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from configs.baselines_alibaba import ROWS
from ctr_jax import export, serving, sharding, steps
from ctr_jax.config import ConfigError
from ctr_jax.data import open_data
from ctr_jax.data.expected import expected_spec
from ctr_jax.raw_values import RawValues
from kernels import ahead_of_time
from tests.ctr_jax.test_serving import saved

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
pytest.importorskip("safetensors")
pytest.importorskip("flatbuffers")


@pytest.fixture(scope="module")
def raw_values(tmp_path_factory):
    """A log with every encoding: texts, integers, quantile buckets and standardised numbers."""
    import pyarrow as pa

    rng, rows = np.random.default_rng(0), 600
    item = rng.integers(0, 30, rows)
    price = np.where(rng.random(rows) < 0.1, np.nan, rng.normal(size=rows))
    ts = 1_000_000_000 + np.sort(rng.integers(0, 9**7, rows))
    table = dict(user=rng.integers(0, 20, rows), ts=ts, item=item,
                 name=[f"a name longer than sixteen {i}" for i in item],
                 price=pa.array(price, from_pandas=True), weight=pa.array(price, from_pandas=True),
                 label=rng.integers(0, 2, rows))  # fmt: skip
    directory = tmp_path_factory.mktemp("raw_values")
    pq.write_table(pa.table(table), directory / "events.parquet")
    return directory


@pytest.fixture
def trained(small_config, raw_values, tmp_path):
    """A config of that log, a checkpoint of it in tmp_path."""
    split = 1_000_000_000 + 9**7 // 2
    del small_config.data.user_table, small_config.data.users_key, small_config.data.user_columns
    small_config.data.candidate = dict(item="item", name="name", price="price", weight="weight")
    small_config.data.behaviour = dict(item="item", name="name")
    small_config.data.update(
        dict(name="values", raw_dir=str(raw_values), label="label", train=f"ts < {split}",
             test=f"ts >= {split}", time_floor=60,
             kinds={"candidate/price": "quantile", "candidate/weight": "standard"})
    )  # fmt: skip
    saved(small_config, tmp_path / "run")
    return small_config


def test_a_process_without_this_library_scores_alike(trained, tmp_path):
    page, out = tmp_path / "page.py", tmp_path / "exported"
    page.write_text(
        "import json\nfrom ml_collections import ConfigDict\n"
        f"def get_config(arg=''):\n    return ConfigDict(json.loads({trained.to_json()!r}))\n"
    )
    spec = open_data(trained).spec
    command = [sys.executable, "-m", "ctr_jax.export", f"--config={page}", "--shapes=2x5,1x3",
               f"--workdir={tmp_path / 'run'}", f"--out={out}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    about = json.loads((out / "model.json").read_text())
    assert (about["step"], about["platform"], about["time_floor"]) == (0, "cpu", 60)
    assert [f["file"] for f in about["functions"]] == ["score_2x5.jax", "score_1x3.jax"]
    assert about["data_hash"] == spec.content_hash
    assert about["encoding_hash"] == spec.encoding_hash != ""
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:];"
        "runpy.run_path(sys.argv[0], run_name='__main__');"
        "ours = ('ctr_jax', 'kernels', 'seqvault', 'baselines_jax', 'flax');"
        "print([m for m in sys.modules if m.split('.')[0] in ours])"
    )
    command = [sys.executable, "-c", code, ROOT / "examples" / "serve_exported.py", out]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "differ from those at the export by 0.0e+00" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("model", ["sparsectr_jax.model", "laser_jax.model", "lrea_jax.model"])
def test_logits_are_those_of_the_library(small_config, model, tmp_path):
    from serve_exported import Model

    small_config.model = import_module(model).default_config()
    small = dict(
        embedding_width=4, width=8, num_layers=1, num_heads=2, num_chunks=2, fusion_blocks=1
    )
    known = {name: size for name, size in small.items() if name in small_config.model}
    small_config.model.update(known)
    small_config.loss.weights = {"non_negativity": 0.3} if "lrea" in model else {}
    data = saved(small_config, tmp_path / "run")
    export.export(small_config, tmp_path / "run", tmp_path / "out", [(7, 1)])
    served = Model(tmp_path / "out").functions[7, 1]

    experiment, weights, _ = serving.restore(small_config, tmp_path / "run")
    batch = data.split("test").read(np.arange(7), small_config.history_length)
    with jax.set_mesh(experiment.mesh):
        expected = steps.score_step(experiment)(weights, batch)
    np.testing.assert_allclose(served(export.flat(batch)), expected, rtol=1e-5, atol=1e-6)


def test_raw_values_are_encoded_as_they_were_prepared(trained, raw_values, tmp_path):
    from serve_exported import Model

    export.export(trained, tmp_path / "run", tmp_path / "out", [(1, 1)])
    model = Model(tmp_path / "out")
    raw = pq.read_table(raw_values / "events.parquet").to_pydict()
    data = open_data(trained)
    requests = [data.split(s) for s in ("train", "valid", "test")]
    records = np.concatenate([r.records(np.arange(len(r))) for r in requests])
    records = records[np.argsort(records["request_time"], kind="stable")]
    order = np.argsort(raw["ts"], kind="stable")
    assert len(records) == len(order)
    for column in ("item", "name", "price", "weight"):
        values = [raw[column][i] for i in order]
        found = model.encode(f"candidate/{column}", values)
        stored = records[f"candidate/{column}"][:, 0]
        assert found.dtype == stored.dtype
        np.testing.assert_array_equal(found, stored, err_msg=column)
        assert len(np.unique(stored)) > 5
    library, nan, inf = RawValues(data), float("nan"), float("inf")
    for column, values in (
        ("name", ["never seen", None, "", "nan", raw["name"][0]]),
        ("item", [[0, 1.0], [None, nan], [10**9, np.int64(2)]]),
        ("item", np.array([[0, 1], [2, 10**9]])),
        ("price", [[None, nan], [inf, -inf], [0.5, 1e9]]),
        ("weight", [[None, nan], [inf, -inf], [0.5, 1]]),
        ("weight", np.array([nan, 0.5], np.float32)),
        ("item", []),
    ):
        expected = library.encode({f"candidate/{column}": values})[f"candidate/{column}"]
        found = model.encode(f"candidate/{column}", values)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected, err_msg=f"{column} {values}")
    for column, value in (
        ("name", 1), ("name", b"a"), ("item", "1"), ("item", True), ("item", 1.5), ("item", inf),
        ("item", ""), ("price", "1.5"), ("weight", "1.5"), ("weight", ""), ("weight", True),
    ):  # fmt: skip
        for encode in (model.encode, lambda k, v: library.encode({k: v})):
            with pytest.raises(ValueError, match=f"candidate/{column}"):
                encode(f"candidate/{column}", [None, value])


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_other_platforms_are_exported_for_here(trained, tmp_path, platform):
    about = export.export(trained, tmp_path / "run", tmp_path / "out", [(2, 4)], platform)
    artifact = (tmp_path / "out" / about["functions"][0]["file"]).read_bytes()
    exported = jax.export.deserialize(artifact)
    assert exported.platforms == (platform,) and exported.nr_devices == 1
    if platform == "tpu" and ahead_of_time.can_compile_for_tpu():
        given = jax.tree.unflatten(exported.in_tree, exported.in_avals)[0]
        given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given)
        assert ahead_of_time.tpu_bytes("v5e:2x2", exported.call, *given).arguments > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    ["sparsectr_alibaba", "laser_alibaba", "lrea_taobao"]
    + [f"baselines_alibaba:{row}" for row in ROWS],
)
def test_every_model_can_be_exported(page):
    module, _, variant = page.partition(":")
    config = import_module(f"configs.{module}").get_config(variant)
    config.history_length = min(config.history_length, 128)
    spec, _ = expected_spec(config, {})
    mesh = sharding.make_mesh(data=1)
    with jax.set_mesh(mesh):
        experiment = steps.bind(config, spec, mesh, 1)
        shapes = steps.state_shapes(experiment)
    weights = {name: shapes[name] for name in ("tables", "model", "model_state")}
    for platform in export.PLATFORMS:
        exported = export.lowered(experiment, weights, 2, 50, platform)
        assert exported.platforms == (platform,)
        assert [x.shape for x in exported.out_avals] == [(2, 50)]


def test_what_cannot_be_exported_says_so(trained, tmp_path, monkeypatch):
    for wrong, message in (
        (dict(shapes=[]), "shapes must be pairs"),
        (dict(shapes=[(0, 3)]), "shapes must be pairs"),
        (dict(platform="rocm"), "platform must be one of"),
        (dict(step=7), "no checkpoint of step 7"),
    ):
        with pytest.raises((ConfigError, FileNotFoundError), match=message):
            export.export(trained, tmp_path / "run", tmp_path / "out", **wrong)
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="is there already"):
        export.export(trained, tmp_path / "run", tmp_path / "there")
    with pytest.raises(ConfigError, match="write requests x candidates"):
        export.parse_shapes(["1x"])

    def fails(*_):
        raise OSError("no space left")

    monkeypatch.setattr(export, "write_json", fails)
    with pytest.raises(OSError, match="no space"):
        export.export(trained, tmp_path / "run", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []
