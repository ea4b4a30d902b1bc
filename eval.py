"""Evaluates checkpoints: AUC, GAUC, logloss, calibration, slices and plots.

python eval.py --config=configs/sparsectr_alibaba.py[:variant] [--workdir=DIR]
               [--step N | --watch] [--relative_to=OTHER_WORKDIR] [--scores=DIR]
"""

from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from ctr_jax import command_line

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
CPU_DEVICES = command_line.define_cpu_devices()
WORKDIR = flags.DEFINE_string("workdir", None, "The training run (runs/<config name>).")
STEP = flags.DEFINE_integer("step", None, "This checkpoint; default: the best measured one.")
WATCH = flags.DEFINE_bool("watch", False, "Evaluate each checkpoint as it appears.")
RELATIVE_TO = flags.DEFINE_string("relative_to", None, "A run to measure RelaImpr against.")
SCORES = flags.DEFINE_string("scores", None, "Write every candidate's score: DIR/<split>.parquet.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    if WATCH.value and STEP.value is not None:
        raise app.UsageError("--step and --watch exclude each other")
    from ctr_jax.evaluation import evaluate
    from ctr_jax.reports import format_table, slice_rows, summary_rows
    from ctr_jax.writers import quiet_checkpoint_logs

    jax.config.update("jax_num_cpu_devices", CPU_DEVICES.value)  # only CPU backends read it
    logging.set_verbosity(logging.INFO)
    quiet_checkpoint_logs()
    config = CONFIG.value
    workdir = Path(WORKDIR.value or Path("runs") / config.name)
    with command_line.one_line():
        how = dict(relative_to=RELATIVE_TO.value, scores=SCORES.value)
        results = evaluate(config, workdir, STEP.value, WATCH.value, **how)
    for split, result in results.items():
        print(f"\n{config.name}, {split}")
        print(format_table(summary_rows(result)))
        if config.slices:
            print(f"\n{format_table(slice_rows(result, config.slices))}")
    splits = f"{{{','.join(results)}}}"
    print(f"\nmetrics and plots: {workdir}/evaluation/{splits}/")
    if SCORES.value:
        print(f"scores: {SCORES.value}/{splits}.parquet")


if __name__ == "__main__":
    command_line.run(main)
