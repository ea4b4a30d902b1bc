"""Training in several processes of this host, against one process with as many devices."""

import json
import os
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest

from ctr_jax import processes
from tests.ctr_jax.test_growth import days, logs, monday, runs  # noqa: F401
from tests.ctr_jax.test_survival import flip
from tests.ctr_jax.test_training import final_state
from tests.test_commands import ROOT, command, config_file, run  # noqa: F401

MESH = ["--config.mesh.data=2", "--config.mesh.table=2"]


def start(number, *flags, mesh=MESH):
    """`number` processes of one run, with 4 devices in all."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            command("train.py", *flags, *mesh, f"--cpu_devices={4 // number}",
                    f"--coordinator=localhost:{port}", f"--num_processes={number}",
                    f"--process_id={i}"),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for i in range(number)
    ]  # fmt: skip


def finish(started, timeout=300):
    errors = [p.communicate(timeout=timeout)[1] for p in started]
    return [p.returncode for p in started], errors


def losses(workdir):
    lines = (workdir / "train.jsonl").read_text().splitlines()
    return [(r["step"], r["loss"]) for r in map(json.loads, lines) if "loss" in r]


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
def test_processes_agree_with_one(config_file, tmp_path, number):  # noqa: F811
    flags = [f"--config={config_file}", "--config.checkpoint_steps=4"]
    one = run("train.py", *flags, *MESH, "--cpu_devices=4", "--config.total_steps=8",
              f"--workdir={tmp_path / 'one'}")  # fmt: skip
    assert one.returncode == 0, one.stderr[-2000:]
    many = [*flags, f"--workdir={tmp_path / 'many'}"]
    codes, errors = finish(start(number, *many, "--config.total_steps=4"))
    assert codes == [0] * number, errors[0][-3000:]
    # The second half in one process on one device: other processes, other devices, same data.
    rest = run("train.py", *many, "--cpu_devices=1", "--config.mesh.data=1",
               "--config.total_steps=8")  # fmt: skip
    assert rest.returncode == 0, rest.stderr[-2000:]
    want, got = losses(tmp_path / "one"), losses(tmp_path / "many")
    assert [s for s, _ in got] == [s for s, _ in want] == [2, 4, 6, 8]
    np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-5)
    for step in (4, 8):
        measured = [
            json.loads((tmp_path / d / "metrics" / f"{step}.json").read_text())["valid"]
            for d in ("one", "many")
        ]
        assert measured[0]["count"] == measured[1]["count"]
        for name in ("auc", "gauc_user", "logloss"):
            assert measured[1][name] == pytest.approx(measured[0][name], abs=1e-5), (step, name)


@pytest.mark.slow
def test_processes_that_start_from_a_run_agree_with_one(config_file, days, monday, tmp_path):  # noqa: F811
    """Their data's vocabularies have grown since, and with them a table that both hold parts of."""
    flags = [f"--config={config_file}", "--config.validate=False", "--config.total_steps=4",
             f"--config.start_from={monday}"]  # fmt: skip
    for name in ("raw_dir", "train", "test", "vocabularies_from", "grow_vocabularies"):
        flags.append(f"--config.data.{name}={days[1].data[name]}")
    one = run("train.py", *flags, *MESH, "--cpu_devices=4", f"--workdir={tmp_path / 'one'}")
    assert one.returncode == 0, one.stderr[-2000:]
    codes, errors = finish(start(2, *flags, f"--workdir={tmp_path / 'two'}"))
    assert codes == [0, 0], errors[0][-3000:]
    assert all(f"started from step 3 of {monday}" in error for error in errors)
    want, got = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [s for s, _ in got] == [2, 4]
    np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-5)
    states = [final_state(days[1], tmp_path / name, 4) for name in ("one", "two")]
    assert len(states[0]["tables"]["item"]) == 512
    for part in ("tables", "table_opt"):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
            *(state[part] for state in states),
        )


