"""What SCL costs: an epoch of SCL over an epoch of dense, in the same loop.

python -m experiments.bench --repeats 9 --json bench.json

Both are compiled first and timed in turns, so that whatever else the machine does
falls on both. Printed are medians and the spread of the ratio over the repeats,
with the floor beside them: the bytes that a step of SCL must move beyond those of
a dense step. The product reads W and S and writes W * H(S); the norms read W and its
gradient; the update reads and writes S and its momentum, and finds W and its gradient
where the update of W has them.
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

from experiments.config import Config
from experiments.data import ABOUT, Split
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


def compare(config: Config, steps: int, repeats: int) -> dict[str, Any]:
    """Time epochs of `steps` steps on random images; return a row of the table."""
    random = np.random.default_rng(0)
    examples = steps * config.batch_size
    split = Split(
        random.integers(0, 256, (examples, *ABOUT[config.dataset].shape), np.uint8),
        random.integers(0, 10, examples, np.int32),
    )
    dense, scl = (epoch_timer(config, method, split) for method in ("dense", "scl"))
    times = [(dense(), scl()) for _ in range(repeats)]
    ratios = sorted(s / d for d, s in times)
    params, _ = make_network(config).init(jax.random.key(0))
    weights = sum(layer.size for layer in kernel_counts(params).values())
    return {
        "network": config.model,
        "batch": config.batch_size,
        "dense_us": 1e6 * statistics.median(d for d, _ in times) / steps,
        "scl_us": 1e6 * statistics.median(s for _, s in times) / steps,
        "ratio": statistics.median(ratios),
        "ratio_spread": [ratios[0], ratios[-1]],
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
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args(argv)

    lenet300 = Config(dataset="fashion_mnist", model="lenet300", epochs=1000)
    settings = [lenet300, dataclasses.replace(lenet300, batch_size=64)]
    rows = [compare(s, arguments.steps, arguments.repeats) for s in settings]
    lenet5 = dataclasses.replace(lenet300, model="lenet5", learning_rate=0.01)
    rows.append(compare(lenet5, max(1, arguments.steps // 10), arguments.repeats))

    imports = import_seconds(min(5, arguments.repeats))
    header = ["network", "batch", "dense", "SCL", "SCL / dense", "spread", "floor"]
    cells = [
        [
            row["network"],
            str(row["batch"]),
            f"{row['dense_us']:.0f} us",
            f"{row['scl_us']:.0f} us",
            f"{row['ratio']:.3f}",
            "{:.3f}-{:.3f}".format(*row["ratio_spread"]),
            f"{row['floor_bytes'] / 1e6:.1f} MB",
        ]
        for row in rows
    ]
    about = versions()
    print(f"One training step, float32, {about['device']}, jax {about['jax']}")
    print(f"median of {arguments.repeats} repeats of {arguments.steps} steps\n")
    print(as_text([header, *cells]))
    more = imports["jax_optax_scl_jax"] - imports["jax_optax"]
    print(f"\nimport jax, optax: {imports['jax_optax']:.2f} s; scl_jax: {more:+.2f} s")
    if arguments.json:
        content = {"steps": rows, "import_seconds": imports, "versions": about}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
