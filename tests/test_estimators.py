"""Estimators beside each other in one network: what is trained, and what is said."""

import dataclasses
import json

import numpy as np
import pytest
from tiny import config, dataset, register

from experiments import configs, estimators
from experiments.estimators import estimator_cells, run_estimators, trainings


@pytest.fixture
def tiny_experiment(monkeypatch):
    """Make the experiment a tiny one; return the data sets that were asked for."""
    register(monkeypatch)
    settings = config(epochs=2, seeds=2, validation=10, mask_learning_rate=0.3)
    monkeypatch.setattr(configs, "load_config", lambda name: settings)
    asked = []

    def examples(given, data_dir):
        asked.append((given, data_dir))
        return dataset(held_out=10)

    monkeypatch.setattr(estimators, "examples", examples)
    return asked


def test_all_start_from_the_usual_place_and_the_not_positive_from_afar_too():
    names = ["identity", "softplus(5.0)", "relu", "clipped"]
    usual = [(name, 0.1) for name in names]
    assert trainings(names) == [*usual, ("identity", 1.5), ("clipped", 1.5)]
    # The identity is there to be compared with, whatever is asked for.
    assert trainings(["clipped"])[1:] == [("identity", 1.5), ("clipped", 1.5)]


def test_rows_are_the_means_of_what_is_written(tiny_experiment, tmp_path):
    folders = {"folder": tmp_path, "scratch": tmp_path / "scratch"}
    rows = run_estimators("tiny", ["identity", "clipped"], **folders)
    content = json.loads((tmp_path / "estimators_tiny.json").read_text())
    assert content["summary"] == rows
    assert [(row["ste"], row["start"]) for row in rows] == [
        *(("identity", 0.1), ("clipped", 0.1), ("identity", 1.5), ("clipped", 1.5))
    ]
    assert len(content["runs"]) == 8
    for row in rows:
        words = f"ste={row['ste']} mask_initial={row['start']} "
        own = [run for key, run in content["runs"].items() if words in key]
        assert sorted(run["seed"] for run in own) == [7, 8]
        accuracies = [run["accuracy"] for run in own]
        assert row["accuracy"] == pytest.approx(np.mean(accuracies))
        assert row["accuracy_std"] == pytest.approx(np.std(accuracies, ddof=1))
        sparsities = [1 - run["nnz"] / run["weights"] for run in own]
        assert row["sparsity"] == pytest.approx(np.mean(sparsities))
    found = {(row["ste"], row["start"]): row["sparsity"] for row in rows}
    assert found["identity", 0.1] > 0
    assert found["clipped", 1.5] == 0  # it does not move there


def test_what_is_written_is_not_trained_again(tiny_experiment, tmp_path):
    folders = {"folder": tmp_path, "scratch": tmp_path / "scratch"}
    rows = run_estimators("tiny", ["identity"], data_dir="here", **folders)
    assert [data_dir for _, data_dir in tiny_experiment] == ["here"]
    assert run_estimators("tiny", ["identity"], **folders) == rows
    assert len(tiny_experiment) == 1
    more = run_estimators("tiny", ["identity", "relu"], **folders)
    assert [row for row in more if row["ste"] == "identity"] == rows
    assert len(tiny_experiment) == 2


def test_runs_of_other_settings_are_refused(tiny_experiment, tmp_path, monkeypatch):
    folders = {"folder": tmp_path, "scratch": tmp_path / "scratch"}
    run_estimators("tiny", ["identity"], **folders)
    other = dataclasses.replace(configs.load_config("tiny"), epochs=3)
    monkeypatch.setattr(configs, "load_config", lambda name: other)
    with pytest.raises(ValueError, match="has runs with another epochs"):
        run_estimators("tiny", ["identity"], **folders)


def test_experiment_without_validation_is_refused(
    tiny_experiment, tmp_path, monkeypatch
):
    monkeypatch.setattr(configs, "load_config", lambda name: config())
    with pytest.raises(ValueError, match="compared on validation; it is 0"):
        run_estimators("tiny", folder=tmp_path, scratch=tmp_path)


def test_cells_say_mean_and_deviation_in_percent():
    row = {"ste": "relu", "start": 0.1, "accuracy": 0.931, "accuracy_std": 0.0012}
    row |= {"sparsity": 0.95, "sparsity_std": 0.0}
    header, cells = estimator_cells([row])
    assert len(header) == len(cells)
    assert cells == ["relu", "0.1", "93.10 ± 0.12", "95.00 ± 0.00"]
    assert estimator_cells([]) == [header]
