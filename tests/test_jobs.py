"""Several processes that do the work of one command."""

import argparse
import os
import signal
import sys
import time

import pytest

from experiments import estimators, jobs, pareto


def parse(*argv):
    parser = argparse.ArgumentParser()
    jobs.add_jobs(parser)
    return parser.parse_args(argv).jobs


def test_one_process_does_the_work_unless_more_are_asked_for():
    assert parse() == 1
    assert parse("--jobs", "3") == parse("--jobs=3") == 3
    assert parse("--jobs", "3", "--jobs=1") == 1  # as the processes are told


@pytest.mark.parametrize("number", ["0", "-2", "two", "1.5", ""])
def test_number_of_processes_that_is_none_is_refused(number, capsys):
    with pytest.raises(SystemExit) as exit_code:
        parse(f"--jobs={number}")
    assert exit_code.value.code == 2
    message = capsys.readouterr().err
    assert "--jobs" in message
    assert number in message


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


@pytest.mark.parametrize("count", [1, 3])
def test_each_process_is_told_all_arguments_and_to_work_alone(
    count, stand_in, tmp_path
):
    stand_in('echo "$#:$@" $XLA_PYTHON_CLIENT_PREALLOCATE >> log')
    arguments = ["a name", "--jobs", "2", "--data-dir", "over there"]
    assert jobs.share("experiments.work", arguments, count) == 0
    said = f"8:-m experiments.work {' '.join(arguments)} --jobs=1 false"
    assert (tmp_path / "log").read_text().splitlines() == [said] * count


def test_what_the_user_says_of_memory_is_kept(stand_in, monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    monkeypatch.setenv("OF_THE_USER", "kept")
    stand_in("echo $XLA_PYTHON_CLIENT_PREALLOCATE $OF_THE_USER >> log")
    assert jobs.share("experiments.work", [], 2) == 0
    assert (tmp_path / "log").read_text().splitlines() == ["true kept"] * 2


def test_what_each_process_prints_is_dropped_but_for_its_progress(stand_in, capfd):
    stand_in("echo a table; echo progress >&2")
    assert jobs.share("experiments.work", [], 2) == 0
    assert capfd.readouterr() == ("", "progress\nprogress\n")


@pytest.mark.parametrize(
    ("command", "work"), [(estimators, "run_estimators"), (pareto, "run_pareto")]
)
def test_command_says_itself_what_its_processes_came_to(command, work, monkeypatch):
    said, codes = [], [7, 0]
    monkeypatch.setattr(command, "share", lambda *what: codes.pop(0))
    monkeypatch.setattr(command, work, lambda name, *a, **k: said.append(name) or [])
    arguments = ["fashion_mnist_resnet20", "--jobs", "2"]
    assert (command.main(arguments), said) == (7, [])
    assert (command.main(arguments), said) == (0, ["fashion_mnist_resnet20"])


@pytest.mark.parametrize(
    ("ends", "worst"),
    [("exit 0", 0), ("exit 3", 3), ("kill -KILL $$", -9), ("kill -TERM $$", -15)],
)
def test_code_is_the_worst_of_all(ends, worst, stand_in):
    # One succeeds, one fails a little, and one, which may be any of them, fails.
    stand_in(
        "mkdir first 2> /dev/null && exit 0\n"
        f"mkdir second 2> /dev/null && exit {min(1, abs(worst))}\n{ends}"
    )
    assert jobs.share("experiments.work", [], 3) == worst


def test_processes_end_when_the_work_is_interrupted(stand_in, tmp_path):
    # Each says who it is before it asks; the second is started after the first.
    stand_in(
        "echo $$ >> log; mkdir first 2> /dev/null || kill -INT $PPID\nexec sleep 99"
    )
    hearing = signal.signal(signal.SIGINT, signal.default_int_handler)
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            jobs.share("experiments.work", [], 2)
    finally:
        signal.signal(signal.SIGINT, hearing)
    assert time.monotonic() - began < 50
    for job in (tmp_path / "log").read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(job), 0)