@pytest.mark.slow
def test_damage_is_agreed_upon_and_one_that_dies_ends_the_others(config_file, tmp_path):  # noqa: F811
    workdir = tmp_path / "run"
    flags = [f"--config={config_file}", f"--workdir={workdir}", "--config.validate=False"]
    codes, errors = finish(start(2, *flags, "--config.total_steps=4"))
    assert codes == [0, 0], errors[0][-3000:]
    flip(workdir / "checkpoints" / "4")

    # Both take step 2, and after a few more steps one of them is killed.
    started = start(2, *flags, "--config.total_steps=1000000", "--config.checkpoint_steps=1000000")
    while losses(workdir)[-1][0] < 8 and started[0].poll() is None:
        time.sleep(0.05)
    started[1].kill()
    began = time.monotonic()
    codes, errors = finish(started, timeout=4 * processes.HEARTBEAT_SECONDS)
    assert time.monotonic() - began < 3 * processes.HEARTBEAT_SECONDS
    # A collective failed, which is ours to tell; or none did and JAX missed the heartbeats.
    assert codes[0] in (1, -signal.SIGABRT), errors[0][-3000:]
    says = {1: "another process has died", -signal.SIGABRT: "JAX distributed service detected"}
    assert says[codes[0]] in errors[0] and "Traceback" not in errors[0], errors[0][-3000:]
    for error in errors:
        assert error.count("Moved to") == error.count("at step 2") == 1, error[-3000:]
    assert (workdir / "checkpoints" / "4.damaged").is_dir()

    codes, errors = finish(start(2, *flags, "--config.total_steps=4"))
    assert codes == [0, 0], errors[0][-3000:]
    assert "at step 2" in errors[0] and [s for s, _ in losses(workdir)] == [2, 4]


@pytest.mark.slow
def test_sigterm_to_one_stops_all_at_one_step(config_file, tmp_path):  # noqa: F811
    flags = [f"--config={config_file}", f"--workdir={tmp_path / 'run'}",
             "--config.total_steps=100000", "--config.checkpoint_steps=100000"]  # fmt: skip
    started = start(2, *flags)
    log = tmp_path / "run" / "train.jsonl"
    while not (log.exists() and log.stat().st_size) and started[0].poll() is None:
        time.sleep(0.05)
    for _ in range(2):  # the second, while it saves, changes nothing
        started[1].terminate()
        time.sleep(0.2)
    codes, errors = finish(started)
    assert codes == [0, 0], errors[0][-3000:] + errors[1][-3000:]
    (step,) = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert all(f"SIGTERM: saving step {step}" in e for e in errors)
    assert losses(tmp_path / "run")[-1][0] == step


@pytest.mark.slow
def test_a_mesh_that_leaves_a_process_without_devices_ends_all(config_file, tmp_path):  # noqa: F811
    flags = [f"--config={config_file}", f"--workdir={tmp_path / 'run'}"]
    started = start(2, *flags, mesh=["--config.mesh.data=1", "--config.mesh.table=1"])
    codes, errors = finish(started, timeout=60)
    assert codes == [1, 1]
    for error in errors:
        assert "ConfigError" in error and "Traceback" not in error, error[-3000:]
        assert "process 1 holds [] of the data axis" in error


def test_one_of_several_leaves_at_once_whatever_it_fails_of(monkeypatch, capsys):
    error = KeyError("nobody thought of it")
    with pytest.raises(KeyError):
        processes.leave_unforeseen(error)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", lambda code: codes.append(code))
    codes = []
    processes.leave_unforeseen(error)
    printed = capsys.readouterr().err
    assert codes == [1] and "nobody thought of it" in printed
    assert printed.splitlines()[-1] == "process 0 of 2: KeyError; its traceback is above"


@pytest.mark.slow
def test_an_error_nobody_foresaw_ends_one_of_several(config_file, tmp_path):  # noqa: F811
    flags = [f"--config={config_file}"]
    (tmp_path / "file").write_text("")  # a workdir that cannot be made
    codes, errors = finish(start(2, *flags, f"--workdir={tmp_path / 'file' / 'run'}"), timeout=100)
    assert all(codes), errors[0][-3000:]
    assert "its traceback is above" in errors[0]


def test_only_some_of_the_flags_are_refused():
    with pytest.raises(ValueError, match="go together"):
        processes.initialize(coordinator="localhost:1234")


@pytest.mark.parametrize(
    "environment, several",
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, True),
    ],
)
def test_what_the_environment_says(environment, several):
    assert processes.found(environment) is several
