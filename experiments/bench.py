"""What SCL costs: an epoch of SCL over an epoch of dense, in the same loop.

python -m experiments.bench --repeats 9 --json bench.json
python -m experiments.bench --experiments imagenet_resnet50 --steps 20
python -m experiments.bench --experiments fashion_mnist_resnet20 --methods gmp rigl

SCL is timed with a fixed penalty and with a budget to meet. All are compiled first and
timed in turns, so that whatever else the machine does falls on all. Printed are medians
and the spread of the ratio over the repeats, with the floor beside them: the bytes that
a step of SCL must move beyond those of a dense step. The product reads W and S and
writes W * H(S); the norms read W and its gradient; the update reads and writes S and
its momentum, and finds W and its gradient where the update of W has them.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import configs
from experiments.config import Config
from experiments.data import ABOUT, Split
from experiments.dispatch import LAYERS, dispatch_times
from experiments.feed import make_feed
from experiments.health import kernel_counts
from experiments.mesh import make_mesh
from experiments.methods import METHODS
from experiments.network import make_network
from experiments.outcome import as_text
from experiments.record import versions
from experiments.step import Objective, make_initial, make_run

BYTES_PER_WEIGHT = 4 * (3 + 2 + 4)  # float32: product, norms, update


def epoch_timer(config: Config, method: str, split: Split) -> Callable[[], float]:
    """Return a function that trains one more epoch and returns its seconds."""
    mesh = make_mesh(config.devices, config.model_parallel)
    feed = make_feed(config, split, mesh)
    way = METHODS[method](config, config.epochs * feed.steps)
    objective = Objective(make_network(config), way, config.label_smoothing)
    initial, _ = make_initial(objective, mesh)
    run = make_run(objective, feed, mesh)
    key = jax.random.key_data(jax.random.key(1))
    held = {"state": initial(jax.random.key(0))}

    def epoch() -> float:
        start = time.perf_counter()
        items = feed.items(0, key, 0, 0, feed.steps)
        held["state"], _ = run(held["state"], items)
        return time.perf_counter() - start

    epoch()
    return epoch


def compare(
    config: Config, steps: int, repeats: int, methods: Sequence[str] = ()
) -> dict[str, Any]:
    """Time epochs of `steps` steps on random images; return a row of the table."""
    random = np.random.default_rng(0)
    examples = steps * config.batch_size
    shape = ABOUT[config.dataset].shape
    images = random.integers(0, 256, (examples, *shape), np.uint8)
    # Labels that can be learned: a network that learns nothing prunes itself away.
    labels = images.reshape(examples, -1)[:, :10].argmax(-1)
    split = Split(images, labels.astype(np.int32))
    fixed = dataclasses.replace(config, sparsity=0.0)
    budget = dataclasses.replace(config, sparsity=0.9)
    timers = (
        epoch_timer(fixed, "dense", split),
        epoch_timer(fixed, "scl", split),
        epoch_timer(budget, "scl", split),
        *(epoch_timer(budget, method, split) for method in methods),
    )
    times = [[timer() for timer in timers] for _ in range(repeats)]
    dense, scl, met, *_ = (
        1e6 * statistics.median(column) / steps for column in zip(*times, strict=True)
    )
    ratios = sorted(row[1] / row[0] for row in times)
    _, _, met_ratio, *others = (
        statistics.median(
            time / row[0] for time, row in zip(column, times, strict=True)
        )
        for column in zip(*times, strict=True)
    )
    params, _ = make_network(config).init(jax.random.key(0))
    weights = sum(layer.size for layer in kernel_counts(params).values())
    return {
        "network": config.model,
        "batch": config.batch_size,
        "compute": config.compute,
        "dense_us": dense,
        "scl_us": scl,
        "budget_us": met,
        "ratio": statistics.median(ratios),
        "ratio_spread": [ratios[0], ratios[-1]],
        "budget_ratio": met_ratio,
        "other_ratios": dict(zip(methods, others, strict=True)),
        "floor_bytes": BYTES_PER_WEIGHT * weights,
        "repeats": repeats,
    }


def import_seconds(repeats: int) -> dict[str, float]:
    """Return the median seconds of importing jax and optax, and scl_jax too."""

    def seconds(modules: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {modules}"], check=True)
        return time.perf_counter() - start

    pairs = [
        (seconds("jax, optax"), seconds("jax, optax, scl_jax")) for _ in range(repeats)
    ]
    base, with_scl = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {"jax_optax": base, "jax_optax_scl_jax": with_scl}


def _long(config: Config) -> Config:
    """Return the settings with so many epochs that none of those timed is the last."""
    return dataclasses.replace(config, epochs=1000)


def _without_path(argv: Sequence[str]) -> str:
    """Return the command's arguments but the file that they are written to."""
    pairs = zip(["", *argv], argv, strict=False)
    return " ".join(word for last, word in pairs if "--json" not in (last, word))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(f"must be at least 1, got {text}")
    return number


