"""Parts in a distributed store that a team already runs: a three-call protocol, and who uses it.

A backend keeps blocks under keys. A user's newest part lies under `<vault>/<stream>/<user>`, the
part before it under `<vault>/<stream>/<user>/<number>`: reading the newest behaviours is one get
per user, all users of a batch in one round trip. The bytes are those of a local segment, checksums
included, so a backend is not trusted with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, unquote

import numpy as np

from seqvault.bits import SLACK
from seqvault.chains import read_parts
from seqvault.errors import DamagedError, VaultError
from seqvault.files import Files
from seqvault.part import NEVER, NO_PLACE, PREFIX, bound, encode
from seqvault.querying import check_question, checked_ends, times_of, user_ids
from seqvault.reading import Layout
from seqvault.schema import TIME, Schema, check_values, words_of
from seqvault.unpacking import (
    FIRST,
    PREVIOUS,
    REACHED,
    RESULTS,
    STATUS,
    TAKEN,
)
from seqvault.writing import BLOCK_ROWS, cuts


class Backend(Protocol):
    """Where blocks live. Keys are short ASCII strings without spaces."""

    def get_blocks(self, keys: Sequence[str]) -> list[bytes | None]:
        """The blocks under `keys`, None for one that is not there; one round trip if it can."""

    def put_blocks(self, blocks: Mapping[str, bytes]) -> None:
        """Stores blocks, in the mapping's order; each one is replaced whole."""

    def list_keys(self, prefix: str) -> Iterator[str]:
        """All keys that start with `prefix`, in no order."""


class DirectoryBackend:
    """Blocks as files of a local directory: for tests, and for file systems that are shared."""

    def __init__(self, path: Path):
        self._path, self._files = Path(path), Files()
        self._path.mkdir(parents=True, exist_ok=True)

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

    def list_keys(self, prefix: str) -> Iterator[str]:
        escaped = "".join(f"\\{c}" if c in "*?[]\\^-" else c for c in prefix)
        for key in self._client.scan_iter(match=escaped + "*", count=1000):
            yield key.decode()


