"""A comparison: as many trials each, the same sparsity, tested once, resumed."""

import contextlib
import dataclasses

import numpy as np
import pytest
from tiny_comparison import COMPARISON, SPACES, of, put_comparison, put_trials, run

from experiments import book as books
from experiments import configs, study
from experiments.methods import METHODS
from experiments.spaces import Comparison, pruning_spaces


@pytest.fixture
def held(monkeypatch):
    return put_comparison(monkeypatch)


@pytest.fixture
def trials(monkeypatch, held):
    return put_trials(monkeypatch)


def test_every_method_is_tested_with_its_best_settings_on_validation(trials, tmp_path):
    content = run(tmp_path)
    assert [(row["method"], row["target"]) for row in content["summary"]] == [
        ("dense", 0.0),
        *((m, t) for m in ("scl", "gmp", "str") for t in (0.5, 0.9)),
    ]
    for target in COMPARISON.targets:
        assert of(content, "scl", target)["settings"] == {
            "learning_rate": 0.2,
            "mask_learning_rate": 1e-2,
            "sparsity": target,
        }
        assert of(content, "gmp", target)["settings"] == {
            "learning_rate": 0.2,
            "schedule_end": 0.5,
            "sparsity": target,
        }
        chosen = of(content, "str", target)["settings"]
        assert (chosen["learning_rate"], chosen["mask_initial"]) == (0.1, -1.0)
    assert of(content, "dense", 0.0)["settings"]["learning_rate"] == 0.2


def test_no_test_is_seen_before_the_choice_and_other_seeds_choose(trials, tmp_path):
    run(tmp_path, methods=["scl", "str"])
    stages = trials.evaluated
    assert len(stages) == len(trials.trained)
    for stage, (_, config, examples, seed) in zip(stages, trials.trained, strict=True):
        if stage == "test":
            assert (config.validation, examples) == (0, 40)
            assert seed in (0, 1, 2)
        else:
            assert (config.validation, examples) == (10, 30)
            assert seed in (1000, 1001)
    for target in COMPARISON.targets:
        own = [
            stage
            for stage, (method, config, *_) in zip(stages, trials.trained, strict=True)
            if method == "scl" and config.sparsity == target
        ]
        assert own == ["validation"] * 8 + ["test"] * 3


def test_row_is_that_of_its_runs(trials, tmp_path):
    content = run(tmp_path)
    for row in content["summary"]:
        own = [
            record
            for record in content["runs"].values()
            if record["stage"] == "test"
            and record["method"] == row["method"]
            and record["settings"] == row["settings"]
        ]
        assert row["seeds"] == [record["seed"] for record in own] == [0, 1, 2]
        for name in ("accuracy", "nnz", "macs_remaining"):
            values = [record[name] for record in own]
            assert row[name] == pytest.approx(np.mean(values))
            assert row[f"{name}_std"] == pytest.approx(np.std(values, ddof=1))
        assert row["sparsity"] == pytest.approx(1 - row["nnz"] / 1000)
        assert row["least_density"] == pytest.approx(row["nnz"] / 1000)


