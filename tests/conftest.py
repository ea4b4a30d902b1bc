"""Every test sees eight CPU devices, so that meshes of several shapes run on any machine."""

import atexit
import os
import shutil
import tempfile

from tests.compiling import CHEAP

# Before jax looks for devices: the TPU compiler of the extra `test` needs none, and would be asked.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", CHEAP)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
# Tests that run the same step again, in this process or in one they start, compile it once.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # it is in the workers that pytest starts
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jax-cache-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session")
def small_log(tmp_path_factory):
    """A directory with events.parquet and users.parquet: 80 users, 30 events each, a taste per
    user that the ratings show."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    directory = tmp_path_factory.mktemp("small_log")
    rng = np.random.default_rng(0)
    users, events, items = 80, 30, 40
    user = np.repeat(np.arange(users), events)
    item = rng.integers(0, items, user.size)
    taste = rng.normal(size=(users, 4))
    likes = taste[user, item % 4] + rng.normal(size=user.size) > 0
    time = np.sort(rng.integers(0, 20 * 86400, (users, events)), axis=1).reshape(-1)
    table = pa.table(
        dict(user=user, item=item, category=item % 4, rating=np.where(likes, 5, 2),
             ts=1_000_000_000 + time)
    )  # fmt: skip
    pq.write_table(table, directory / "events.parquet")
    pq.write_table(
        pa.table(dict(user=np.arange(users), age=np.arange(users) % 5)), directory / "users.parquet"
    )
    return directory


@pytest.fixture(scope="session")
def prepared_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture
def small_config(small_log, prepared_dir):
    """A whole experiment that trains in seconds; tests change what they look at. Its model is the
    one that compiles fastest."""
    from baselines_jax import din
    from ctr_jax.config import base_config

    split = 1_000_000_000 + 15 * 86400
    config = base_config()
    config.name = "small"
    config.data.update(
        dict(builder="events", name="small", raw_dir=str(small_log),
             prepared_dir=str(prepared_dir), events=("events.parquet",), user="user", time="ts",
             user_table="users.parquet", users_key="user", label="rating >= 4", request="event",
             ties="order", train=f"ts < {split}", test=f"ts >= {split}", valid_fraction=0.1,
             candidate=dict(item="item", category="category"),
             behaviour=dict(item="item", category="category", rating="rating"),
             user_columns=dict(age="age"))
    )  # fmt: skip
    config.history_length = 12
    config.batch_size = 64
    config.eval_batch_size = 48
    config.model = din.default_config()
    config.model.update(
        dict(embedding_width=4, width=8, attention_hidden=(6,), head_hidden=(8,), activation="relu")
    )
    config.total_epochs = 0.0
    config.total_steps = 6
    config.log_steps = 2
    config.checkpoint_percent = 0.0
    config.checkpoint_steps = 3
    config.mesh.data = 1
    return config


@pytest.fixture
def small_sparsectr():
    """config.model of a SparseCTR that fits small_config."""
    from sparsectr_jax.model import default_config

    model = default_config()
    model.update(dict(embedding_width=4, width=8, num_layers=2, num_heads=2, num_chunks=3))
    return model
