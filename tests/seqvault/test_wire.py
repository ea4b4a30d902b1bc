"""The wire format: what comes out is what went in, and no bytes are trusted."""

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import seqvault
from seqvault import wire

DTYPES = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
DTYPES += ["float32", "float64"]


def answer(rng, users, n, dtypes):
    """What last_n may give: right-aligned rows of any bits, 0 elsewhere."""
    counts = rng.integers(0, n + 1, users)
    found = {}
    for name, dtype in {"time": "int32", **dtypes}.items():
        found[name] = np.zeros((users, n), dtype)
        for i, count in enumerate(counts.tolist()):
            if dtype == "bool":
                row = rng.integers(0, 2, count).astype(bool)
            elif dtype.startswith("float"):
                row = rng.normal(size=count).astype(dtype)
            else:
                info = np.iinfo(dtype)
                row = rng.integers(info.min, info.max, count, dtype, endpoint=True)
            found[name][i, n - count :] = row
    mask = np.zeros((users, n), bool)
    for i, count in enumerate(counts.tolist()):
        mask[i, n - count :] = True
    return found | {"mask": mask}


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32),
    st.integers(0, 5),
    st.integers(0, 9),
    st.lists(st.sampled_from(DTYPES), max_size=6),
    st.sampled_from([0, 1, 3]),
)
def test_what_comes_out_is_what_went_in(seed, users, n, dtypes, level):
    columns = {f"c{i}": dtype for i, dtype in enumerate(dtypes)}
    found = answer(np.random.default_rng(seed), users, n, columns)
    out = wire.unpack(wire.pack(found, level), users, n)
    assert set(out) == set(found)
    for name, values in found.items():
        assert out[name].dtype == values.dtype
        assert (out[name] == values).all() and out[name].shape == values.shape


def test_the_bytes_of_a_message():
    """Written out by hand: the format must not change under a version."""
    found = {
        "time": np.array([[0, 7], [5, 9]], np.int32),
        "kind": np.array([[0, 1], [2, 3]], np.uint8),
        "mask": np.array([[False, True], [True, True]]),
    }
    payload = b"\x04\x05time\x04\x02kind" + struct.pack("<II", 1, 2)
    payload += struct.pack("<iii", 7, 5, 9) + b"\1\2\3"
    head = b"SQVW" + struct.pack("<BBHIIII", 1, 0, 2, 2, 2, len(payload), len(payload))
    message = head + struct.pack("<I", zlib.crc32(head + payload)) + payload
    assert wire.pack(found) == message
    packed = wire.pack(found, 1)
    assert zstandard.decompress(packed[28:]) == (
        payload[:20] + b"\7\xfe\4" + b"\0\xff\0" * 3 + b"\1\2\3"
    )


def test_answers_of_a_vault_travel(tmp_path):
    schema = seqvault.Schema({"item": np.int64})
    vault = seqvault.Vault.create(tmp_path / "v", schema, ("ads", "search"))
    vault.append(1, {"time": [1, 3], "item": [-1, 2**40]}, stream="ads")
    vault.append(1, {"time": [2], "item": [5]}, stream="search")
    found = vault.last_n([1, 2], 4)  # both streams, with the column "stream"
    out = wire.unpack(wire.pack(found, 3), 2, 4)
    assert out["item"].tolist() == [[0, -1, 5, 2**40], [0] * 4]
    assert out["stream"].tolist() == found["stream"].tolist()


@pytest.mark.parametrize("level", [0, 3])
def test_damage_and_other_questions_are_refused(level):
    rng = np.random.default_rng(0)
    found = answer(rng, 3, 5, {"a": "int16", "b": "float32"})
    message = wire.pack(found, level)
    for bit in range(8 * len(message)):
        flipped = bytearray(message)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(seqvault.VaultError):
            wire.unpack(bytes(flipped), 3, 5)
    for cut in range(len(message)):
        with pytest.raises(seqvault.VaultError):
            wire.unpack(message[:cut], 3, 5)
    with pytest.raises(seqvault.VaultError, match="asked were 3 and 6"):
        wire.unpack(message, 3, 6)


def sealed(payload, flags=0, columns=1, users=2, n=4, size=None, unpacked=None, version=1):
    """A message whose checksum is right, whatever it says."""
    size = len(payload) if size is None else size
    unpacked = len(payload) if unpacked is None else unpacked
    head = struct.pack(
        "<4sBBHIIII", b"SQVW", version, flags, columns, users, n, size, unpacked
    )  # fmt: skip
    return head + struct.pack("<I", zlib.crc32(payload, zlib.crc32(head))) + payload


TABLE = b"\x04\x05time"
BOMB = zstandard.compress(bytes(1 << 28), 1)


@pytest.mark.parametrize(
    "message",
    [
        sealed(TABLE + struct.pack("<II", 1, 2**32 - 1) + bytes(4)),
        sealed(TABLE + struct.pack("<II", 5, 0) + bytes(20)),  # more rows than were asked for
        sealed(TABLE + struct.pack("<II", 1, 1) + bytes(9)),
        sealed(TABLE + struct.pack("<II", 1, 1) + bytes(7)),
        sealed(TABLE + b"\0\0\0"),
        sealed(TABLE[:3]),
        sealed(TABLE, columns=60_000),
        sealed(TABLE + TABLE + bytes(8), columns=2),
        sealed(b"\x04\x05mask" + bytes(8)),
        sealed(b"\x04\x0btime" + bytes(8)),
        sealed(TABLE + bytes(8), version=2),
        sealed(TABLE + bytes(8), flags=2),
        sealed(TABLE + bytes(8), size=13),
        sealed(TABLE + bytes(8), unpacked=15),
        sealed(TABLE + bytes(8), flags=1),
        sealed(BOMB, flags=1, unpacked=1 << 28),
        sealed(BOMB, flags=1, unpacked=100 * len(BOMB)),
        sealed(b"", columns=0, users=1 << 31),
    ],
)
def test_a_hostile_message_is_refused_and_gets_no_memory(message):
    tracemalloc.start()
    with pytest.raises(seqvault.VaultError):
        wire.unpack(message, 2, 4)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("name, dtype", [("c" * 256, "i4"), ("ä", "i4"), ("c", "f2"), ("c", "U3")])
def test_a_column_that_a_message_cannot_carry_is_refused(name, dtype):
    found = {"mask": np.ones((1, 2), bool), name: np.ones((1, 2), dtype)}
    with pytest.raises(seqvault.VaultError, match="column"):
        wire.pack(found)
    assert wire.pack({"mask": found["mask"], "c" * 255: np.ones((1, 2), "i4")})


def test_an_empty_answer_has_a_message_of_its_own_and_what_packs_too_well_is_sent_whole():
    found = {"time": np.zeros((0, 3), np.int32), "mask": np.zeros((0, 3), bool)}
    assert wire.unpack(wire.pack(found, 1), 0, 3)["time"].shape == (0, 3)
    found = {"time": np.ones((4, 9000), np.int32), "mask": np.ones((4, 9000), bool)}
    assert len(wire.pack(found, 3)) > 4 * 4 * 9000
    assert (wire.unpack(wire.pack(found, 3), 4, 9000)["time"] == 1).all()
