"""What SCL costs: an epoch of SCL over an epoch of dense, in the same loop.

python -m experiments.bench --repeats 9 --json bench.json
python -m experiments.bench --experiments imagenet_resnet50 --steps 50 --memory
python -m experiments.bench --experiments imagenet_resnet50 --steps 50 --scaling
python -m experiments.bench --experiments fashion_mnist_resnet20 --methods gmp rigl
python -m experiments.bench --experiments imagenet_vit_b16 --batch 64 --kinds scl

SCL is timed with a fixed penalty ("scl"), with a budget to meet, and with masks at rest
("frozen"), or those of them that `--kinds` names. Printed are medians and the spread of
the ratio over the repeats, with the floor beside them: experiments/step_cost.py says
what of.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import configs
from experiments.config import Config
from experiments.dispatch import LAYERS, dispatch_times
from experiments.methods import METHODS
from experiments.outcome import as_text
from experiments.record import versions
from experiments.step_cost import (
    KINDS,
    add_memory,
    allowed_bytes,
    compare,
    scaling,
    scaling_cells,
)

# Without --experiments: networks, their batch, and how many times fewer steps.
USUAL = (
    ("lenet300", 128, 1),
    ("lenet300", 64, 1),
    ("lenet5", 128, 10),
    ("resnet20", 128, 100),
)


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


def _without_path(argv: Sequence[str]) -> str:
    """Return the command's arguments but the file that they are written to."""
    pairs = zip(["", *argv], argv, strict=False)
    return " ".join(word for last, word in pairs if "--json" not in (last, word))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(f"must be at least 1, got {text}")
    return number


def _parser() -> argparse.ArgumentParser:
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
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=KINDS, help="of SCL"
    )
    parser.add_argument(
        "--compute", choices=("float32", "bfloat16"), help="with --experiments"
    )
    parser.add_argument("--mask-dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--mask-momentum", type=float)
    parser.add_argument("--memory", action="store_true", help="of a step, too")
    parser.add_argument(
        "--scaling", action="store_true", help="all devices beside one, and no more"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    return parser


def _settings(arguments: argparse.Namespace) -> list[tuple[Config, int]]:
    """Return the config and the steps of each row."""
    changes = {
        name: getattr(arguments, name) for name in ("mask_dtype", "mask_momentum")
    }
    if arguments.experiments:
        changes |= {"batch_size": arguments.batch, "compute": arguments.compute}
        chosen = [(configs.load_config(n), 1) for n in arguments.experiments]
    else:
        chosen = [
            (Config(dataset="fashion_mnist", model=model, batch_size=batch), fewer)
            for model, batch, fewer in USUAL
        ]
    changes = {name: value for name, value in changes.items() if value is not None}
    return [
        (dataclasses.replace(config, **changes), max(1, arguments.steps // fewer))
        for config, fewer in chosen
    ]


def _print_steps(rows: Sequence[dict[str, Any]]) -> None:
    header = ["network", "batch", "compute", "what", "step", "/ dense", "spread"]
    cells = [[*header, "floor", "memory", "allowed"]]
    for row in rows:
        for name, one in row["timed"].items():
            is_scl = name in ("scl", "budget")
            memory = allowed = ""
            if "bytes" in one:
                memory = f"{one['bytes'] / 1e6:.1f} MB"
            if "bytes" in one and is_scl:
                allowed = f"{allowed_bytes(row) / 1e6:.1f} MB"
            cells.append(
                [
                    row["network"],
                    str(row["batch"]),
                    row["compute"],
                    name,
                    f"{one['us']:.0f} us",
                    f"{one['ratio']:.3f}",
                    "{:.3f}-{:.3f}".format(*one["spread"]),
                    f"{row['floor_bytes'] / 1e6:.1f} MB" if is_scl else "",
                    memory,
                    allowed,
                ]
            )
    print(as_text(cells))


def main(argv: Sequence[str]) -> int:
    """Run the benchmarks; print them as a table."""
    arguments = _parser().parse_args(argv)
    about = versions()
    print(f"One training step, {about['device']}, jax {about['jax']}")
    print(f"median of {arguments.repeats} repeats of {arguments.steps} steps\n")
    content: dict[str, Any] = {"versions": about, "arguments": _without_path(argv)}

    def save(**more: Any) -> None:
        # As it comes: a large network takes minutes to compile, and may be given up.
        content.update(more)
        if arguments.json:
            arguments.json.write_text(json.dumps(content, indent=2) + "\n")

    rows = []
    for config, steps in _settings(arguments):
        if arguments.scaling:
            rows.append(scaling(config, steps, arguments.repeats))
            save(scaling=rows)
            continue
        asked = arguments.repeats, arguments.methods, arguments.kinds
        rows.append(compare(config, steps, *asked))
        save(steps=rows)
        if arguments.memory:
            add_memory(rows[-1], config)
            save(steps=rows)
    if arguments.scaling:
        print(as_text(scaling_cells(rows)))
        return 0
    _print_steps(rows)
    imports = import_seconds(min(5, arguments.repeats))
    more = imports["jax_optax_scl_jax"] - imports["jax_optax"]
    print(f"\nimport jax, optax: {imports['jax_optax']:.2f} s; scl_jax: {more:+.2f} s")
    host = dispatch_times(steps=40 * arguments.repeats)
    print(
        f"\none call of a step, {LAYERS} layers: {host['dense_us']:.0f} us for "
        f"{host['arrays'][0]} arrays; SCL {host['ratio']:.2f} times that for "
        f"{host['arrays'][1]}, to a budget {host['budget_ratio']:.2f}"
    )
    save(dispatch=host, import_seconds=imports)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
