"""The book of runs: whole at any moment, of one config, each run written once."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
from sharing import fill_disk

from experiments import book as books
from experiments import configs
from experiments.book import RESULTS, Book, Task, machines
from experiments.config import Config
from experiments.outcome import Result
from experiments.train import TrainingError

CONFIG = Config(dataset="mnist5k", model="lenet300", epochs=2, learning_rate=0.1)
DATA = SimpleNamespace(validation="validation split", test="test split")
TASK = Task("validation", "scl", CONFIG, [4, 5, 6])
YOUNG = ("optimizer", "warmup_epochs", "label_smoothing", "mask_dtype", "compute")
YOUNG += ("sparsity", "costs", "weigh", "schedule", "schedule_end")
BUDGET = {"sparsity": 0.98, "costs": "macs", "weigh": False}


class Trainings:
    """Trainings that take no time; `ends` is called at the end of each."""

    def __init__(self):
        self.began, self.folders, self.ends = [], [], lambda seed: None

    def train(self, config, data, method, *, seeds, folder):
        for seed in seeds:
            self.began.append(seed)
            checkpoints = folder / f"{method}-seed{seed}"
            self.folders.append(checkpoints)
            checkpoints.mkdir(parents=True, exist_ok=True)
            try:
                self.ends(seed)
                history = [SimpleNamespace(seconds=0.5)] * config.epochs
                yield SimpleNamespace(seed=seed, history=history, method=method)
            finally:
                # Orbax is still writing when the training ends: not to be disturbed.
                assert checkpoints.is_dir()

    def make_result(self, config, trained, on):
        numbers = {"weights": 10, "parameters": 11, "nnz": 4, "macs": 10}
        numbers |= {"macs_remaining": 4, "seconds": 1.0, "accuracy": len(on) / 20}
        return Result(method=trained.method, seed=trained.seed, **numbers)

    def make_report(self, config, trained):
        row = {"path": "Dense_0/kernel", "weights": 10, "nnz": 4, "features": 2}
        rows = [{**row, "macs": 10, "macs_remaining": 4}]
        return SimpleNamespace(to_dict=lambda: {"rows": rows})


@pytest.fixture
def trainings(monkeypatch):
    made = Trainings()
    for name in ("train", "make_result", "make_report"):
        monkeypatch.setattr(books, name, getattr(made, name))
    return made


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tiny.json"


def opened(path, config=CONFIG):
    book = Book(path, path.parent / "scratch")
    book.open(config)
    return book


def read(path):
    return json.loads(path.read_text())


# Of one config


def test_settings_are_noted(path):
    opened(path)
    assert Config(**read(path)["config"]) == CONFIG


@pytest.mark.parametrize(
    "change",
    [
        *({"epochs": 5}, {"mask_dtype": "bfloat16"}, {"augment": "crop_flip"}),
        *({"schedule": "linear"}, {"schedule_end": 0.5}),
    ],
)
def test_book_with_a_different_field_is_refused_and_untouched(path, change):
    opened(path)
    before = path.read_bytes()
    (name,) = change
    with pytest.raises(ValueError, match=f"another {name};"):
        opened(path, dataclasses.replace(CONFIG, **change))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"penalty": 0.5, "learning_rate": 0.2, "pixels": "unit"},  # parts of the keys
        BUDGET,
        {"seed": 7, "seeds": 9, "devices": 1, "checkpoint_every": 0.0},
    ],
)
def test_book_may_differ_in_what_the_keys_say_and_in_what_changes_no_run(path, change):
    opened(path)
    opened(path, dataclasses.replace(CONFIG, **change))


def test_field_that_is_younger_than_the_book_counts_as_its_default(path):
    opened(path)
    content = read(path)
    for name in YOUNG:
        del content["config"][name]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="another optimizer;"):
        opened(path, dataclasses.replace(CONFIG, optimizer="adamw"))
    opened(path)
    assert read(path)["config"]["optimizer"] == "sgd"


def finished():
    """Return the names of the committed studies that are finished."""
    names = [name for name in configs.names() if (RESULTS / f"{name}.json").exists()]
    return [name for name in names if "summary" in read(RESULTS / f"{name}.json")]


def made_with_earlier_defaults(name):
    study = read(RESULTS / f"{name}.json")["config"]
    return [
        field
        for field in ("norm_decay", "pruned_gradient")
        if study.get(field, 0.0) != getattr(CONFIG, field)
    ]


@pytest.mark.parametrize("name", finished())
def test_committed_study_is_accepted_as_it_is_but_for_earlier_defaults(path, name):
    shutil.copy(RESULTS / f"{name}.json", path)
    before = read(path)
    if earlier := made_with_earlier_defaults(name):
        with pytest.raises(ValueError, match=f"another {', '.join(earlier)};"):
            opened(path, configs.load_config(name))
        assert read(path) == before
        return
    opened(path, configs.load_config(name))
    after = read(path)
    for entry in ("runs", "summary", "versions", "study"):
        assert after[entry] == before[entry]


# Each run once


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


# Not finite


def diverge(trainings, at):
    def end(seed):
        if seed in at:
            raise TrainingError(f"seed {seed} is not finite")

    trainings.ends = end


def test_training_that_diverges_is_noted_and_the_other_seeds_go_on(path, trainings):
    diverge(trainings, [4, 6])
    book = opened(path)
    book.run([TASK], DATA)
    assert trainings.began == [4, 5, 6]
    bad, good, worse = book.records(TASK)
    assert (bad["diverged"], worse["diverged"]) == (
        "seed 4 is not finite",
        "seed 6 is not finite",
    )
    assert "diverged" not in good
    # Of the dense LeNet-300-100: nothing is right, nothing is pruned.
    assert (bad["accuracy"], bad["weights"], bad["nnz"]) == (0.0, 266_200, 266_200)
    assert (bad["macs"], bad["macs_remaining"], bad["seed"]) == (266_200, 266_200, 4)
    assert not any(folder.exists() for folder in trainings.folders)
    opened(path).run([TASK], DATA)  # it is not tried again
    assert trainings.began == [4, 5, 6]


def test_training_that_diverges_where_it_is_tested_is_an_error(path, trainings):
    diverge(trainings, [5])
    tested = TASK._replace(stage="test")
    with pytest.raises(TrainingError, match="seed 5 is not finite"):
        opened(path).run([tested], DATA)
    assert [run["seed"] for run in read(path)["runs"].values()] == [4]


# Killed


def kill(trainings, at):
    def end(seed):
        if seed == at:
            raise KeyboardInterrupt

    trainings.ends = end


def test_scratch_of_a_run_is_there_until_it_is_written_down(path, trainings):
    kill(trainings, 5)
    with pytest.raises(KeyboardInterrupt):
        opened(path).run([TASK], DATA)
    done, killed = trainings.folders
    assert not done.exists()
    assert killed.is_dir()
    # The same folder for whoever goes on, with more seeds and other devices, too.
    kill(trainings, None)
    config = dataclasses.replace(CONFIG, seeds=9, devices=1)
    opened(path).run([TASK._replace(config=config)], DATA)
    assert trainings.folders[2] == killed
    assert not any(folder.exists() for folder in trainings.folders)


def test_scratch_that_a_kill_left_behind_is_removed(path, trainings):
    opened(path).run([TASK], DATA)
    left = trainings.folders[1]
    left.mkdir()
    opened(path).run([TASK], DATA)
    assert not left.exists()


def test_scratch_of_different_runs_is_apart(path, trainings):
    other = TASK._replace(config=dataclasses.replace(CONFIG, penalty=0.5))
    tasks = [TASK, other, TASK._replace(stage="test"), TASK._replace(method="dense")]
    opened(path).run(tasks, DATA)
    assert len(set(trainings.folders)) == 4 * 3


@pytest.mark.parametrize("failing", ["write", "replace"])
def test_file_is_whole_whenever_a_process_dies(path, trainings, monkeypatch, failing):
    kill(trainings, 5)
    with pytest.raises(KeyboardInterrupt):
        opened(path).run([TASK], DATA)
    kill(trainings, None)
    before = path.read_bytes()
    book = Book(path, path.parent / "scratch")

    with monkeypatch.context() as patch:
        fill_disk(patch, failing)
        with pytest.raises(OSError, match="the disk is full"):
            book.run([TASK], DATA)
    assert path.read_bytes() == before
    opened(path).run([TASK], DATA)
    assert len(read(path)["runs"]) == 3
