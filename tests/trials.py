"""Trainings that take no time, for the tests of what asks for them."""

import json
from types import SimpleNamespace

import numpy as np

from experiments import book as books
from experiments import configs, study
from experiments.config import Config
from experiments.data import Dataset, Split
from experiments.outcome import Result


def split(count):
    """Return made-up images."""
    random = np.random.default_rng(count)
    return Split(
        random.integers(0, 256, (count, 28, 28, 1)).astype(np.uint8),
        np.arange(count, dtype=np.int32) % 10,
    )


TEST = split(20)

# What the tests of studies, sweeps and comparisons begin with.
BASE = Config(
    dataset="mnist5k",
    model="lenet300",
    validation=10,
    epochs=2,
    batch_size=10,
    devices=1,
)


class Trials:
    """Trainings that are put in the place of real ones, and a record of them.

    Args:
      monkeypatch: pytest's.
      dense: from a config to the accuracies on validation and test.
      scl: from a config to the accuracies on validation and test, and the sparsity.
    """

    def __init__(self, monkeypatch, dense, scl):
        self.dense, self.scl = dense, scl
        self.trained, self.evaluated, self.stop_after = [], [], None
        self.method = None  # of the training at hand
        self.of_pixels = {}  # pixels -> what they add on validation, on test
        for name in ("load", "train", "make_result", "make_report"):
            monkeypatch.setattr(books, name, getattr(self, name))

    def load(self, name, *, validation, data_dir=None):
        assert name == "mnist5k"
        return Dataset(split(40 - validation), split(validation), TEST)

    def train(self, config, data, method, *, seeds, folder):
        for seed in seeds:
            if len(self.trained) == self.stop_after:
                raise KeyboardInterrupt
            self.trained.append((method, config, len(data.train.labels), seed))
            self.method = method
            history = [SimpleNamespace(seconds=0.5)] * config.epochs
            sparsity = 0.0 if method == "dense" else self.scl(config)[2]
            yield SimpleNamespace(
                seed=seed, history=history, method=method, sparsity=sparsity
            )

    def make_result(self, config, trained, on):
        tested, self.method = on is TEST, trained.method
        self.evaluated.append("test" if tested else "validation")
        found = self.dense(config) if trained.method == "dense" else self.scl(config)
        accuracy = found[tested] + self.of_pixels.get(config.pixels, (0, 0))[tested]
        return Result(
            method=trained.method,
            seed=trained.seed,
            accuracy=accuracy + 0.001 * (trained.seed % 3),
            weights=1000,
            parameters=1010,
            nnz=round(1000 * (1 - trained.sparsity)),
            macs=1000,
            macs_remaining=round(1000 * (1 - trained.sparsity)),
            seconds=0.5 * config.epochs,
        )

    def make_report(self, config, trained):
        nnz = round(1000 * (1 - trained.sparsity))
        row = {"path": "Dense_0/kernel", "weights": 1000, "nnz": nnz}
        rows = [{**row, "macs": 1000, "macs_remaining": nnz}]
        return SimpleNamespace(to_dict=lambda: {"rows": rows})


def experiment(monkeypatch, config, study=None):
    """Put one made-up experiment in place; its fields can be changed."""
    held = SimpleNamespace(config=config, study=study)
    monkeypatch.setattr(configs, "load_config", lambda name: held.config)
    monkeypatch.setattr(configs, "load_study", lambda name: held.study)
    return held


def run(folder):
    """Run the study, and return its book."""
    study.run_study("tiny", folder=folder, scratch=folder / "scratch")
    return book(folder)


def book(folder):
    return json.loads((folder / "tiny.json").read_text())


def rows(content):
    """Return what tells the rows of a summary apart."""
    return {
        (row["method"], row["target"], row["penalty"], row["learning_rate"])
        for row in content["summary"]
    }
