"""The training loop: one jitted scan over an epoch, the same for every method."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

import scl_jax
from experiments.config import Config
from experiments.data import IMAGE_SHAPE, PIXELS, Dataset, Split
from experiments.methods import METHODS, Method
from experiments.models import MODELS

PyTree = Any


class TrainingError(RuntimeError):
    """A training that cannot go on; the message says where and why."""


class TrainState(NamedTuple):
    """What an epoch takes and returns; its buffers are donated."""

    trained: PyTree  # what the method trains: weights, mask variables
    opt_state: PyTree
    key: jax.Array  # orders the examples of the epochs to come


class Metrics(NamedTuple):
    """What one epoch came to."""

    method: str
    seed: int
    epoch: int  # from 1
    loss: float  # mean over the epoch, without the penalty, nats
    train_accuracy: float  # running, over the epoch, 0..1
    validation_accuracy: float | None  # None without a validation split
    nnz: int  # nonzero kernel weights after the epoch
    sparsity: float  # of the kernels, 0..1
    seconds: float  # the epoch's training alone


class Trained(NamedTuple):
    """What a training leaves."""

    seed: int
    trained: PyTree
    folded: PyTree  # plain parameters
    history: list[Metrics]


def train(
    config: Config,
    data: Dataset,
    method: str,
    *,
    seeds: Sequence[int] | None = None,
    on_epoch: Callable[[Metrics], None] = lambda metrics: None,
) -> Iterator[Trained]:
    """Train a network once per seed, one after the other, with one compilation.

    Two methods with the same seed start from the same weights and see the
    examples in the same order. A seed repeats bit for bit on the same machine.

    Args:
      config: the experiment.
      data: what `experiments.data.load` gives; the test split is not touched.
      method: a name in `experiments.methods.METHODS`.
      seeds: the seeds; those of the config by default.
      on_epoch: called after each epoch.

    Yields:
      A `Trained` per seed, as each is done.

    Raises:
      ValueError: if the training split is smaller than one batch.
      TrainingError: if the loss is no longer finite.
    """
    examples = len(data.train.labels)
    if examples < config.batch_size:
        raise ValueError(
            f"batch_size must be at most the number of training examples, {examples}; "
            f"got {config.batch_size}"
        )
    steps = config.epochs * (examples // config.batch_size)
    network = make_network(config)
    way = METHODS[method](config, steps)
    run_epoch = make_epoch(network, way, config.batch_size)
    fold = jax.jit(way.fold)
    split = jax.tree.map(jnp.asarray, data.train)

    for seed in config_seeds(config) if seeds is None else seeds:
        state = initial_state(network, way, seed)
        history = []
        for epoch in range(1, config.epochs + 1):
            start = time.perf_counter()
            state, (loss, accuracy) = run_epoch(state, split)
            wait_until_ready(loss)
            seconds = time.perf_counter() - start
            folded = fold(state.trained)
            nnz, weights = kernel_counts(folded)
            held_out = len(data.validation.labels) > 0
            metrics = Metrics(
                method=way.name,
                seed=seed,
                epoch=epoch,
                loss=float(loss),
                train_accuracy=float(accuracy),
                validation_accuracy=(
                    evaluate(network, folded, data.validation) if held_out else None
                ),
                nnz=nnz,
                sparsity=1 - nnz / weights,
                seconds=seconds,
            )
            history.append(metrics)
            on_epoch(metrics)
            if not np.isfinite(metrics.loss):
                raise TrainingError(
                    f"the loss of {way.name}, seed {seed}, is {metrics.loss} in epoch "
                    f"{epoch}: the learning rate {config.learning_rate:g} or the mask "
                    f"learning rate {config.mask_learning_rate:g} is too high"
                )
        # No loss is computed after the last step: only the parameters show it.
        if not all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.trained)):
            raise TrainingError(
                f"the parameters of {way.name}, seed {seed}, are not finite after the "
                "last step"
            )
        yield Trained(seed, state.trained, folded, history)


def config_seeds(config: Config) -> range:
    """Return the seeds of a config."""
    return range(config.seed, config.seed + config.seeds)


class Network(NamedTuple):
    """A network as two functions."""

    init: Callable[[jax.Array], PyTree]  # key -> parameters
    apply: Callable[[PyTree, jax.Array], jax.Array]  # uint8 images -> logits


@functools.cache
def make_network(config: Config) -> Network:
    """Return the network of a config, from bytes to logits; equal ones are shared."""
    model = MODELS[config.model]()

    standardized = config.pixels == "standardized"
    mean, deviation = PIXELS[config.dataset] if standardized else (0.0, 1.0)

    def as_input(images):
        return (images.astype(jnp.float32) / 255 - mean) / deviation

    def init(key):
        images = jnp.zeros((1, *IMAGE_SHAPE), jnp.uint8)
        return model.init(key, as_input(images))["params"]

    def apply(params, images) -> Any:
        return model.apply({"params": params}, as_input(images))

    return Network(init, apply)


def initial_state(network: Network, method: Method, seed: int) -> TrainState:
    """Initialize network, method and optimizer from one seed."""
    init_key, order_key = jax.random.split(jax.random.key(seed))
    trained = method.wrap(network.init(init_key))
    return TrainState(trained, method.tx.init(trained), order_key)


def make_epoch(
    network: Network, method: Method, batch_size: int
) -> Callable[[TrainState, Split], tuple[TrainState, tuple[jax.Array, jax.Array]]]:
    """Return the function that trains one epoch: one jitted scan over its steps.

    Returns:
      A function (state, split) -> (state, (mean loss, accuracy)). The split's
      images are uint8 on the device; a last batch that is not full is left out.
      The state's buffers are donated.
    """

    def loss_fn(trained, images, labels):
        params = method.effective(trained)
        logits = network.apply(params, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        loss = losses.mean()
        correct = (logits.argmax(-1) == labels).mean()
        return loss + method.penalty(trained), (loss, correct)

    def step(carry, split, indices):
        trained, opt_state = carry
        batch = split.images[indices], split.labels[indices]
        gradient, seen = jax.grad(loss_fn, has_aux=True)(trained, *batch)
        updates, opt_state = method.tx.update(gradient, opt_state, trained)
        return (optax.apply_updates(trained, updates), opt_state), seen

    def scan(carry, split, order):
        return jax.lax.scan(lambda c, indices: step(c, split, indices), carry, order)

    def dispatch_steps(carry, split, order):
        seen = []
        for indices in order:
            carry, step_seen = jitted_step(carry, split, indices)
            seen.append(step_seen)
        return carry, jax.tree.map(lambda *xs: jnp.stack(xs), *seen)

    jitted_step = jax.jit(step, donate_argnums=0)
    run_steps = (
        dispatch_steps if slow_in_scan(network) else jax.jit(scan, donate_argnums=0)
    )

    def epoch(state: TrainState, split: Split):
        key, order = shuffle(state.key, len(split.labels), batch_size)
        carry, seen = run_steps((state.trained, state.opt_state), split, order)
        loss, accuracy = jax.tree.map(jnp.mean, seen)
        trained, opt_state = carry
        return TrainState(trained, opt_state, key), (loss, accuracy)

    return epoch


@functools.partial(jax.jit, static_argnums=(1, 2))
def shuffle(
    key: jax.Array, examples: int, batch_size: int
) -> tuple[jax.Array, jax.Array]:
    """Return the next key and an epoch's order, indices of shape (steps, batch)."""
    key, order_key = jax.random.split(key)
    order = jax.random.permutation(order_key, examples)
    steps = examples // batch_size
    return key, order[: steps * batch_size].reshape(steps, batch_size)


