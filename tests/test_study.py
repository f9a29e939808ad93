"""The study: chosen on validation, tested once, and resumed after any run."""

import dataclasses
import json

import numpy as np
import pytest
from trials import BASE, Trials, book, experiment, rows, run

from experiments import book as books
from experiments.config import Study

CONFIG = dataclasses.replace(BASE, learning_rate=0.1, penalty=2e-6, seeds=3)
STUDY = Study(
    targets=(0.5, 0.9),
    penalties=(1e-6, 2e-6, 3e-6, 4e-6),
    learning_rates=(0.05, 0.1),
    seeds=2,
)
# penalty -> accuracy on validation, accuracy on test, sparsity. By validation, 2e-6 is
# the best that reaches 0.5, and 4e-6 the only one that reaches 0.9. 1e-6 is better but
# too dense, and the test set would choose 3e-6.
SCL = {
    1e-6: (0.99, 0.99, 0.3),
    2e-6: (0.95, 0.80, 0.6),
    3e-6: (0.94, 0.98, 0.7),
    4e-6: (0.90, 0.85, 0.9),
}
DENSE = {0.05: (0.93, 0.91), 0.1: (0.92, 0.97)}  # learning rate -> accuracies


@pytest.fixture
def settings(monkeypatch):
    """Put one made-up experiment in place; its fields can be changed."""
    return experiment(monkeypatch, CONFIG, STUDY)


@pytest.fixture
def trials(monkeypatch, settings):
    """Replace data, training and evaluation."""
    return Trials(
        monkeypatch,
        dense=lambda config: DENSE[config.learning_rate],
        scl=lambda config: SCL[config.penalty],
    )


# The choice


def test_penalty_is_the_best_on_validation_of_those_that_reach_the_target(
    trials, tmp_path
):
    assert rows(run(tmp_path)) == {
        ("dense", None, None, 0.1),
        ("dense", None, None, 0.05),
        ("scl", 0.5, 2e-6, 0.1),
        ("scl", 0.9, 4e-6, 0.1),
    }


def test_dense_of_the_same_learning_rate_is_tested_once(trials, tmp_path, monkeypatch):
    monkeypatch.setitem(DENSE, 0.1, (0.98, 0.97))
    content = run(tmp_path)
    dense = [row for row in content["summary"] if row["method"] == "dense"]
    assert [row["learning_rate"] for row in dense] == [0.1]


def test_pixels_are_chosen_on_validation_and_dense_is_tested_with_those_of_scl(
    trials, settings, tmp_path
):
    settings.study = dataclasses.replace(STUDY, pixels=("unit", "standardized"))
    trials.of_pixels = {"unit": (-0.02, 0.02)}
    content = run(tmp_path)
    assert {row["pixels"] for row in content["summary"]} == {"standardized"}
    trials.of_pixels = {"unit": (0.02, -0.02)}
    other = tmp_path / "other"
    other.mkdir()
    content = run(other)
    assert {row["pixels"] for row in content["summary"]} == {"unit"}
    assert rows(content) == {
        ("dense", None, None, 0.1),
        ("dense", None, None, 0.05),
        ("scl", 0.5, 2e-6, 0.1),
        ("scl", 0.9, 4e-6, 0.1),
    }


def test_study_of_penalties_has_them_fixed_whatever_the_config_asks_for(
    trials, settings, tmp_path
):
    settings.config = dataclasses.replace(CONFIG, sparsity=0.9)
    content = run(tmp_path)
    assert ("scl", 0.5, 2e-6, 0.1) in rows(content)
    assert {c.sparsity for method, c, *_ in trials.trained if method == "scl"} == {0}


def test_target_that_is_reached_exactly_is_reached(trials, settings, tmp_path):
    settings.study = dataclasses.replace(STUDY, targets=(0.6,))
    assert ("scl", 0.6, 2e-6, 0.1) in rows(run(tmp_path))


def test_test_split_is_not_looked_at_while_choosing(trials, tmp_path):
    run(tmp_path)
    choosing = 2 * 2 + 4 * 2  # learning rates, penalties; two seeds each
    assert trials.evaluated == ["validation"] * choosing + ["test"] * 4 * 3
    for place, (_, config, train_examples, seed) in enumerate(trials.trained):
        if place < choosing:
            assert (config.validation, train_examples) == (10, 30)
            assert seed in (1000, 1001)
        else:
            # Tested with other seeds, on networks that saw all training examples.
            assert (config.validation, train_examples) == (0, 40)
            assert seed in (0, 1, 2)


def test_test_split_is_not_looked_at_where_no_penalty_reaches_a_target(
    trials, settings, tmp_path
):
    settings.study = dataclasses.replace(STUDY, targets=(0.5, 0.95))
    with pytest.raises(ValueError, match=r"no penalty .*0\.95.*larger"):
        run(tmp_path)
    assert set(trials.evaluated) == {"validation"}
    assert "summary" not in book(tmp_path)


