"""Straight-through estimators beside each other in one network.

python -m experiments.estimators fashion_mnist_resnet20 --jobs 14

The trainings differ in the estimator and in where all mask variables start, and in
nothing else. Every run is written to experiments/results/estimators_NAME.json as soon
as it is done; what was killed goes on when it is started again.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from experiments import configs
from experiments.book import RESULTS, SCRATCH, Book, Task, examples
from experiments.config import parse_ste
from experiments.jobs import add_jobs, share
from experiments.outcome import as_text, mean_std
from experiments.train import config_seeds

NAMES = (
    "identity",
    "leaky_relu(0.5)",
    "leaky_relu(0.1)",
    "softplus(1.0)",
    "softplus(5.0)",
    "relu",
    "clipped",
)
START = 0.1  # the usual one, where all of `NAMES` are positive
FAR = 1.5  # where some are not: they are tried from there, and the identity


def trainings(names: Sequence[str]) -> list[tuple[str, float]]:
    """Return what is trained: pairs of an estimator and the mask variables' start."""
    far = [name for name in names if not parse_ste(name)(jnp.float32(FAR)) > 0]
    return [(name, START) for name in names] + [
        (name, FAR) for name in dict.fromkeys(["identity", *far])
    ]


def run_estimators(
    name: str,
    names: Sequence[str] = NAMES,
    *,
    data_dir: str | None = None,
    folder: Path = RESULTS,
    scratch: Path = SCRATCH,
) -> list[dict[str, Any]]:
    """Train a network with every estimator, or what is missing of it.

    Args:
      name: of the experiment; it says how sparse, on which data, and how many seeds.
      names: of estimators, as `experiments.config` parses them.
      data_dir: folder of prepared TFDS data sets.
      folder: where the JSON file is.
      scratch: where checkpoints are.

    Returns:
      A row for each pair of `trainings`: `ste`, `start`, and the mean and the standard
      deviation (`_std`) of `accuracy` on the validation split, last epoch, and of
      `sparsity`, over the seeds of the config.

    Raises:
      ValueError: if the experiment has no validation split, or a name is unknown, or
        the file has runs of other settings.
    """
    config = configs.load_config(name)
    if not config.validation:
        raise ValueError(f"{name}: estimators are compared on validation; it is 0")
    book = Book(folder / f"estimators_{name}.json", scratch / f"estimators_{name}")
    book.open(config, ("ste", "mask_initial"))
    tasks = []
    for ste, start in trainings(names):
        settings = {"ste": ste, "mask_initial": start}
        changed = dataclasses.replace(config, **settings)
        seeds = config_seeds(config)
        tasks.append(Task("validation", "scl", changed, seeds, settings))
    if not all(map(book.has, tasks)):
        book.run(tasks, examples(config, data_dir))
    rows = [_row(task, book.records(task)) for task in tasks]
    if book.content.get("summary") != rows:
        book.save(name=name, summary=rows)
    return rows


def _row(task: Task, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    accuracy, accuracy_std = mean_std([record["accuracy"] for record in records])
    sparsity, sparsity_std = mean_std(
        [1 - record["nnz"] / record["weights"] for record in records]
    )
    return {
        "ste": task.config.ste,
        "start": task.config.mask_initial,
        "accuracy": accuracy,
        "accuracy_std": accuracy_std,
        "sparsity": sparsity,
        "sparsity_std": sparsity_std,
    }


def estimator_cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the cells of a table, a row per estimator and start."""
    return [["estimator", "start", "accuracy (%)", "sparsity (%)"]] + [
        [
            row["ste"],
            f"{row['start']:g}",
            *(
                f"{100 * row[x]:.2f} ± {100 * row[f'{x}_std']:.2f}"
                for x in ("accuracy", "sparsity")
            ),
        ]
        for row in rows
    ]


def main(argv: Sequence[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.estimators",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=configs.names())
    parser.add_argument("--data-dir", help="folder of prepared TFDS data sets")
    add_jobs(parser)
    arguments = parser.parse_args(argv)
    if arguments.jobs > 1:
        code = share("experiments.estimators", argv, arguments.jobs)
        if code:
            return code
    rows = run_estimators(arguments.name, data_dir=arguments.data_dir)
    print(as_text(estimator_cells(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
