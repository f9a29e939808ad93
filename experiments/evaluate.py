"""The accuracy of plain parameters on a split."""

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.data import Split
from experiments.feed import from_parts
from experiments.mesh import by_example, place
from experiments.network import Network

if TYPE_CHECKING:  # importing it takes seconds, and few need it
    from experiments.imagenet import Stream

PyTree = Any
BATCH = 1000  # examples, about


def evaluate(
    network: Network,
    params: PyTree,
    statistics: PyTree,
    examples: "Split | Stream",
    mesh: Mesh,
) -> float | None:
    """Return the accuracy, 0..1, of images, or of the characters of texts.

    Args:
      network: the network.
      params: plain parameters, folded, on the devices of the mesh.
      statistics: what its normalization layers keep.
      examples: a split, or a stream that ends.
      mesh: the devices that share the work.

    Returns:
      The accuracy; None if there are no examples.
    """
    counts = [
        _count(network, params, statistics, batch) for batch in _batches(examples, mesh)
    ]
    if not counts:
        return None
    correct, predicted = np.sum(jax.device_get(counts), axis=0)
    return int(correct) / int(predicted)


def _batches(examples: "Split | Stream", mesh: Mesh) -> Iterator[Split]:
    """Yield all examples in order; rows that fill the last batch are labelled -1."""
    sharding = by_example(mesh)
    if not isinstance(examples, Split):
        for part in examples.batches():
            yield from_parts(part, sharding)
        return
    parts, count = mesh.shape["data"], len(examples.labels)
    # As few sizes as can be, for each is compiled: a small split is one batch.
    size = -(-max(1, min(BATCH, count)) // parts) * parts
    for start in range(0, count, size):
        batch = Split(*(x[start : start + size] for x in examples))
        missing = size - len(batch.labels)
        labels = np.pad(batch.labels, _after(batch.labels, missing), constant_values=-1)
        inputs = np.pad(batch.inputs, _after(batch.inputs, missing))
        yield place(Split(inputs, labels), sharding)


def _after(array: np.ndarray, rows: int) -> list[tuple[int, int]]:
    return [(0, rows)] + [(0, 0)] * (array.ndim - 1)


@functools.partial(jax.jit, static_argnums=0)
def _count(network: Network, params: PyTree, statistics: PyTree, batch: Split) -> Any:
    """Count the labels predicted correctly, and all labels."""
    guesses = network.apply(params, statistics, batch.inputs).argmax(-1)
    return jnp.sum(guesses == batch.labels), jnp.sum(batch.labels >= 0)