def test_study_without_a_validation_split_is_refused_before_training(
    trials, settings, tmp_path
):
    settings.config = dataclasses.replace(CONFIG, validation=0)
    with pytest.raises(ValueError, match="validation"):
        run(tmp_path)
    assert trials.trained == []


# What is written


def test_summary_is_that_of_the_runs(trials, tmp_path):
    content = run(tmp_path)
    assert (content["name"], content["config"]["epochs"]) == ("tiny", 2)
    assert content["study"]["targets"] == [0.5, 0.9]
    assert content["versions"]["jax"]
    for row in content["summary"]:
        own = [
            record
            for record in content["runs"].values()
            if (record["stage"], record["method"]) == ("test", row["method"])
            and record["penalty"] == row["penalty"]
            and record["learning_rate"] == row["learning_rate"]
        ]
        assert row["seeds"] == [record["seed"] for record in own] == [0, 1, 2]
        accuracies = [record["accuracy"] for record in own]
        assert row["accuracy"] == pytest.approx(np.mean(accuracies))
        assert row["accuracy_std"] == pytest.approx(np.std(accuracies, ddof=1))
        sparsities = [1 - record["nnz"] / record["weights"] for record in own]
        assert row["sparsity"] == pytest.approx(np.mean(sparsities))
        assert row["sparsity_std"] == pytest.approx(np.std(sparsities, ddof=1))
        for field in ("nnz", "macs_remaining", "seconds"):
            assert row[field] == pytest.approx(np.mean([r[field] for r in own]))


def test_a_run_is_written_as_soon_as_it_is_done(trials, tmp_path):
    for stop_after in (1, 5, 13):
        folder = tmp_path / str(stop_after)
        folder.mkdir()
        trials.trained.clear()
        trials.stop_after = stop_after
        with pytest.raises(KeyboardInterrupt):
            run(folder)
        assert len(book(folder)["runs"]) == stop_after
        assert {path.name for path in folder.iterdir()} == {"tiny.json", "scratch"}


def test_killed_study_goes_on_where_it_was(trials, tmp_path):
    whole = run(tmp_path)
    total = len(trials.trained)
    assert len(whole["runs"]) == total
    other = tmp_path / "other"
    other.mkdir()
    trials.trained.clear()
    trials.stop_after = 7
    with pytest.raises(KeyboardInterrupt):
        run(other)
    trials.stop_after = None
    assert run(other) == whole
    assert len(trials.trained) == total


def test_only_the_runs_that_are_missing_are_repeated(trials, tmp_path):
    whole = run(tmp_path)
    kept = dict(list(whole["runs"].items())[::2])
    (tmp_path / "tiny.json").write_text(json.dumps({**whole, "runs": kept}))
    trials.trained.clear()
    again = run(tmp_path)
    assert len(trials.trained) == len(whole["runs"]) - len(kept)
    assert again["runs"] == whole["runs"]
    assert again["summary"] == whole["summary"]


def test_finished_study_trains_nothing(trials, tmp_path):
    whole = run(tmp_path)
    trials.trained.clear()
    assert run(tmp_path) == whole
    assert trials.trained == []


def test_finished_study_keeps_the_versions_that_its_runs_were_made_with(
    trials, tmp_path, monkeypatch
):
    # A second start that trains nothing must not say that its commit made the runs.
    first = {"commit": "first", "jax": "1", "device": "1 x made up"}
    monkeypatch.setattr(books, "versions", lambda: first)
    run(tmp_path)
    monkeypatch.setattr(books, "versions", lambda: {**first, "commit": "second"})
    assert run(tmp_path)["versions"] == first


def test_summary_of_a_study_that_grew_is_gone_until_the_study_is_done(
    trials, settings, tmp_path
):
    # Or the README would show the old numbers under the new settings.
    run(tmp_path)
    settings.study = dataclasses.replace(STUDY, learning_rates=(0.05, 0.1, 0.07))
    trials.stop_after = len(trials.trained)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert "summary" not in book(tmp_path)


def test_more_seeds_keep_the_runs_of_the_others(trials, settings, tmp_path):
    run(tmp_path)
    trials.trained.clear()
    settings.config = dataclasses.replace(CONFIG, seeds=4)
    content = run(tmp_path)
    assert {seed for *_, seed in trials.trained} == {3}
    assert all(row["seeds"] == [0, 1, 2, 3] for row in content["summary"])


@pytest.mark.parametrize(
    "change", [{"epochs": 5}, {"mask_learning_rate": 0.5}, {"norm": "l2"}]
)
def test_runs_of_other_settings_are_not_taken_for_these(
    trials, settings, tmp_path, change
):
    # The book would say one config and hold the runs of another.
    run(tmp_path)
    before = len(trials.trained)
    settings.config = dataclasses.replace(CONFIG, **change)
    try:
        run(tmp_path)
    except ValueError:
        return  # refused: as good as repeated
    assert len(trials.trained) == 2 * before
