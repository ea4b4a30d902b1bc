"""Trains the experiment of a config file.

    python train.py --config=configs/sparsectr_alibaba.py[:variant] [--workdir=DIR]
    python train.py --config=configs/sparsectr_alibaba.py[:variant] --describe
    python train.py --config=configs/sparsectr_alibaba.py[:variant] --plan=v5e:4x4

The others train nothing: --describe prints parameters, operations and memory of the model, --plan
what the whole step needs on devices that need not be here. Any field can be overridden, as in
--config.model.num_chunks=32. The same config and workdir resume by themselves.
"""

import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from ctr_jax import command_line

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
CPU_DEVICES = command_line.define_cpu_devices()
DESCRIBE = flags.DEFINE_bool("describe", False, "Print what the model costs, and stop.")
PLAN = flags.DEFINE_string(
    "plan", None, "Compile the train step for a TPU slice (v5e:4x4), cpu:8 or auto, and stop."
)
ROWS = flags.DEFINE_list("rows", [], "With --plan: rows of vocabularies, as user_id=100000000.")
RESUME_ANYWAY = flags.DEFINE_bool(
    "resume_anyway", False, "Resume another configuration's checkpoint; the log says what differs."
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "Several processes: HOST:PORT of the first.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Several processes: how many.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Several processes: this one, from 0.")
WORKDIR = flags.DEFINE_string("workdir", None, "Checkpoints, metrics, plots (runs/<config name>).")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    if ROWS.value and not PLAN.value:
        raise app.UsageError("--rows is for --plan")
    from ctr_jax import processes
    from ctr_jax.describe import describe
    from ctr_jax.planner import parse_rows, plan
    from ctr_jax.training import last_words, train
    from ctr_jax.writers import quiet_checkpoint_logs

    devices = CPU_DEVICES.value
    if PLAN.value and PLAN.value.startswith("cpu:") and PLAN.value[4:].isdigit():
        devices = max(1, int(PLAN.value[4:]))  # "cpu:0" is the planner's to refuse
    jax.config.update("jax_num_cpu_devices", devices)  # only CPU backends read it
    logging.set_verbosity(logging.INFO)
    try:
        processes.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    except ValueError as error:
        sys.exit(str(error))
    quiet_checkpoint_logs()
    config = CONFIG.value
    try:
        if DESCRIBE.value:
            print(describe(config))
            return
        if PLAN.value:
            print(plan(config, PLAN.value, parse_rows(ROWS.value)))
            return
        workdir = WORKDIR.value or Path("runs") / config.name
        done = train(config, workdir, resume_anyway=RESUME_ANYWAY.value)
    except command_line.mendable() as error:
        processes.leave(f"{type(error).__name__}: {error}")
    except jax.errors.JaxRuntimeError as error:
        processes.leave_broken(error)
    except Exception as error:
        processes.leave_unforeseen(error)
    logging.info(last_words(done, workdir))


if __name__ == "__main__":
    command_line.run(main)
