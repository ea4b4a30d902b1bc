"""Where blocks live, in a distributed store that a team already runs: a protocol of four calls.

`BackendVault` keeps the parts of histories there. A backend is not trusted with the bytes: every
block carries its checksums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, unquote

from seqvault.files import Files


class Backend(Protocol):
    """Where blocks live. Keys are short ASCII strings without spaces."""

    def get_blocks(self, keys: Sequence[str]) -> list[bytes | None]:
        """The blocks under `keys`, None for one that is not there; one round trip if it can."""

    def put_blocks(self, blocks: Mapping[str, bytes]) -> None:
        """Stores blocks, each replaced whole; if it raises, any of them may be stored."""

    def delete_blocks(self, keys: Sequence[str]) -> None:
        """Removes blocks; a key that is not there is no error."""

    def list_keys(self, prefix: str) -> Iterator[str]:
        """All keys that start with `prefix`, in no order."""


class DirectoryBackend:
    """Blocks as files of a local directory: for tests, and for file systems that are shared."""

    def __init__(self, path: Path):
        self._path, self._files = Path(path), Files()
        self._files.make_directory(self._path)

    def get_blocks(self, keys: Sequence[str]) -> list[bytes | None]:
        blocks: list[bytes | None] = []
        for key in keys:
            try:
                blocks.append((self._path / quote(key, safe="")).read_bytes())
            except FileNotFoundError:
                blocks.append(None)
        return blocks

    def put_blocks(self, blocks: Mapping[str, bytes]) -> None:
        for key, block in blocks.items():
            self._files.write_whole(self._path / quote(key, safe=""), block)

    def delete_blocks(self, keys: Sequence[str]) -> None:
        for key in keys:
            (self._path / quote(key, safe="")).unlink(missing_ok=True)

    def list_keys(self, prefix: str) -> Iterator[str]:
        for file in self._path.iterdir():
            if not file.name.endswith(".part") and unquote(file.name).startswith(prefix):
                yield unquote(file.name)


class RedisBackend:
    """Blocks in Redis or Redis Cluster, which most recommendation teams run beside their ranker.

    Durability is the server's: `appendfsync always` for what must survive a power loss.
    """

    def __init__(self, client):
        """`client`: a redis.Redis or redis.cluster.RedisCluster with decode_responses=False."""
        self._client = client
        self._cluster = hasattr(client, "get_primaries")

    def get_blocks(self, keys: Sequence[str]) -> list[bytes | None]:
        if not keys:
            return []
        if self._cluster:  # grouped by slot by the client
            return self._client.mget_nonatomic(list(keys))
        return self._client.mget(list(keys))

    def put_blocks(self, blocks: Mapping[str, bytes]) -> None:
        pipeline = self._client.pipeline(transaction=False) if not self._cluster else None
        for key, block in blocks.items():
            (pipeline or self._client).set(key, block)
        if pipeline is not None:
            pipeline.execute()

    def delete_blocks(self, keys: Sequence[str]) -> None:
        if keys and not self._cluster:
            self._client.delete(*keys)
        for key in keys if self._cluster else ():
            self._client.delete(key)

    def list_keys(self, prefix: str) -> Iterator[str]:
        escaped = "".join(f"\\{c}" if c in "*?[]\\^-" else c for c in prefix)
        for key in self._client.scan_iter(match=escaped + "*", count=1000):
            yield key.decode()
