"""The command line of the study: one process, or several that share its runs."""

import json
import sys

import pytest

from experiments import configs, study
from experiments.book import RESULTS


def test_unknown_study_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as exit_code:
        study.main(["nothing"])
    assert exit_code.value.code != 0
    error = capsys.readouterr().err
    for name in configs.names():
        assert name in error


ROW = json.loads((RESULTS / "mnist5k_lenet300.json").read_text())["summary"][0]


@pytest.fixture
def asked(monkeypatch):
    """Put a stand-in in the place of the study; return what it is asked for."""
    calls = []

    def run_study(name, *, data_dir):
        calls.append((name, data_dir))
        return [ROW]

    monkeypatch.setattr(study, "run_study", run_study)
    return calls


def test_command_line_runs_the_study_and_prints_what_it_came_to(asked, capsys):
    assert study.main(["mnist5k_lenet300", "--data-dir", "here"]) == 0
    assert asked == [("mnist5k_lenet300", "here")]
    header, _, row, *_ = capsys.readouterr().out.splitlines()
    assert "test accuracy" in header
    assert f"{100 * ROW['accuracy']:.2f} ± " in row


@pytest.mark.parametrize("jobs", ["0", "-2", "two"])
def test_number_of_processes_that_is_none_is_refused(jobs, capsys):
    with pytest.raises(SystemExit) as exit_code:
        study.main(["mnist5k_lenet300", "--jobs", jobs])
    assert exit_code.value.code == 2
    assert "--jobs" in capsys.readouterr().err


def test_study_is_shared_by_processes_and_ends_as_the_worst_of_them(
    asked, monkeypatch, tmp_path, capsys
):
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho "$@" >> log\nmkdir first 2> /dev/null && exit 0\nexit 3\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.chdir(tmp_path)
    arguments = ["mnist5k_lenet300", "--jobs", "2", "--data-dir", "here"]
    assert study.main(arguments) == 3
    command = f"-m experiments.study {' '.join(arguments)} --jobs=1"
    assert (tmp_path / "log").read_text().splitlines() == [command] * 2
    assert (asked, capsys.readouterr().out) == ([], "")


def test_what_processes_have_come_to_is_printed_once(asked, monkeypatch, capsys):
    monkeypatch.setattr(study, "share", lambda module, argv, jobs: 0)
    assert study.main(["mnist5k_lenet300", "--jobs", "2"]) == 0
    assert asked == [("mnist5k_lenet300", None)]
    assert capsys.readouterr().out.count("test accuracy") == 1