def main(argv: Sequence[str]) -> int:
    """Run the benchmarks; print them as a table."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repeats", type=_positive, default=9, help="9 if left out")
    parser.add_argument("--steps", type=_positive, default=200, help="per epoch; 200")
    parser.add_argument(
        "--experiments", nargs="+", choices=configs.names(), help="LeNets if left out"
    )
    parser.add_argument("--batch", type=_positive, help="with --experiments")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=[], help="timed, too"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args(argv)

    if arguments.experiments:
        chosen = [configs.load_config(name) for name in arguments.experiments]
        if arguments.batch:
            chosen = [
                dataclasses.replace(c, batch_size=arguments.batch) for c in chosen
            ]
        settings = [(_long(config), arguments.steps) for config in chosen]
    else:
        lenet300 = _long(Config(dataset="fashion_mnist", model="lenet300"))
        batch_64 = dataclasses.replace(lenet300, batch_size=64)
        lenet5 = dataclasses.replace(lenet300, model="lenet5", learning_rate=0.01)
        settings = [(config, arguments.steps) for config in (lenet300, batch_64)]
        settings.append((lenet5, max(1, arguments.steps // 10)))
    rows = [
        compare(config, steps, arguments.repeats, arguments.methods)
        for config, steps in settings
    ]

    imports = import_seconds(min(5, arguments.repeats))
    header = ["network", "batch", "compute", "dense", "SCL", "SCL / dense", "spread"]
    header += ["to a budget", "floor", *arguments.methods]
    cells = [
        [
            row["network"],
            str(row["batch"]),
            row["compute"],
            f"{row['dense_us']:.0f} us",
            f"{row['scl_us']:.0f} us",
            f"{row['ratio']:.3f}",
            "{:.3f}-{:.3f}".format(*row["ratio_spread"]),
            f"{row['budget_ratio']:.3f}",
            f"{row['floor_bytes'] / 1e6:.1f} MB",
            *(f"{ratio:.3f}" for ratio in row["other_ratios"].values()),
        ]
        for row in rows
    ]
    about = versions()
    print(f"One training step, {about['device']}, jax {about['jax']}")
    print(f"median of {arguments.repeats} repeats of {arguments.steps} steps\n")
    print(as_text([header, *cells]))
    more = imports["jax_optax_scl_jax"] - imports["jax_optax"]
    print(f"\nimport jax, optax: {imports['jax_optax']:.2f} s; scl_jax: {more:+.2f} s")
    host = dispatch_times(steps=40 * arguments.repeats)
    print(
        f"\none call of a step, {LAYERS} layers: {host['dense_us']:.0f} us for "
        f"{host['arrays'][0]} arrays; SCL {host['ratio']:.2f} times that for "
        f"{host['arrays'][1]}, to a budget {host['budget_ratio']:.2f}"
    )
    if arguments.json:
        content = {"steps": rows, "dispatch": host, "import_seconds": imports}
        content |= {"versions": about, "arguments": _without_path(argv)}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
