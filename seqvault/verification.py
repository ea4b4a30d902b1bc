"""verify: every byte of every file against its checksum."""

from __future__ import annotations

import os
import time
import zlib
from pathlib import Path

import numpy as np

from seqvault import log
from seqvault.bits import SLACK
from seqvault.errors import Damage, VaultError
from seqvault.manifest import DIFFERS, check_copies, manifest_stamp, read_manifest
from seqvault.part import PREFIX
from seqvault.segments import committed_bytes, segment_path
from seqvault.state import State, walk
from seqvault.unpacking import check_part

_ATTEMPTS = 10
_RENAMES = 2.0  # seconds that a writer may take from one to the next, with an fsync between


def verify(path: Path) -> list[Damage]:
    """Names all that is damaged in the vault or snapshot at `path`; empty if nothing is.

    Looks again if a writer replaced files meanwhile; one that never stops gets no damage named that
    was not met each time.

    Raises:
      VaultError: there is no vault, or nothing of it can be read.
    """
    always: list[Damage] | None = None
    for attempt in range(_ATTEMPTS):
        stamp = manifest_stamp(path)
        try:
            damages = _verify_once(path)
        except (VaultError, FileNotFoundError):
            if manifest_stamp(path) == stamp or attempt == _ATTEMPTS - 1:
                raise
            continue
        if any(d.problem == DIFFERS for d in damages):  # a writer may be between its two renames
            until = time.monotonic() + _RENAMES
            while manifest_stamp(path) == stamp and time.monotonic() < until:
                time.sleep(0.01)
        if manifest_stamp(path) == stamp:
            return damages
        always = damages if always is None else [d for d in damages if d in always]
        if not always:
            return always
    return always


def _verify_once(path: Path) -> list[Damage]:
    damages = check_copies(path)
    manifest, _ = read_manifest(path)
    committed = committed_bytes(manifest)
    if manifest["kind"] == "vault":
        state = State(path)  # what the log adds
        committed = state.committed
        state.close()
        damages += _check_logs(path, manifest)
        index = manifest["index"]["file"]
    else:
        index = "index.sv"
    damages += _check_whole(path / index, manifest["index"])
    for segment, size in sorted(committed.items()):
        damages += check_segment(segment_path(path, segment), size)
    return damages


def _check_whole(path: Path, entry: dict) -> list[Damage]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [Damage(path.name, 0, "missing")]
    if len(data) != entry["bytes"]:
        return [Damage(path.name, len(data), f"it should have {entry['bytes']} bytes")]
    if zlib.crc32(data) != entry["crc32"]:
        return [Damage(path.name, 0, "it does not match its checksum")]
    return []


def _check_logs(path: Path, manifest: dict) -> list[Damage]:
    damages = []
    for entry in [*manifest["carry"], {"file": manifest["log"], "bytes": None}]:
        file = path / entry["file"]
        if not file.exists():
            damages.append(Damage(file.name, 0, "missing"))
            continue
        _, found, end = log.read(file.read_bytes(), file.name)
        damages += found
        if entry["bytes"] not in (None, end):
            damages.append(Damage(file.name, end, f"it should have {entry['bytes']} bytes"))
    return damages


def check_segment(path: Path, size: int) -> list[Damage]:
    """Walks over the parts and checks each of them whole."""
    damages: list[Damage] = []
    if not size:
        return damages
    for info in walk(path, size, damages):
        buf = np.zeros(info.bytes + SLACK, np.uint8)
        with open(path, "rb") as file:
            got = os.preadv(file.fileno(), [memoryview(buf)[: info.bytes]], info.offset)
        wrong = PREFIX if got < info.bytes else int(check_part(buf, info.bytes))
        if wrong >= 0:
            problem = f"the part of user {info.user} does not match its checksums"
            damages.append(Damage(path.name, info.offset + wrong, problem))
    return damages
