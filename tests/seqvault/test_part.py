"""Packing, checksums and the index, against plain numpy and Python."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import seqvault
from seqvault import bits, chains, part, unpacking
from seqvault.index import ENTRY, Index
from seqvault.reading import Layout

DTYPES = {"a": np.int64, "b": np.uint8, "c": np.float64, "d": np.int16, "e": np.uint64}
SCHEMA = seqvault.Schema(DTYPES)


def test_compiled_files_name_what_they_inline():
    """Numba's cache of a file does not see changes of the files that it inlines."""
    for dependent, files in (
        (part, [bits]),
        (unpacking, [bits, part]),
        (chains, [bits, part, unpacking]),
    ):
        source = b"".join(Path(f.__file__).read_bytes() for f in files)
        digest = hashlib.sha256(source).hexdigest()[:16]
        assert dependent.INLINES == digest, f"set INLINES of {dependent.__name__} to {digest}"


def test_checksum_is_that_of_zstd_frames():
    """zstd ends a frame with the low 32 bits of XXH64 of its content."""
    data = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8)
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    for size in [*range(1, 100), 255, 256, 999]:
        wanted = int.from_bytes(compressor.compress(data[1 : size + 1].tobytes())[-4:], "little")
        assert bits.checksum(data, 1, size + 1) == wanted


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.integers(0, 64), st.integers(0, 300), st.integers(0, 2**32))
def test_packed_bits(width, count, seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2**64, count, np.uint64)
    kept = values & np.uint64((1 << width) - 1)
    buf = np.zeros(8 * count + 64 + bits.SLACK, np.uint8)
    end = bits.pack(buf, 1, values, 0, width)
    assert end == 1 + bits.packed_bytes(count, width)
    assert end - 1 <= 8 * -(-count // 8) * width / 8 + 64
    if width <= 32:
        out = np.full(304, 9, np.uint32)
        bits.unpack(buf, 1, count, width, out)
        assert out[:count].tolist() == kept.tolist()
        # lane by lane, as Python integers
        for lane in range(min(8, count)):
            mine = kept[lane::8].tolist()
            whole = sum(value << (i * width) for i, value in enumerate(mine))
            words = buf[1:end].view("<u4")[lane::8].tolist() if width else []
            assert sum(word << (32 * i) for i, word in enumerate(words)) == whole


def columns(rng, rows):
    """Words of every shape that the encodings treat differently."""
    skewed = rng.zipf(1.3, rows) % 10**6
    extreme = rng.choice([-(2**63), 2**63 - 1, 0, -1], rows)
    few = rng.choice(rng.integers(-(2**62), 2**62, 7), rows)
    constant = np.full(rows, rng.integers(-9, 9))
    choices = [skewed, extreme, few, constant, rng.integers(-5, 300, rows)]
    return {
        "time": np.sort(rng.integers(-(2**31), 2**31, rows)).astype(np.int32),
        "a": choices[rng.integers(len(choices))].astype(np.int64),
        "b": rng.choice([0, 255, 3], rows).astype(np.uint8),
        "c": np.where(rng.random(rows) < 0.5, 0, rng.normal(size=rows)),
        "d": choices[rng.integers(4)].astype(np.int16),
        "e": rng.integers(0, 2**64, rows, np.uint64) >> np.uint64(rng.integers(0, 64)),
    }


def encoded(values, schema=SCHEMA, user=7):
    words = seqvault.schema.words_of(values, schema)
    buf = np.full(part.bound(*words.shape[::-1]), 170, np.uint8)
    end = part.encode(words, buf, 0, user, 0, 0, 5, -1, 0)
    assert end + bits.SLACK <= len(buf)
    return buf, end


def read(buf, end, limit, before, want, n, available=None, user=7, layout=None):
    layout = layout or Layout([SCHEMA], None)
    out, plan, views = layout.zeros(n)
    results = np.zeros((1, unpacking.RESULTS), np.int64)
    one = lambda value: np.array([value], np.int64)  # noqa: E731
    chains.read_parts(
        buf, one(end), one(end if available is None else available), one(user), 0, one(limit),
        one(before), one(want), one(n), layout.wanted, plan,
        out, results,
    )  # fmt: skip
    return results[0], views


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 255, 256, 257, 700]))
def test_a_part_gives_back_what_it_packs(seed, rows):
    rng = np.random.default_rng(seed)
    values = columns(rng, rows)
    buf, end = encoded(values)
    assert unpacking.check_part(buf, end) == -1
    for _ in range(8):
        limit = 5 + int(rng.integers(-6, rows + 2))
        before = int(rng.choice(values["time"])) if rng.random() < 0.5 else part.NEVER
        want = int(rng.integers(0, rows + 2))
        high = min(rows, limit - 5, int(np.searchsorted(values["time"], before)))
        taken = min(max(high, 0), want)
        result, views = read(buf, end, limit, before, want, want)
        assert result[unpacking.STATUS] == unpacking.DONE
        assert result[unpacking.TAKEN] == taken
        assert result[unpacking.REACHED] == 5 + max(high, 0) and result[unpacking.FIRST] == 5
        for name, expected in values.items():
            assert views[name].dtype == expected.dtype
            assert (
                views[name][want - taken :] == expected[max(high, 0) - taken : max(high, 0)]
            ).all()
            assert not views[name][: want - taken].any()


