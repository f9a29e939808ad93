"""The runs of a study in one JSON file, filled by one process or by several.

Every run is written down as soon as it is done, under a key that says what it is. A
process that trains a run holds a lock for its key, which the operating system takes
back when the process ends, however it ends: the run is then free for another one.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import shutil
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.config import Config, identity
from experiments.data import Dataset, load
from experiments.json_lines import as_lines
from experiments.outcome import Result, make_diverged, make_report, make_result
from experiments.record import replace_text, versions
from experiments.train import Trained, TrainingError, train

RESULTS = Path(__file__).parent / "results"
SCRATCH = Path("runs") / "studies"

Settings = dict[str, Any]  # fields of a config that are changed

# What a key says of its run, so that the runs of a book may differ in it.
CHOSEN = ("penalty", "sparsity", "costs", "weigh", "learning_rate", "pixels")
BUDGET = ("sparsity", "costs", "weigh")
_MACHINE = ("device", "jax")  # a book may be filled on several
_OF_LAYERS = ("path", "weights", "nnz", "macs", "macs_remaining")
WAIT = 1.0  # seconds between two looks at what other processes do


class Task(NamedTuple):
    """Runs that differ in nothing but their seed."""

    stage: str  # "validation" or "test": the split they are evaluated on
    method: str
    config: Config
    seeds: Sequence[int]
    settings: Settings | None = None  # that tell it from others; None: those of CHOSEN

    def keys(self) -> dict[int, str]:
        """Return the key of each seed's run."""
        if self.settings is not None:
            return self._keys(self.settings)
        config = self.config
        asked = self.budget() or {"penalty": self.penalty()}
        if self.penalty() is not None and config.costs != "connections":
            asked |= {"costs": config.costs, "weigh": config.weigh}
        asked |= {"learning_rate": config.learning_rate, "pixels": config.pixels}
        return self._keys(asked)

    def _keys(self, settings: Settings) -> dict[int, str]:
        words = [f"{k}={v}" for k, v in settings.items() if v is not None]
        return {
            seed: " ".join([self.stage, self.method, *words, f"seed={seed}"])
            for seed in self.seeds
        }

    def penalty(self) -> float | None:
        """Return the penalty, if it is fixed."""
        fixed = self.method == "scl" and not self.config.sparsity
        return self.config.penalty if fixed else None

    def budget(self) -> dict[str, Any] | None:
        """Return what is to be pruned of what, if a budget is to be met."""
        if self.method != "scl" or not self.config.sparsity:
            return None
        return {name: getattr(self.config, name) for name in BUDGET}


