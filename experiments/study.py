"""Choose penalties on the validation split, then test once: the README's numbers.

python -m experiments.study mnist5k_lenet300

Every run is written to experiments/results/NAME.json as soon as it is done, under
a key that says what it is, so that a study can be killed and started again.
"""

import argparse
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments import configs
from experiments.config import Config, Study
from experiments.data import Dataset, load
from experiments.outcome import make_result, mean_std
from experiments.record import versions
from experiments.train import config_seeds, train

RESULTS = Path(__file__).parent / "results"

Settings = dict[str, Any]  # fields of a config that are changed


class Book:
    """The runs of a study by key, in one JSON file that is always whole."""

    def __init__(self, path: Path):
        self.path = path
        self.content: dict[str, Any] = {"runs": {}}
        if path.exists():
            self.content = json.loads(path.read_text())

    def open(self, config: Config) -> None:
        """Note the settings; refuse to mix runs of different ones.

        Raises:
          ValueError: if the file has runs of another config.
        """
        settings = dataclasses.asdict(config)
        noted = self.content.setdefault("config", settings)
        # What each run's key says of itself, and how many there are, may change.
        free = ("penalty", "learning_rate", "pixels", "seed", "seeds")
        differing = [
            k for k in settings if settings[k] != noted.get(k) and k not in free
        ]
        if differing:
            raise ValueError(
                f"{self.path} has runs with another {', '.join(differing)}; move it "
                "away to start the study anew"
            )
        self.content["config"] = settings

    def save(self, **entries: Any) -> None:
        """Add entries and replace the file at once."""
        self.content.update(entries)
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(draft, self.path)

    def run(
        self, stage: str, method: str, config: Config, data: Dataset, seeds: range
    ) -> list[dict[str, Any]]:
        """Return the records of a config's seeds; train those that are missing."""
        split = data.test if stage == "test" else data.validation
        keys = {seed: _key(stage, method, config, seed) for seed in seeds}
        runs = self.content["runs"]
        missing = [seed for seed, key in keys.items() if key not in runs]
        if missing and self.content.pop("summary", None):
            self.save()  # it was that of fewer runs, and comes back with the last one
        for trained in train(config, data, method, seeds=missing):
            result = make_result(config, trained, split)
            runs[keys[trained.seed]] = {
                **dataclasses.asdict(result),
                "stage": stage,
                "penalty": config.penalty if method == "scl" else None,
                "learning_rate": config.learning_rate,
                "pixels": config.pixels,
                "epoch_seconds": [round(m.seconds, 4) for m in trained.history],
            }
            self.save(versions=versions())
            print(
                f"{keys[trained.seed]}: accuracy {result.accuracy:.4f}, "
                f"sparsity {result.sparsity:.4f}",
                flush=True,
            )
        return [runs[key] for key in keys.values()]


def _key(stage: str, method: str, config: Config, seed: int) -> str:
    penalty = f" penalty={config.penalty}" if method == "scl" else ""
    rest = f"learning_rate={config.learning_rate} pixels={config.pixels}"
    return f"{stage} {method}{penalty} {rest} seed={seed}"


def run_study(
    name: str, *, data_dir: str | None = None, folder: Path = RESULTS
) -> None:
    """Run a study, or what is missing of it, and write down what it came to.

    On the validation split, dense chooses its learning rate and SCL, for each
    target sparsity, the penalty with the best accuracy among those that reach it;
    both choose how the pixels are scaled. Then both train on training and validation
    examples together, and see the test set once. Dense is tested with the settings
    of SCL, too.
    """
    config, study = configs.load_config(name), configs.load_study(name)
    book = Book(folder / f"{name}.json")
    if not config.validation:
        raise ValueError("a study chooses on the validation split; validation is 0")
    book.open(config)
    book.save(name=name, study=dataclasses.asdict(study))

    data = load(config.dataset, validation=config.validation, data_dir=data_dir)
    dense, scl = _choose(book, config, study, data)

    everything = load(config.dataset, validation=0, data_dir=data_dir)
    rows = []

    def test(method: str, target: float | None, settings: Settings) -> None:
        final = dataclasses.replace(config, validation=0, **settings)
        records = book.run("test", method, final, everything, config_seeds(config))
        rows.append(_summary(method, target, records))

    rate = {"learning_rate": config.learning_rate}
    same = [{"pixels": settings["pixels"], **rate} for settings in scl.values()]
    for settings in _unique([*same, dense]):
        test("dense", None, settings)
    for target, settings in scl.items():
        test("scl", target, settings)
    book.save(summary=rows)


def _choose(
    book: Book, config: Config, study: Study, data: Dataset
) -> tuple[Settings, dict[float, Settings]]:
    """Return the settings of dense, and those of SCL for each target."""
    seeds = range(1000, 1000 + study.seeds)  # seeds that are not tested

    def validate(method: str, settings: Settings) -> tuple[float, float]:
        changed = dataclasses.replace(config, **settings)
        records = book.run("validation", method, changed, data, seeds)
        return _mean(records, "accuracy"), _sparsity(records)[0]

    def grid(field: str, values: Sequence[float]) -> list[Settings]:
        pairs = itertools.product(study.pixels, values)
        return [{"pixels": pixels, field: value} for pixels, value in pairs]

    dense = [
        (validate("dense", s)[0], s)
        for s in grid("learning_rate", study.learning_rates)
    ]
    tried = [(*validate("scl", s), s) for s in grid("penalty", study.penalties)]
    scl = {}
    for target in study.targets:
        reaching = [(a, s) for a, sparsity, s in tried if sparsity >= target]
        if not reaching:
            raise ValueError(
                f"no penalty of the study reaches a sparsity of {target} on "
                "validation; add a larger one"
            )
        scl[target] = max(reaching, key=lambda pair: pair[0])[1]
    return max(dense, key=lambda pair: pair[0])[1], scl


def _unique(many: Iterable[Settings]) -> list[Settings]:
    return [dict(items) for items in dict.fromkeys(tuple(s.items()) for s in many)]


def _summary(
    method: str, target: float | None, records: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return one row of the README's table."""
    accuracy, accuracy_std = mean_std([record["accuracy"] for record in records])
    sparsity, sparsity_std = _sparsity(records)
    return {
        "method": method,
        "target": target,
        "penalty": records[0]["penalty"],
        "learning_rate": records[0]["learning_rate"],
        "pixels": records[0]["pixels"],
        "seeds": [record["seed"] for record in records],
        "accuracy": accuracy,
        "accuracy_std": accuracy_std,
        "sparsity": sparsity,
        "sparsity_std": sparsity_std,
        "nnz": _mean(records, "nnz"),
        "macs_remaining": _mean(records, "macs_remaining"),
        "seconds": _mean(records, "seconds"),
    }


def _mean(records: Iterable[dict[str, Any]], field: str) -> float:
    return mean_std([record[field] for record in records])[0]


def _sparsity(records: Iterable[dict[str, Any]]) -> tuple[float, float]:
    return mean_std([1 - record["nnz"] / record["weights"] for record in records])


def main(argv: Sequence[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.study", description=run_study.__doc__
    )
    parser.add_argument("name", choices=configs.names())
    parser.add_argument("--data-dir", help="folder of prepared TFDS data sets")
    arguments = parser.parse_args(argv)
    run_study(arguments.name, data_dir=arguments.data_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