def test_a_read_with_too_few_bytes_says_how_many_it_needs():
    rng = np.random.default_rng(3)
    values = columns(rng, 1500)
    buf, end = encoded(values)
    for want, before in ((300, part.NEVER), (10, int(values["time"][700]))):
        available = 10
        for _ in range(5):
            result, views = read(buf, end, 10**6, before, want, want, available)
            if result[unpacking.STATUS] == unpacking.DONE:
                break
            assert (
                result[unpacking.STATUS] == unpacking.SHORT
                and available < result[unpacking.NEED] <= end
            )
            available = int(result[unpacking.NEED])
        assert result[unpacking.TAKEN] == want and available < end
        high = np.searchsorted(values["time"], before)
        assert (views["a"] == values["a"][high - want : high]).all()


def test_every_flipped_bit_of_a_part_is_found():
    rng = np.random.default_rng(4)
    buf, end = encoded(columns(rng, 40))
    for at in range(end):
        for bit in range(8):
            buf[at] ^= 1 << bit
            assert unpacking.check_part(buf, end) >= 0, (at, bit)
            buf[at] ^= 1 << bit
    assert unpacking.check_part(buf, end) == -1


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(0, 2**32))
def test_a_hostile_part_is_refused_or_read_within_its_bytes(seed):
    """Checksums made right again after the flip: only the structure can still be wrong."""
    rng = np.random.default_rng(seed)
    buf, end = encoded(columns(rng, 300))
    chunks = int(bits.load32(buf, end - 24))
    footer = int(bits.load32(buf, end - 20))
    for _ in range(3):
        buf[rng.integers(0, end - 8)] = rng.integers(256)
    entry = end - part.TRAILER - chunks * part.ENTRY
    begin = part.PREFIX
    for k in range(chunks):
        stop = min(max(int(bits.load32(buf, entry + k * part.ENTRY)), begin), end)
        bits.store(buf, entry + k * part.ENTRY + 4, bits.checksum(buf, begin, stop), 4)
        begin = stop
    bits.store(buf, end - 8, bits.checksum(buf, end - footer, end - 8), 4)
    guarded = np.concatenate([buf[:end], np.zeros(bits.SLACK, np.uint8)])
    result, _ = read(guarded, end, 10**6, part.NEVER, 300, 300)
    assert result[unpacking.STATUS] in (unpacking.DONE, unpacking.SHORT, unpacking.DAMAGED)


def test_a_chain_that_loops_is_damaged():
    """A part that names itself as the one before it would be read for ever."""
    values = columns(np.random.default_rng(6), 20)
    words = seqvault.schema.words_of(values, SCHEMA)
    buf = np.zeros(part.bound(*words.shape[::-1]), np.uint8)
    size = part.encode(words, buf, 0, 7, 0, 0, 5, 0, 0)
    part.encode(words, buf, 0, 7, 0, 0, 5, 0, size)  # previous: place 0, its own
    layout, one = Layout([SCHEMA], None), np.ones(1, np.int64)
    out, plan, _ = layout.zeros(1000)
    found = np.zeros((1, chains.FOUND), np.int64)
    chains.read_last(
        buf, np.zeros(0, np.int32), 7 * one, 0, np.array([[0], [size], [1000]]), 1000,
        np.zeros(0, np.int64), False, layout.wanted, plan, out, found,
    )  # fmt: skip
    assert found[0, 0] == unpacking.DAMAGED


def test_entries_of_skewed_columns_cost_less_than_their_widest_value():
    rng = np.random.default_rng(5)
    rows = 4000
    values = {
        "time": np.arange(rows, dtype=np.int32) * 7 + 1_500_000_000,
        "item": np.where(rng.random(rows) < 0.02, 2**30, rng.integers(0, 16, rows)),
    }
    _, end = encoded(values, seqvault.Schema({"item": np.int32}))
    assert 8 * end / rows < 9


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40), max_size=8))
def test_the_index_finds_what_was_added(batches):
    index, known = Index(), {}
    for batch in batches:
        users = np.array(batch, np.int64)
        numbers = index.find_or_add(users)
        for user, number in zip(batch, numbers.tolist(), strict=True):
            assert known.setdefault(user, number) == number
    assert sorted(known.values()) == list(range(index.count))
    asked = np.array([*known, 12345], np.int64)
    expected = [*known.values(), known.get(12345, -1)]
    assert index.find(asked).tolist() == expected
    assert index.entries["user"].tolist() == sorted(known, key=known.get)


@pytest.mark.parametrize("users", [1_000, 65_000, 300_000])
def test_the_index_takes_at_most_48_bytes_per_user(users):
    rng = np.random.default_rng(0)
    index = Index()
    for start in range(0, users, 997):
        index.find_or_add(rng.integers(-(2**63), 2**63, min(997, users - start)))
        if index.count > 600:
            assert index.nbytes <= 48 * index.count
    assert ENTRY.itemsize == 32
