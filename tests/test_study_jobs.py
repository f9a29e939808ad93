"""The command line of the study: one process, or several that share its runs."""

import os
import signal
import sys
import time

import pytest

from experiments import configs, study


def test_unknown_study_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as exit_code:
        study.main(["nothing"])
    assert exit_code.value.code != 0
    error = capsys.readouterr().err
    for name in configs.names():
        assert name in error


def test_command_line_runs_the_study(monkeypatch):
    asked = []
    monkeypatch.setattr(
        study, "run_study", lambda name, *, data_dir: asked.append((name, data_dir))
    )
    assert study.main(["mnist5k_lenet300", "--data-dir", "here"]) == 0
    assert asked == [("mnist5k_lenet300", "here")]


@pytest.mark.parametrize("jobs", ["0", "-2", "two"])
def test_number_of_processes_that_is_none_is_refused(jobs, capsys):
    with pytest.raises(SystemExit) as exit_code:
        study.main(["mnist5k_lenet300", "--jobs", jobs])
    assert exit_code.value.code == 2
    assert "--jobs" in capsys.readouterr().err


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Return a function that puts a shell script in the place of Python."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    monkeypatch.chdir(tmp_path)

    def write(script):
        (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "python").chmod(0o755)

    return write


@pytest.mark.parametrize(
    ("ends", "worst"),
    [("exit 0", 0), ("exit 3", 3), ("kill -KILL $$", -9), ("kill -TERM $$", -15)],
)
def test_study_is_shared_by_processes_and_ends_as_the_worst_of_them(
    ends, worst, stand_in, tmp_path
):
    stand_in(
        'echo "$@" $XLA_PYTHON_CLIENT_PREALLOCATE >> log\n'
        f"mkdir first 2> /dev/null && exit 0\n{ends}"
    )
    arguments = ["mnist5k_lenet300", "--jobs", "2", "--data-dir", "here"]
    assert study.main(arguments) == worst
    command = "-m experiments.study mnist5k_lenet300 --data-dir here false"
    assert (tmp_path / "log").read_text().splitlines() == [command] * 2


def test_processes_end_when_the_study_is_interrupted(stand_in, tmp_path):
    # Each says who it is before it asks; the second is started after the first.
    stand_in(
        "echo $$ >> log; mkdir first 2> /dev/null || kill -INT $PPID\nexec sleep 99"
    )
    hearing = signal.signal(signal.SIGINT, signal.default_int_handler)
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            study.main(["mnist5k_lenet300", "--jobs", "2"])
    finally:
        signal.signal(signal.SIGINT, hearing)
    assert time.monotonic() - began < 50
    for job in (tmp_path / "log").read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(job), 0)
