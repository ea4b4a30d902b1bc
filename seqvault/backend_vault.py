"""BackendVault: histories whose parts live in a backend (backends.py).

A user's newest part lies under `<vault>/<stream>/<user>`: reading the newest behaviours is one get
per user, all users of a batch in one round trip. The parts before it lie under
`<vault>/<stream>/<user>/<number>`, cut as in a local vault; a part names the number of the one
before it. Numbers of a user only rise, so that no block that a reader may be about to fetch ever
changes: it stays as it is, or it is gone and the reader starts anew. The schemas, in the order of
the numbers that parts carry, lie under `<vault>/schemas`.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from seqvault.backends import Backend
from seqvault.bits import SLACK
from seqvault.chains import read_parts
from seqvault.errors import DamagedError, MissingError, VaultError
from seqvault.part import NEVER, NO_PLACE, PREFIX, TRAILER, bound, encode
from seqvault.querying import (
    check_question,
    checked_ends,
    first_unknown,
    one_user,
    times_of,
    user_ids,
)
from seqvault.reading import Layout
from seqvault.schema import DEFAULT, TIME, Schema, check_evolution, checked_columns, words_of
from seqvault.unpacking import FIRST, PREVIOUS, REACHED, RESULTS, STATUS, TAKEN
from seqvault.writing import BLOCK_ROWS, cuts, kept_rows

_COUNTS = struct.Struct("<qIII")  # of a trailer, from byte 8 on: previous, its bytes, first, rows


class Read(NamedTuple):
    """What `_read` brings of users [B]; see reading.Found.

    Attributes:
      previous: [B] the number of the part before the oldest one read.
      older: keys of all blocks read beyond the newest ones.
    """

    taken: np.ndarray
    reached: np.ndarray
    first: np.ndarray
    previous: np.ndarray
    older: list[str]
    columns: dict[str, np.ndarray]


class BackendVault:
    """Reads as `Vault` does, without a local index; appends rewrite the newest part at once.

    There is no log and no fresh tail here, so append in batches. One writer per user at a time.
    Older parts are stored before the newest one that names them is sent, and what nobody names any
    more is deleted after that: readers see a user's history before an append or after it, and a
    writer that dies in between leaves one of the two (and maybe blocks that nobody names). There is
    no list of streams: one that nobody has appended to reads as empty.

    Attributes:
      schema: the newest that this process has met.
    """

    def __init__(
        self, backend: Backend, schema: Schema, name: str, *, block_rows: int = BLOCK_ROWS
    ):
        """Opens the vault `name`, which is the first part of every key, or makes it.

        Args:
          schema: one of the vault's, so that processes of an older release can go on; a new one
            comes by `evolve`.
          block_rows: reads of up to this many behaviours take one block; the same in all writers.
        Raises:
          VaultError: the vault is there and has no such schema.
        """
        self._backend, self._name, self._block_rows = backend, name, block_rows
        self._schemas: list[Schema] = []
        self._layouts: dict[tuple[str, ...] | None, Layout] = {}
        (block,) = backend.get_blocks([self._schemas_key])
        if block is None:
            self._write_schemas([schema])
        else:
            self._adopt(block)
        if schema.to_json() not in [known.to_json() for known in self._schemas]:
            raise VaultError(f"vault {name!r} has other schemas; use evolve")

    @property
    def schema(self) -> Schema:
        return self._schemas[-1]

    # --- reading

    def last_n(
        self,
        users: np.ndarray,
        n: int,
        *,
        before: np.ndarray | None = None,
        end: np.ndarray | None = None,
        columns: Iterable[str] | None = None,
        stream: str = DEFAULT,
    ) -> dict[str, np.ndarray]:
        """See Vault.last_n; `stream` is one name."""
        users = user_ids(users)
        names = tuple(columns) if columns is not None else None
        check_question(n, before, end)

        def ask() -> dict[str, np.ndarray]:
            blocks = self._newest(users, stream)
            limits = _claimed(blocks)
            if end is not None:
                limits = checked_ends(users, self._lengths(users, blocks, stream), end)
            befores = times_of(before, users) if before is not None else None
            found = self._read(names, users, blocks, limits, befores, n, stream)
            out = {name: values.reshape(len(users), n) for name, values in found.columns.items()}
            return out | {"mask": np.arange(n) >= n - found.taken[:, None]}

        return self._answered(ask)

    def lengths(self, users: np.ndarray, *, stream: str = DEFAULT) -> np.ndarray:
        """See Vault.lengths."""
        users = user_ids(users)
        return self._answered(lambda: self._lengths(users, self._newest(users, stream), stream))

    def resolve(
        self, users: np.ndarray, before_time: np.ndarray, *, stream: str = DEFAULT
    ) -> np.ndarray:
        """See Vault.resolve."""
        users = user_ids(users)
        before = times_of(before_time, users)

        def ask() -> np.ndarray:
            blocks = self._newest(users, stream)
            return self._read((), users, blocks, _claimed(blocks), before, 0, stream).reached

        return self._answered(ask)

    def _answered(self, ask: Callable):
        """ask(), again if what it reads changed meanwhile: blocks moved, or a newer schema came."""
        for _ in range(10):
            try:
                return ask()
            except MissingError as error:
                missing = error
            except DamagedError:
                (block,) = self._backend.get_blocks([self._schemas_key])
                if block is None or not self._adopt(block):
                    raise
        raise missing

    def _lengths(self, users, blocks, stream) -> np.ndarray:
        """[B] behaviours of users whose newest blocks are `blocks`, which are checked."""
        return self._read((), users, blocks, _claimed(blocks), None, 0, stream).reached

    def _read(self, names, users, blocks, limits, befores, n, stream) -> Read:
        """The last `n` rows of users whose newest blocks are `blocks`, in columns [B * n]."""
        layout, batch = self._layout(names), len(users)
        buffer, plan, columns = layout.zeros(batch * n)
        del columns["mask"]
        taken, reached, first = (np.zeros(batch, np.int64) for _ in range(3))
        previous, older = np.full(batch, NO_PLACE), []
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
                rights[at], layout.wanted, plan, buffer, results,
            )  # fmt: skip
            bad = results[:, STATUS] != 0
            if older:  # a chain must lead to older rows
                bad |= results[:, FIRST] >= first[at]
            if bad.any():
                wrong = users[at[bad]].tolist()
                raise DamagedError(f"the history of user {wrong[0]} is damaged", tuple(wrong))
            taken[at] += results[:, TAKEN]
            rights[at] -= results[:, TAKEN]
            wants[at] -= results[:, TAKEN]
            reached[at] = np.where(settled[at], reached[at], results[:, REACHED])
            settled[at] |= results[:, REACHED] > results[:, FIRST]
            first[at], previous[at] = results[:, FIRST], results[:, PREVIOUS]
            limits[at] = np.minimum(limits[at], results[:, FIRST])
            at = at[(results[:, FIRST] > 0) & ((wants[at] > 0) | ~settled[at])]
            keys = [
                f"{self._key(user, stream)}/{number}"
                for user, number in zip(users[at].tolist(), previous[at].tolist(), strict=True)
            ]
            blocks = self._backend.get_blocks(keys) if keys else []
            if None in blocks:
                missing = keys[blocks.index(None)]
                raise MissingError(f"block {missing} is missing from the backend")
            older += keys
        return Read(taken, reached, first, previous, older, columns)

    # --- writing

    def append(
        self, user: int, behaviours: Mapping[str, np.ndarray], *, stream: str = DEFAULT
    ) -> int:
        """See Vault.append; what this acknowledges is as durable as the backend makes it."""
        behaviours = {name: np.atleast_1d(values) for name, values in behaviours.items()}
        users = np.full(len(behaviours.get(TIME, ())), one_user(user))
        return self.append_many(users, behaviours, stream=stream)

    def append_many(
        self, users: np.ndarray, behaviours: Mapping[str, np.ndarray], *, stream: str = DEFAULT
    ) -> int:
        """Appends row i of `behaviours` to user `users[i]`; late rows take their place by time.

        All or nothing for each user, not across them.

        Returns:
          How many were appended: all, less those whose event id the user already has.
        Raises:
          VaultError: a column is missing or a value does not fit its column.
        """
        users = user_ids(users)
        who, which = np.unique(users, return_inverse=True)
        keys = self._keys(who, stream)
        *newest, schemas = self._backend.get_blocks([*keys, self._schemas_key])
        if schemas is not None:
            self._adopt(schemas)  # or an older release would drop the columns it does not know
        columns = checked_columns(self.schema, users, behaviours)
        lengths = self._lengths(who, newest, stream).tolist()
        older, newer, stale, done = {}, {}, [], 0
        for i, (user, block) in enumerate(zip(who.tolist(), newest, strict=True)):
            mine = which == i
            rows = {name: values[mine] for name, values in columns.items()}
            if self.schema.event_id:
                rows = self._new_events(user, block, lengths[i], rows, stream)
            if len(rows[TIME]):
                parts, unnamed = self._rewritten(user, block, lengths[i], rows, stream)
                *before, (_, newer[keys[i]]) = parts
                older |= {f"{keys[i]}/{number}": part for number, part in before}
                stale += unnamed
                done += len(rows[TIME])
        if older:  # all of them are there, or this raises, before a newest part names one
            self._backend.put_blocks(older)
        self._backend.put_blocks(newer)
        self._backend.delete_blocks(stale)
        return done

    def _new_events(
        self, user: int, block: bytes | None, length: int, rows: dict, stream: str
    ) -> dict:
        """The rows whose event id is new to the user; of equal ones the first."""
        name, one = self.schema.event_id, np.array([user])
        found = self._read((name,), one, [block], np.array([length]), None, length, stream)
        new = first_unknown(rows[name], found.columns[name])
        return {name: values[new] for name, values in rows.items()}

    def _rewritten(
        self, user: int, block: bytes | None, before: int, rows: dict, stream: str
    ) -> tuple[list[tuple[int, bytes]], list[str]]:
        """([(number, part)] to be written, the newest last, [key] of what is then unnamed)."""
        one, length = np.array([user]), np.array([before])
        after = before + len(rows[TIME])
        kept = kept_rows(before, after, self._block_rows)
        found = self._read(None, one, [block], length, None, before - kept, stream)
        if kept and (found.first[0] != kept or rows[TIME].min() < found.columns[TIME][0]):
            kept = 0
            found = self._read(None, one, [block], length, None, before, stream)
        joined = {n: np.concatenate([found.columns[n], values]) for n, values in rows.items()}
        order = np.argsort(joined[TIME], kind="stable")
        words = words_of({n: values[order] for n, values in joined.items()}, self.schema)
        link = int(found.previous[0]) if kept else NO_PLACE
        # The newest part names the largest number so far.
        number = _counts(block)[0] if block is not None else NO_PLACE
        parts = []
        for start, stop in cuts(after, self._block_rows):
            if start >= kept:
                buf = np.zeros(bound(stop - start, len(words)), np.uint8)
                piece = words[:, start - kept : stop - kept]
                version = len(self._schemas) - 1
                size = encode(piece, buf, 0, user, 0, version, start, link, 0)
                link = number = number + 1
                parts.append((number, buf[:size].tobytes()))
        return parts, found.older

    # --- schemas

    def evolve(self, schema: Schema) -> None:
        """See Vault.evolve; other processes follow when they meet the newer schema's parts."""
        (block,) = self._backend.get_blocks([self._schemas_key])
        if block is not None:
            self._adopt(block)
        check_evolution(self._schemas, schema)
        self._write_schemas([*self._schemas, schema])

    def _write_schemas(self, schemas: Sequence[Schema]) -> None:
        body = json.dumps([schema.to_json() for schema in schemas]).encode()
        block = b"%08x\n" % zlib.crc32(body) + body
        self._backend.put_blocks({self._schemas_key: block})
        self._adopt(block)

    def _adopt(self, block: bytes) -> bool:
        """Goes on under the schemas in `block`; whether there are newer ones among them."""
        digest, _, body = block.partition(b"\n")
        if digest != b"%08x" % zlib.crc32(body):
            raise VaultError(f"{self._schemas_key} does not match its checksum")
        try:
            schemas = [Schema.from_json(fields) for fields in json.loads(body)]
        except (ValueError, TypeError, RecursionError) as error:
            raise VaultError(f"{self._schemas_key}: not a list of schemas ({error!r})") from None
        newer = len(schemas) > len(self._schemas)
        if newer:
            self._schemas, self._layouts = schemas, {}
        return newer

    @property
    def _schemas_key(self) -> str:
        return f"{self._name}/schemas"

    def _layout(self, names: tuple[str, ...] | None) -> Layout:
        if names not in self._layouts:
            self._layouts[names] = Layout(self._schemas, names)
        return self._layouts[names]

    def _key(self, user: int, stream: str) -> str:
        return f"{self._name}/{stream}/{user}"

    def _newest(self, users: np.ndarray, stream: str) -> list[bytes | None]:
        return self._backend.get_blocks(self._keys(users, stream))

    def _keys(self, users: np.ndarray, stream: str) -> list[str]:
        """Where the newest parts lie. Raises VaultError if other parts might lie there too."""
        if "/" in stream:
            raise VaultError(f"stream {stream!r}: a backend's keys allow no '/' in its name")
        return [self._key(user, stream) for user in users.tolist()]

    def close(self) -> None:
        """Nothing to release: the client is the caller's."""


def _counts(block: bytes) -> tuple[int, int, int]:
    """(previous, first row, rows) as a part's trailer has them, unchecked."""
    previous, _, first, rows = _COUNTS.unpack_from(block, len(block) - TRAILER + 8)
    return previous, first, rows


def _claimed(blocks: Sequence[bytes | None]) -> np.ndarray:
    """[B] behaviours that the trailers of newest parts claim: for reads, which check them."""
    whole = [block is not None and len(block) >= PREFIX + TRAILER for block in blocks]
    counts = [_counts(b)[1:] if w else (0, 0) for b, w in zip(blocks, whole, strict=True)]
    return np.array(counts, np.int64).reshape(-1, 2).sum(1)
