"""The tables of the README: what a row says that it was asked for, and came to."""

import json

import pytest

from experiments import tables
from experiments.tables import _asked, study_cells

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


def timed_row(**more):
    """Return a row of a benchmark, in which SCL takes 1.25 times the dense step."""
    kinds = {
        "dense": {"us": 2000.0, "ratio": 1.0, "spread": [1.0, 1.0], "bytes": 5e6},
        "scl": {"us": 2500.0, "ratio": 1.25, "spread": [1.2, 1.3], "bytes": 7e6},
        "budget": {"us": 2600.0, "ratio": 1.3},
    }
    sizes = {"weights": 500_000, "mask_bytes": 4_000_000, "floor_bytes": 13_000_000}
    named = {"network": "lenet5", "batch": 64, "side": 28, "compute": "float32"}
    return {**named, "timed": kinds, **sizes, "repeats": 3, **more}


def test_benchmark_is_a_table_with_what_was_not_timed_left_empty(tmp_path):
    versions = {"device": "1 x cpu (cpu)", "jax": "0.1", "commit": "0123456789"}
    bench = {"steps": [timed_row()], "versions": versions, "arguments": ""}
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    text = tables.render(tmp_path)
    assert "commit 0123456; `make bench`\n" in text
    cells = [cell.strip() for cell in text.splitlines()[-1].split("|")[1:-1]]
    assert cells == [
        *("lenet5", "64", "28x28", "2.00 ms", "1.250 (1.20 to 1.30)", "1.300", ""),
        *("13.0 MB", "7.0 of 10.0 MB"),  # 5 of dense, 4 of masks, 1 of two a weight
    ]
    del bench["steps"][0]["timed"]["scl"]
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    cells = [c.strip() for c in tables.render(tmp_path).splitlines()[-1].split("|")]
    assert cells[4:-1] == ["2.00 ms", "", "1.300", "", "13.0 MB", ""]
    (tmp_path / "bench.json").write_text(json.dumps({**bench, "note": "old"}))
    assert "`make bench`; old\n" in tables.render(tmp_path)


def test_scaling_is_a_table_of_its_own(tmp_path):
    versions = {"device": "2 x cpu (cpu)", "jax": "0.1", "commit": "0123456789"}
    row = {"network": "lenet5", "devices": 2, "batch": 128, "compute": "float32"}
    row |= {"repeats": 3, "dense": 1.96, "scl": 1.9}
    bench = {"scaling": [row], "versions": versions, "arguments": "--scaling"}
    (tmp_path / "bench_two.json").write_text(json.dumps(bench))
    text = tables.render(tmp_path)
    assert text.startswith("**Several devices.** float32, 2 x cpu (cpu), ")
    assert '`make bench ARGS="--scaling"`' in text
    assert "| 1.96 times one | 1.90 times one |" in text


def test_costs_of_methods_are_a_row_each_and_a_column_per_network(tmp_path):
    versions = {"device": "1 x cpu (cpu)", "jax": "0.1", "commit": "0123456789"}
    first, second = timed_row(), timed_row(network="resnet20")
    first["timed"] = first["timed"] | {"gmp": {"us": 1.0, "ratio": 1.5}}
    bench = {"steps": [first, second], "versions": versions, "arguments": "--methods"}
    (tmp_path / "methods_cpu.json").write_text(json.dumps(bench))
    text = tables.render_costs(tmp_path)
    assert "over the dense step.** float32, 1 x cpu (cpu), jax 0.1, median" in text
    assert text.splitlines()[2:] == [
        "| method | lenet5, batch 64 | resnet20, batch 64 |",
        "| :-- | --: | --: |",
        "| SCL, to a budget | 1.300 | 1.300 |",
        "| magnitude, global | 1.500 |  |",
    ]
    assert tables.render(tmp_path) == ""  # the README has SCL's own


def test_estimators_are_shown_when_all_have_run(tmp_path):
    row = {"ste": "relu", "start": 1.5, "accuracy": 0.9, "accuracy_std": 0.01}
    content = {
        "name": "fashion_mnist_resnet20",
        "config": {"epochs": 7, "sparsity": 0.95, "seeds": 2},
        "runs": {},
        "versions": {"device": "1 x made up", "jax": "0.0"},
    }
    path = tmp_path / "estimators_fashion_mnist_resnet20.json"
    path.write_text(json.dumps(content))
    assert tables.render_estimators(tmp_path) == ""
    content["summary"] = [row | {"sparsity": 0.95, "sparsity_std": 0.0}]
    path.write_text(json.dumps(content))
    text = tables.render_estimators(tmp_path)
    assert text.startswith("**ResNet-20 on Fashion-MNIST.** 7 epochs, 95 % pruned, ")
    assert "2 seeds, 1 x made up, jax 0.0; `python -m experiments.estimators " in text
    assert "| relu | 1.5 | 90.00 ± 1.00 | 95.00 ± 0.00 |" in text
