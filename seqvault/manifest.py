"""The manifest of a vault or snapshot: a small JSON file, replaced by rename, kept twice.

The first line is the CRC-32 of the rest. `MANIFEST.copy` is written before `MANIFEST`, and either
is enough to open; a damaged one is named.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from pathlib import Path

from seqvault.errors import Damage, VaultError
from seqvault.files import Files

FORMAT, FORMAT_VERSION = "seqvault", 3
READABLE = (2, 3)  # before 3, each segment that a merge touched had a log record of its own
MANIFEST, COPY = "MANIFEST", "MANIFEST.copy"
BUILDING = ".building"  # the suffix of a directory that a build has not finished
DIFFERS = "it is not a copy of the manifest"
_MAX_BYTES = 1 << 26


def write_manifest(files: Files, directory: Path, fields: dict) -> None:
    """Makes `fields` the manifest of `directory`, durable and in one step."""
    fields = {**fields, "format": FORMAT, "format_version": FORMAT_VERSION}
    body = json.dumps(fields, indent=1, sort_keys=True).encode()
    data = b"%08x\n" % zlib.crc32(body) + body
    files.write_whole(directory / COPY, data)
    files.write_whole(directory / MANIFEST, data)


def read_manifest(directory: Path) -> tuple[dict, list[Damage]]:
    """The manifest's fields, and what is damaged of it.

    Raises:
      VaultError: there is none, none is whole, or a newer format wrote it.
    """
    if directory.name.endswith(BUILDING):
        raise VaultError(f"{directory}: an unfinished build, not a vault")
    damages, missing = [], 0
    for name in (MANIFEST, COPY):
        try:
            with open(directory / name, "rb") as file:
                data = file.read(_MAX_BYTES)
        except FileNotFoundError:
            missing += 1
            damages.append(Damage(name, 0, "missing"))
            continue
        fields = _parse(data)
        if fields is None:
            damages.append(Damage(name, 0, "it does not match its checksum"))
            continue
        if fields.get("format_version") not in READABLE:
            raise VaultError(
                f"{directory / name}: format version {fields.get('format_version')}; this library "
                f"reads {' and '.join(map(str, READABLE))}"
            )
        return fields, damages
    if missing == 2:
        raise VaultError(f"{directory / MANIFEST}: no such file, so {directory} is no vault")
    raise VaultError(f"{directory / damages[0].file}: damaged manifest, and so is its copy")


def check_copies(directory: Path) -> list[Damage]:
    """What is damaged of either copy, or that they are not of the same checkpoint."""
    damages, whole = [], []
    for name in (MANIFEST, COPY):
        try:
            data = (directory / name).read_bytes()
        except FileNotFoundError:
            damages.append(Damage(name, 0, "missing"))
            continue
        if _parse(data) is None:
            damages.append(Damage(name, 0, "it does not match its checksum"))
        else:
            whole.append(data)
    if len(whole) == 2 and whole[0] != whole[1]:
        damages.append(Damage(COPY, 0, DIFFERS))
    return damages


def repair_copies(files: Files, directory: Path) -> None:
    """Makes both copies what `read_manifest` reads, before files that the other names may go.

    And of this format, before anything is written that libraries of an older one would misread.
    """
    found = {}
    for name in (MANIFEST, COPY):
        with contextlib.suppress(FileNotFoundError):
            found[name] = (directory / name).read_bytes()
    good = next(data for data in found.values() if _parse(data) is not None)
    fields = _parse(good)
    if fields["format_version"] != FORMAT_VERSION:
        write_manifest(files, directory, fields)
        return
    for name in (COPY, MANIFEST):
        if found.get(name) != good:
            files.write_whole(directory / name, good)


def _parse(data: bytes) -> dict | None:
    """The fields, or None if the bytes are not a whole manifest."""
    crc, _, body = data.partition(b"\n")
    if crc != b"%08x" % zlib.crc32(body):
        return None
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) and fields.get("format") == FORMAT else None


def manifest_stamp(path: Path) -> tuple[int, int] | None:
    """What changes whenever the manifest does."""
    try:
        found = os.stat(path / MANIFEST)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns
