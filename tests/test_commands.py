"""train.py and eval.py as a user calls them: killed and resumed, overridden, refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
CONFIG = """
import json, sys
from ml_collections import ConfigDict
def get_config():
    config = ConfigDict(json.load(open({path!r})))
    return config
"""


def command(script, *arguments):
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def run(script, *arguments):
    return subprocess.run(command(script, *arguments), capture_output=True, text=True, cwd=ROOT)


@pytest.fixture
def config_file(small_config, tmp_path):
    """small_config as a config page of its own."""
    small_config.log_steps = 2
    small_config.total_steps = 12
    small_config.checkpoint_steps = 2
    for name in ("total", "log", "checkpoint"):
        for unit in ("steps", "epochs", "examples", "percent"):
            if small_config.get(f"{name}_{unit}", 0) is None:
                small_config[f"{name}_{unit}"] = 0 if unit == "steps" else 0.0
    (tmp_path / "config.json").write_text(json.dumps(small_config.to_dict()))
    page = tmp_path / "page.py"
    page.write_text(CONFIG.format(path=str(tmp_path / "config.json")))
    return page


@pytest.mark.parametrize(
    "script, flags, says",
    [
        ("train.py", ["--config.model.num_chunk=3"], "did you mean --config.model.num_chunks"),
        ("eval.py", ["-config.rhubarb", "3"], "--config.rhubarb: sparsectr_movielens has no such"),
        ("train.py", ["--config.batch_size=many"], "invalid literal"),
    ],
    ids=["alike", "unlike", "kind"],
)
def test_an_override_that_cannot_be_is_one_line(script, flags, says):
    # A value that looks like the flag's name is not taken for it.
    page = ["--workdir=config", "--config", "configs/sparsectr_movielens.py"]
    done = run(script, *page, *flags)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert says in done.stderr


@pytest.mark.parametrize(
    "flag, says",
    [
        ("--config.optimizer.schedule=steep", "ConfigError: schedule 'steep'"),
        ("--plan=cpu:0", "CannotPlan: --plan=cpu:0: cpu:N with N from 1"),
        ("--config.kernels=pallas", "CannotRun: kernels 'pallas' cannot run: they are for TPUs"),
    ],
)
def test_a_value_that_cannot_be_is_one_line(config_file, tmp_path, flag, says):
    done = run("train.py", f"--config={config_file}", f"--workdir={tmp_path / 'run'}", flag)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(says)


def test_absent_files_are_named_with_the_way_out(tmp_path):
    done = run("train.py", "--config=configs/sparsectr_alibaba.py",
               f"--config.data.raw_dir={tmp_path}", f"--workdir={tmp_path / 'run'}")  # fmt: skip
    assert done.returncode != 0 and "Traceback" not in done.stderr
    for name in ("raw_sample.csv", "ad_feature.csv", "user_profile.csv", "behavior_log.csv"):
        assert name in done.stderr
    assert str(tmp_path) in done.stderr and "sparsectr_alibaba.py:demo" in done.stderr


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--coordinator=localhost:9"], "go together"),
        (
            ["--coordinator=localhost:9", "--num_processes=2", "--process_id=2"],
            "--process_id=2 is not in 0 .. 1",
        ),
    ],
    ids=["some", "out of range"],
)
def test_wrong_flags_of_several_processes_are_one_line(flags, says):
    done = run("train.py", "--config=configs/sparsectr_movielens.py", *flags)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert says in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_equals_uninterrupted(config_file, tmp_path):
    flags = [f"--config={config_file}", "--cpu_devices=1"]
    whole = run("train.py", *flags, f"--workdir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr[-2000:]
    rng = np.random.default_rng(0)
    workdir = tmp_path / "killed"
    for _ in range(4):
        process = subprocess.Popen(
            command("train.py", *flags, f"--workdir={workdir}"),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT,
        )  # fmt: skip
        log = workdir / "train.jsonl"
        before = log.stat().st_size if log.exists() else 0
        while process.poll() is None and (not log.exists() or log.stat().st_size <= before):
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 0.5))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
    finished = run("train.py", *flags, f"--workdir={workdir}")
    assert finished.returncode == 0, finished.stderr[-2000:]
    logs = [
        [(r["step"], r["loss"]) for r in map(json.loads, path.read_text().splitlines())
         if "loss" in r]
        for path in (tmp_path / "whole" / "train.jsonl", workdir / "train.jsonl")
    ]  # fmt: skip
    assert logs[0] == logs[1] and [s for s, _ in logs[0]] == [2, 4, 6, 8, 10, 12]
    metrics = [
        json.loads((d / "metrics" / "12.json").read_text()) for d in (tmp_path / "whole", workdir)
    ]
    assert metrics[0] == metrics[1]


@pytest.mark.slow
def test_training_and_evaluation_from_the_command_line(config_file, tmp_path):
    workdir = tmp_path / "run"
    trained = run("train.py", f"--config={config_file}", f"--workdir={workdir}",
                  "--config.total_steps=4")  # fmt: skip
    assert trained.returncode == 0, trained.stderr[-2000:]
    evaluated = run("eval.py", f"--config={config_file}", f"--workdir={workdir}")
    assert evaluated.returncode == 0, evaluated.stderr[-2000:]
    assert "GAUC by user" in evaluated.stdout and "evaluation" in evaluated.stdout
    again = run("eval.py", f"--config={config_file}", f"--workdir={workdir}",
                f"--relative_to={workdir}", "--step=4")  # fmt: skip
    assert "rela impr" in again.stdout, again.stderr[-2000:]
    changed = run("train.py", f"--config={config_file}", f"--workdir={workdir}",
                  "--config.model.width=5")  # fmt: skip
    assert changed.returncode != 0 and "model.width" in changed.stderr
    assert os.listdir(workdir / "checkpoints")


@pytest.mark.slow
def test_a_behaviour_appended_a_moment_ago_changes_the_scores(tmp_path):
    flags = ["--config=configs/laser_alibaba.py:demo", f"--workdir={tmp_path / 'run'}",
             "--config.data.generate.users=300", f"--config.data.raw_dir={tmp_path / 'raw'}",
             f"--config.data.prepared_dir={tmp_path / 'prepared'}", "--config.total_epochs=0",
             "--config.total_steps=4", "--config.model.width=16"]  # fmt: skip
    trained = run("train.py", *flags, "--config.validate=False")
    assert trained.returncode == 0, trained.stderr[-2000:]
    served = subprocess.run(
        [sys.executable, "-m", "examples.serve_laser", *flags], capture_output=True, text=True,
        cwd=ROOT,
    )  # fmt: skip
    assert served.returncode == 0, served.stderr[-2000:]
    assert "3 behaviours appended, durably" in served.stdout
    assert "all candidates moved by" in served.stdout
    assert "Restor" not in served.stderr  # Orbax's account of it
