"""BackendVault against lists, on a backend in memory that dies or lets others in between."""

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import seqvault
from seqvault.backend_vault import BackendVault
from seqvault.backends import RedisBackend
from seqvault.part import bound, encode
from seqvault.shards import Shards
from tests.seqvault.oracle import SCHEMA, Oracle, draw


class Memory:
    """Blocks in a dict. `left`: how many may still be changed; `between`: runs before each get."""

    def __init__(self):
        self.blocks, self.left, self.between = {}, 10**9, None
        self.puts, self.gets = [], 0

    def get_blocks(self, keys):
        if self.between:
            self.between(keys)
        self.gets += 1
        return [self.blocks.get(key) for key in keys]

    def put_blocks(self, blocks):
        for key, block in blocks.items():
            self._change()
            self.blocks[key] = block
            self.puts.append(key)

    def delete_blocks(self, keys):
        for key in keys:
            self._change()
            self.blocks.pop(key, None)

    def _change(self):
        if not self.left:
            raise ConnectionError("the writer dies here")
        self.left -= 1

    def list_keys(self, prefix):
        return iter([key for key in self.blocks if key.startswith(prefix)])


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 5, 300]), st.booleans())
def test_any_appends_equal_lists(seed, block_rows, late):
    rng = np.random.default_rng(seed)
    backend = Memory()
    vault = BackendVault(backend, SCHEMA, "shop", block_rows=block_rows)
    reader = BackendVault(backend, SCHEMA, "shop", block_rows=block_rows)
    oracle, everyone = Oracle(), np.arange(-1, 7)
    for clock in range(6):
        users, columns = draw(rng, int(rng.integers(0, 50)), users=6, late=late)
        if not late:
            columns["time"] = columns["time"] // 8 + 5 * clock
        assert vault.append_many(users, columns) == len(users)
        oracle.append(users, columns)
        oracle.check(reader, everyone, rng, sizes=(1, 4, 60))
    lengths = vault.lengths(everyone)
    for user, length in zip(everyone.tolist(), lengths.tolist(), strict=True):
        before = backend.gets
        vault.last_n([user], block_rows)
        assert backend.gets == before + 1
        vault.last_n([user], length)
        assert backend.gets <= before + 3 + (length // block_rows).bit_length()


def test_an_append_in_order_rewrites_the_newest_part_only():
    backend = Memory()
    vault = BackendVault(backend, SCHEMA, "shop", block_rows=100)
    row = {"item": [1], "kind": [2], "seen": [True], "weight": [0.5]}
    for i in range(3):  # 100 rows alone, then the newest of 199, then an older one beside it
        many = {name: values * 99 for name, values in row.items()}
        vault.append_many([1] * 99, {"time": range(99 * i, 99 * i + 99), **many})
    backend.puts.clear()
    vault.append(1, {"time": 297, **{n: v[0] for n, v in row.items()}})
    assert backend.puts == ["shop/default/1"]
    backend.puts.clear()
    vault.append(1, {"time": 297, **{n: v[0] for n, v in row.items()}})  # not late: a tie
    assert backend.puts == ["shop/default/1"]
    vault.append(1, {"time": 3, **{n: v[0] for n, v in row.items()}})  # late: all of them
    assert len(backend.puts) == 3
    assert vault.last_n([1], 300)["time"][0].tolist() == sorted([*range(298), 297, 3])


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.integers(0, 2**32))
def test_event_ids_make_appends_idempotent(seed):
    rng = np.random.default_rng(seed)
    schema = seqvault.Schema({"event": np.int64, "item": np.int32}, event_id="event")
    vault = BackendVault(Memory(), schema, "shop", block_rows=3)
    oracle = Oracle(("time", "event", "item"), "event")
    for _ in range(6):
        count = int(rng.integers(0, 12))
        users = rng.integers(0, 3, count)
        columns = {n: rng.integers(0, 15, count) for n in ("time", "event", "item")}
        for _ in range(int(rng.integers(1, 3))):  # the same append again changes nothing
            assert vault.append_many(users, columns) == oracle.append(users, columns)
        oracle.check(vault, np.arange(3), rng, sizes=(5,))