class Book:
    """The runs by key, in a file that is always whole.

    Args:
      path: the JSON file.
      scratch: a folder for checkpoints and locks, which may be deleted when no
        process is at work.
    """

    def __init__(self, path: Path, scratch: Path):
        self.path, self._scratch = path, scratch
        self.content: dict[str, Any] = {"runs": {}}
        self._read()

    def open(self, config: Config, chosen: Collection[str] = CHOSEN) -> None:
        """Note the settings; refuse to mix runs of different ones.

        Args:
          config: the settings.
          chosen: fields in which runs may differ: the keys say them.

        Raises:
          ValueError: if the file has runs of another config.
        """
        settings = identity(config)
        # A field that is younger than the file had its default, which changed nothing.
        defaults = {field.name: field.default for field in dataclasses.fields(Config)}
        with self._changing():
            noted = self.content.get("config", settings)
            differing = [
                name
                for name, value in settings.items()
                if name not in chosen and noted.get(name, defaults[name]) != value
            ]
            if differing:
                raise ValueError(
                    f"{self.path} has runs with another {', '.join(differing)}; move "
                    "it away to start the study anew"
                )
            self.content["config"] = dataclasses.asdict(config)

    def save(self, **entries: Any) -> None:
        """Add entries to what the file has by now, and replace it at once."""
        with self._changing():
            self.content.update(entries)

    def run(self, tasks: Iterable[Task], data: Dataset) -> None:
        """Train what is missing, together with other processes, until all is there."""
        tasks = list(tasks)
        keys = {key for task in tasks for key in task.keys().values()}
        while True:
            for task in tasks:
                self._train(task, data)
            self._read()
            if keys <= self.content["runs"].keys():
                return
            time.sleep(WAIT)

    def advance(self, tasks: Iterable[Task], data: Mapping[str, Dataset]) -> bool:
        """Train the first task that no other process trains, or wait for others.

        Args:
          tasks: those that are not done.
          data: by the stage of a task.

        Returns:
          Whether there were any tasks.
        """
        found = False
        for task in tasks:
            found = True
            if self._train(task, data[task.stage]):
                break
        else:
            if found:
                time.sleep(WAIT)
        self._read()
        return found

    def has(self, task: Task) -> bool:
        """Tell whether all runs of a task were done when the file was last read."""
        return set(task.keys().values()) <= self.content["runs"].keys()

    def tried(self, task: Task, field: str) -> list[Any]:
        """Return the values of a setting with which runs like a task's are done."""

        def about(stage: str, method: str, settings: Settings | None) -> Settings:
            others = {k: v for k, v in (settings or {}).items() if k != field}
            return {**others, "stage": stage, "method": method}

        same = about(task.stage, task.method, task.settings)
        values = [
            record["settings"][field]
            for record in self.content["runs"].values()
            if field in (record.get("settings") or {})
            and about(record["stage"], record["method"], record["settings"]) == same
        ]
        return list(dict.fromkeys(values))

    def records(self, task: Task) -> list[dict[str, Any]]:
        """Return the records of a task that is done, a seed each."""
        return [self.content["runs"][key] for key in task.keys().values()]

    def _train(self, task: Task, data: Dataset) -> bool:
        """Train the seeds of a task that no other process is training, if any."""
        split = data.test if task.stage == "test" else data.validation
        keys = task.keys()
        # Where the checkpoints are: the same for a process that takes a run over.
        where = self._scratch / _short(f"{task.stage} {identity(task.config)}")
        begun: list[int] = []
        with contextlib.ExitStack() as held:

            def free() -> Iterator[int]:
                """Yield what is missing when its turn comes, and keep others off."""
                for seed in task.seeds:
                    lock = self._locked(keys[seed], wait=False)
                    if not held.enter_context(lock):
                        continue
                    self._read()
                    if keys[seed] not in self.content["runs"]:
                        begun.append(seed)
                        yield seed
                    # Written down, and its checkpoints are closed.
                    old = where / f"{task.method}-seed{seed}"
                    shutil.rmtree(old, ignore_errors=True)

            seeds = free()
            while (first := next(seeds, None)) is not None:
                with self._changing():
                    # It is that of fewer runs, and comes back with the last one.
                    self.content.pop("summary", None)
                mine = itertools.chain([first], seeds)
                runs = train(task.config, data, task.method, seeds=mine, folder=where)
                try:
                    for trained in runs:
                        self._note_result(task, trained, split)
                except TrainingError as error:
                    if task.stage == "test" and task.settings is None:
                        raise
                    # Other settings are chosen, or none is shown; other seeds go on.
                    result = make_diverged(task.config, task.method, begun[-1])
                    self._note(task, result, {"diverged": str(error)})
        return bool(begun)

    def _note_result(self, task: Task, trained: Trained, split: Any) -> None:
        """Write down a training that came to its end."""
        result = make_result(task.config, trained, split)
        seconds = [round(m.seconds, 4) for m in trained.history]
        more: dict[str, Any] = {"epoch_seconds": seconds}
        if task.stage == "test":
            rows = make_report(task.config, trained).to_dict()["rows"]
            more["layers"] = [{k: row[k] for k in _OF_LAYERS} for row in rows]
        self._note(task, result, more)

    def _note(self, task: Task, result: Result, more: dict[str, Any]) -> None:
        key = task.keys()[result.seed]
        record = {
            **dataclasses.asdict(result),
            "stage": task.stage,
            "penalty": task.penalty(),
            "budget": task.budget(),
            "learning_rate": task.config.learning_rate,
            "pixels": task.config.pixels,
            **({"settings": task.settings} if task.settings else {}),
            **more,
        }
        with self._changing():
            about = versions()
            self.content["versions"] = about  # of the last run
            machine = {name: about[name] for name in _MACHINE}
            self.content["runs"][key] = {**record, **machine}
        print(
            f"{key}: accuracy {result.accuracy:.4f}, sparsity {result.sparsity:.4f}",
            file=sys.stderr,  # stdout is for what they all come to
            flush=True,
        )

    def _read(self) -> None:
        if self.path.exists():
            self.content = json.loads(self.path.read_text())

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Change what the file has by now, and replace it at once."""
        with self._locked("file"):
            self._read()
            yield
            replace_text(self.path, as_lines(self.content) + "\n")

    @contextlib.contextmanager
    def _locked(self, what: str, wait: bool = True) -> Iterator[bool]:
        """Hold the lock of something; without waiting, say whether it was free."""
        self._scratch.mkdir(parents=True, exist_ok=True)
        with (self._scratch / f"{_short(what)}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True


def examples(config: Config, data_dir: str | None) -> Dataset:
    """Return the examples of an experiment, or streams of them."""
    if config.dataset == "imagenet2012":
        from experiments.imagenet import open_streams  # importing it takes seconds

        return open_streams(config, data_dir)
    return load(config.dataset, validation=config.validation, data_dir=data_dir)


def machines(content: dict[str, Any]) -> str:
    """Say on what the runs of a book were made, for the line above its table."""
    last = content["versions"]  # of runs from before each said it for itself
    runs = content["runs"].values()
    names = [tuple(run.get(k, last[k]) for k in _MACHINE) for run in runs]
    known = dict.fromkeys(names or [tuple(last[k] for k in _MACHINE)])
    return " and ".join(f"{device}, jax {jax}" for device, jax in known)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
