"""What a run survives: damaged files, full disks, SIGTERM, other devices."""

import copy
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time

import jax
import numpy as np
import pytest

from ctr_jax import manifests, processes
from ctr_jax.checkpoints import Checkpoints, ConfigMismatch, SaveFailed
from ctr_jax.data import pipeline
from ctr_jax.evaluation import evaluate
from ctr_jax.manifests import Damaged
from ctr_jax.training import last_words, train
from tests.ctr_jax.test_checkpoints import IDENTITY, make_state, shapes
from tests.ctr_jax.test_training import final_state, log_lines
from tests.test_commands import ROOT, command, config_file, run  # noqa: F401


def saved(workdir, steps=(1, 2, 3), manifest=True):
    """A workdir with checkpoints of `steps`."""
    checkpoints = Checkpoints(workdir, keep_last=9)
    for step in steps:
        checkpoints.save(make_state(step), IDENTITY)
    checkpoints.finish()
    checkpoints.close()
    if not manifest:  # as where a run is killed before it is written
        for path in (workdir / "checkpoints").glob(f"*/{manifests.NAME}"):
            path.unlink()
    return workdir / "checkpoints"


def largest_file(directory):
    files = [p for p in directory.rglob("*") if p.is_file() and p.name != manifests.NAME]
    return max(files, key=lambda p: p.stat().st_size)


def truncate(directory):
    path = largest_file(directory)
    os.truncate(path, path.stat().st_size // 2)


def flip(directory):
    path = largest_file(directory)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(directory):
    shutil.rmtree(directory)
    directory.mkdir()


HARMS = {
    "truncated": (truncate, "bytes of"),
    "a flipped bit": (flip, "holds other bytes"),
    "a file deleted": (lambda d: largest_file(d).unlink(), "is missing"),
    "a manifest that is none": (lambda d: (d / manifests.NAME).write_text("{"), "cannot be read"),
}


@pytest.mark.parametrize("harm, says", HARMS.values(), ids=HARMS.keys())
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, caplog, harm, says):
    directory = saved(tmp_path)
    harm(directory / "3")
    checkpoints = Checkpoints(tmp_path)
    with caplog.at_level(logging.ERROR):
        state = checkpoints.restore_newest(shapes(make_state(0)), IDENTITY)
    jax.tree.map(np.testing.assert_array_equal, state, make_state(2))
    (line,) = [r.getMessage() for r in caplog.records if "Moved to" in r.getMessage()]
    assert "step 3: " in line and says in line and "3.damaged" in line
    assert (directory / "3.damaged").is_dir() and checkpoints.steps() == [1, 2]
    checkpoints.save(make_state(3), IDENTITY)  # its place is free
    checkpoints.finish()
    assert checkpoints.steps() == [1, 2, 3]
    checkpoints.close()


@pytest.mark.parametrize("harm", [truncate, empty], ids=["truncated", "empty"])
def test_damage_before_the_manifest_was_written(tmp_path, harm):
    directory = saved(tmp_path, manifest=False)
    for step in (1, 2, 3):
        assert not manifests.exists(directory / str(step))
    harm(directory / "3")
    checkpoints = Checkpoints(tmp_path)
    state = checkpoints.restore_newest(shapes(make_state(0)), IDENTITY)
    jax.tree.map(np.testing.assert_array_equal, state, make_state(2))
    checkpoints.close()


def test_a_manifest_is_written_in_passing_once_the_save_is(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(1), IDENTITY)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "is_saving_in_progress", lambda: True)
        patch.setattr(checkpoints._manager, "wait_until_finished", lambda: pytest.fail("waits"))
        checkpoints.settle()
    directory, deadline = tmp_path / "checkpoints", time.monotonic() + 30
    while not manifests.exists(directory / "1") and time.monotonic() < deadline:
        checkpoints.settle()
        time.sleep(0.01)
    manifests.check(directory / "1")
    monkeypatch.setattr(checkpoints, "finish", lambda: pytest.fail("once more"))
    checkpoints.settle()
    monkeypatch.undo()
    checkpoints.save(make_state(2), IDENTITY)
    checkpoints.close()  # as on the way out of a run that stops for another reason
    manifests.check(directory / "2")


def test_nothing_readable_is_said_and_nothing_is_overwritten(tmp_path):
    directory = saved(tmp_path, steps=(1, 2))
    for step in ("1", "2"):
        flip(directory / step)
    for _ in range(2):  # a second start says the same
        checkpoints = Checkpoints(tmp_path)
        with pytest.raises(Damaged, match=r"none of the checkpoints \[1, 2\] .* another --wor"):
            checkpoints.restore_newest(shapes(make_state(0)), IDENTITY)
        checkpoints.close()
    assert not list(directory.glob("*.damaged"))


def test_what_a_checkpoint_is_not_to_blame_for_is_no_damage(tmp_path, monkeypatch):
    saved(tmp_path, manifest=False)
    checkpoints = Checkpoints(tmp_path)

    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(checkpoints, "restore", full)
    with pytest.raises(jax.errors.JaxRuntimeError):
        checkpoints.restore_newest(shapes(make_state(0)), IDENTITY)
    assert checkpoints.steps() == [1, 2, 3]
    checkpoints.close()


