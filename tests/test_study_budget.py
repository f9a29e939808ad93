"""A study without penalties: SCL is given its targets, and chooses its rate."""

import dataclasses
import json

import pytest
from trials import BASE, Trials, experiment, rows, run

from experiments.config import Study

CONFIG = dataclasses.replace(BASE, learning_rate=0.3, sparsity=0.7, seeds=3)
STUDY = Study(targets=(0.5, 0.9), learning_rates=(0.05, 0.1, 0.2), seeds=2)
# (sparsity asked for, learning rate) -> as in SCL. By validation, 0.1 is the best for
# 0.5 and 0.2 for 0.9, and 0.05 is nowhere; the test set would choose otherwise. The
# sparsity is less than the target where the budget is one of MACs.
BUDGETS = {
    (0.5, 0.05): (0.90, 0.99, 0.5),
    (0.5, 0.1): (0.96, 0.80, 0.4),
    (0.5, 0.2): (0.94, 0.98, 0.5),
    (0.9, 0.05): (0.80, 0.99, 0.9),
    (0.9, 0.1): (0.85, 0.98, 0.9),
    (0.9, 0.2): (0.92, 0.70, 0.9),
}
# learning rate -> accuracies
DENSE = {0.05: (0.93, 0.91), 0.1: (0.92, 0.97), 0.2: (0.91, 0.98)}


@pytest.fixture
def settings(monkeypatch):
    return experiment(monkeypatch, CONFIG, STUDY)


@pytest.fixture
def trials(monkeypatch, settings):
    """Replace data, training and evaluation; a fixed penalty prunes 0.4."""
    return Trials(
        monkeypatch,
        dense=lambda config: DENSE.get(config.learning_rate, (0.5, 0.5)),
        scl=lambda config: (
            BUDGETS[config.sparsity, config.learning_rate]
            if config.sparsity
            else (0.9, 0.9, 0.4)
        ),
    )


def test_study_without_penalties_chooses_the_rate_of_each_target_on_validation(
    trials, tmp_path
):
    content = run(tmp_path)
    assert rows(content) == {
        ("dense", None, None, 0.05),  # dense's own choice
        ("dense", None, None, 0.1),  # those of SCL
        ("dense", None, None, 0.2),
        ("scl", 0.5, None, 0.1),
        ("scl", 0.9, None, 0.2),
    }
    kind = {"costs": "connections", "weigh": True}
    assert [row["budget"] for row in content["summary"]] == [
        *[None] * 3,
        {"sparsity": 0.5, **kind},
        {"sparsity": 0.9, **kind},
    ]


def test_budgets_are_trained_to_and_each_is_tested_with_its_rate(trials, tmp_path):
    run(tmp_path)
    choosing = 2 * 3 + 2 * 3 * 2  # rates of dense, rates for each target; two seeds
    assert trials.evaluated[:choosing] == ["validation"] * choosing
    assert set(trials.evaluated[choosing:]) == {"test"}
    asked = [
        (c.sparsity, c.learning_rate, seed)
        for method, c, _, seed in trials.trained
        if method == "scl"
    ]
    chosen = [(*pair, seed) for pair in BUDGETS for seed in (1000, 1001)]
    tested = [(0.5, 0.1, s) for s in range(3)] + [(0.9, 0.2, s) for s in range(3)]
    assert asked == chosen + tested


def test_one_rate_is_not_tried(trials, settings, tmp_path):
    settings.study = dataclasses.replace(STUDY, learning_rates=(0.2,))
    content = run(tmp_path)
    assert set(trials.evaluated) == {"test"}
    assert {row["learning_rate"] for row in content["summary"]} == {0.2}


def test_budget_of_macs_is_met_whatever_the_sparsity_of_the_connections_is(
    trials, settings, tmp_path
):
    settings.config = dataclasses.replace(settings.config, costs="macs", weigh=False)
    content = run(tmp_path)
    assert {("scl", 0.5, None, 0.1), ("scl", 0.9, None, 0.2)} <= rows(content)
    row = content["summary"][-2]
    assert row["budget"] == {"sparsity": 0.5, "costs": "macs", "weigh": False}
    assert row["sparsity"] == pytest.approx(0.4)


def test_runs_of_penalties_stay_in_the_book_of_a_study_of_budgets(
    trials, settings, tmp_path
):
    settings.study = dataclasses.replace(
        STUDY, penalties=(1e-6,), learning_rates=(0.05, 0.1), targets=(0.3,)
    )
    settings.config = dataclasses.replace(CONFIG, sparsity=0.0)
    before = run(tmp_path)
    for record in before["runs"].values():
        del record["budget"]  # as it was when there were none
    for name in ("sparsity", "costs", "weigh", "schedule", "schedule_end"):
        del before["config"][name]
    (tmp_path / "tiny.json").write_text(json.dumps(before))
    trials.trained.clear()
    settings.study, settings.config = STUDY, CONFIG
    after = run(tmp_path)
    assert before["runs"].items() < after["runs"].items()
    assert {row["penalty"] for row in after["summary"]} == {None}
    # Dense has neither penalty nor budget: it chooses from one more rate.
    dense = [
        config
        for method, config, *_ in trials.trained
        if method == "dense" and config.validation
    ]
    assert {config.learning_rate for config in dense} == {0.2}
