"""Shards and backends: several vaults, or a foreign store, read as one vault."""

import shutil
import socket
import subprocess
import time

import numpy as np
import pytest

import seqvault
from seqvault.backend_vault import BackendVault
from seqvault.backends import DirectoryBackend, RedisBackend
from seqvault.shards import Shards, shard_of
from seqvault.writing import cuts
from tests.seqvault.oracle import SCHEMA, Oracle, draw


@pytest.mark.parametrize("threads", [0, 3])
def test_shards_behave_as_one(tmp_path, threads):
    rng = np.random.default_rng(0)
    shards = Shards([seqvault.Vault.create(tmp_path / str(i), SCHEMA) for i in range(3)], threads)
    oracle, everyone = Oracle(), np.arange(-2, 30)
    for _ in range(4):
        users, columns = draw(rng, 150, users=28)
        assert shards.append_many(users, columns, sync=True) == 150
        oracle.append(users, columns)
        shards.merge(1000)
        before = rng.integers(0, 40, len(everyone))
        for arguments in ({}, {"before": before}, {"before": 20}):
            found = shards.last_n(everyone, 5, **arguments)
            for i, user in enumerate(everyone.tolist()):
                cut = {k: np.broadcast_to(v, everyone.shape)[i] for k, v in arguments.items()}
                wanted = oracle.last_n(user, 5, **cut)
                assert found["mask"][i].sum() == len(wanted)
                items = found["item"][i, 5 - len(wanted) :].tolist()
                assert items == [row[1] for row in wanted]
        lengths = [len(oracle.history(user)) for user in everyone.tolist()]
        assert shards.lengths(everyone).tolist() == lengths
        same = shards.last_n(everyone, 5, end=shards.resolve(everyone, before))
        wanted = shards.last_n(everyone, 5, before=before)
        assert all((same[name] == wanted[name]).all() for name in wanted)
    assert sum(len(b["user"]) for b in shards.scan()) == 600
    assert min(vault.users().size for vault in shards.vaults) > 0
    assert shards.last_n(np.zeros(0, int), 3)["item"].shape == (0, 3)
    shards.close()


def splitmix(user):
    """The finaliser of SplitMix64, in Python integers."""
    x = user % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_the_shard_of_a_user_never_changes():
    users = np.array([0, 1, 2, 3, -1, 2**62], np.int64)
    assert (shard_of(users.view(np.uint64), 7) == shard_of(users, 7)).all()
    assert shard_of(users, 1009).tolist() == [splitmix(int(u)) % 1009 for u in users]
    counts = np.bincount(shard_of(np.arange(70_000), 7))
    assert counts.min() > 9_500


def free_port():
    """A port such that a cluster's bus, 10,000 above it, is a port too."""
    while True:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            if (port := taken.getsockname()[1]) <= 55_000:
                return port


def start_redis(directory, *options):
    """(process, port) of a Redis server on loopback."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    redis = pytest.importorskip("redis", reason="the client is not installed (pip install redis)")
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    process = subprocess.Popen(
        [*command, "--dir", str(directory), *options], stdout=subprocess.DEVNULL
    )
    client = redis.Redis(port=port, retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0))
    for _ in range(600):
        assert process.poll() is None, f"redis-server ended with {process.returncode}"
        try:
            client.ping()
            client.close()
            return process, port
        except redis.ConnectionError:
            time.sleep(0.05)
    process.kill()
    raise AssertionError("redis-server did not start")


@pytest.fixture(params=["directory", "redis", "cluster"])
def backend(request, tmp_path):
    if request.param == "directory":
        yield DirectoryBackend(tmp_path / "blocks")
        return
    options = []
    if request.param == "cluster":
        options = ["--cluster-enabled", "yes", "--cluster-config-file", str(tmp_path / "nodes")]
    process, port = start_redis(tmp_path, *options)
    import redis

    client = redis.Redis(port=port)
    if request.param == "cluster":  # one node that owns every slot is a whole cluster
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        while "cluster_state:ok" not in str(client.execute_command("CLUSTER", "INFO")):
            time.sleep(0.05)
        client.close()
        client = redis.cluster.RedisCluster(host="127.0.0.1", port=port)
    yield RedisBackend(client)
    client.close()
    process.kill()
    process.wait()


def test_parts_in_a_backend_read_like_a_vault(backend):
    rng = np.random.default_rng(0)
    vault = BackendVault(backend, SCHEMA, "shop", block_rows=4)
    other = BackendVault(backend, SCHEMA, "shop2", block_rows=4)
    oracle, everyone = Oracle(), np.arange(-1, 7)
    for _ in range(5):
        users, columns = draw(rng, 40, users=6)
        vault.append_many(users, columns)
        other.append_many(users[:1], {n: c[:1] for n, c in columns.items()})
        oracle.append(users, columns)
        oracle.check(vault, everyone, rng)
    keys = set(backend.list_keys("shop/"))
    assert {f"shop/default/{u}" for u in range(6)} <= keys
    assert all(key.startswith("shop/") for key in keys)
    blocks = sum(len(list(cuts(len(oracle.history(user)), 4))) for user in range(6))
    assert len(keys) == blocks + 1  # what nobody names is deleted; the schemas
    whole = backend.get_blocks(["shop/default/3"])[0]
    for bit in range(7, 8 * len(whole), 101):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        backend.put_blocks({"shop/default/3": bytes(flipped)})
        try:
            assert vault.lengths([3]).tolist() == [len(oracle.history(3))]
            found = vault.last_n([3], 4)
        except (seqvault.DamagedError, seqvault.VaultError):
            continue
        wanted = oracle.last_n(3, 4)
        assert found["item"][0].tolist() == [row[1] for row in wanted]
    assert vault.last_n([2], 4)["mask"].all()
    with pytest.raises(seqvault.VaultError, match="negative"):
        vault.last_n([2], -1)