def test_a_checkpoint_that_a_killed_run_did_not_measure_is_measured(small_config, tmp_path):
    train(small_config, tmp_path / "whole")
    for ended_at in (3, 6):
        workdir = tmp_path / str(ended_at)
        config = copy.deepcopy(small_config)
        config.total_steps, config.validate = ended_at, False
        train(config, workdir)  # as one that was killed in its validation leaves it
        done = train(small_config, workdir)
        for name in ("metrics/3.json", "metrics/6.json")[ended_at == 6 :]:
            assert (workdir / name).read_text() == (tmp_path / "whole" / name).read_text()
        measured = json.loads((workdir / "metrics/6.json").read_text())["valid"]
        assert done["valid"] == {"step": 6, **measured}


def test_a_table_of_measures_that_cannot_be_read_is_not_measured(tmp_path, caplog):
    saved(tmp_path)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.metrics_path(3).parent.mkdir()
    checkpoints.metrics_path(3).write_text("")
    assert checkpoints.metrics(3) == {} and "3.json cannot be read" in caplog.text
    assert checkpoints.best("valid/auc") is None
    checkpoints.close()


def test_another_process_acts_on_what_the_first_has_seen(tmp_path, monkeypatch):
    saved(tmp_path)
    checkpoints = Checkpoints(tmp_path, keep_last=9)
    monkeypatch.setattr(processes, "first", lambda: False)
    monkeypatch.setattr(manifests, "check", lambda _: pytest.fail("read every file once more"))
    monkeypatch.setattr(processes, "from_first", lambda _: np.array([True, True]))
    with pytest.raises(Damaged, match="step 3: damaged; the first process says how"):
        checkpoints.check(3)
    monkeypatch.setattr(processes, "from_first", lambda _: np.array([True, False]))
    assert checkpoints.check(3)
    monkeypatch.setattr(processes, "from_first", lambda _: np.array([False, True, False]))
    assert checkpoints.prune() == [2] and checkpoints.steps() == [1, 3]
    checkpoints.close()


def test_leftovers_of_a_killed_save_do_not_count(tmp_path):
    directory = saved(tmp_path, steps=(1,))
    leftover = directory / "2.orbax-checkpoint-tmp-17"
    shutil.copytree(directory / "1", leftover)
    reader = Checkpoints(tmp_path, read_only=True)
    assert reader.steps() == [1] and leftover.exists()
    reader.close()
    writer = Checkpoints(tmp_path)
    assert writer.steps() == [1] and not leftover.exists()
    writer.close()


def test_evaluation_names_the_damage(small_config, tmp_path):
    small_config.validate = False
    train(small_config, tmp_path)
    flip(tmp_path / "checkpoints" / "6")
    with pytest.raises(Damaged, match="step 6: .* holds other bytes than were saved"):
        evaluate(small_config, tmp_path, step=6)


def test_another_configuration_is_resumed_only_on_demand(small_config, tmp_path, caplog):
    small_config.validate = False
    small_config.total_steps = 3
    train(small_config, tmp_path)
    small_config.total_steps = 4
    small_config.optimizer.learning_rate = 0.5
    with pytest.raises(ConfigMismatch, match="optimizer.learning_rate"):
        train(small_config, tmp_path)
    with caplog.at_level(logging.WARNING):
        assert train(small_config, tmp_path, resume_anyway=True)["step"] == 4
    assert "although optimizer.learning_rate: checkpoint 0.001, config 0.5" in caplog.text
    small_config.model.width = 5
    with pytest.raises(ConfigMismatch, match=r"model/.*: checkpoint \[.*\], model \["):
        train(small_config, tmp_path, resume_anyway=True)


def test_a_run_goes_on_with_other_devices(small_config, tmp_path):
    whole = train(small_config, tmp_path / "whole")
    small_config.total_steps = 3
    small_config.mesh.data, small_config.mesh.table = 2, 2
    train(small_config, tmp_path / "moved")
    small_config.total_steps = 6
    small_config.mesh.data, small_config.mesh.table = 1, 8
    moved = train(small_config, tmp_path / "moved")
    assert moved["step"] == whole["step"] == 6
    logs = [
        [(r["step"], r["loss"]) for r in log_lines(tmp_path / name) if "loss" in r]
        for name in ("whole", "moved")
    ]
    np.testing.assert_allclose(*logs, rtol=1e-5)
    small_config.mesh.data = small_config.mesh.table = 1
    states = [final_state(small_config, tmp_path / name)["model"] for name in ("whole", "moved")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *states)


