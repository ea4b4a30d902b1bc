"""Several processes that train one model: Cloud TPU VMs, Slurm, or a few on one host.

Every process runs the same command. On a Cloud TPU slice and under Slurm JAX finds the others by
itself; elsewhere each is told: --coordinator=HOST:PORT --num_processes=N --process_id=I.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import NoReturn

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from ctr_jax import sharding
from ctr_jax.batch import RequestBatch

# A process that dies is noticed by the others within about this time.
HEARTBEAT_SECONDS = 30


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of this run; nothing where it has one only.

    Raises:
      ValueError: only some of the three are given, or process_id is not one of 0 .. N - 1.
    """
    given = [x is not None for x in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        raise ValueError("--coordinator, --num_processes and --process_id go together")
    if all(given) and not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id={process_id} is not in 0 .. {num_processes - 1} (--num_processes - 1)"
        )
    if not all(given) and not found(os.environ):
        return
    jax.distributed.initialize(
        coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
    )
    logging.info("process %d of %d", jax.process_index(), jax.process_count())


def found(environment) -> bool:
    """Whether the environment is one of several processes that JAX detects by itself: tasks of one
    Slurm step, workers of one TPU slice."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or "1"
    workers = environment.get("TPU_WORKER_HOSTNAMES") or ""
    return int(tasks) > 1 or workers.count(",") > 0


def first() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def leave(message: str) -> NoReturn:
    """Ends this process with one line and exit code 1.

    One of several does not take Python's way out, where JAX waits for the others: they may be no
    more, or be waiting for this one and notice only that it is gone.
    """
    if jax.process_count() == 1:
        sys.exit(message)
    print(f"process {jax.process_index()} of {jax.process_count()}: {message}",
          file=sys.stderr, flush=True)  # fmt: skip
    os._exit(1)


def leave_broken(error: Exception) -> NoReturn:
    """`leave` after an error of the runtime, where most likely another process has died; raises it
    again where there is only one."""
    if jax.process_count() == 1:
        raise error
    reason = " ".join(str(error).split())[:300]
    leave(
        f"another process has died, or this one failed ({reason}). End all and start them again: "
        "they resume at the newest checkpoint"
    )


def leave_unforeseen(error: Exception) -> NoReturn:
    """`leave` after an error that nobody foresaw, with its traceback; raises it again where there
    is only one process."""
    if jax.process_count() == 1:
        raise error
    traceback.print_exception(error)
    leave(f"{type(error).__name__}; its traceback is above")


def from_first(value: np.ndarray) -> np.ndarray:
    """The first process's value, on all of them: what one has seen in files and all act upon."""
    return multihost_utils.broadcast_one_to_all(value) if jax.process_count() > 1 else value


def whole(batch: RequestBatch, logits: jax.Array, mesh: Mesh) -> tuple[RequestBatch, jax.Array]:
    """Each process's rows of a batch, and the logits of all of it -> all rows, on the host.

    What no score is kept with, the behaviours, stays behind where there are several processes.
    """
    if jax.process_count() == 1:
        return batch, jax.device_get(logits)
    batch = batch.replace(behaviour={}, behaviour_time=batch.behaviour_time[:, :0])
    everywhere = (sharding.put_batch(batch, mesh), logits)
    return multihost_utils.process_allgather(everywhere, tiled=True)