def test_a_newer_schema_reads_older_records():
    backend = Memory()
    older = seqvault.Schema({"a": np.int8, "gone": np.int32})
    vault = BackendVault(backend, older, "shop", block_rows=2)
    reader = BackendVault(backend, older, "shop", block_rows=2)
    vault.append_many([1] * 5, {"time": range(5), "a": [-5, 100, 3, 4, 5], "gone": [7] * 5})
    vault.append(2, {"time": 3, "a": 4, "gone": 9})
    newer = seqvault.Schema(
        {"new": np.float32, "a": np.int64, "flag": np.int16}, 2, defaults={"new": 1.5, "flag": -3}
    )
    vault.evolve(newer)
    with pytest.raises(seqvault.VaultError, match="the schema wants"):  # it follows first
        BackendVault(backend, older, "shop").append(1, {"time": 9, "a": 1, "gone": 1})
    for step in range(2):
        if step:
            vault.append(1, {"time": [5], "a": [2**40], "new": [0.25], "flag": [6]})
        for who in (vault, reader, BackendVault(backend, older, "shop", block_rows=2)):
            who.last_n([2], 1)
            if step == 0 and who is reader:
                continue  # has met no part of the newer schema yet
            found = who.last_n([1], 6)
            assert set(found) == {"time", "mask", "a", "new", "flag"}
            tail = [2**40] if step else []
            assert found["a"].tolist() == [[0] * (1 - step) + [-5, 100, 3, 4, 5, *tail]]
            assert found["new"].tolist()[0][1 - step :] == [1.5] * 5 + [0.25] * step
            assert found["flag"].tolist()[0][1 - step :] == [-3] * 5 + [6] * step
            assert found["a"].dtype == np.int64
    for wrong in (
        seqvault.Schema({"a": np.int64}, 2),
        seqvault.Schema({"a": np.int32}, 3),
        seqvault.Schema({"a": np.int64}, 3, event_id="a"),
    ):
        with pytest.raises(seqvault.VaultError):
            vault.evolve(wrong)
    with pytest.raises(seqvault.VaultError, match="use evolve"):
        BackendVault(backend, seqvault.Schema({"b": np.int8}), "shop")


def test_what_a_damaged_newest_part_claims_is_never_a_length():
    schema, backend = seqvault.Schema({"item": np.int32}), Memory()
    vault = BackendVault(backend, schema, "shop", block_rows=4)
    vault.append_many([1] * 9, {"time": range(9), "item": [5] * 9})
    whole = backend.blocks["shop/default/1"]
    questions = (
        lambda: vault.lengths([1, 2]).tolist() == [9, 0],
        lambda: vault.last_n([1], 3, end=[9])["time"].tolist() == [[6, 7, 8]],
        lambda: vault.append(1, {"time": 9, "item": 5}) == 1,
    )
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        for ask in questions:
            backend.blocks["shop/default/1"] = bytes(flipped)
            try:
                assert ask(), bit
            except seqvault.DamagedError as error:
                assert error.users == (1,)
    for cut in (0, 40, len(whole) - 1):
        backend.blocks["shop/default/1"] = whole[:cut]
        with pytest.raises(seqvault.DamagedError):
            vault.lengths([1])
    assert vault.lengths([2], stream="nobody appended to it").tolist() == [0]


def test_a_stream_whose_keys_would_be_anothers_is_refused():
    """User 5 of the stream "ads/1" would have the key of a part of user 1 of "ads"."""
    vault = BackendVault(Memory(), SCHEMA, "shop")
    row = {"time": 1, "item": 1, "kind": 2, "seen": True, "weight": 0.5}
    for call in (
        lambda: vault.append(5, row, stream="ads/1"),
        lambda: vault.last_n([5], 1, stream="ads/1"),
        lambda: vault.lengths([5], stream="ads/1"),
    ):
        with pytest.raises(seqvault.VaultError, match="stream 'ads/1'"):
            call()


class FullRedis:
    """What RedisBackend needs of a client. All commands of a pipeline are sent, whatever fails."""

    def __init__(self):
        self.blocks, self.most, self.sent = {}, 10**9, []

    def mget(self, keys):
        return [self.blocks.get(key) for key in keys]

    def pipeline(self, transaction):
        return self

    def set(self, key, block):
        self.sent.append((key, block))

    def execute(self):
        full = [key for key, block in self.sent if len(block) > self.most]
        self.blocks |= {key: block for key, block in self.sent if key not in full}
        self.sent.clear()
        if full:
            raise MemoryError("OOM command not allowed when used memory > 'maxmemory'")

    def delete(self, *keys):
        for key in keys:
            self.blocks.pop(key, None)


def test_a_newest_part_is_sent_when_those_it_names_are_stored():
    client, rng = FullRedis(), np.random.default_rng(0)
    schema = seqvault.Schema({"item": np.int32})
    vault = BackendVault(RedisBackend(client), schema, "shop", block_rows=100)
    items = np.where(np.arange(199) < 100, rng.integers(0, 2**30, 199), 1)
    vault.append_many([1] * 199, {"time": range(199), "item": items})
    client.most = 300  # the older part does not fit, the newest would
    with pytest.raises(MemoryError):
        vault.append_many([1, 1], {"time": [200, 201], "item": [1, 2]})
    client.most = 10**9
    assert vault.last_n([1], 199)["item"][0].tolist() == items.tolist()
    vault.append_many([1, 1], {"time": [200, 201], "item": [1, 2]})
    assert vault.lengths([1]).tolist() == [201]