def slow_in_scan(network: Network) -> bool:
    """Tell whether a network is better dispatched step by step than scanned.

    XLA's CPU backend computes the gradients of convolutions several times more
    slowly in the body of a loop, LeNet-5's about six times (JAX issue 12868).
    """
    if jax.default_backend() != "cpu":
        return False
    params = jax.eval_shape(network.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, *IMAGE_SHAPE), jnp.uint8)
    return "conv_general_dilated" in str(jax.make_jaxpr(network.apply)(params, images))


def evaluate(network: Network, params: PyTree, split: Split) -> float:
    """Return the accuracy, 0..1, of plain parameters on a split."""
    correct = _correct(network, params, jax.tree.map(jnp.asarray, split))
    wait_until_ready(correct)
    return int(correct) / len(split.labels)


@functools.partial(jax.jit, static_argnums=0)
def _correct(network: Network, params: PyTree, split: Split) -> jax.Array:
    """Count the examples classified correctly."""

    def one(example):
        image, label = example
        return network.apply(params, image[None])[0].argmax(-1) == label

    return jnp.sum(jax.lax.map(one, tuple(split), batch_size=1000))


def kernel_counts(params: PyTree) -> tuple[int, int]:
    """Return how many kernel weights are nonzero, and how many there are."""
    leaves: dict[str, Any] = flatten_dict(params, sep="/")
    chosen = [leaf for path, leaf in leaves.items() if scl_jax.kernels(path, leaf)]
    return (
        sum(int(jnp.count_nonzero(leaf)) for leaf in chosen),
        sum(leaf.size for leaf in chosen),
    )


def wait_until_ready(x: Any) -> None:
    """Wait for a result, and hear Ctrl-C meanwhile.

    Blocking in the runtime would hold the interrupt back until the end of the
    epoch.
    """
    while not x.is_ready():
        time.sleep(0.005)
