"""A comparison of a few methods whose trainings take no time."""

import dataclasses
import json

from trials import BASE, Trials, experiment

from experiments import configs
from experiments.comparison import run_comparison
from experiments.spaces import Comparison

CONFIG = dataclasses.replace(BASE, learning_rate=0.3, sparsity=0.7, seeds=1)
SPACES = {
    "dense": {"learning_rate": (0.1, 0.2)},
    "scl": {"learning_rate": (0.1, 0.2), "mask_learning_rate": (1e-3, 1e-2)},
    "gmp": {"learning_rate": (0.1, 0.2), "schedule_end": (0.5, 0.7)},
    "str": {"learning_rate": (0.1, 0.2), "mask_initial": (-1.0, -2.0)},
}
COMPARISON = Comparison(targets=(0.5, 0.9), spaces=SPACES, seeds=2, tested=3)


def accuracies(method, config):
    """Return those on validation and on test; the latter would choose otherwise."""
    if method == "dense":
        worth = {0.1: 0.02, 0.2: 0.03}[config.learning_rate]
    elif method == "scl":
        worth = 0.01 * (config.learning_rate == 0.2) + config.mask_learning_rate
    elif method == "gmp":
        worth = 0.1 * config.learning_rate - 0.01 * config.schedule_end
    else:
        worth = -0.1 * config.learning_rate + 0.01 * config.mask_initial
    return 0.9 + worth - 0.1 * config.sparsity, 0.8 - worth


def left(method, config):
    """Return the fraction of the weights that are left, of which STR is not asked."""
    if method != "str":
        return 1 - config.sparsity if method != "dense" else 1.0
    return min(1.0, 0.02 * config.weight_decay**-0.4 * abs(config.mask_initial))


def put_comparison(monkeypatch):
    """Put the comparison in place; the fields of what is returned can be changed."""
    held = experiment(monkeypatch, CONFIG)
    held.comparison = COMPARISON
    monkeypatch.setattr(configs, "load_comparison", lambda name: held.comparison)
    return held


def put_trials(monkeypatch, left=left):
    """Put trainings in place of real ones; `left` says how much of each is left."""
    found = Trials(
        monkeypatch,
        dense=lambda config: accuracies("dense", config),
        scl=lambda config: (
            *accuracies(found.method, config),
            1 - left(found.method, config),
        ),
    )
    return found


def run(folder, **part):
    run_comparison("tiny", folder=folder, scratch=folder / "scratch", **part)
    return json.loads((folder / "compare_tiny.json").read_text())


def of(content, method, target):
    (row,) = [
        row
        for row in content["summary"]
        if (row["method"], row["target"]) == (method, target)
    ]
    return row