@pytest.mark.parametrize("late", [False, True])
def test_a_writer_that_dies_leaves_the_old_state_or_the_new_one(late):
    rng = np.random.default_rng(0)
    backend, oracle = Memory(), Oracle()
    vault = BackendVault(backend, SCHEMA, "shop", block_rows=2)
    clock, died, counts = 0, 0, set()
    for _ in range(60):
        _, columns = draw(rng, 3, late=late)
        clock += 1
        columns["time"] += 0 if late else 40 * clock
        backend.left = int(rng.integers(0, 9))
        after = Oracle()
        after.rows = {key: list(rows) for key, rows in oracle.rows.items()}
        after.append([1, 1, 1], columns)
        try:
            vault.append_many([1, 1, 1], columns)
            oracle = after
        except ConnectionError:
            died += 1
            if vault.lengths([1])[0] == len(after.history(1)):
                oracle = after
                counts.add("new")
            else:
                counts.add("old")
        backend.left = 10**9
        oracle.check(vault, np.array([1]), rng, sizes=(500,))
    assert died > 10 and counts == {"old", "new"}


def test_a_reader_that_a_writer_overtakes_starts_anew():
    rng = np.random.default_rng(0)
    backend, oracle = Memory(), Oracle()
    vault = BackendVault(backend, SCHEMA, "shop", block_rows=2)
    users, columns = draw(rng, 12, users=1)
    vault.append_many(users, columns)
    oracle.append(users, columns)
    overtaken = []

    def overtake(keys):
        if keys[0].count("/") == 3 and len(overtaken) < 3:  # an older part is about to be read
            overtaken.append(keys)
            backend.between = None
            users, columns = draw(rng, 2, users=1)
            columns["time"] = np.zeros(2, int)  # late: every part is written anew
            BackendVault(backend, SCHEMA, "shop", block_rows=2).append_many(users, columns)
            oracle.append(users, columns)
            backend.between = overtake

    backend.between = overtake
    found = vault.last_n([0], 40)
    assert len(overtaken) == 3
    items = found["item"][0][found["mask"][0]].tolist()
    assert items == [row[1] for row in oracle.history(0)]
    backend.between = None
    gone = next(key for key in backend.blocks if key.count("/") == 3)
    del backend.blocks[gone]
    with pytest.raises(seqvault.VaultError, match="missing from the backend"):
        vault.last_n([0], 40)


def test_a_part_that_names_itself_is_damage_and_no_endless_read():
    schema = seqvault.Schema({"item": np.int32})
    backend = Memory()
    vault = BackendVault(backend, schema, "shop")
    buf = np.zeros(bound(1, 2), np.uint8)
    part = buf[: encode(np.array([[1], [1]]), buf, 0, 7, 0, 0, 5, 0, 0)].tobytes()
    backend.blocks |= {"shop/default/7": part, "shop/default/7/0": part}
    with pytest.raises(seqvault.DamagedError) as raised:
        vault.last_n([7], 10)
    assert raised.value.users == (7,)


def test_a_dropped_column_comes_back_as_what_can_read_it():
    vault = BackendVault(Memory(), seqvault.Schema({"a": np.int32, "k": np.int8}), "shop")
    vault.evolve(seqvault.Schema({"k": np.int8}, 2))
    with pytest.raises(seqvault.VaultError, match="'a' cannot go from int32 to float32"):
        vault.evolve(seqvault.Schema({"k": np.int8, "a": np.float32}, 3))


def test_streams_and_shards_of_backends():
    shards = Shards([BackendVault(Memory(), SCHEMA, "shop") for _ in range(3)])
    rng, oracle = np.random.default_rng(0), Oracle()
    for stream in ("ads", "search"):
        users, columns = draw(rng, 60)
        assert shards.append_many(users, columns, stream=stream) == 60
        oracle.append(users, columns, stream)
        found = shards.last_n(np.arange(8), 30, stream=stream)
        for user in range(8):
            items = found["item"][user][found["mask"][user]].tolist()
            assert items == [row[1] for row in oracle.history(user, stream)]


@pytest.mark.parametrize("body", [b"[", b"7", b"[7]", b'[{"version": 1}]', b"[" * 100_000])
def test_schemas_that_are_none_are_refused(body):
    backend = Memory()
    backend.blocks["shop/schemas"] = b"%08x\n" % zlib.crc32(body) + body
    with pytest.raises(seqvault.VaultError):
        BackendVault(backend, SCHEMA, "shop")
    backend.blocks["shop/schemas"] = b"00000000\n[]"
    with pytest.raises(seqvault.VaultError, match="checksum"):
        BackendVault(backend, SCHEMA, "shop")
