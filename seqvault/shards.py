"""Shards: users spread by hash over independent vaults, read and written as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from seqvault.errors import VaultError
from seqvault.querying import per_user, user_ids

_PER_USER = ("before", "end", "before_time")


def shard_of(users: np.ndarray, shards: int) -> np.ndarray:
    """Which of `shards` each of `users` [B] belongs to: [B] int64.

    A fixed hash (the finaliser of SplitMix64), so that every process and machine agrees.
    """
    x = user_ids(users).view(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) % np.uint64(shards)).astype(np.int64)


class Shards:
    """Vaults that behave as one; shard i holds the users of whom `shard_of` says i.

    The vaults are independent directories. They may lie on several machines: a process that serves
    one machine's shards opens those alone, and whoever asks sends each user to its shard.

    Attributes:
      vaults: the shards in their order. Anything with the reading methods of `Vault` will do, so
        also a `BackendVault` or a client of a remote process.
    """

    def __init__(self, vaults: Sequence[Any], threads: int = 0):
        """`threads` > 0 reads that many shards at a time; the reads do not hold Python's lock.

        Raises:
          VaultError: there is no shard, or they have different columns.
        """
        if not vaults:
            raise VaultError("a set of shards needs one at least")
        if len({tuple(v.schema.stored.items()) for v in vaults}) > 1:
            raise VaultError("the shards have different columns")
        self.vaults = list(vaults)
        self._pool = ThreadPoolExecutor(threads) if threads else None

    @property
    def schema(self):
        return self.vaults[0].schema

    def append_many(
        self, users: np.ndarray, behaviours: Mapping[str, np.ndarray], **options
    ) -> int:
        """See Vault.append_many. All or nothing within each shard, not across them."""
        done = 0
        for shard, rows in self._split(users):
            mine = {name: np.asarray(values)[rows] for name, values in behaviours.items()}
            done += self.vaults[shard].append_many(np.asarray(users)[rows], mine, **options)
        return done

    def append(self, user: int, behaviours: Mapping[str, np.ndarray], **options) -> int:
        """See Vault.append."""
        shard = shard_of(np.array([user]), len(self.vaults))[0]
        return self.vaults[shard].append(user, behaviours, **options)

    def last_n(self, users: np.ndarray, n: int, **options) -> dict[str, np.ndarray]:
        """See Vault.last_n."""
        out: dict[str, np.ndarray] = {}
        batch = len(np.asarray(users))
        each, options = _divided(options, batch)

        def ask(shard, rows):
            mine = {name: values[rows] for name, values in each.items()}
            return rows, self.vaults[shard].last_n(np.asarray(users)[rows], n, **mine, **options)

        for rows, found in self._each(ask, users):
            for name, values in found.items():
                if name not in out:
                    out[name] = np.zeros((batch, n), values.dtype)
                out[name][rows] = values
        return out

    def lengths(self, users: np.ndarray, **options) -> np.ndarray:
        """See Vault.lengths."""
        return self._numbers("lengths", users, **options)

    def resolve(self, users: np.ndarray, before_time: np.ndarray, **options) -> np.ndarray:
        """See Vault.resolve."""
        return self._numbers("resolve", users, before_time=before_time, **options)

    def scan(self, **options) -> Iterator[dict[str, np.ndarray]]:
        """Shard after shard; within one as Vault.scan."""
        for vault in self.vaults:
            yield from vault.scan(**options)

    def merge(self, budget: int | None = None, **options) -> int:
        """See Vault.merge; each shard has the whole budget."""
        return sum(vault.merge(budget, **options) for vault in self.vaults)

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown()
        for vault in self.vaults:
            vault.close()

    def _numbers(self, method: str, users: np.ndarray, **options) -> np.ndarray:
        out = np.zeros(len(np.asarray(users)), np.int64)
        each, options = _divided(options, len(out))

        def ask(shard, rows):
            mine = {name: values[rows] for name, values in each.items()}
            asked = getattr(self.vaults[shard], method)
            return rows, asked(np.asarray(users)[rows], **mine, **options)

        for rows, found in self._each(ask, users):
            out[rows] = found
        return out

    def _each(self, ask, users: np.ndarray) -> Iterable:
        parts = self._split(users) or [(0, np.zeros(0, np.int64))]
        run = self._pool.map if self._pool else map
        return run(lambda part: ask(*part), parts)

    def _split(self, users: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """(shard, positions in `users`) of every shard that is asked."""
        shards = shard_of(np.asarray(users), len(self.vaults))
        return [(int(s), np.flatnonzero(shards == s)) for s in np.unique(shards)]


def _divided(options: Mapping[str, Any], batch: int) -> tuple[dict[str, np.ndarray], dict]:
    """({option that each user has its own of: [batch]}, the other options)."""
    mine = {n: v for n, v in options.items() if n in _PER_USER and v is not None}
    each = {name: per_user(name, value, batch) for name, value in mine.items()}
    return each, {name: value for name, value in options.items() if name not in each}
