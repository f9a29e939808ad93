"""The study: chosen on validation, tested once, and resumed after any run."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import book as books
from experiments import configs, study
from experiments.config import Config, Study
from experiments.data import Dataset, Split
from experiments.outcome import Result

CONFIG = Config(
    dataset="mnist5k",
    model="lenet300",
    validation=10,
    epochs=2,
    batch_size=10,
    learning_rate=0.1,
    penalty=2e-6,
    seeds=3,
    devices=1,
)
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


def split(count):
    random = np.random.default_rng(count)
    return Split(
        random.integers(0, 256, (count, 28, 28, 1)).astype(np.uint8),
        np.arange(count, dtype=np.int32) % 10,
    )


TEST = split(20)


class Trials:
    """Trainings that take no time, and a record of what was asked for."""

    def __init__(self):
        self.trained, self.evaluated, self.stop_after = [], [], None
        self.of_pixels = {}  # pixels -> what they add on validation, on test

    def load(self, name, *, validation, data_dir=None):
        assert name == "mnist5k"
        return Dataset(split(40 - validation), split(validation), TEST)

    def train(self, config, data, method, *, seeds, folder):
        for seed in seeds:
            if len(self.trained) == self.stop_after:
                raise KeyboardInterrupt
            self.trained.append((method, config, len(data.train.labels), seed))
            history = [SimpleNamespace(seconds=0.5)] * config.epochs
            yield SimpleNamespace(seed=seed, history=history, method=method)

    def make_result(self, config, trained, on):
        tested = on is TEST
        self.evaluated.append("test" if tested else "validation")
        if trained.method == "dense":
            accuracy, sparsity = DENSE[config.learning_rate][tested], 0.0
        else:
            accuracies, sparsity = SCL[config.penalty][:2], SCL[config.penalty][2]
            accuracy = accuracies[tested]
        accuracy += self.of_pixels.get(config.pixels, (0, 0))[tested]
        return Result(
            method=trained.method,
            seed=trained.seed,
            accuracy=accuracy + 0.001 * (trained.seed % 3),
            weights=1000,
            parameters=1010,
            nnz=round(1000 * (1 - sparsity)),
            macs=1000,
            macs_remaining=round(1000 * (1 - sparsity)),
            seconds=0.5 * config.epochs,
        )


@pytest.fixture
def settings(monkeypatch):
    """Put one made-up experiment in place; its fields can be changed."""
    held = SimpleNamespace(config=CONFIG, study=STUDY)
    monkeypatch.setattr(configs, "load_config", lambda name: held.config)
    monkeypatch.setattr(configs, "load_study", lambda name: held.study)
    return held


@pytest.fixture
def trials(monkeypatch, settings):
    """Replace data, training and evaluation."""
    made = Trials()
    monkeypatch.setattr(study, "load", made.load)
    monkeypatch.setattr(books, "train", made.train)
    monkeypatch.setattr(books, "make_result", made.make_result)
    report = SimpleNamespace(to_dict=lambda: {"rows": []})
    monkeypatch.setattr(books, "make_report", lambda *args: report)
    return made


def run(folder):
    study.run_study("tiny", folder=folder, scratch=folder / "scratch")
    return book(folder)


def book(folder):
    return json.loads((folder / "tiny.json").read_text())


def rows(content):
    return {
        (row["method"], row["target"], row["penalty"], row["learning_rate"])
        for row in content["summary"]
    }


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
    monkeypatch.setattr(books, "versions", lambda: {"commit": "first", "jax": "1"})
    run(tmp_path)
    monkeypatch.setattr(books, "versions", lambda: {"commit": "second", "jax": "2"})
    assert run(tmp_path)["versions"] == {"commit": "first", "jax": "1"}


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
