"""What a training step of SCL costs beside the dense one: time, memory, and the floor.

All that is compared is compiled first and timed in turns, so that whatever else the
machine does falls on all. The floor is the bytes that a step of SCL must move beyond
those of a dense step: the product reads S; the norms read W and its gradient, in the
dtype it was computed in; the update reads and writes S and its momentum, and finds W
and its gradient where the update of W has them. With masks at rest the network is that
of the weights as they are; what is left is to tell which weights are pruned: a read of
S, or of the byte that the compiler keeps of it in a loop.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import scl_jax
from experiments.config import Config
from experiments.data import ABOUT, Split
from experiments.feed import each, make_feed
from experiments.layouts import compile_laid_out
from experiments.mesh import make_mesh
from experiments.methods import METHODS
from experiments.network import make_network
from experiments.step import Objective, make_initial, make_run

# What is timed beside dense: SCL with a fixed penalty, to a budget, with masks at rest.
KINDS = ("scl", "budget", "frozen")


def compare(
    config: Config,
    steps: int,
    repeats: int,
    methods: Sequence[str] = (),
    kinds: Sequence[str] = KINDS,
) -> dict[str, Any]:
    """Compare training steps of SCL, and of other methods, with the dense one.

    Args:
      config: the network, its batch, its precision, the dtype and momentum of masks.
      steps: steps of an epoch; each epoch is timed as one.
      repeats: epochs of each, in turns.
      methods: those that are timed, too, at the budget's sparsity.
      kinds: those of `KINDS` that are timed: each is compiled, which of a large
        network takes minutes.

    Returns:
      The row of a table. Of each of `timed`: the median step in microseconds (`us`),
      the median of the ratios to the dense step of the same repeat (`ratio`) and their
      least and largest (`spread`). Bytes that SCL must move (`floor_bytes`) and those
      of its mask state (`mask_bytes`).
    """
    split = random_examples(config, steps)
    asked = {name: setting(config, name) for name in ("dense", *kinds, *methods)}
    timers = [epoch_timer(*one, split) for one in asked.values()]
    times = [[timer() for timer in timers] for _ in range(repeats)]
    timed = {}
    for name, column in zip(asked, zip(*times, strict=True), strict=True):
        ratios = sorted(own / row[0] for own, row in zip(column, times, strict=True))
        timed[name] = {
            "us": 1e6 * statistics.median(column) / steps,
            "ratio": statistics.median(ratios),
            "spread": [ratios[0], ratios[-1]],
        }
    params, _ = jax.eval_shape(make_network(config).init, jax.random.key(0))
    masks = jax.eval_shape(scl_jax.mask_params, params).masks
    weights = sum(mask.size for mask in jax.tree.leaves(masks))
    return {
        "network": config.model,
        "batch": config.batch_size,
        "side": ABOUT[config.dataset].shape[0],
        "compute": config.compute,
        "mask_dtype": config.mask_dtype,
        "mask_momentum": config.mask_momentum,
        "timed": timed,
        "weights": weights,
        "floor_bytes": weights * floor_bytes(config),
        "mask_bytes": weights * mask_bytes(config),
        "repeats": repeats,
    }


def add_memory(row: dict[str, Any], config: Config) -> None:
    """Add the peak of a step's memory (`bytes`) to what `compare` has timed.

    That is a compilation more of each, which of a large network takes minutes.
    """
    split = random_examples(config, 1)
    for name, one in row["timed"].items():
        one["bytes"] = step_bytes(*setting(config, name), split)


def allowed_bytes(row: dict[str, Any]) -> int:
    """Return the memory that a step of SCL should not exceed, of a row with memory.

    That of the dense step, the mask state, and two bytes a weight.
    """
    return row["timed"]["dense"]["bytes"] + row["mask_bytes"] + 2 * row["weights"]


def mask_bytes(config: Config) -> int:
    """Return the bytes of mask variable and momentum of a weight."""
    return jnp.dtype(config.mask_dtype).itemsize * (2 if config.mask_momentum else 1)


def floor_bytes(config: Config) -> int:
    """Return the bytes that SCL must move for a weight, beyond those of dense."""
    of_mask = jnp.dtype(config.mask_dtype).itemsize
    norms = 4 + jnp.dtype(config.compute).itemsize
    return of_mask + norms + 2 * mask_bytes(config)


def setting(config: Config, name: str) -> tuple[Config, str, bool]:
    """Return the config of what is timed, its method, and whether masks rest."""
    # So many epochs that none of those timed is the last.
    config = dataclasses.replace(config, epochs=1000, sparsity=0.9)
    if name in ("dense", "scl"):
        config = dataclasses.replace(config, sparsity=0.0)
    return config, "scl" if name in KINDS else name, name == "frozen"


def random_examples(config: Config, steps: int) -> Split:
    """Return images for an epoch."""
    random = np.random.default_rng(0)
    examples = steps * config.batch_size
    images = random.integers(0, 256, (examples, *ABOUT[config.dataset].shape), np.uint8)
    # Labels that can be learned: a network that learns nothing prunes itself away.
    labels = images.reshape(examples, -1)[:, :10].argmax(-1)
    return Split(images, labels.astype(np.int32))


def epoch_timer(
    config: Config, method: str, frozen: bool, split: Split
) -> Callable[[], float]:
    """Return a function that trains one more epoch and returns its seconds."""
    mesh = make_mesh(config.devices, config.model_parallel)
    feed = make_feed(config, split, mesh)
    objective = _objective(config, method, frozen, feed.steps)
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


def step_bytes(config: Config, method: str, frozen: bool, split: Split) -> int:
    """Return the most memory that one step has in use, without the data set.

    As the compiler has planned it: arguments, results and what is between them.
    """
    mesh = make_mesh(config.devices, config.model_parallel)
    feed = make_feed(config, split, mesh)
    objective = _objective(config, method, frozen, feed.steps)
    _, template = make_initial(objective, mesh)
    key = jax.random.key_data(jax.random.key(1))
    item = next(each(feed.items(0, key, 0, 0, 1)))
    batch = jax.eval_shape(feed.batch, feed.source, item)
    step = compile_laid_out(objective.step, mesh, template, batch)
    planned: Any = step.memory_analysis()
    return (
        planned.argument_size_in_bytes
        + planned.output_size_in_bytes
        - planned.alias_size_in_bytes
        + planned.temp_size_in_bytes
    )


def scaling(config: Config, steps: int, repeats: int) -> dict[str, Any]:
    """Compare the throughput of all devices with that of one, at the same batch each.

    Returns:
      The row of a table: `devices`, their `batch` together, and for dense and SCL the
      median over the repeats of throughput over that of one device.
    """
    devices = jax.device_count()
    alone = dataclasses.replace(config, devices=1)
    together = dataclasses.replace(
        config, devices=devices, batch_size=devices * config.batch_size
    )
    row: dict[str, Any] = {
        "network": config.model,
        "devices": devices,
        "batch": together.batch_size,
        "compute": config.compute,
        "repeats": repeats,
    }
    for name in ("dense", "scl"):
        timers = [
            epoch_timer(*setting(one, name), random_examples(one, steps))
            for one in (alone, together)
        ]
        times = [[timer() for timer in timers] for _ in range(repeats)]
        row[name] = statistics.median(devices * one / all_ for one, all_ in times)
    return row


def scaling_cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return a header, and a row of cells for each that `scaling` returned."""
    cells = [["network", "devices", "batch", "compute", "dense", "SCL"]]
    cells += [
        [
            row["network"],
            str(row["devices"]),
            str(row["batch"]),
            row["compute"],
            *(f"{row[name]:.2f} times one" for name in ("dense", "scl")),
        ]
        for row in rows
    ]
    return cells


def _objective(config: Config, method: str, frozen: bool, steps: int) -> Objective:
    way = METHODS[method](config, config.epochs * steps)
    objective = Objective(make_network(config), way, config.label_smoothing)
    return objective.frozen() if frozen else objective
