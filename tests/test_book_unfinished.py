"""The book and trainings that do not end: diverged ones, killed ones, full disks."""

import dataclasses

import pytest
from sharing import fill_disk
from tiny_book import CONFIG, DATA, TASK, opened, path_in, put_trainings, read

from experiments.book import Book
from experiments.train import TrainingError


@pytest.fixture
def trainings(monkeypatch):
    return put_trainings(monkeypatch)


@pytest.fixture
def path(tmp_path):
    return path_in(tmp_path)


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


def test_tested_training_that_diverges_is_noted_where_others_can_be_chosen(
    path, trainings
):
    diverge(trainings, [5])
    tested = TASK._replace(stage="test", settings={"penalty": 0.1})
    book = opened(path)
    book.run([tested], DATA)
    records = book.records(tested)
    assert [record.get("diverged") for record in records] == [
        None,
        "seed 5 is not finite",
        None,
    ]


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
