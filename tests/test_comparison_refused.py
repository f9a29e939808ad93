"""What a comparison refuses: parts, settings, books and commands that do not fit."""

import dataclasses

import pytest
from tiny_comparison import CONFIG, put_comparison, put_trials, run

from experiments import study
from experiments.comparison import ComparisonError


@pytest.fixture
def held(monkeypatch):
    return put_comparison(monkeypatch)


@pytest.fixture
def trials(monkeypatch, held):
    return put_trials(monkeypatch)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"methods": ["magic"]}, "method must be one of dense, scl, gmp, str; got "),
        ({"targets": [0.7]}, "target must be one of 0.5, 0.9; got 0.7"),
    ],
    ids=["method", "target"],
)
def test_what_is_not_in_a_comparison_is_refused(trials, tmp_path, part, words):
    with pytest.raises(ComparisonError, match=words):
        run(tmp_path, **part)
    assert not trials.trained
    assert not (tmp_path / "compare_tiny.json").exists()


def test_comparison_that_cannot_choose_or_is_not_there_is_refused(
    trials, held, tmp_path
):
    held.config = dataclasses.replace(CONFIG, validation=0)
    with pytest.raises(ComparisonError, match="validation split; validation is 0"):
        run(tmp_path)
    held.comparison = None
    with pytest.raises(ComparisonError, match="tiny has no comparison; these have: "):
        run(tmp_path)
    assert not trials.trained


def test_book_of_other_settings_is_refused(trials, held, tmp_path):
    run(tmp_path, methods=["scl"], targets=[0.5])
    held.config = dataclasses.replace(CONFIG, epochs=3, learning_rate=0.7)
    with pytest.raises(ValueError, match="runs with another epochs; move"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fashion_mnist_lenet300", "--methods", "scl"], "parts of a comparison"),
        (["mnist5k_lenet5", "--compare"], "mnist5k_lenet5 has no comparison"),
        (
            ["fashion_mnist_lenet300", "--compare", "--methods", "magic"],
            "method must be one of dense, scl",
        ),
    ],
    ids=["no_comparison_asked", "no_comparison", "method"],
)
def test_command_line_says_what_is_wrong(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        study.main(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
