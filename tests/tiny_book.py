"""A book of a tiny config, and trainings that take no time to be written in it."""

import json
from types import SimpleNamespace

from experiments import book as books
from experiments.book import Book, Task
from experiments.config import Config
from experiments.outcome import Result

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


def put_trainings(monkeypatch):
    """Put trainings that take no time in the place of real ones."""
    made = Trainings()
    for name in ("train", "make_result", "make_report"):
        monkeypatch.setattr(books, name, getattr(made, name))
    return made


def path_in(folder):
    return folder / "tiny.json"


def opened(path, config=CONFIG):
    book = Book(path, path.parent / "scratch")
    book.open(config)
    return book


def read(path):
    return json.loads(path.read_text())
