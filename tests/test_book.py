"""The book of runs: each run written once, under a key that says what it is."""

import dataclasses
import json

import pytest
from tiny_book import (
    BUDGET,
    CONFIG,
    DATA,
    TASK,
    YOUNG,
    opened,
    path_in,
    put_trainings,
    read,
)

from experiments import book as books
from experiments.book import machines


@pytest.fixture
def trainings(monkeypatch):
    return put_trainings(monkeypatch)


@pytest.fixture
def path(tmp_path):
    return path_in(tmp_path)


def test_a_run_is_trained_once_and_its_key_says_what_it_is(path, trainings):
    for _ in range(2):
        book = opened(path)
        book.run([TASK], DATA)
    assert trainings.began == [4, 5, 6]
    runs = read(path)["runs"]
    middle = "scl penalty=1e-06 learning_rate=0.1 pixels=standardized"
    assert list(runs) == [f"validation {middle} seed={seed}" for seed in (4, 5, 6)]
    assert book.records(TASK) == list(runs.values())
    (record,) = {json.dumps({**one, "seed": 4}) for one in runs.values()}
    assert json.loads(record)["epoch_seconds"] == [0.5, 0.5]
    lines = path.read_text().splitlines()
    assert sum(line.startswith(f'"validation {middle} seed=') for line in lines) == 3


def test_the_machines_of_all_runs_are_said(path, trainings, monkeypatch):
    other = {"device": "2 x made up", "jax": "9.9"}
    opened(path).run([TASK._replace(seeds=[4])], DATA)
    here = machines(read(path))
    monkeypatch.setattr("experiments.book.versions", lambda: other)
    opened(path).run([TASK], DATA)
    assert machines(read(path)) == f"{here} and 2 x made up, jax 9.9"
    # Runs of before they said it themselves are of the machine that the book names.
    content = read(path)
    for run in content["runs"].values():
        del run["device"], run["jax"]
    assert machines(content) == "2 x made up, jax 9.9"


def test_finished_runs_prepare_no_training(path, trainings, monkeypatch):
    opened(path).run([TASK], DATA)
    monkeypatch.setattr(books, "train", lambda *args, **kwargs: pytest.fail("trained"))
    opened(path).run([TASK, TASK._replace(seeds=[5])], DATA)


def test_dense_runs_are_the_same_for_every_penalty():
    dense = TASK._replace(method="dense")
    other = dense._replace(config=dataclasses.replace(CONFIG, penalty=0.5))
    assert dense.keys() == other.keys()
    assert TASK.keys() != TASK._replace(config=other.config).keys()


def to_budget(**changes):
    return TASK._replace(config=dataclasses.replace(CONFIG, **BUDGET | changes))


def test_key_of_a_run_to_a_budget_says_the_budget_and_no_penalty():
    assert to_budget(sparsity=0.9, costs="connections", weigh=True).keys()[4] == (
        "validation scl sparsity=0.9 costs=connections weigh=True "
        "learning_rate=0.1 pixels=standardized seed=4"
    )
    assert to_budget().keys()[4] == (
        "validation scl sparsity=0.98 costs=macs weigh=False "
        "learning_rate=0.1 pixels=standardized seed=4"
    )
    # The penalty is not looked at then.
    assert to_budget(penalty=0.5).keys() == to_budget().keys()
    others = {"sparsity": 0.9}, {"costs": "connections"}, {"weigh": True}
    keys = [to_budget(**change).keys()[4] for change in ({}, *others)]
    assert len(set(keys)) == 4


def test_dense_runs_are_the_same_for_every_budget():
    dense = TASK._replace(method="dense")
    key = "validation dense learning_rate=0.1 pixels=standardized seed=4"
    assert dense.keys()[4] == to_budget()._replace(method="dense").keys()[4] == key


def test_book_of_a_fixed_penalty_is_extended_by_budgets(path, trainings):
    opened(path).run([TASK], DATA)
    content = read(path)
    for name in YOUNG:
        del content["config"][name]
    for record in content["runs"].values():
        del record["budget"]
    path.write_text(json.dumps(content))
    task = to_budget()
    book = opened(path, task.config)
    book.run([TASK, task, task._replace(method="dense")], DATA)
    assert trainings.began == [4, 5, 6] * 3
    after = read(path)["runs"]
    assert content["runs"].items() < after.items()
    new = list(after.values())[3:]
    asked = [(None, BUDGET)] * 3 + [(None, None)] * 3
    assert [(record["penalty"], record["budget"]) for record in new] == asked
    # And again of a fixed penalty, in what is a book of both.
    book.run([TASK._replace(seeds=[7])], DATA)
    (record,) = book.records(TASK._replace(seeds=[7]))
    assert (record["penalty"], record["budget"]) == (1e-6, None)


def test_layers_are_recorded_in_the_test_stage_alone(path, trainings):
    book = opened(path)
    tested = TASK._replace(stage="test")
    book.run([TASK, tested], DATA)
    assert not any("layers" in record for record in book.records(TASK))
    layer = {"path": "Dense_0/kernel", "weights": 10, "nnz": 4}
    for record in book.records(tested):
        assert record["layers"] == [{**layer, "macs": 10, "macs_remaining": 4}]
    # Each is evaluated on the split of its stage.
    assert {r["accuracy"] for r in book.records(TASK)} == {len(DATA.validation) / 20}
    assert {r["accuracy"] for r in book.records(tested)} == {len(DATA.test) / 20}


def test_summary_is_gone_as_soon_as_a_run_is_missing(path, trainings):
    book = opened(path)
    book.run([TASK], DATA)
    book.save(summary=["of three seeds"])
    opened(path).run([TASK], DATA)
    assert read(path)["summary"] == ["of three seeds"]

    def end(seed):
        assert "summary" not in read(path)

    trainings.ends = end
    opened(path).run([TASK._replace(seeds=[4, 7])], DATA)
    assert trainings.began == [4, 5, 6, 7]
    assert "summary" not in read(path)


def test_what_others_write_meanwhile_is_kept(path, trainings):
    mine, others = opened(path), opened(path)
    others.save(name="tiny")
    others.run([TASK._replace(seeds=[4])], DATA)
    mine.save(study={"targets": [0.5]})
    mine.run([TASK._replace(seeds=[5])], DATA)
    content = read(path)
    assert (content["name"], content["study"]) == ("tiny", {"targets": [0.5]})
    assert len(content["runs"]) == 2
