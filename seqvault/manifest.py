"""The manifest of a snapshot: what files it has, and how they must look.

A snapshot is a directory with one little-endian array per file and `manifest.json`:

    manifest.json   format, schema, counts, {file: dtype, rows, bytes, sha256}, content hash
    offsets.bin     [U + 1]: the behaviours of user u are rows offsets[u] .. offsets[u + 1]
    time.bin        [rows]: seconds, not decreasing within a user
    <column>.bin    [rows]

The manifest is the last file written, so a directory without one is no snapshot.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from seqvault.errors import VaultError

FORMAT = "seqvault-snapshot"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
OFFSETS = "offsets"
BUILDING = ".building"  # the suffix of a directory that a build has not finished


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(fields: dict) -> str:
    """sha256 of what the snapshot holds: format, schema, counts and the files' hashes."""
    held = {key: value for key, value in fields.items() if key != "content_hash"}
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path) -> dict:
    """The manifest of the snapshot in `directory`, checked against itself.

    Raises:
      VaultError: there is none, it is damaged, or a newer format wrote it.
    """
    path = directory / MANIFEST
    if directory.name.endswith(BUILDING):
        raise VaultError(f"{directory}: an unfinished build, not a snapshot")
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise VaultError(f"{path}: no such file, so {directory} is no history snapshot") from None
    except ValueError as error:
        raise VaultError(f"{path}: damaged manifest ({error})") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise VaultError(f"{path}: not the manifest of a {FORMAT}")
    if fields.get("format_version") != FORMAT_VERSION:
        raise VaultError(
            f"{path}: format version {fields.get('format_version')}; this library reads "
            f"{FORMAT_VERSION}"
        )
    if fields.get("content_hash") != content_hash(fields):
        raise VaultError(f"{path}: damaged manifest (its hash does not match its content)")
    return fields
