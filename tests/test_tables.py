"""The tables of the README: what a row says that it was asked for, and came to."""

import pytest

from experiments.tables import _asked, _earlier, study_cells

ROW = {
    "method": "scl",
    "target": 0.98,
    "penalty": None,
    "budget": None,
    "learning_rate": 0.05,
    "pixels": "unit",
    "seeds": [0, 1],
    "accuracy": 0.97654,
    "accuracy_std": 0.00126,
    "sparsity": 0.98001,
    "sparsity_std": 0.0,
    "nnz": 5324.0,
    "macs_remaining": 1234567.5,
    "seconds": 3.0,
}
DENSE = {
    **ROW,
    **{"method": "dense", "target": None, "sparsity": 0.0, "nnz": 266200.0},
    **{"accuracy": 0.9, "accuracy_std": 0.0, "learning_rate": 0.1},
}


def asked(budget=None, penalty=None):
    return _asked({**ROW, "budget": budget, "penalty": penalty})


@pytest.mark.parametrize(
    ("penalty", "said"), [(1.2e-6, "penalty 1.2e-06"), (0.5, "penalty 0.5")]
)
def test_fixed_penalty_is_said_to_be_one(penalty, said):
    assert asked(penalty=penalty) == said


def test_dense_was_asked_for_nothing():
    assert asked() == ""


def test_row_of_before_budgets_is_read():
    old = {name: value for name, value in ROW.items() if name != "budget"}
    assert _asked({**old, "penalty": 0.001}) == "penalty 0.001"
    assert _asked(old) == ""


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (("connections", True), "0.98 pruned"),
        (("macs", True), "0.98 pruned of the MACs"),
        (("macs", False), "0.98 pruned of the MACs, penalized alike"),
    ],
)
def test_budget_is_said_with_what_it_is_of(budget, said):
    costs, weigh = budget
    assert asked({"sparsity": 0.98, "costs": costs, "weigh": weigh}) == said


def test_cells_are_a_header_and_a_row_each():
    budget = {"sparsity": 0.98, "costs": "connections", "weigh": True}
    header, dense, scl = study_cells([DENSE, {**ROW, "budget": budget}])
    assert header == [
        *("method", "pixels", "learning rate", "asked for"),
        *("test accuracy (%)", "sparsity", "connections", "MACs"),
    ]
    assert dense == [
        *("dense", "unit", "0.1", ""),
        *("90.00 ± 0.00", "0.0000 ± 0.0000", "266,200", "1,234,568"),
    ]
    assert scl == [
        *("SCL", "unit", "0.05", "0.98 pruned"),
        *("97.65 ± 0.13", "0.9800 ± 0.0000", "5,324", "1,234,568"),
    ]


def test_table_of_nothing_is_its_header():
    assert len(study_cells([])) == 1


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, ""),
        ({"norm_decay": 0.9, "pruned_gradient": 0.1}, ""),
        ({"norm_decay": 0.0}, "; SCL with the earlier `norm_decay` 0"),
        (
            {"norm_decay": 0.5, "pruned_gradient": 0.0},
            "; SCL with the earlier `norm_decay` 0.5 and `pruned_gradient` 0",
        ),
    ],
)
def test_study_with_other_defaults_than_todays_says_which(config, said):
    assert _earlier(config) == said
