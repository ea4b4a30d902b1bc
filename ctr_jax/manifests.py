"""Whether the files of a finished checkpoint are still what was saved.

Orbax gives a step its name only when all of it is written, so a killed save leaves nothing that
counts. What happens to files afterwards (a truncated copy, a flipped bit) it does not always see;
a manifest of sizes and CRC-32s, written once a save has finished, does.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from ctr_jax.writers import write_json

NAME = "manifest.json"
_BLOCK = 1 << 22


class Damaged(RuntimeError):
    """A checkpoint is not what was saved; the message names step, file and what is wrong."""


def write(directory: Path) -> None:
    """Writes the manifest of a finished checkpoint's directory."""
    write_json(directory / NAME, {name: _of(directory / name) for name in _files(directory)})


def exists(directory: Path) -> bool:
    return (directory / NAME).exists()


def check(directory: Path) -> None:
    """Compares the files of `directory` with its manifest.

    Raises:
      Damaged: a file is missing, of another size, or of other bytes.
    """
    try:
        saved = json.loads((directory / NAME).read_text())
    except (OSError, ValueError) as error:
        raise Damaged(f"step {directory.name}: {NAME} cannot be read ({error})") from error
    for name, (size, crc) in saved.items():
        path = directory / name
        if not path.exists():
            raise Damaged(f"step {directory.name}: {name} is missing")
        if path.stat().st_size != size:
            raise Damaged(
                f"step {directory.name}: {name} has {path.stat().st_size} bytes of {size}"
            )
        if _of(path) != [size, crc]:
            raise Damaged(f"step {directory.name}: {name} holds other bytes than were saved")


def _files(directory: Path) -> list[str]:
    found = (p.relative_to(directory) for p in sorted(directory.rglob("*")) if p.is_file())
    return [str(p) for p in found if p.name != NAME]


def _of(path: Path) -> list[int]:
    """[bytes, CRC-32]."""
    crc, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]
