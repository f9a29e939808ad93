"""A comparison: as many trials each, the same sparsity, tested once, resumed."""

import dataclasses
import json

import numpy as np
import pytest
from trials import Trials, experiment

from experiments import book as books
from experiments import comparison as comparisons
from experiments import configs, study
from experiments.comparison import ComparisonError, run_comparison
from experiments.config import Config
from experiments.methods import METHODS
from experiments.spaces import Comparison, pruning_spaces
from experiments.train import TrainingError

CONFIG = Config(
    dataset="mnist5k",
    model="lenet300",
    validation=10,
    epochs=2,
    batch_size=10,
    learning_rate=0.3,
    sparsity=0.7,
    seeds=1,
    devices=1,
)
SPACES = {
    "dense": {"learning_rate": (0.1, 0.2)},
    "scl": {"learning_rate": (0.1, 0.2), "mask_learning_rate": (1e-3, 1e-2)},
    "gmp": {"learning_rate": (0.1, 0.2), "schedule_end": (0.5, 0.7)},
    "str": {"learning_rate": (0.1, 0.2), "mask_initial": (-1.0, -2.0)},
}
COMPARISON = Comparison(targets=(0.5, 0.9), spaces=SPACES, seeds=2, tested=3)


def accuracies(method, config):
    """Return those on validation and on test; the latter would choose otherwise."""
    if method == "dense":
        worth = {0.1: 0.02, 0.2: 0.03}[config.learning_rate]
    elif method == "scl":
        worth = 0.01 * (config.learning_rate == 0.2) + config.mask_learning_rate
    elif method == "gmp":
        worth = 0.1 * config.learning_rate - 0.01 * config.schedule_end
    else:
        worth = -0.1 * config.learning_rate + 0.01 * config.mask_initial
    return 0.9 + worth - 0.1 * config.sparsity, 0.8 - worth


def left(method, config):
    """Return the fraction of the weights that are left, of which STR is not asked."""
    if method != "str":
        return 1 - config.sparsity if method != "dense" else 1.0
    return min(1.0, 0.02 * config.weight_decay**-0.4 * abs(config.mask_initial))


@pytest.fixture
def held(monkeypatch):
    held = experiment(monkeypatch, CONFIG)
    held.comparison = COMPARISON
    monkeypatch.setattr(configs, "load_comparison", lambda name: held.comparison)
    return held


@pytest.fixture
def trials(monkeypatch, held):
    found = Trials(
        monkeypatch,
        dense=lambda config: accuracies("dense", config),
        scl=lambda config: (
            *accuracies(found.method, config),
            1 - left(found.method, config),
        ),
    )
    return found


def run(folder, **part):
    run_comparison("tiny", folder=folder, scratch=folder / "scratch", **part)
    return json.loads((folder / "compare_tiny.json").read_text())


def of(content, method, target):
    (row,) = [
        row
        for row in content["summary"]
        if (row["method"], row["target"]) == (method, target)
    ]
    return row


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


def test_a_method_that_is_not_asked_is_brought_to_the_sparsity_by_its_own_setting(
    trials, tmp_path
):
    content = run(tmp_path)
    for target in COMPARISON.targets:
        row = of(content, "str", target)
        decay = row["settings"]["weight_decay"]
        assert 0.02 * decay**-0.4 == pytest.approx(1 - target, rel=0.012)
        assert row["sparsity"] == pytest.approx(target, abs=0.01 * (1 - target) + 1e-3)
        # On validation, within a tenth, and each of the four settings by itself.
        tried = {
            (r["settings"]["learning_rate"], r["settings"]["mask_initial"])
            for r in content["runs"].values()
            if r["stage"] == "validation"
            and r["method"] == "str"
            and abs(r["nnz"] / r["weights"] / (1 - target) - 1) <= 0.1
        }
        assert len(tried) == 4


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


def test_a_sparsity_that_cannot_be_reached_ends_at_the_nearest(
    trials, tmp_path, monkeypatch
):
    def jumps(method, config):
        return 0.3 if config.weight_decay < 0.0123 else 0.02

    monkeypatch.setitem(globals(), "left", jumps)
    row = of(run(tmp_path, methods=["str"], targets=[0.9]), "str", 0.9)
    assert row["reached"] is False
    assert row["sparsity"] == pytest.approx(0.7)  # |log 0.3/0.1| < |log 0.02/0.1|
    tests = {config.weight_decay for _, config, *_ in trials.trained}
    assert len(tests) <= 2 * comparisons.TRIES


def test_a_setting_that_cannot_be_as_sparse_is_not_chosen_for_being_denser(
    trials, tmp_path, monkeypatch
):
    # By accuracy alone, 0.1 would be chosen: it is left with half of the weights.
    monkeypatch.setitem(
        globals(),
        "left",
        lambda method, config: 0.5 if config.learning_rate == 0.1 else 0.1,
    )
    row = of(run(tmp_path, methods=["str"], targets=[0.9]), "str", 0.9)
    assert row["settings"]["learning_rate"] == 0.2
    assert row["reached"] is True
    row = of(run(tmp_path, methods=["str"], targets=[0.5]), "str", 0.5)
    assert row["settings"]["learning_rate"] == 0.1


def test_search_goes_back_where_more_makes_the_network_denser_again(
    trials, tmp_path, monkeypatch
):
    def resets(method, config):
        decay = config.weight_decay
        return 1.5e-3 / decay if decay < 1.7e-2 else 0.6

    monkeypatch.setitem(globals(), "left", resets)
    row = of(run(tmp_path, methods=["str"], targets=[0.9]), "str", 0.9)
    assert row["sparsity"] == pytest.approx(0.9, abs=1e-3)


def test_search_steps_back_from_what_diverged(trials, tmp_path, monkeypatch):
    def train(config, *others, **more):
        for trained in trials.train(config, *others, **more):
            if config.weight_decay > 0.008:
                raise TrainingError("no longer finite")
            yield trained

    monkeypatch.setattr(books, "train", train)
    content = run(tmp_path, methods=["str"], targets=[0.5])
    assert any("diverged" in record for record in content["runs"].values())
    row = of(content, "str", 0.5)
    assert row["reached"] is True
    assert row["settings"]["weight_decay"] < 0.008


def test_search_ends_at_the_most_that_a_setting_may_be(trials, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "left", lambda *_: 1 - 1e-3 * trials_so_far(trials))
    row = of(run(tmp_path, methods=["str"], targets=[0.5]), "str", 0.5)
    assert row["settings"]["weight_decay"] == comparisons.MOST


def trials_so_far(trials):
    return len(trials.trained)


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


def test_command_line_runs_the_parts_that_are_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(study, "run_comparison", lambda *a, **k: asked.append((a, k)))
    monkeypatch.setattr(study, "run_study", lambda *a, **k: pytest.fail("a study ran"))
    part = ["--methods", "scl", "gmp", "--targets", "0.9", "0.98"]
    assert study.main(["fashion_mnist_lenet300", "--compare", *part]) == 0
    assert study.main(["fashion_mnist_lenet300", "--compare"]) == 0
    nothing = {"methods": None, "targets": None, "data_dir": None}
    wanted = {**nothing, "methods": ["scl", "gmp"], "targets": [0.9, 0.98]}
    name = ("fashion_mnist_lenet300",)
    assert asked == [(name, wanted), (name, nothing)]


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
