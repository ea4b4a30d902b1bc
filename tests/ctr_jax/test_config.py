"""Pages: what is refused before anything is read or saved, and what a run is known by."""

import json

import pytest
from ml_collections import ConfigDict

from ctr_jax.checkpoints import Checkpoints
from ctr_jax.config import ConfigError, identity
from ctr_jax.training import train


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("best_metric", "valid/AUC", "choose one of valid/auc"),
        ("best_metric", "test/auc", "choose one of valid/auc"),
        ("best_metric", "valid/logloss", "choose one of .*-valid/logloss"),
        ("slices", ("candidate/nope",), "the columns are candidate/category"),
        ("dtype", "bf16", "choose one of float32"),
        ("keep_last", 0, "must be 1 or more"),
        ("batch_size", 0, "must be 1 or more"),
        ("micro_batch", -16, "must be 0 or more"),
        ("micro_batch", 5, "does not divide into micro-batches"),
        ("length_buckets", (6,), "the last of them history_length"),
        ("mesh.data", 9, "there are 8"),
        ("mesh.data", 0, "must be 1 or more, or -1"),
        ("mesh.table", 0, "mesh.table is 0; it must be 1 or more"),
        ("mesh.table", -1, "must be 1 or more"),
        ("model.base_rate", 0.0, "more than 0 and less than 1"),
        ("clip_norm", -1.0, "must be 0 or more"),
        ("clip_norm", float("nan"), "must be 0 or more"),
        ("optimizer.learning_rate", -1.0, "optimizer.learning_rate is -1.0; it must be 0 or more"),
        ("optimizer.b1", 1.5, "0 or more and less than 1"),
        ("table_optimizer.b2", 1.0, "0 or more and less than 1"),
        ("table_optimizer.eps", -1.0, "must be 0 or more"),
        ("table_optimizer.init_scale", -1.0, "must be 0 or more"),
        ("table_optimizer.final_fraction", 1.5, "from 0 to 1"),
        ("model.module", "ctr_jax.head", "is no model: it has no build"),
        ("model.module", "", "Empty module name"),
        ("model.module", "baselines_jax.dinn", "No module named"),
        ("model.module", "lrea_jax.model", "config.model has no field"),
        ("loss.weights", ConfigDict({"nothing": 1.0}), "has .'nothing'., the model the losses ..;"),
        ("learning_rate", 0.1, "config has no field 'learning_rate'"),
        ("optimizer.lr", 0.1, "config.optimizer has no field 'lr'"),
        ("model.embeding_width", 4, "did you mean embedding_width"),
    ],
)
def test_a_page_that_cannot_be_is_refused_before_anything_is_saved(
    small_config, tmp_path, field, value, says
):
    *groups, name = field.split(".")
    group = small_config
    for each in groups:
        group = group[each]
    group[name] = value
    with pytest.raises(ConfigError, match=says):
        train(small_config, tmp_path)
    assert not list(tmp_path.glob("checkpoints/*"))


def test_values_that_cannot_be_are_refused_before_data_are_read(small_config):
    small_config.data.builder = "none"
    for field, value in (("clip_norm", -1.0), ("best_metric", "test/auc")):
        config = small_config.copy_and_resolve_references()
        config[field] = value
        with pytest.raises(ConfigError, match=field):
            train(config, "nowhere")


def test_identity_covers_what_a_run_is(small_config):
    before = identity(small_config, "hash")
    small_config.total_steps = 1000
    small_config.mesh.data = 4
    small_config.data.raw_dir = "elsewhere"
    assert identity(small_config, "hash") == before
    small_config.batch_size = 32
    assert identity(small_config, "hash") != before
    assert identity(small_config, "other") != before


def test_what_only_speed_depends_on_is_no_part_of_a_run(small_config, tmp_path):
    """Nor is it where a checkpoint from before was saved with it."""
    small_config.total_steps, small_config.validate = 2, False
    train(small_config, tmp_path)
    for field in ("tile_bytes", "rows_per_tile"):
        small_config.model[field] = 1 << 20
    assert "tile_bytes" not in identity(small_config, "hash")["model"]
    (path,) = (tmp_path / "checkpoints" / "2" / "identity").glob("metadata*")
    saved = json.loads(path.read_text())
    saved["model"]["tile_bytes"] = 0
    path.write_text(json.dumps(saved))
    assert "tile_bytes" not in Checkpoints(tmp_path, read_only=True).identity(2)["model"]
