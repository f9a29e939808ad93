"""Ask every network of the zoo for several budgets: what was asked, what came.

python -m experiments.zoo

A few steps on a few images (or texts) with the same settings for all, at the small
size of Fashion-MNIST: it shows that a budget is met, not what the network is worth.
Every run is written to experiments/results/zoo.json as soon as it is done.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.book import RESULTS
from experiments.config import Config
from experiments.data import Dataset, Split, load
from experiments.json_lines import as_lines
from experiments.models import MODELS, LanguageModel
from experiments.record import replace_text, versions
from experiments.train import train

REMAINING = (0.5, 0.1, 0.02, 0.005)  # fractions of the connections
STEPS, BATCH, EPOCHS = 120, 16, 4


def settings(model: str, remaining: float, steps: int) -> Config:
    """Return the settings, which differ in nothing but network, data and budget."""
    text = issubclass(MODELS[model], LanguageModel)
    return Config(
        dataset="python_docs" if text else "fashion_mnist",
        model=model,
        epochs=EPOCHS,
        batch_size=BATCH,
        optimizer="adamw",
        learning_rate=1e-3,
        sparsity=1 - remaining,
        devices=1,
        look_every=steps // EPOCHS,
    )


def run_zoo(
    path: Path,
    *,
    models: Sequence[str] = tuple(MODELS),
    remaining: Sequence[float] = REMAINING,
    steps: int = STEPS,
    data_dir: str | None = None,
) -> None:
    """Train each network to each budget, or what is missing, and write it down.

    Args:
      path: the JSON file.
      models: names in `experiments.models.MODELS`.
      remaining: the budgets, fractions of the connections.
      steps: of each training, a multiple of 4.
      data_dir: folder of prepared TFDS data sets.

    Raises:
      ValueError: if the steps are no multiple of 4, or need more examples than
        there are.
    """
    if steps < EPOCHS or steps % EPOCHS:
        raise ValueError(f"steps must be a multiple of {EPOCHS}, got {steps}")
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"runs": {}}
    if path.exists():
        content = json.loads(path.read_text())
    for model in models:
        for fraction in remaining:
            key = f"{model} {fraction:g} of the connections, {steps} steps"
            if key in content["runs"]:
                continue
            config = settings(model, fraction, steps)
            run = _run(config, _some(config, steps, data_dir))
            content["runs"][key] = {"model": model, "remaining": fraction, **run}
            content["versions"] = versions()
            replace_text(path, as_lines(content) + "\n")
            wanted = fraction * run["connections"]
            print(
                f"{key}: {run['reached']:,} of {run['connections']:,}, "
                f"{100 * (run['reached'] / wanted - 1):+.4f} % of what was asked",
                flush=True,
            )


def _some(config: Config, steps: int, data_dir: str | None) -> Dataset:
    """Return as few training examples as the steps need, and no others."""
    train_split, _, test = load(config.dataset, validation=0, data_dir=data_dir)
    count = steps // config.epochs * config.batch_size
    if count > len(train_split.labels):
        raise ValueError(
            f"{steps} steps need {count} examples of {config.dataset}, which has "
            f"{len(train_split.labels)}"
        )
    few = Split(*(x[:count] for x in train_split))
    return Dataset(few, Split(*(x[:0] for x in test)), Split(*(x[:0] for x in test)))


def _run(config: Config, data: Dataset) -> dict[str, Any]:
    (trained,) = train(config, data, "scl")
    masks = jax.tree.leaves(trained.trained.masks)
    return {
        "connections": sum(mask.size for mask in masks),
        "reached": sum(int((mask >= 0).sum()) for mask in masks),
        "least_of_a_layer": min(int((mask >= 0).sum()) for mask in masks),
        "nnz_by_epoch": [metrics.nnz for metrics in trained.history],
        "penalty": trained.history[-1].penalty,
        "config": dataclasses.asdict(config),
    }


def main(argv: Sequence[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.zoo", description=__doc__
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=RESULTS / "zoo.json")
    parser.add_argument("--data-dir", help="folder of prepared TFDS data sets")
    arguments = parser.parse_args(argv)
    run_zoo(
        arguments.out,
        models=arguments.models,
        steps=arguments.steps,
        data_dir=arguments.data_dir,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
