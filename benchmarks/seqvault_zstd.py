"""Does zstd pay on parts, and on what a serving process sends? Bytes per behaviour and CPU.

    python -m benchmarks.seqvault_zstd [--users=600]

Parts are those of a bulk-loaded vault of the generator of benchmarks/seqvault.py; dictionaries are
trained on the parts of every second user and measured, as everything here, on those of the others.
A response is `last_n(1000)` of 256 users. CPU is the best of `--rounds` passes, in microseconds per
part or per user of a response.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import zstandard

import seqvault
from benchmarks.seqvault import BATCH, Generator
from benchmarks.seqvault_measures import N
from benchmarks.seqvault_rivals import COLUMNS
from seqvault import wire
from seqvault.part import bound, encode
from seqvault.schema import words_of
from seqvault.segments import segment_path
from seqvault.state import walk

DICTIONARY_BYTES = 112_640  # the zstd command line's default


def best_cpu(call: Callable, rounds: int) -> float:
    """CPU seconds of the fastest of `rounds` calls."""
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return min(seconds)


def parts_of(directory: Path) -> list[tuple[int, int, bytes]]:
    """(user, rows, bytes) of every part of the vault's only segment."""
    path = segment_path(directory, 1)
    data = path.read_bytes()
    return [
        (info.user, info.rows, data[info.offset : info.offset + info.bytes])
        for info in walk(path, len(data), [])
    ]


def compressed(blobs: Sequence[bytes], rows: int, level: int, dictionary, rounds: int) -> dict:
    """zstd of every blob on its own."""
    compressor = zstandard.ZstdCompressor(level=level, dict_data=dictionary)
    decompressor = zstandard.ZstdDecompressor(dict_data=dictionary)
    packed = [compressor.compress(blob) for blob in blobs]
    pack = best_cpu(lambda: [compressor.compress(blob) for blob in blobs], rounds)
    unpack = best_cpu(lambda: [decompressor.decompress(blob) for blob in packed], rounds)
    return {
        "bytes_per_behaviour": round(sum(map(len, packed)) / rows, 3),
        "pack_us": round(1e6 * pack / len(blobs), 2),
        "unpack_us": round(1e6 * unpack / len(blobs), 2),
    }


def of_parts(vault: seqvault.Vault, rounds: int) -> dict[str, dict]:
    parts = parts_of(vault.path)
    train = [blob for user, _, blob in parts if user % 2]
    blobs = [blob for user, _, blob in parts if not user % 2]
    rows = sum(rows for user, rows, _ in parts if not user % 2)
    out = {"as is": {"bytes_per_behaviour": round(sum(map(len, blobs)) / rows, 3)}}
    dictionary = zstandard.train_dictionary(DICTIONARY_BYTES, train)
    for level in (1, 3):
        out[f"zstd {level}"] = compressed(blobs, rows, level, None, rounds)
        with_it = compressed(blobs, rows, level, dictionary, rounds)
        out[f"zstd {level}, dictionary"] = with_it
    return out


def of_responses(vault: seqvault.Vault, users: np.ndarray, rounds: int) -> dict[str, dict]:
    found = vault.last_n(users, N)
    rows, batch = int(found["mask"].sum()), len(users)

    def figures(data: bytes, make: Callable, read: Callable | None = None) -> dict:
        out = {
            "bytes_per_behaviour": round(len(data) / rows, 3),
            "pack_us": round(1e6 * best_cpu(make, rounds) / batch, 2),
        }
        if read is not None:
            out["unpack_us"] = round(1e6 * best_cpu(lambda: read(data), rounds) / batch, 2)
        return out

    def arrays() -> bytes:
        return b"".join(values.tobytes() for values in found.values())

    def parts() -> bytes:
        flat = {name: v[found["mask"]] for name, v in found.items() if name != "mask"}
        words, ends = words_of(flat, vault.schema), np.cumsum(found["mask"].sum(1)).tolist()
        buf = np.zeros(bound(N, len(words)), np.uint8)
        out = []
        for user, start, stop in zip(users.tolist(), [0, *ends], ends, strict=False):
            end = encode(words[:, start:stop], buf, 0, user, 0, 0, 0, -1, 0)
            out.append(buf[:end].tobytes())
        return b"".join(out)

    out = {"arrays": figures(arrays(), arrays), "parts": figures(parts(), parts)}
    for level in (1, 3):
        for name, make in (("arrays", arrays), ("parts", parts)):
            out[f"{name}, zstd {level}"] = figures(
                zstandard.compress(make(), level),
                lambda make=make, level=level: zstandard.compress(make(), level),
            )
    for level in (0, 1, 3):
        out[f"wire, level {level}"] = figures(
            wire.pack(found, level),
            lambda level=level: wire.pack(found, level),
            lambda data: wire.unpack(data, batch, N),
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    generator = Generator(args.users, 2000)
    with tempfile.TemporaryDirectory() as directory:
        vault = seqvault.Vault.create(Path(directory) / "v", seqvault.Schema(COLUMNS))
        vault.bulk_load(generator.blocks())
        users = np.random.default_rng(1).choice(generator.ids, BATCH)
        for kind, figures in (
            ("part", of_parts(vault, args.rounds)),
            ("response", of_responses(vault, users, args.rounds)),
        ):
            for name, values in figures.items():
                print(f"{kind}, {name}: {json.dumps(values)}", flush=True)
        vault.close()


if __name__ == "__main__":
    main()
