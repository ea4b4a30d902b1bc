"""Metrics to JSONL and TensorBoard, and progress to a person.

The JSONL log has no gap and no repeat: on resume, lines past the restored step are dropped.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from logging import WARNING
from pathlib import Path

from absl import logging
from tensorboardX import SummaryWriter
from tqdm import tqdm


def quiet_checkpoint_logs() -> None:
    """Keeps Orbax's own account of every save (dozens of lines) out of the log below WARNING."""
    keep = lambda record: record.levelno >= WARNING or "orbax" not in record.pathname  # noqa: E731
    for handler in logging.get_absl_logger().handlers + [logging.get_absl_handler()]:
        handler.addFilter(keep)


def write_json(path: Path, content) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never a torn one, whatever is
    killed or loses power.

    Raises:
      ValueError: a value is NaN or infinite.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> dict:
    """What `write_json` wrote; {} where nothing is there, and with a warning where it is torn."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        logging.warning("%s cannot be read (%s): as if it were not there", path, error)
        return {}


class MetricWriter:
    """Writes {name: number} per step to `<workdir>/train.jsonl` and TensorBoard event files.

    Args:
      active: False where another process writes them.
    """

    def __init__(self, workdir: Path, start_step: int = 0, active: bool = True):
        self._active = active
        if not active:
            return
        self._path = Path(workdir) / "train.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _drop_after(self._path, start_step)
        self._file = self._path.open("a")
        self._tensorboard = SummaryWriter(str(workdir), purge_step=start_step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        if not self._active:
            return
        self._file.close()
        self._tensorboard.close()


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the torn last line of a killed run
        if record["step"] <= step:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


class Progress:
    """A progress bar on a terminal, plain log lines elsewhere."""

    def __init__(self, total: int, start: int, label: str):
        self._bar = None
        self._label, self._total = label, total
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, desc=label, unit="step", smoothing=0.1)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update(1)

    def report(self, step: int, text: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        else:
            logging.info("%s %d/%d  %s", self._label, step, self._total, text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
