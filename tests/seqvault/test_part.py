"""Packing, checksums and the index, against plain numpy and Python."""

import ast
import hashlib
import os
import subprocess
import sys
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
from tests.seqvault.parts import ROWS, SCHEMA, columns, encoded, read


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


def hostile(rng):
    """A part with wrong bytes under right checksums: only its structure can give it away."""
    rows = int(rng.choice([3, 40, ROWS]))
    buf, end = encoded(columns(rng, rows))
    chunks = int(bits.load32(buf, end - 24))
    footer = int(bits.load32(buf, end - 20))
    entry = end - part.TRAILER - chunks * part.ENTRY
    heads, at = [], part.PREFIX  # of packed columns: few bytes, and most of the structure
    for k in range(chunks):
        for _ in SCHEMA.stored:
            heads.append(at)
            at = unpacking._column_end(buf, at, end, min(part.CHUNK, rows - k * part.CHUNK))
    for _ in range(3):
        at = rng.choice(heads) + rng.integers(4) if rng.random() < 0.7 else rng.integers(end - 8)
        buf[at] = rng.integers(256)
    begin = part.PREFIX
    for k in range(chunks):
        stop = min(max(int(bits.load32(buf, entry + k * part.ENTRY)), begin), end)
        bits.store(buf, entry + k * part.ENTRY + 4, bits.checksum(buf, begin, stop), 4)
        begin = stop
    bits.store(buf, end - 8, bits.checksum(buf, end - footer, end - 8), 4)
    return np.concatenate([buf[:end], np.zeros(bits.SLACK, np.uint8)])


def test_a_hostile_part_is_refused_or_read_within_its_bytes(tmp_path):
    """In a process of its own, which dies of a byte too far; see tests/seqvault/guarded.py."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "parts.npz", *(hostile(rng) for _ in range(400)))
    ended = subprocess.run(
        [sys.executable, "-m", "tests.seqvault.guarded", tmp_path / "parts.npz"],
        env={**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path / "cache")},
        timeout=300, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    ends = ast.literal_eval(ended.stdout)
    assert set(ends) <= {unpacking.DONE, unpacking.SHORT, unpacking.DAMAGED}
    assert ends[unpacking.DONE] > 50 and ends[unpacking.DAMAGED] > 200


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
