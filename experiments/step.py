"""The training step, and many of them in one call: the same for every method."""

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from experiments.data import Split
from experiments.feed import Feed, each
from experiments.layouts import laid_out
from experiments.mesh import by_shape
from experiments.method import Method, rested
from experiments.network import Network

PyTree = Any
AHEAD = 8  # steps dispatched before their turn; the batch of each is in memory


class TrainState(NamedTuple):
    """What a step takes and returns; its buffers are donated."""

    trained: PyTree  # what the method trains: weights, mask variables
    statistics: PyTree  # of normalization layers
    opt_state: PyTree


class Seen(NamedTuple):
    """What a step saw of its batch, before its update."""

    loss: jax.Array  # without the penalty, nats
    accuracy: jax.Array  # 0..1


class Objective(NamedTuple):
    """A network, the method that trains it, and the loss.

    Attributes:
      network: the network.
      method: the method.
      label_smoothing: the probability that is given to all classes alike, 0..1.
    """

    network: Network
    method: Method
    label_smoothing: float

    def loss(
        self, trained: PyTree, statistics: PyTree, batch: Split
    ) -> tuple[jax.Array, tuple[PyTree, Seen]]:
        """Return the loss with the penalty; new statistics and what was seen."""
        params = self.method.effective(trained)
        logits, statistics = self.network.train(params, statistics, batch.inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        if self.label_smoothing:
            uniform = -jax.nn.log_softmax(logits).mean(-1)
            losses += self.label_smoothing * (uniform - losses)
        loss = losses.mean()
        accuracy = (logits.argmax(-1) == batch.labels).mean()
        total = loss + self.method.penalty(trained)
        return total, (statistics, Seen(loss, accuracy))

    def frozen(self) -> "Objective":
        """Return the objective of steps in which masks rest, of what is `rested`."""
        method = self.method
        if method.frozen_tx is None:
            return self
        frozen = method._replace(effective=lambda m: m.weights, tx=method.frozen_tx)
        return self._replace(method=frozen)

    def rests(self, step: int, epoch: int) -> bool:
        """Tell whether masks rest in the whole epoch of a step, of `epoch` steps."""
        # Of the epoch: how often it is looked at must not change a training.
        freeze_step = self.method.freeze_step
        return freeze_step is not None and step - step % epoch >= freeze_step

    def step(self, state: TrainState, batch: Split) -> tuple[TrainState, Seen]:
        """Take one step of the optimizer."""
        trained, statistics, opt_state = state
        gradient, (statistics, seen) = jax.grad(self.loss, has_aux=True)(
            trained, statistics, batch
        )
        updates, opt_state = self.method.tx.update(gradient, opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        return TrainState(trained, statistics, opt_state), seen


def make_initial(
    objective: Objective, mesh: Mesh
) -> tuple[Callable[[jax.Array], TrainState], TrainState]:
    """Return the function from a key to the initial state, and the state's shapes.

    Every array is made where it belongs on the mesh; the shapes are
    `jax.ShapeDtypeStruct` with shardings.
    """

    def make(key):
        params, statistics = objective.network.init(key)
        trained = objective.method.wrap(params)
        return TrainState(trained, statistics, objective.method.tx.init(trained))

    shapes = jax.eval_shape(make, jax.random.key(0))
    shardings = by_shape(mesh, shapes)
    initial = jax.jit(make, out_shardings=shardings)
    template = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        *(shapes, shardings),
    )
    return initial, template


Run = Callable[[TrainState, Iterable], tuple[TrainState, Seen]]


def make_run(objective: Objective, feed: Feed, mesh: Mesh) -> Run:
    """Return the function that takes the steps of some items, and waits for them.

    Returns:
      A function (state, items) -> (state, seen), where `items` is what `feed.items`
      gives and the fields of `seen` are NumPy arrays of shape (steps,). One jitted
      scan, or one dispatch a step where items are streamed or scanning is slow. The
      state's buffers are donated.
    """

    def step(state, source, item):
        new, seen = objective.step(state, feed.batch(source, item))
        # So that the next step of a loop finds what this one did.
        return jax.lax.with_sharding_constraint(new, by_shape(mesh, new)), seen

    def scan(state, source, items):
        return jax.lax.scan(lambda s, item: step(s, source, item), state, items)

    one_ready, all_ready = laid_out(step, mesh), laid_out(scan, mesh)
    slow = slow_in_scan(objective.network)

    def run(state, items):
        if isinstance(items, tuple) and not slow:
            take, state = all_ready(state, feed.source, items)
            state, seen = take(state, feed.source, items)
            wait_until_ready(seen.loss)
            return state, jax.device_get(seen)
        take, every = None, []
        for item in each(items):
            if take is None:
                take, state = one_ready(state, feed.source, item)
            state, seen = take(state, feed.source, item)
            every.append(seen)
            if len(every) > AHEAD:
                wait_until_ready(every[-AHEAD].loss)
        wait_until_ready(every[-1].loss)
        return state, jax.tree.map(lambda *xs: np.stack(xs), *jax.device_get(every))

    return run


def make_rest(mesh: Mesh) -> Callable[[TrainState], TrainState]:
    """Return the function that makes a state, whose buffers it takes, ready to rest."""
    ready = laid_out(
        lambda state: (state._replace(trained=rested(state.trained)), None), mesh
    )

    def rest(state):
        take, state = ready(state)
        return take(state)[0]

    return rest


def make_training(
    objective: Objective, feed: Feed, mesh: Mesh
) -> Callable[[TrainState, Iterable, int], tuple[TrainState, Seen]]:
    """Return the function that takes steps, wherever in a training they are.

    Args:
      objective: what is trained.
      feed: the data.
      mesh: the devices.

    Returns:
      A function (state, items, step) -> (state, seen), like that of `make_run`, with
      the number of the first of the steps; all are of one epoch. In those in which
      masks rest no gradient of theirs is computed.
    """
    move = make_run(objective, feed, mesh)
    stay = make_run(objective.frozen(), feed, mesh)
    rest = make_rest(mesh)

    def run(state, items, step):
        if objective.rests(step, feed.steps):
            return stay(rest(state), items)
        return move(state, items)

    return run


def wait_until_ready(x: Any) -> None:
    """Wait for a result, and hear Ctrl-C meanwhile.

    Blocking in the runtime would hold the interrupt back until the end of the scan. As
    often as is looked, so exactly are epochs timed; more often, and a CPU that computes
    is slowed down.
    """
    while not x.is_ready():
        time.sleep(0.002)


def slow_in_scan(network: Network) -> bool:
    """Tell whether a network is better dispatched step by step than scanned.

    XLA's CPU backend computes the gradients of convolutions several times more
    slowly in the body of a loop, LeNet-5's about six times (JAX issue 12868).
    """
    if jax.default_backend() != "cpu":
        return False
    variables = jax.eval_shape(network.init, jax.random.key(0))
    program = jax.make_jaxpr(network.apply)(*variables, network.example)
    return "conv_general_dilated" in str(program)
