"""The search of a comparison for the setting that gives the sparsity asked for."""

import dataclasses

import pytest
from tiny_comparison import COMPARISON, left, of, put_comparison, put_trials, run

from experiments import book as books
from experiments import search as searches
from experiments.train import TrainingError


@pytest.fixture
def held(monkeypatch):
    return put_comparison(monkeypatch)


@pytest.fixture
def trials(monkeypatch, held):
    # Looked up here at each call: tests put others in the place of `left`.
    return put_trials(monkeypatch, left=lambda *given: left(*given))


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


def test_what_was_tried_for_other_sparsities_serves(trials, held, tmp_path):
    targets = (0.5, 0.8, 0.9)
    held.comparison = dataclasses.replace(COMPARISON, targets=targets)
    run(tmp_path / "alone", methods=["str"], targets=[0.8])
    alone = trials_so_far(trials)
    run(tmp_path, methods=["str"], targets=[0.5, 0.9])
    before = trials_so_far(trials)
    content = run(tmp_path, methods=["str"])
    assert trials_so_far(trials) - before < alone / 2
    assert all(row["reached"] for row in content["summary"])
    assert [row["target"] for row in content["summary"]] == list(targets)


def test_test_runs_start_where_validation_says_that_the_target_is(
    trials, tmp_path, monkeypatch
):
    # Validation stops at the first that is near enough: at 1.08 of what is allowed.
    def steep(method, config):
        return 0.108 * (0.01 / config.weight_decay) ** 0.5

    monkeypatch.setitem(globals(), "left", steep)
    run(tmp_path, methods=["str"], targets=[0.9])
    decays = {c.validation: c.weight_decay for _, c, *_ in reversed(trials.trained)}
    assert decays[10] == 0.01
    assert decays[0] > 0.01


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
    assert len(tests) <= 24  # a jump is found by halving


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


def diverge(trials, monkeypatch, where):
    def train(config, *others, **more):
        for trained in trials.train(config, *others, **more):
            if where(config, trained.seed):
                raise TrainingError("no longer finite")
            yield trained

    monkeypatch.setattr(books, "train", train)


def test_search_steps_back_from_what_diverged(trials, tmp_path, monkeypatch):
    diverge(trials, monkeypatch, lambda config, seed: config.weight_decay > 0.008)
    content = run(tmp_path, methods=["str"], targets=[0.5])
    assert any("diverged" in record for record in content["runs"].values())
    row = of(content, "str", 0.5)
    assert row["reached"] is True
    assert row["settings"]["weight_decay"] < 0.008


def test_search_steps_back_where_one_that_was_tested_diverged(
    trials, tmp_path, monkeypatch
):
    diverge(
        trials,
        monkeypatch,
        lambda config, seed: config.weight_decay > 8e-3 and seed == 1,
    )
    content = run(tmp_path, methods=["str"], targets=[0.5, 0.9])
    assert of(content, "str", 0.5)["reached"] is True
    # What would be sparse enough diverged: the nearest of what did not.
    row = of(content, "str", 0.9)
    assert row["reached"] is False
    assert row["settings"]["weight_decay"] == pytest.approx(0.008, rel=0.02)


def test_method_whose_test_diverged_has_no_row(trials, tmp_path, monkeypatch):
    diverge(
        trials, monkeypatch, lambda config, seed: trials.method == "gmp" and seed == 1
    )
    content = run(tmp_path, targets=[0.5])
    assert {row["method"] for row in content["summary"]} == {"dense", "scl", "str"}
    before = trials_so_far(trials)
    assert run(tmp_path, targets=[0.5]) == content
    assert trials_so_far(trials) == before  # it is not tried again


def test_search_ends_at_the_most_that_a_setting_may_be(trials, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "left", lambda *_: 1 - 1e-3 * trials_so_far(trials))
    row = of(run(tmp_path, methods=["str"], targets=[0.5]), "str", 0.5)
    assert row["settings"]["weight_decay"] == searches.MOST


def trials_so_far(trials):
    return len(trials.trained)