def test_sigterm_saves_the_running_step_and_stops(small_config, tmp_path, monkeypatch):
    whole = train(small_config, tmp_path / "whole")
    batches = pipeline.train_batches

    def terminated(*args, **kwargs):
        for number, batch in enumerate(batches(*args, **kwargs)):
            if number == 1:  # before the second step; a second signal changes nothing
                for _ in range(2):
                    signal.raise_signal(signal.SIGTERM)
            yield batch

    monkeypatch.setattr(pipeline, "train_batches", terminated)
    before = signal.getsignal(signal.SIGTERM)
    stopped = train(small_config, tmp_path / "stopped")
    assert signal.getsignal(signal.SIGTERM) is before
    assert stopped["step"] == 2 and not (tmp_path / "stopped" / "train_done.json").exists()
    says = last_words(stopped, "run")
    assert says.startswith("stopped by SIGTERM at step 2, which is saved in run; the same command")
    measured = last_words({**stopped, "valid": {"step": 1, "auc": 0.5}}, "run")
    assert "validation was last of step 1;" in measured
    monkeypatch.setattr(pipeline, "train_batches", batches)
    finished = train(small_config, tmp_path / "stopped")
    assert finished["step"] == 6 and finished["valid"] == whole["valid"]
    assert finished["valid"]["step"] == 6 and last_words(finished, "run").startswith("done: {'step")
    states = [final_state(small_config, tmp_path / name) for name in ("whole", "stopped")]
    jax.tree.map(np.testing.assert_array_equal, *states)
    steps = [r["step"] for r in log_lines(tmp_path / "stopped") if "loss" in r]
    assert steps == [2, 3, 4, 6]


def test_a_torn_log_line_is_dropped_and_no_step_is_written_twice(small_config, tmp_path):
    train(small_config, tmp_path / "whole")
    small_config.total_steps = 3
    train(small_config, tmp_path / "torn")
    with (tmp_path / "torn" / "train.jsonl").open(
        "a"
    ) as log:  # after its last checkpoint, then dead
        log.write('{"step": 4, "loss": 9.9}\n{"step": 5, "lo')
    small_config.total_steps = 6
    train(small_config, tmp_path / "torn")
    logs = [
        [(r["step"], r["loss"]) for r in log_lines(tmp_path / name) if "loss" in r]
        for name in ("whole", "torn")
    ]
    assert logs[0] == logs[1]


def test_a_full_disk_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    saved(tmp_path, steps=(1,))
    checkpoints = Checkpoints(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    says = r"step 2 could not be saved .* the last good one is step 1\. OSError: .*No space left"
    with monkeypatch.context() as patch, pytest.raises(SaveFailed, match=says):
        patch.setattr(checkpoints._manager, "save", full)
        checkpoints.save(make_state(2), IDENTITY)
    assert checkpoints.steps() == [1]

    # Room for the arrays but not for the manifest: the step does not count as good.
    checkpoints.save(make_state(2), IDENTITY)
    with monkeypatch.context() as patch, pytest.raises(SaveFailed, match=says):
        patch.setattr(manifests, "write", full)
        checkpoints.finish()
    checkpoints.close()


@pytest.mark.slow
def test_a_disk_that_fills_ends_the_run_with_one_line(config_file, tmp_path):  # noqa: F811
    # A limit on the size of files stands in for the disk: tables no longer fit, logs do. A table
    # is several times the limit, because the writer spreads small arrays over files as they come.
    flags = [f"--config={config_file}", "--cpu_devices=1", f"--workdir={tmp_path / 'run'}",
             "--config.model.embedding_width=512", "--config.checkpoint_steps=2"]  # fmt: skip
    first = run("train.py", *flags, "--config.total_steps=2")
    assert first.returncode == 0, first.stderr[-2000:]

    words = " ".join(map(shlex.quote, command("train.py", *flags, "--config.total_steps=8")))
    done = subprocess.run(
        ["bash", "-c", f"trap '' XFSZ; ulimit -f 40; exec {words}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode not in (0, None)
    assert "SaveFailed" in done.stderr and "the last good one is step 2" in done.stderr
    again = run("train.py", *flags, "--config.total_steps=4")
    assert again.returncode == 0, again.stderr[-2000:]
    assert "resumed" in again.stderr and "at step 2" in again.stderr


@pytest.mark.slow
def test_sigterm_from_outside_ends_with_zero(config_file, tmp_path):  # noqa: F811
    flags = [f"--config={config_file}", "--cpu_devices=1", f"--workdir={tmp_path / 'run'}",
             "--config.total_steps=100000", "--config.checkpoint_steps=100000"]  # fmt: skip
    process = subprocess.Popen(
        command("train.py", *flags), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True, cwd=ROOT,
    )  # fmt: skip
    log = tmp_path / "run" / "train.jsonl"

    def terminate():
        while not (log.exists() and log.stat().st_size) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)

    threading.Thread(target=terminate).start()
    stderr = process.communicate(timeout=300)[1]
    assert process.returncode == 0, stderr[-2000:]
    assert "SIGTERM: saving step" in stderr
    (step,) = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[-1]["step"] == step


def test_a_manifest_costs_little(tmp_path):
    size = 64 << 20
    (tmp_path / "tables").write_bytes(np.random.default_rng(0).bytes(size))
    began = time.perf_counter()
    manifests.write(tmp_path)
    manifests.check(tmp_path)
    assert time.perf_counter() - began < 4  # 0.1 s on an idle machine
