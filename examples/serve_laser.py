"""Scoring live requests with LASER over a SeqVault: a behaviour counts as soon as it is appended.

    python train.py --config=configs/laser_alibaba.py:demo
    python -m examples.serve_laser --config=configs/laser_alibaba.py:demo

Loads the histories of the prepared data set into a vault, takes a request of the test split, scores
100 candidates, appends three behaviours of one candidate's category as if the user had just made
them, and scores the same candidates again. Any config whose histories lie in a store, and not in
its records, can be served like this.
"""

import shutil
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

import seqvault
from ctr_jax import command_line, serving, steps
from ctr_jax.data import open_data
from ctr_jax.metrics import sigmoid
from ctr_jax.writers import quiet_checkpoint_logs

CONFIG = config_flags.DEFINE_config_file("config", None, "What was trained.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Of the training run (runs/<config name>).")
CANDIDATES = flags.DEFINE_integer("candidates", 100, "Scored per request.")


def main(argv):
    del argv
    quiet_checkpoint_logs()
    with command_line.one_line():
        serve()


def serve() -> None:
    config = CONFIG.value
    workdir = Path(WORKDIR.value or Path("runs") / config.name)
    data = open_data(config)
    histories = serving.history_store(data)
    experiment, weights, step = serving.restore(config, workdir)
    score = steps.score_step(experiment)

    # ---- a live store, filled from the training snapshot ----
    path = workdir / "vault"
    shutil.rmtree(path, ignore_errors=True)
    with seqvault.Vault.create(path, histories.schema) as vault:
        loaded = vault.bulk_load(histories.scan())
        print(f"step {step} of {workdir}; {loaded:,} behaviours in {path}")

        # ---- a request of the test split: the user, the time, candidates ----
        requests = data.split("test")
        of_user = requests.records(np.arange(1))[0]
        others = requests.records(np.arange(min(len(requests), CANDIDATES.value)))
        users, now = np.array([of_user["user"]]), np.array([of_user["request_time"]])

        def columns(group, rows):
            return {c.name: rows[f"{group}/{c.name}"] for c in data.spec.group(group)}

        request = {
            "time": now,
            "user": columns("user", of_user[None]),
            "context": columns("context", of_user[None]),
            "candidate": {k: v[None, :, 0] for k, v in columns("candidate", others).items()},
        }

        def scores():
            began = time.perf_counter()
            history = vault.last_n(users, config.history_length, before=now)
            read = time.perf_counter()
            batch = serving.request_batch(data.spec, history, **request)
            with jax.set_mesh(experiment.mesh):
                logits = np.asarray(score(weights, batch))[0]
            done = time.perf_counter()
            seen = int(history["mask"].sum())
            print(
                f"{seen} behaviours read in {(read - began) * 1e3:.2f} ms, "
                f"{len(logits)} candidates scored in {(done - read) * 1e3:.1f} ms"
            )
            return sigmoid(logits)

        scores()  # compiles
        before = scores()

        # ---- the user looks at something: three behaviours, seconds before the request ----
        wanted = int(np.argsort(before)[len(before) // 2])
        fresh = {"time": now[0] - np.array([9, 6, 3])}
        for column in data.spec.group("behaviour"):
            values = request["candidate"].get(column.name)  # same names share a vocabulary
            value = values[0, wanted] if values is not None else history_mode(vault, column, users)
            fresh[column.name] = np.full(3, value, np.int32)
        began = time.perf_counter()
        vault.append(int(users[0]), fresh, sync=True)
        print(f"3 behaviours appended, durably, in {(time.perf_counter() - began) * 1e3:.2f} ms")
        scores()
        after = scores()

    moved = np.abs(after - before)
    print(f"candidate {wanted}: {before[wanted]:.4f} -> {after[wanted]:.4f}")
    print(f"all candidates moved by {moved.mean():.4f} in the mean, {moved.max():.4f} at most")
    if not moved.max() > 0:
        raise SystemExit("the scores did not change: the fresh behaviours were not read")


def history_mode(vault, column, users) -> int:
    """The user's most frequent value of a column that candidates do not have."""
    history = vault.last_n(users, 1000, columns=(column.name,))
    values, counts = np.unique(history[column.name][history["mask"]], return_counts=True)
    return int(values[counts.argmax()]) if len(values) else 0


if __name__ == "__main__":
    command_line.run(main)
