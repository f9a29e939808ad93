"""Train a network to a sweep of budgets: accuracy against sparsity and against MACs.

python -m experiments.pareto mnist5k_lenet300 --sparsities 0.9 0.98 0.995

Dense is trained beside it. The table, the figure and the numbers of every run are
written to a folder; a sweep that was killed goes on when it is started again.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import configs
from experiments.book import Book, Task, examples, machines
from experiments.config import Config
from experiments.jobs import add_jobs, share
from experiments.outcome import as_markdown, as_text
from experiments.study import summarize
from experiments.tables import study_cells
from experiments.tradeoff import draw_tradeoff
from experiments.train import config_seeds

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
# What a budget is of, and what is penalized in proportion to it.
KINDS = {
    "connections": {"costs": "connections"},
    "macs": {"costs": "macs"},
    "macs-alone": {"costs": "macs", "weigh": False},
}


def run_pareto(
    name: str,
    folder: Path,
    *,
    sparsities: Sequence[float] = SPARSITIES,
    kinds: Sequence[str] = ("connections",),
    seeds: int | None = None,
    data_dir: str | None = None,
) -> None:
    """Train dense, and SCL to every budget, and write down what they came to.

    Nothing is chosen: the settings are those of the config, training and validation
    examples are trained on, and the test set is seen once by each run.

    Args:
      name: an experiment in `experiments.configs`.
      folder: where pareto.json, pareto.md and pareto.png are written.
      sparsities: what is to be pruned, fractions in (0, 1) of each kind.
      kinds: names in `KINDS`.
      seeds: how many; those of the config by default.
      data_dir: folder of prepared TFDS data sets.

    Raises:
      ValueError: if a sparsity is not in (0, 1), there is no seed, or the folder has
        runs of other settings.
    """
    if not sparsities or not all(0 < sparsity < 1 for sparsity in sparsities):
        raise ValueError(f"sparsities must be in (0, 1), got {list(sparsities)}")
    config = dataclasses.replace(configs.load_config(name), validation=0)
    if seeds is not None:
        config = dataclasses.replace(config, seeds=seeds)
    book = Book(folder / "pareto.json", folder / "scratch")
    book.open(config)
    kinds, sparsities = list(dict.fromkeys(kinds)), sorted(set(sparsities))
    book.save(name=name, kinds=kinds, sparsities=sparsities)
    tasks = [_task(config, "dense", {"sparsity": 0.0})]
    tasks += [
        _task(config, "scl", {**KINDS[kind], "sparsity": sparsity})
        for kind in kinds
        for sparsity in sparsities
    ]
    book.run(tasks, examples(config, data_dir))
    rows = [
        summarize(task.method, task.config.sparsity or None, book.records(task))
        for task in tasks
    ]
    book.save(summary=rows)
    draw_tradeoff(book.content, folder / "pareto.png")
    (folder / "pareto.md").write_text(render(book.content))
    print(f"\n{as_text(study_cells(rows))}\n\nTable, figure and numbers: {folder}")


def render(book: dict[str, Any]) -> str:
    """Return the page of a sweep, in Markdown."""
    rows = book["summary"]
    asked = ["--kinds", *book["kinds"], "--sparsities", *map(str, book["sparsities"])]
    return (
        f"# {configs.summary(book['name'])} From dense to sparse.\n\n"
        f"{as_markdown(study_cells(rows))}\n\n"
        "Accuracy on the test set after the last epoch, mean ± standard deviation over "
        f"{len(rows[0]['seeds'])} seeds; MACs per example, FLOPs = 2 x MACs. "
        f"{book['config']['epochs']} epochs, {machines(book)}; "
        f"`python -m experiments.pareto {book['name']} "
        f"{' '.join(asked)}`\n\n"
        "![accuracy against weights and MACs](pareto.png)\n"
    )


def _task(config: Config, method: str, settings: dict) -> Task:
    changed = dataclasses.replace(config, **settings)
    return Task("test", method, changed, config_seeds(changed))


def main(argv: Sequence[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.pareto", description=__doc__
    )
    parser.add_argument("name", choices=configs.names())
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["connections"])
    parser.add_argument("--seeds", type=int, help="how many; as in the config")
    parser.add_argument("--out", type=Path, help="folder; runs/pareto/NAME")
    parser.add_argument("--data-dir", help="folder of prepared TFDS data sets")
    add_jobs(parser)
    arguments = parser.parse_args(argv)
    if arguments.jobs > 1:
        code = share("experiments.pareto", argv, arguments.jobs)
        if code:
            return code
    run_pareto(
        arguments.name,
        arguments.out or Path("runs") / "pareto" / arguments.name,
        sparsities=arguments.sparsities,
        kinds=arguments.kinds,
        seeds=arguments.seeds,
        data_dir=arguments.data_dir,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
