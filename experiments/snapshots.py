"""A training looked at on its way: the network after some of its epochs.

`experiments.train` keeps what a training comes to. This is for a look at what leads
there: the same steps, and a copy of the network at each epoch that is asked for.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.config import Config
from experiments.data import Dataset
from experiments.feed import make_feed, next_key
from experiments.mesh import make_mesh
from experiments.methods import METHODS
from experiments.network import make_network
from experiments.step import Objective, make_initial, make_training

PyTree = Any


class Snapshot(NamedTuple):
    """A network on its way, as NumPy arrays.

    Attributes:
      epoch: epochs that it has been trained for; 0 is the start.
      trained: what the method trains: for SCL a `scl_jax.MaskedParams`.
      statistics: of normalization layers, {} where there are none.
    """

    epoch: int
    trained: PyTree
    statistics: PyTree


def snapshots(
    config: Config, data: Dataset, method: str, epochs: Sequence[int], *, seed: int = 0
) -> Iterator[Snapshot]:
    """Train a network, and yield what it is after some of its epochs.

    The schedules are those of the whole training, `config.epochs`, and the steps are
    those of `experiments.train.train`, bit for bit; it ends with the last epoch asked
    for. Nothing is evaluated, and no checkpoint is written.

    Args:
      config: the experiment.
      data: what `experiments.data.load` gives.
      method: a name in `experiments.methods.METHODS`.
      epochs: after which to look, increasing, from 0 (the start) to `config.epochs`.
      seed: the seed.

    Yields:
      A `Snapshot` per epoch asked for, as each is reached.

    Raises:
      ValueError: if the epochs do not increase, or are not in the training.
    """
    inside = all(0 <= epoch <= config.epochs for epoch in epochs)
    if not inside or list(epochs) != sorted(set(epochs)):
        raise ValueError(
            "snapshots: epochs must increase, and be from 0 to those of the training, "
            f"{config.epochs}; got {list(epochs)}"
        )
    mesh = make_mesh(config.devices, config.model_parallel)
    feed = make_feed(config, data.train, mesh)
    way = METHODS[method](config, config.epochs * feed.steps)
    objective = Objective(make_network(config), way, config.label_smoothing)
    initial, _ = make_initial(objective, mesh)
    run = make_training(objective, feed, mesh)

    init_key, order_key = jax.random.split(jax.random.key(seed))
    state, key = initial(init_key), jax.random.key_data(order_key)
    done = 0
    for epoch in epochs:
        while done < epoch:
            items = feed.items(seed, key, done, 0, feed.steps)
            state, _ = run(state, items, done * feed.steps)
            key, done = next_key(key), done + 1
        # Copies: the next step takes the state's buffers.
        yield Snapshot(
            epoch, *jax.tree.map(np.array, (state.trained, state.statistics))
        )
