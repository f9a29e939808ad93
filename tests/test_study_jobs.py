"""The command line of the study: one process, or several that share its runs."""

import sys

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


def test_study_is_shared_by_processes_and_ends_as_the_worst_of_them(
    monkeypatch, tmp_path
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
