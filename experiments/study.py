"""Choose settings on the validation split, then test once: the README's numbers.

python -m experiments.study mnist5k_lenet300

Every run is written to experiments/results/NAME.json as soon as it is done, and a run
that is killed goes on from its last checkpoint when the study is started again. With
`--jobs 8`, eight processes share the runs, and one accelerator if there is one.

With `--compare`, other methods are put beside SCL: see experiments/comparison.py.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments import configs
from experiments.book import RESULTS, SCRATCH, Book, Settings, Task, examples
from experiments.comparison import ComparisonError, run_comparison
from experiments.config import Config, Study
from experiments.data import Dataset
from experiments.jobs import add_jobs, share
from experiments.outcome import as_text, mean_std
from experiments.side_by_side import comparison_cells
from experiments.tables import study_cells
from experiments.train import config_seeds


def run_study(
    name: str,
    *,
    data_dir: str | None = None,
    folder: Path = RESULTS,
    scratch: Path = SCRATCH,
) -> list[dict[str, Any]]:
    """Run a study, or what is missing of it; write down and return what it came to.

    On the validation split, dense chooses its learning rate, and so does SCL for each
    target sparsity, which it is given as its budget; or, where the study has
    penalties, it chooses the one with the best accuracy among those that reach the
    target. Both choose how the pixels are scaled. Then both train on training and
    validation examples together, and see the test set once. Dense is tested with the
    settings of SCL, too.
    """
    config, study = configs.load_config(name), configs.load_study(name)
    book = Book(folder / f"{name}.json", scratch / name)
    if not config.validation:
        raise ValueError("a study chooses on the validation split; validation is 0")
    book.open(config)
    book.save(name=name, study=dataclasses.asdict(study))

    data = examples(config, data_dir)
    dense, scl = _choose(book, config, study, data)

    everything = examples(dataclasses.replace(config, validation=0), data_dir)

    def test(method: str, settings: Settings) -> Task:
        final = dataclasses.replace(config, validation=0, **settings)
        return Task("test", method, final, config_seeds(config))

    rate = {"learning_rate": config.learning_rate}
    same = [
        {name: {**rate, **settings}[name] for name in ("pixels", "learning_rate")}
        for settings in scl.values()
    ]
    tasks = [(None, test("dense", settings)) for settings in _unique([*same, dense])]
    tasks += [(target, test("scl", settings)) for target, settings in scl.items()]
    book.run([task for _, task in tasks], everything)
    rows = [
        summarize(task.method, target, book.records(task)) for target, task in tasks
    ]
    book.save(summary=rows)
    return rows


def _choose(
    book: Book, config: Config, study: Study, data: Dataset
) -> tuple[Settings, dict[float, Settings]]:
    """Return the settings of dense, and those of SCL for each target."""
    seeds = range(1000, 1000 + study.seeds)  # seeds that are not tested

    def grid(method: str, field: str, values: Sequence[float], **fixed) -> list[Any]:
        pairs = itertools.product(study.pixels, values)
        many = [{**fixed, "pixels": pixels, field: value} for pixels, value in pairs]
        return [
            (Task("validation", method, dataclasses.replace(config, **s), seeds), s)
            for s in many
        ]

    of_dense = grid("dense", "learning_rate", study.learning_rates)
    if study.penalties:
        fixed = grid("scl", "penalty", study.penalties, sparsity=0.0)
        of_scl = dict.fromkeys(study.targets, fixed)
    else:
        of_scl = {
            target: grid("scl", "learning_rate", study.learning_rates, sparsity=target)
            for target in study.targets
        }
    # One rate leaves no choice; one penalty may still not reach the target.
    book.run(
        [
            task
            for trials in (of_dense, *of_scl.values())
            for task, _ in trials
            if len(trials) > 1 or task.penalty() is not None
        ],
        data,
    )

    def accuracy(trial: tuple[Task, Settings]) -> float:
        return _mean(book.records(trial[0]), "accuracy")

    def best(trials: list[tuple[Task, Settings]]) -> Settings:
        return (max(trials, key=accuracy) if len(trials) > 1 else trials[0])[1]

    def reaches(trial: tuple[Task, Settings], target: float) -> bool:
        budget = trial[0].budget()
        return bool(budget) or _sparsity(book.records(trial[0]))[0] >= target

    scl = {}
    for target, trials in of_scl.items():
        reaching = [trial for trial in trials if reaches(trial, target)]
        if not reaching:
            raise ValueError(
                f"no penalty of the study reaches a sparsity of {target} on "
                "validation; add a larger one"
            )
        scl[target] = best(reaching)
    return best(of_dense), scl


def _unique(many: Iterable[Settings]) -> list[Settings]:
    return [dict(items) for items in dict.fromkeys(tuple(s.items()) for s in many)]


def summarize(
    method: str, target: float | None, records: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return the row of a table for runs that differ in their seeds."""
    accuracy, accuracy_std = mean_std([record["accuracy"] for record in records])
    sparsity, sparsity_std = _sparsity(records)
    return {
        "method": method,
        "target": target,
        "penalty": records[0]["penalty"],
        "budget": records[0].get("budget"),  # not there in files of before budgets
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
    parser.add_argument(
        "--compare", action="store_true", help="other methods beside SCL"
    )
    parser.add_argument("--methods", nargs="+", help="with --compare: only these")
    parser.add_argument(
        "--targets", nargs="+", type=float, help="with --compare: only these sparsities"
    )
    add_jobs(parser)
    arguments = parser.parse_args(argv)
    if (arguments.methods or arguments.targets) and not arguments.compare:
        parser.error("--methods and --targets are parts of a comparison: --compare")
    if arguments.jobs > 1:
        code = share("experiments.study", argv, arguments.jobs)
        if code:
            return code
    if arguments.compare:
        try:
            rows = run_comparison(
                arguments.name,
                methods=arguments.methods,
                targets=arguments.targets,
                data_dir=arguments.data_dir,
            )
        except ComparisonError as error:
            parser.error(str(error))
        print("Test accuracy (%), last epoch, at each sparsity:\n")
        cells = comparison_cells(rows, "accuracy")
    else:
        cells = study_cells(run_study(arguments.name, data_dir=arguments.data_dir))
    print(f"{as_text(cells)}\n\nAll tables and figures: python -m experiments.tables")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