class BackendVault:
    """Histories whose parts live in a backend; reads as `Vault` does, without a local index.

    Appends rewrite the newest part at once: there is no log and no fresh tail here, so append in
    batches. One writer per user at a time; readers see a user's part before an append or after it.
    Older parts are written before the newest one that names them, so that a writer that dies in
    between leaves the old state.
    """

    def __init__(
        self, backend: Backend, schema: Schema, name: str, *, block_rows: int = BLOCK_ROWS
    ):
        """`name` is the first part of every key; vaults of one backend need different ones."""
        self.schema = schema
        self._backend, self._name, self._block_rows = backend, name, block_rows

    def last_n(
        self,
        users: np.ndarray,
        n: int,
        *,
        before: np.ndarray | None = None,
        end: np.ndarray | None = None,
        columns: Iterable[str] | None = None,
        stream: str = "default",
    ) -> dict[str, np.ndarray]:
        """See Vault.last_n; `stream` is one name."""
        users = user_ids(users)
        check_question(n, before, end)
        blocks = self._newest(users, stream)
        layout = Layout([self.schema], columns)
        limits = _lengths(blocks)
        if end is not None:
            limits = checked_ends(users, limits, end)
        befores = times_of(before, users) if before is not None else None
        taken, _, views = self._read(layout, users, blocks, limits, befores, n, stream)
        out = {name: values.reshape(len(users), n) for name, values in views.items()}
        out["mask"] = np.arange(n) >= n - taken[:, None]
        return out

    def lengths(self, users: np.ndarray, *, stream: str = "default") -> np.ndarray:
        """See Vault.lengths."""
        return _lengths(self._newest(user_ids(users), stream))

    def resolve(
        self, users: np.ndarray, before_time: np.ndarray, *, stream: str = "default"
    ) -> np.ndarray:
        """See Vault.resolve."""
        users = user_ids(users)
        blocks = self._newest(users, stream)
        layout, before = Layout([self.schema], ()), times_of(before_time, users)
        return self._read(layout, users, blocks, _lengths(blocks), before, 0, stream)[1]

    def append_many(
        self, users: np.ndarray, behaviours: Mapping[str, np.ndarray], *, stream: str = "default"
    ) -> int:
        """Appends row i of `behaviours` to user `users[i]`; late rows take their place by time.

        Raises:
          VaultError: a column is missing or a value does not fit its column.
        """
        users = user_ids(users)
        if set(behaviours) != set(self.schema.stored):
            raise VaultError(
                f"columns {sorted(behaviours)}, the schema wants {sorted(self.schema.stored)}"
            )
        for name, dtype in self.schema.stored.items():
            check_values(name, np.asarray(behaviours[name]), dtype)
        who, which = np.unique(users, return_inverse=True)
        layout = Layout([self.schema], None)
        for user, block in zip(who.tolist(), self._newest(who, stream), strict=True):
            rows = np.flatnonzero(which == np.searchsorted(who, user))
            new = {name: np.asarray(behaviours[name])[rows] for name in self.schema.stored}
            one, length = np.array([user]), _lengths([block])
            _, _, old = self._read(layout, one, [block], length, None, int(length[0]), stream)
            joined = {
                name: np.concatenate([old[name], new[name].astype(dtype)])
                for name, dtype in self.schema.stored.items()
            }
            order = np.argsort(joined[TIME], kind="stable")
            self._put(user, {name: c[order] for name, c in joined.items()}, stream)
        return len(users)

    def close(self) -> None:
        """Nothing to release: the client is the caller's."""

    def _put(self, user: int, columns: Mapping[str, np.ndarray], stream: str) -> None:
        words = words_of(columns, self.schema)
        key = self._key(user, stream)
        pieces = list(cuts(words.shape[1], self._block_rows))
        blocks = {}
        for number, (start, stop) in enumerate(pieces):
            buf = np.zeros(bound(stop - start, len(words)), np.uint8)
            previous = number - 1 if number else NO_PLACE
            size = encode(words[:, start:stop], buf, 0, user, 0, 0, start, previous, 0)
            last = number == len(pieces) - 1
            blocks[key if last else f"{key}/{number}"] = buf[:size].tobytes()
        self._backend.put_blocks(blocks)

    def _key(self, user: int, stream: str) -> str:
        return f"{self._name}/{stream}/{user}"

    def _newest(self, users: np.ndarray, stream: str) -> list[bytes | None]:
        return self._backend.get_blocks([self._key(u, stream) for u in users.tolist()])

    def _read(self, layout, users, blocks, limits, befores, n, stream):
        """(taken [B], reached [B], {column: [B * n]}), following the parts of each user."""
        batch = len(users)
        buffer, offsets, listed = layout.zeros(batch * n)
        taken, reached = np.zeros(batch, np.int64), np.zeros(batch, np.int64)
        settled = np.zeros(batch, bool)
        befores = np.full(batch, NEVER) if befores is None else befores
        wants, rights, limits = np.full(batch, n), (np.arange(batch) + 1) * n, limits.copy()
        at = np.flatnonzero([block is not None for block in blocks])
        blocks = [block for block in blocks if block is not None]
        while len(at):
            sizes = np.array([len(block) for block in blocks])
            buf = np.frombuffer(b"".join(blocks) + bytes(SLACK), np.uint8)
            results = np.zeros((len(at), RESULTS), np.int64)
            read_parts(
                buf, np.cumsum(sizes), sizes, users[at], 0, limits[at], befores[at], wants[at],
                rights[at], layout.wanted, layout.sizes, offsets, layout.defaults, buffer, results,
            )  # fmt: skip
            bad = results[:, STATUS] != 0
            if bad.any():
                wrong = users[at[bad]].tolist()
                raise DamagedError(f"the history of user {wrong[0]} is damaged", tuple(wrong))
            taken[at] += results[:, TAKEN]
            rights[at] -= results[:, TAKEN]
            wants[at] -= results[:, TAKEN]
            reached[at] = np.where(settled[at], reached[at], results[:, REACHED])
            settled[at] |= results[:, REACHED] > results[:, FIRST]
            limits[at] = np.minimum(limits[at], results[:, FIRST])
            more = (results[:, FIRST] > 0) & ((wants[at] > 0) | ~settled[at])
            at, numbers = at[more], results[more, PREVIOUS].tolist()
            keys = [
                f"{self._key(user, stream)}/{number}"
                for user, number in zip(users[at].tolist(), numbers, strict=True)
            ]
            blocks = self._backend.get_blocks(keys)
            if None in blocks:
                missing = keys[blocks.index(None)]
                raise VaultError(f"block {missing} is missing from the backend")
        return taken, reached, layout.views(buffer, listed, (batch * n,))


def _lengths(blocks: Sequence[bytes | None]) -> np.ndarray:
    """Behaviours of each user, from the trailers of their newest parts; reads check these."""
    lengths = np.zeros(len(blocks), np.int64)
    for i, block in enumerate(blocks):
        if block is not None and len(block) > PREFIX + 56:
            first, rows = np.frombuffer(block, "<u4", 2, len(block) - 36)
            lengths[i] = int(first) + int(rows)
    return lengths
