"""A request to stop, and where a run may: SIGTERM is what clouds and schedulers send first."""

from __future__ import annotations

import signal
import threading

import jax
from absl import logging
from jax.experimental import multihost_utils


class Preemption:
    """While open, SIGTERM does not kill the process but is answered by `asked`.

    One process has a handler of its own. Several have to agree on the step, which
    `jax.distributed` arranges: it catches the signal on any of them.
    """

    def __enter__(self) -> Preemption:
        self._asked, self._before = False, None
        alone = jax.process_count() == 1
        if alone and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_) -> None:
        self._asked = True

    def asked(self, step: int) -> bool:
        """Whether to stop after `step`; the same answer on every process."""
        if jax.process_count() > 1:
            self._asked = multihost_utils.reached_preemption_sync_point(step)
        if self._asked:
            logging.info("SIGTERM: saving step %d and stopping; the same command goes on", step)
        return self._asked
