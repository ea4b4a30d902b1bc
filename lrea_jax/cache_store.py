"""Caches of many users, one device-resident array per field (the paper's "cached in HBM")."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ctr_jax.batch import EmbeddedBatch, RequestBatch
from lrea_jax.serving import ServedModel, UserCache, precompute


class CacheFull(RuntimeError):
    """There is no room for the users to insert; evict some first. Nothing was inserted."""


@functools.partial(jax.jit, donate_argnums=0)
def _write(fields, slots, rows):
    # In place: the arrays are donated. Slots are distinct.
    return jax.tree.map(lambda x, y: x.at[slots].set(y, unique_indices=True), fields, rows)


@jax.jit
def _read(fields, slots):
    return jax.tree.map(lambda x: x[slots], fields)


class CacheStore:
    """Up to `capacity` users' caches of one set of weights.

    Users are any hashable ids; the host knows each one's row. Where calls come with many different
    numbers of users, round the number up (repeat a user in `lookup`), since each is a shape.

    Threads: any may call any method, so that one refreshes while others serve; a `lookup` waits for
    no refresh to be computed. Of two that refresh one user at a time the last to end stays.

    What is written has been computed: else what fails on the device would leave arrays of all users
    that cannot be read.

    Args:
      model: whose caches are kept; those of other weights are refused.
      capacity: users; memory is capacity * bytes_per_user from the start.
    """

    def __init__(self, model: ServedModel, capacity: int):
        if capacity < 1:
            raise ValueError(f"capacity must be >= 1, got {capacity}")
        self._model, self.capacity = model, capacity
        self._slots: dict = {}
        self._free = list(range(capacity - 1, -1, -1))
        self._fields: UserCache | None = None
        # Of the three above. Writing donates the arrays, so that none may be read until the new
        # ones are in their place.
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, user) -> bool:
        return user in self._slots

    @property
    def bytes_per_user(self) -> int:
        """Of all fields, once something was inserted."""
        fields = self._fields
        return sum(x.nbytes for x in jax.tree.leaves(fields)) // self.capacity

    def insert(self, users: Sequence, cache: UserCache) -> None:
        """Adds `users`, row u of `cache` being users[u].

        Raises:
          StaleCache: the cache was made by other weights.
          CacheFull: fewer rows are free than users given.
          ValueError: a user is in the store already or is given twice, or an array of the cache has
            another number of rows, or other shapes or types than those that are kept.
        Whatever is raised, nothing was inserted.
        """
        cache = jax.block_until_ready(cache)
        with self._lock:
            if known := [u for u in users if u in self._slots]:
                raise ValueError(f"users {known[:5]} are in the store already; use refresh")
            self._check(users, cache)
            left = len(self._free) - len(users)
            if left < 0:
                raise CacheFull(f"{len(users)} users for {len(self._free)} free rows")
            slots = self._free[left:]
            self._put(slots, cache)
            # Only now: a user whose rows could not be written would have those of another.
            del self._free[left:]
            self._slots.update(zip(users, slots, strict=True))

    def refresh(self, users: Sequence, histories: RequestBatch | EmbeddedBatch) -> None:
        """Makes the caches of `users`, who must be there, again from their present histories,
        as `precompute` takes them.

        Raises:
          KeyError: a user is not in the store, or was evicted meanwhile.
          ValueError: a user is given twice, or the histories are not one for each.
        Whatever is raised, all caches are as they were.
        """
        with self._lock:
            self._slots_of(users)
        cache = jax.block_until_ready(precompute(self._model, histories))
        with self._lock:
            slots = self._slots_of(users)
            self._check(users, cache)
            self._put(slots, cache)

    def evict(self, users: Sequence) -> None:
        """Forgets `users`; their rows are free again.

        Raises:
          KeyError: a user is not in the store; nothing is evicted.
        """
        with self._lock:
            self._slots_of(users)
            for user in dict.fromkeys(users):
                self._free.append(self._slots.pop(user))

    def lookup(self, users: Sequence) -> UserCache:
        """The caches of `users`, in their order, for `score`.

        Raises:
          KeyError: a user is not in the store.
        """
        with self._lock:
            slots = self._slots_of(users)
            if self._fields is None:
                raise KeyError("the store is empty")
            return _read(self._fields, np.asarray(slots, np.int32))

    def _slots_of(self, users: Sequence) -> list[int]:
        if unknown := [u for u in users if u not in self._slots]:
            raise KeyError(f"users {unknown[:5]} are not in the store")
        return [self._slots[u] for u in users]

    def _check(self, users: Sequence, cache: UserCache) -> None:
        self._model.check(cache)
        if len(set(users)) != len(users):
            raise ValueError("a user is given twice")
        kept = cache if self._fields is None else self._fields
        pairs = zip(jax.tree.leaves_with_path(cache), jax.tree.leaves(kept), strict=True)
        for (path, x), like in pairs:
            name = jax.tree_util.keystr(path)
            if len(users) != len(x):
                raise ValueError(f"{len(users)} users for {len(x)} rows of the cache's {name}")
            if (x.shape[1:], x.dtype) != (like.shape[1:], like.dtype):
                raise ValueError(
                    f"the cache's {name} is {x.dtype}{[*x.shape[1:]]} for a user, and "
                    f"{like.dtype}{[*like.shape[1:]]} is kept"
                )

    def _put(self, slots: list[int], cache: UserCache) -> None:
        if self._fields is None:
            self._fields = jax.tree.map(
                lambda x: jnp.zeros((self.capacity, *x.shape[1:]), x.dtype), cache
            )
        self._fields = _write(self._fields, np.asarray(slots, np.int32), cache)
