"""Processes of the command line: joined, interrupted, killed and started again."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from command_line import (
    NAME,
    ROOT,
    RUN,
    compiled_once,
    contents,
    lines,
    said,
    signal_when_logged,
)

from experiments import main as entry
from experiments import train
from experiments.main import main

# As RUN, but hearing Ctrl-C also where the tests themselves run in the background,
# which shells start with SIGINT ignored.
HEARING = (
    "import runpy, signal;"
    "signal.signal(signal.SIGINT, signal.default_int_handler);"
    "runpy.run_module('experiments.main', run_name='__main__', alter_sys=True)"
)
SHORT = ["--epochs", "8", "--seeds", "1", "--checkpoint-every", "0", "--devices", "1"]


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in compiled_once(tmp_path_factory.mktemp("compiled")).items():
            patch.setenv(name, value)  # not for JAX in here, which has read them
        yield


# Interrupted


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run([*RUN, *SHORT, "--out", str(folder)], cwd=ROOT, check=True)
    return folder


def computed(folder):
    """Return the metrics and results without what clocks say, and the parameters."""
    results = json.loads((folder / "results.json").read_text())
    records = lines(folder / "metrics.jsonl") + results
    for record in records:
        assert record.pop("seconds") >= 0
    params = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as arrays:
            params |= {(path.name, name): arrays[name].tobytes() for name in arrays}
    return records, params


def test_terminated_run_says_how_to_go_on_and_comes_to_the_same(whole, tmp_path):
    folder = tmp_path / "run"
    command = [*RUN, *SHORT, "--out", str(folder)]
    log = folder / "metrics.jsonl"
    code, error, _ = signal_when_logged(command, signal.SIGTERM, log, 3)
    assert code == 143
    assert "Traceback" not in error
    words = " ".join(error.split())
    assert f"Interrupted. What was logged until now is in {folder};" in words
    assert f"--out {folder} go on from the last checkpoint" in words
    assert not (folder / "results.json").exists()
    logged = lines(log)

    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("dense, seed 0: going on after step ") == 1
    assert computed(folder) == computed(whole)
    # What was done before it ended was not done again, but for an epoch or two.
    assert lines(log)[: len(logged) - 2] == logged[:-2]
    assert len(lines(folder / "resumed.jsonl")) == 1


def test_finished_run_that_is_started_again_trains_nothing_and_says_the_same(
    whole, monkeypatch, capsys
):
    def advance(*args):
        pytest.fail("trained")

    before = contents(whole)
    monkeypatch.setattr(train._Training, "advance", advance)
    assert main([NAME, *SHORT, "--out", str(whole)]) == 0
    capsys.readouterr()
    after = contents(whole)
    assert len(lines(whole / "resumed.jsonl")) == 1
    assert set(after) == {*before, "resumed.jsonl"}
    for name in ("results.json", "metrics.jsonl", "report.md", "versions.json"):
        assert after[name] == before[name]


def test_ctrl_c_ends_the_run_and_keeps_the_log(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HEARING, NAME, "--out", str(folder)]
    command += ["--epochs", "90000", "--seeds", "1"]
    log = folder / "metrics.jsonl"
    code, error, seconds = signal_when_logged(command, signal.SIGINT, log, 3)
    assert code == 130
    assert seconds < 20
    assert "Traceback" not in error
    assert f"Interrupted. What was logged until now is in {folder};" in " ".join(
        error.split()
    )
    assert log.read_text().endswith("\n")
    assert [m["epoch"] for m in lines(log)] == list(range(1, len(lines(log)) + 1))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
@pytest.mark.parametrize("step", ["load", "run"])
def test_signal_that_ends_the_run_is_its_exit_code(
    number, code, step, monkeypatch, tmp_path, capsys
):
    def wait(*args, **kwargs):
        os.kill(os.getpid(), number)
        time.sleep(5)
        pytest.fail("not heard")

    before = signal.getsignal(signal.SIGTERM)
    hearing = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr(entry, step, wait)
        assert main([NAME, "--out", str(tmp_path / "run")]) == code
    finally:
        signal.signal(signal.SIGINT, hearing)
    # Whoever calls main gets back what it changed for the process.
    assert signal.getsignal(signal.SIGTERM) is before
    assert (entry.log.handlers, entry.log.propagate) == ([], True)
    paragraph = said(capsys)
    assert paragraph.startswith("Interrupted")
    assert (str(tmp_path / "run") in paragraph) == (step == "run")


# Joined


def test_processes_are_joined_before_data_are_loaded_and_anything_is_written(
    monkeypatch, tmp_path, capsys
):
    def refuse():
        raise ValueError("no coordinator")

    def load(*args, **kwargs):
        pytest.fail("loaded")

    monkeypatch.setattr(entry, "join_processes", refuse)
    monkeypatch.setattr(entry, "load", load)
    assert main([NAME, "--out", str(tmp_path / "run")]) == 1
    assert "no coordinator" in said(capsys)
    assert not any(tmp_path.iterdir())


def test_nothing_is_computed_before_the_processes_are_joined(tmp_path):
    # JAX refuses to join them after that.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    alone = {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
    run = subprocess.run(
        [*RUN, "--batch-size", "3801", "--out", str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_COORDINATOR_ADDRESS": address, **alone},
    )
    assert "batch_size must be at most" in run.stderr
    assert "Traceback" not in run.stderr
    assert run.returncode == 1


def test_incomplete_environment_of_several_processes_is_reported(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
    assert main([NAME, "--out", str(tmp_path / "run")]) == 1
    assert "JAX_PROCESS_ID" in said(capsys)


def test_process_that_fails_says_so_in_its_exit_code():
    run = subprocess.run(
        [*RUN, "--penalty", "-1"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert run.stdout == ""
    assert "penalty must be" in run.stderr
    assert "Traceback" not in run.stderr
