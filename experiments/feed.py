"""How examples come into the training: from the device's memory, or from a stream.

A feed says how many steps an epoch has, and gives an *item* for each: what the step
needs to make its batch. For data that stay on the devices, that is a row of indices
and a key; for a stream it is the batch itself.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import jax
from jax.sharding import Mesh

from experiments.augment import crop_and_flip
from experiments.config import Config
from experiments.data import Split
from experiments.mesh import by_example, check_batch, place, replicated

if TYPE_CHECKING:  # importing it takes seconds, and few need it
    from experiments.imagenet import Stream


class Feed(Protocol):
    """What the training loop needs of the data.

    Attributes:
      steps: full batches in an epoch; what is left of it is not used.
      source: arrays on the devices, given to every step.
    """

    steps: int
    source: Any

    def items(self, seed: int, key: Any, epoch: int, start: int, stop: int) -> Iterable:
        """Return the items of the steps start..stop of an epoch, counted from 0.

        They depend on the arguments alone: a resumed run goes on where the killed
        one was. An array, or a tuple of arrays, with one row a step can be scanned.
        """
        ...

    def batch(self, source: Any, item: Any) -> Split:
        """Make a batch, inside the traced step, sharded by example."""
        ...

    def sample(self) -> jax.Array:
        """Return a few inputs that differ."""
        ...


def make_feed(config: Config, examples: "Split | Stream", mesh: Mesh) -> Feed:
    """Return the feed of a training split.

    Raises:
      ValueError: if the split is smaller than a batch, or the devices that split a
        batch do not divide it.
    """
    if isinstance(examples, Split):
        return Resident(examples, config, mesh)
    return Streamed(examples, config, mesh)


def each(items: Any) -> Iterator[Any]:
    """Iterate over items, also where they are the rows of arrays."""
    return zip(*items, strict=True) if isinstance(items, tuple) else iter(items)


class Resident:
    """Examples that stay on every device, as bytes."""

    def __init__(self, split: Split, config: Config, mesh: Mesh):
        check_batch(mesh, config.batch_size)
        self._examples, self._config = len(split.labels), config
        self._sharding = by_example(mesh)
        self._replicated = replicated(mesh)
        if self._examples < config.batch_size:
            raise ValueError(
                "batch_size must be at most the number of training examples, "
                f"{self._examples}; got {config.batch_size}"
            )
        self.steps = self._examples // config.batch_size
        self.source = place(split, self._replicated)

    def items(self, seed: int, key: Any, epoch: int, start: int, stop: int) -> Any:
        """Return the rows of `shuffle` that belong to the steps."""
        del seed, epoch  # the key is that of both
        rows = shuffle(key, self._examples, self._config.batch_size)
        return place(jax.tree.map(lambda x: x[start:stop], rows), self._replicated)

    def batch(self, source: Split, item: Any) -> Split:
        """Gather the examples of the indices, and augment them."""
        indices, key = item
        batch = Split(source.inputs[indices], source.labels[indices])
        batch = jax.lax.with_sharding_constraint(batch, self._sharding)
        if self._config.augment == "crop_flip":
            key = jax.random.wrap_key_data(key)
            batch = batch._replace(inputs=crop_and_flip(key, batch.inputs))
        return batch

    def sample(self) -> jax.Array:
        """Return up to 64 inputs from all over the split."""
        return self.source.inputs[:: -(-self._examples // 64)]


@functools.partial(jax.jit, static_argnums=(1, 2))
def shuffle(
    key: jax.Array, examples: int, batch_size: int
) -> tuple[jax.Array, jax.Array]:
    """Return an epoch's order, (steps, batch), and the data of a key for each step.

    The key is given as its data, too; that of the next epoch is `next_key(key)`.
    """
    _, order_key = jax.random.split(jax.random.wrap_key_data(key))
    order = jax.random.permutation(order_key, examples)
    steps = examples // batch_size
    keys = jax.random.split(jax.random.fold_in(order_key, 1), steps)
    order = order[: steps * batch_size].reshape(steps, batch_size)
    return order, jax.random.key_data(keys)


@jax.jit
def next_key(key: jax.Array) -> jax.Array:
    """Return the next epoch's key, as data."""
    return jax.random.key_data(jax.random.split(jax.random.wrap_key_data(key))[0])


class Streamed:
    """Examples that a stream reads from disk, each process its part."""

    source: tuple[()] = ()

    def __init__(self, stream: "Stream", config: Config, mesh: Mesh):
        check_batch(mesh, config.batch_size)
        self._stream, self._sharding = stream, by_example(mesh)
        self.steps = stream.steps
        # Of what is being read: seed, next step, batches.
        self._open: tuple[int, int, Iterator[Split]] | None = None

    def items(
        self, seed: int, key: Any, epoch: int, start: int, stop: int
    ) -> Iterator[Split]:
        """Yield batches; the stream stays open for the steps that follow."""
        del key  # a stream makes its own from the seed
        first, last = epoch * self.steps + start, epoch * self.steps + stop
        if self._open is None or self._open[:2] != (seed, first):
            self._open = (seed, first, self._stream.reseeded(seed).batches(first))
        batches = self._open[2]
        for step in range(first, last):
            part = next(batches)
            self._open = (seed, step + 1, batches)
            yield from_parts(part, self._sharding)

    def batch(self, source: tuple[()], item: Split) -> Split:
        """Return the item."""
        del source
        return item

    def sample(self) -> jax.Array:
        """Return the inputs of the first batch."""
        first = next(iter(self._stream.batches()))
        return from_parts(first, self._sharding).inputs


def from_parts(part: Split, sharding: Any) -> Split:
    """Join this process's rows of a batch with those of the other processes.

    Raises:
      ValueError: if the axis "model" spans processes: their rows would be taken for
        copies of each other.
    """
    count = jax.process_count()

    def join(x):
        # With the shape, JAX checks that the processes have different rows.
        shape = (count * len(x), *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return Split(*map(join, part))
