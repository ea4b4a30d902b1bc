"""The command line: inspect, verify, bench and load vaults and snapshots.

    seqvault inspect PATH               counts, bytes and files, as JSON
    seqvault verify PATH                every byte; names what is damaged; exit status 1 if any is
    seqvault bench PATH                 warm and cold lookups of random users
    seqvault load PATH FILE...          sorted columns of .parquet or .npz files into a vault

`load` makes the vault if there is none, from `--columns item:int32,action:uint8`; one that is there
must have the columns given. The files have those columns beside `user` and `time`. They must be
sorted by (user, time) and hold users that the stream does not have, which is fastest; `--append`
takes any.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from seqvault.errors import VaultError
from seqvault.manifest import COPY, MANIFEST, read_manifest
from seqvault.schema import DEFAULT, TIME, Schema
from seqvault.snapshot import Snapshot
from seqvault.vault import Vault
from seqvault.verification import verify

USER = "user"
_BATCH_ROWS = 1 << 18


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; the exit status: 0, 1 if `verify` found damage, 2 on an error."""
    parser = argparse.ArgumentParser(
        prog="seqvault", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("inspect", "verify", "bench", "load"):
        commands.add_parser(name).add_argument("path", type=Path)
    bench, load = commands.choices["bench"], commands.choices["load"]
    bench.add_argument("--n", type=_positive, default=1000, help="behaviours per lookup")
    bench.add_argument("--batch", type=_positive, default=256, help="users per batched lookup")
    bench.add_argument("--lookups", type=_positive, default=2000)
    bench.add_argument("--stream", default=DEFAULT)
    load.add_argument("files", type=Path, nargs="+")
    load.add_argument("--columns", help="name:dtype,... of a new vault")
    load.add_argument("--event_id", help="the column of a new vault that makes appends idempotent")
    load.add_argument("--stream", default=DEFAULT)
    load.add_argument("--append", action="store_true", help="any order, users may be there")
    options = parser.parse_args(arguments)
    run = {"inspect": _inspect, "verify": _verify, "bench": _bench, "load": _load}
    try:
        return run[options.command](options)
    except (VaultError, OSError) as error:
        print(f"seqvault: {error}", file=sys.stderr)
        return 2


def _positive(text: str) -> int:
    """A number from the command line; argparse tells the user if it raises."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def _open(path: Path) -> Vault | Snapshot:
    manifest, _ = read_manifest(path)
    return Snapshot(path) if manifest.get("kind") == "snapshot" else Vault.open(path)


def _inspect(options: argparse.Namespace) -> int:
    opened = _open(options.path)
    if isinstance(opened, Vault):
        print(json.dumps({"kind": "vault", **opened.stats()}, indent=1))
        return 0
    size = sum(f.stat().st_size for f in options.path.iterdir())
    print(json.dumps({
        "kind": "snapshot", "content_hash": opened.content_hash, "users": opened.num_users,
        "behaviours": opened.num_behaviours, "schema": opened.schema.to_json(),
        "disk_bytes": size, "damages": [str(d) for d in opened.damages],
    }, indent=1))  # fmt: skip
    return 0


def _verify(options: argparse.Namespace) -> int:
    damages = verify(options.path)
    for damage in damages:
        print(damage)
    print(f"{options.path}: {len(damages)} damages" if damages else f"{options.path}: whole")
    return 1 if damages else 0


def _bench(options: argparse.Namespace) -> int:
    """Times lookups; cold ones drop the files' pages from the page cache before each."""
    opened = _open(options.path)
    live = isinstance(opened, Vault)
    users = opened.users(stream=options.stream) if live else np.arange(opened.num_users)
    if not len(users):
        raise VaultError(f"{options.path}: nobody to look up")
    named = {"stream": options.stream} if live else {}
    rng = np.random.default_rng(0)
    for name, batch, cold in (
        ("warm, 1 user", 1, False),
        (f"warm, {options.batch} users", options.batch, False),
        ("cold, 1 user", 1, True),
    ):
        asked = [rng.choice(users, batch) for _ in range(max(3, options.lookups // batch))]
        asked = asked[:300] if cold else asked
        if not cold:
            for some in asked:
                opened.last_n(some, options.n, **named)
        seconds, cpu = [], time.process_time()
        for some in asked:
            if cold:
                _forget(options.path)
            start = time.perf_counter()
            opened.last_n(some, options.n, **named)
            seconds.append(time.perf_counter() - start)
        cpu = (time.process_time() - cpu) / len(asked) / batch * 1e6
        p50, p99 = np.percentile(np.array(seconds) * 1e6, [50, 99])
        line = f"last_n({options.n}), {name}: P50 {p50:.1f} us, P99 {p99:.1f} us"
        print(line if cold else f"{line}, CPU {cpu:.2f} us per user")
    return 0


def _forget(path: Path) -> None:
    for file in path.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _load(options: argparse.Namespace) -> int:
    pairs = [column.partition(":")[::2] for column in (options.columns or "").split(",") if column]
    if any((options.path / name).exists() for name in (MANIFEST, COPY)):
        vault = Vault.open(options.path, write=True)
    elif pairs:
        schema = Schema(dict(pairs), event_id=options.event_id)
        vault = Vault.create(options.path, schema, (options.stream,))
    else:
        raise VaultError(f"{options.path}: no vault there; give --columns to make one")
    with vault:
        if pairs and Schema(dict(pairs)).columns != vault.schema.columns:
            found = {name: dtype.name for name, dtype in vault.schema.columns.items()}
            raise VaultError(f"{options.path} has other columns: {found}")
        if options.event_id not in (None, vault.schema.event_id):
            raise VaultError(f"{options.path} has another event id: {vault.schema.event_id}")
        names = (USER, *vault.schema.stored)
        if options.stream not in vault.streams:
            raise VaultError(f"{options.path} has other streams: {list(vault.streams)}")
        begins: list[tuple[int, Path]] = []
        blocks = _all_blocks(options.files, names, begins)
        start = time.perf_counter()
        try:
            if options.append:
                rows = _append(vault, blocks, options.stream)
            else:
                rows = vault.bulk_load(blocks, stream=options.stream)
        except VaultError as error:
            if error.row is None:
                raise
            first, file = [begin for begin in begins if begin[0] <= error.row][-1]
            raise VaultError(f"{file}, row {error.row - first}: {error}") from None
        if options.append:
            vault.merge()
            vault.checkpoint()
    seconds = time.perf_counter() - start
    print(f"{rows} behaviours in {seconds:.1f} s, {rows / max(seconds, 1e-9):,.0f} per second")
    return 0


def _append(vault: Vault, blocks: Iterable[dict[str, np.ndarray]], stream: str) -> int:
    """Appends block after block; an error has the row of the input where it stopped."""
    rows = done = 0
    for block in blocks:
        users = block.pop(USER)
        try:
            done += vault.append_many(users, block, stream=stream)
        except VaultError as error:
            what = str(error).removeprefix(f"row {error.row}, ")  # of the block
            raise VaultError(what).at_row(rows + (error.row or 0)) from error
        rows += len(users)
    return done


def _all_blocks(
    files: Sequence[Path], names: tuple[str, ...], begins: list[tuple[int, Path]]
) -> Iterator[dict[str, np.ndarray]]:
    """The blocks of all files; `begins` gets the row of the input where each begins."""
    rows = 0
    for file in files:
        begins.append((rows, file))
        for block in _blocks(file, names):
            yield {**block}
            rows += len(block[TIME])


def _blocks(file: Path, names: tuple[str, ...]) -> Iterator[Mapping[str, np.ndarray]]:
    """The named columns of a .parquet or .npz file, in blocks."""
    if file.suffix == ".npz":
        columns = _arrays(file, names)
        for start in range(0, len(columns[TIME]), _BATCH_ROWS):
            yield {name: c[start : start + _BATCH_ROWS] for name, c in columns.items()}
        return
    try:
        import pyarrow.parquet
    except ImportError:
        raise VaultError(f"{file}: reading parquet needs pyarrow") from None
    try:
        reader = pyarrow.parquet.ParquetFile(file)
        if missing := sorted(set(names) - set(reader.schema_arrow.names)):
            raise VaultError(f"{file}: no columns {missing}")
        for batch in reader.iter_batches(_BATCH_ROWS, columns=list(names)):
            yield {name: batch[name].to_numpy(zero_copy_only=False) for name in names}
    except pyarrow.ArrowException as error:
        raise VaultError(f"{file}: cannot be read ({error})") from None


def _arrays(file: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The named columns of an .npz file."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if missing := sorted(set(names) - set(arrays.files)):
                raise VaultError(f"{file}: no columns {missing}")
            columns = {name: arrays[name] for name in names}
    except (ValueError, TypeError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as e:
        raise VaultError(f"{file}: cannot be read ({e})") from None
    for name, values in columns.items():
        if values.ndim != 1:
            raise VaultError(f"{file}: column {name!r} has shape {values.shape}")
    if len({len(values) for values in columns.values()}) > 1:
        lengths = {name: len(values) for name, values in columns.items()}
        raise VaultError(f"{file}: columns of different lengths, {lengths}")
    return columns


if __name__ == "__main__":
    sys.exit(main())