def test_parts_come_to_what_the_whole_does(trials, tmp_path):
    whole = run(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    first = run(other, methods=["gmp"], targets=[0.9])
    assert [(r["method"], r["target"]) for r in first["summary"]] == [("gmp", 0.9)]
    trials.trained.clear()
    run(other, methods=["str", "dense"])
    assert {method for method, *_ in trials.trained} == {"str", "dense"}
    parts = run(other)
    assert parts["summary"] == whole["summary"]
    assert parts["runs"] == whole["runs"]


@pytest.mark.parametrize("stop_after", [0, 3, 30])
def test_killed_comparison_goes_on_where_it_was(trials, tmp_path, stop_after):
    whole = run(tmp_path)
    total = len(trials.trained)
    other = tmp_path / "other"
    other.mkdir()
    trials.trained.clear()
    trials.stop_after = stop_after
    with pytest.raises(KeyboardInterrupt):
        run(other)
    trials.stop_after = None
    assert run(other) == whole
    assert len(trials.trained) == total
    trials.trained.clear()
    assert run(other) == whole
    assert trials.trained == []


def test_a_process_goes_on_with_whatever_no_other_is_training(
    trials, tmp_path, monkeypatch
):
    other = books.Book(
        tmp_path / "compare_tiny.json", tmp_path / "scratch/compare_tiny"
    )
    settings = "learning_rate=0.1 mask_learning_rate=0.001 sparsity=0.5"
    key = f"validation scl {settings} seed=1001"
    done = []

    def wait(seconds):
        done.extend((stage, c.sparsity) for stage, (_, c, *_) in seen())
        lock.close()

    def seen():
        return zip(trials.evaluated, trials.trained, strict=True)

    monkeypatch.setattr(books.time, "sleep", wait)
    with contextlib.ExitStack() as lock:
        assert lock.enter_context(other._locked(key, wait=False))
        content = run(tmp_path, methods=["scl"])
    # It waited when all was done but that run, and the tests that its target is due.
    assert [done.count(("validation", target)) for target in (0.5, 0.9)] == [7, 8]
    assert [done.count(("test", target)) for target in (0.5, 0.9)] == [0, 3]
    assert [row["target"] for row in content["summary"]] == [0.5, 0.9]


def test_budget_of_macs_is_reached_if_the_macs_are(trials, held, tmp_path, monkeypatch):
    spaces = {"dense": {"learning_rate": (0.1,)}, "scl": {}, "scl_macs": {}}
    held.comparison = Comparison(targets=(0.5,), spaces=spaces)
    made = books.make_result

    def twice_the_macs(config, trained, on):
        result = made(config, trained, on)
        if trained.method == "dense":
            return result
        return dataclasses.replace(result, nnz=300, macs_remaining=500)

    monkeypatch.setattr(books, "make_result", twice_the_macs)
    content = run(tmp_path)
    assert not of(content, "scl", 0.5)["reached"]
    assert of(content, "scl_macs", 0.5)["reached"]
    tasks = {(m, c.sparsity) for m, c, *_ in trials.trained if m != "dense"}
    assert tasks == {("scl", 0.5), ("scl_macs", 0.5)}


def test_methods_must_have_as_many_trials():
    spaces = {**SPACES, "gmp": {"schedule_end": (0.5, 0.7, 0.75)}}
    with pytest.raises(ValueError, match=r"as many trials.*'gmp': 3"):
        Comparison(targets=(0.5,), spaces=spaces)


@pytest.mark.parametrize("decays", [(1e-4,), (0.0, 1e-4)], ids=len)
def test_spaces_have_every_method_of_which_each_setting_differs(decays):
    spaces = pruning_spaces((0.05, 0.1), decays)
    assert spaces.keys() == METHODS.keys()
    comparison = Comparison(targets=(0.5,), spaces=spaces)
    for method in spaces:
        trials = comparison.trials(method)
        assert len({tuple(trial.items()) for trial in trials}) == len(trials)
        assert method == "dense" or len(trials) == 4 * len(decays)


@pytest.mark.parametrize("name", configs.compared())
def test_comparison_of_a_config_fits_it(name):
    config, comparison = configs.load_config(name), configs.load_comparison(name)
    assert comparison is not None
    assert config.validation
    assert {"dense", "scl", "gmp"} <= comparison.spaces.keys()
    assert comparison.tested >= 3
    for method in comparison.spaces:
        for trial in comparison.trials(method):
            for target in comparison.targets:
                dataclasses.replace(config, **trial, sparsity=target)


def test_book_of_a_comparison_has_every_field_that_differs_in_its_keys(
    trials, tmp_path
):
    content = run(tmp_path)
    for key, record in content["runs"].items():
        for field, value in record["settings"].items():
            assert f" {field}={value} " in key
    assert len(content["runs"]) == len(trials.trained)


def test_command_line_runs_the_parts_that_are_asked_for(monkeypatch, capsys):
    asked = []
    row = {"method": "scl", "target": 0.9, "reached": True}
    row |= {"accuracy": 0.875, "accuracy_std": 0.001}

    def run_comparison(*arguments, **named):
        asked.append((arguments, named))
        return [row]

    monkeypatch.setattr(study, "run_comparison", run_comparison)
    monkeypatch.setattr(study, "run_study", lambda *a, **k: pytest.fail("a study ran"))
    part = ["--methods", "scl", "gmp", "--targets", "0.9", "0.98"]
    assert study.main(["fashion_mnist_lenet300", "--compare", *part]) == 0
    assert study.main(["fashion_mnist_lenet300", "--compare"]) == 0
    nothing = {"methods": None, "targets": None, "data_dir": None}
    wanted = {**nothing, "methods": ["scl", "gmp"], "targets": [0.9, 0.98]}
    name = ("fashion_mnist_lenet300",)
    assert asked == [(name, wanted), (name, nothing)]
    said = capsys.readouterr().out
    assert said.count("Test accuracy (%)") == said.count("87.50 ± 0.10") == 2
