"""Problems so small that every mask can be tried: where does an estimator end?

A linear layer with one output and fixed weights, of which only the mask is learned:

    J(m) = mean over examples of (x . (w * m) - y)**2  +  penalty * sum(m)

With n connections there are 2**n masks, so the best one is known, and a training of
mask variables can be measured against it. Columns of x share a common factor: what a
connection is worth then depends on which others there are, and a mask that was right
to cut can become right to keep. The weights are not trained: what is compared is the
way of the masks alone, and the optimum stays what was enumerated.

Weights and the coefficients behind y are drawn independently: for about half of the
connections the sign is wrong, and the best mask is not "all". The design is our choice.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import scl_jax
from scl_jax import MaskedParams

STE = Callable[[jax.Array], jax.Array]

_MOST_CONNECTIONS = 16  # 65,536 masks a problem


class Problems(NamedTuple):
    """P problems of N examples and n connections, float32."""

    inputs: jax.Array  # shape (P, N, n)
    weights: jax.Array  # shape (P, n); fixed
    targets: jax.Array  # shape (P, N)
    penalty: float  # loss per connection


def make_problems(
    seed: int,
    count: int,
    *,
    connections: int = 12,
    examples: int = 32,
    correlation: float = 0.3,
    penalty: float = 0.1,
) -> Problems:
    """Draw random problems.

    Inputs, weights and the coefficients behind the targets have mean 0 and variance 1.

    Args:
      seed: of the random numbers.
      count: how many problems.
      connections: of each problem, 1 to 16.
      examples: of each problem.
      correlation: between any two columns of the inputs, in [0, 1).
      penalty: loss per connection, not negative.

    Returns:
      `Problems`.

    Raises:
      ValueError: if a number is out of its range.

    Example:
      >>> make_problems(0, 5, connections=3).inputs.shape
      (5, 32, 3)
    """
    if not 1 <= connections <= _MOST_CONNECTIONS:
        raise ValueError(
            f"make_problems: connections must be in 1 to {_MOST_CONNECTIONS}, so that "
            f"all masks can be tried; got {connections}"
        )
    if count < 1 or examples < 1 or not 0 <= correlation < 1 or penalty < 0:
        raise ValueError(
            "make_problems: count and examples must be positive, correlation in "
            f"[0, 1) and penalty not negative; got count={count}, "
            f"examples={examples}, correlation={correlation}, penalty={penalty}"
        )
    keys = jax.random.split(jax.random.key(seed), 3)
    own = jax.random.normal(keys[0], (count, examples, connections))
    common = jax.random.normal(keys[1], (count, examples, 1))
    inputs = (1 - correlation) ** 0.5 * own + correlation**0.5 * common
    weights, coefficients = jax.random.normal(keys[2], (2, count, connections))
    targets = jnp.einsum("pen,pn->pe", inputs, coefficients)
    return Problems(inputs, weights, targets, penalty)


@jax.jit
def enumerate_masks(problems: Problems) -> jax.Array:
    """Compute the loss of every mask.

    Args:
      problems: P problems of n connections.

    Returns:
      Losses, shape (P, 2**n), float32. Entry k belongs to the mask whose connection i
      is bit i of k, counted from the lowest: `mask_numbers` finds it.

    Example:
      >>> problems = Problems(jnp.eye(2)[None], jnp.ones((1, 2)),
      ...                     jnp.array([[2.0, 0.0]]), penalty=0.25)
      >>> enumerate_masks(problems).tolist()  # none, the first, the second, both
      [[2.0, 0.75, 2.75, 1.5]]
    """
    bits = _bits(problems.weights)
    numbers = jnp.arange(2 ** len(bits))
    masks = (numbers[:, None] & bits[None] > 0).astype(jnp.float32)

    def losses(problem):
        inputs, weights, targets = problem
        outputs = jnp.matmul(inputs * weights[None], masks.T, precision="highest")
        error = jnp.mean(jnp.square(outputs - targets[:, None]), axis=0)
        return error + problems.penalty * masks.sum(axis=1)

    # A problem at a time: the outputs of all of them would not fit into memory.
    return jax.lax.map(losses, (problems.inputs, problems.weights, problems.targets))


def train_masks(
    problems: Problems,
    ste: STE,
    start: jax.Array,
    *,
    steps: int = 1000,
    learning_rate: float = 0.03,
    norm: str = "rms",
    decay: float = 0.9,
) -> jax.Array:
    """Train the mask variables of every problem, as a trainer with `scl_jax` does.

    Gradient descent on J through `scl_jax.apply_masks` and `connection_count`, then
    `normalize_by_feature`. The penalty is in the loss (coupled). The learning rate
    falls to 0 along a cosine, so that masks come to rest; there is no momentum, so
    that every step shows what its gradient says.

    Args:
      problems: P problems of n connections.
      ste: the straight-through estimator: a hashable callable.
      start: start values of the mask variables, shape (P, n).
      steps: the number of steps.
      learning_rate: the first one. With the norm "rms" it is the rms length of a
        step, in units of the mask variables.
      norm: of the mask gradients, as in `normalize_by_feature`; "none" for none.
      decay: of the norm's running mean, likewise.

    Returns:
      The mask variables before every step and after the last, shape
      (P, steps + 1, n), float32.

    Raises:
      ValueError: if the shape of the start does not fit, steps or learning rate are
        not positive, the norm is unknown, or the decay not in [0, 1).
      TypeError: if `ste` is not a hashable callable.

    Example:
      >>> problems = make_problems(0, 5, connections=3)
      >>> start = jnp.full((5, 3), 0.1)
      >>> train_masks(problems, scl_jax.identity, start, steps=20).shape
      (5, 21, 3)
    """
    start = jnp.asarray(start, jnp.float32)
    if start.shape != problems.weights.shape:
        raise ValueError(
            "train_masks: start must have a value per problem and connection, shape "
            f"{problems.weights.shape}; got shape {start.shape}"
        )
    if steps < 1 or not learning_rate > 0:
        raise ValueError(
            "train_masks: steps and learning_rate must be positive; "
            f"got steps={steps}, learning_rate={learning_rate}"
        )
    scl_jax.unit_step(jnp.zeros(1), ste)  # raises here, not while it is compiled
    return _train(problems, start, ste, steps, learning_rate, norm, decay)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _train(problems, start, ste, steps, learning_rate, norm, decay):
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    normalize = scl_jax.normalize_by_feature(norm=norm, decay=decay)
    tx = optax.chain(normalize, optax.sgd(schedule))

    def loss_fn(masks, inputs, weights, targets):
        masked = MaskedParams(weights[:, None], masks)
        kernel = scl_jax.apply_masks(masked, ste=ste)
        outputs = jnp.matmul(inputs, kernel, precision="highest")[:, 0]
        error = jnp.mean(jnp.square(outputs - targets))
        return error + problems.penalty * scl_jax.connection_count(masked, ste=ste)

    def train(inputs, weights, targets, start):
        def step(carry, _):
            masks, opt_state = carry
            gradient = jax.grad(loss_fn)(masks, inputs, weights, targets)
            updates, opt_state = tx.update(gradient, opt_state)
            return (masks + updates, opt_state), masks[:, 0]

        masks = start[:, None]  # one feature, the output
        (last, _), before = jax.lax.scan(step, (masks, tx.init(masks)), length=steps)
        return jnp.concatenate([before, last.T])

    inputs, weights, targets, _ = problems
    return jax.vmap(train)(inputs, weights, targets, start)


def mask_numbers(variables: jax.Array) -> jax.Array:
    """Return which of the enumerated masks mask variables stand for.

    Args:
      variables: mask variables, shape (..., n).

    Returns:
      The index into the last axis of `enumerate_masks`, shape (...), int32.

    Example:
      >>> mask_numbers(jnp.array([[-0.1, 0.0], [3.0, 0.1]])).tolist()
      [2, 3]
    """
    connected = scl_jax.unit_step(variables).astype(jnp.int32)
    return connected @ _bits(variables)


def gap_to_optimum(losses: jax.Array, variables: jax.Array) -> jax.Array:
    """Return by how much a mask's loss is above the best, relative to the best.

    Both losses are looked up in the same table, so that the gap of the best mask is
    exactly 0. The best loss is the error that no mask removes, and the connections
    that it pays for: never 0 here. Divided by what there is to gain, as from all
    connected to the best, gaps would look smaller.

    Args:
      losses: what `enumerate_masks` returns, shape (P, 2**n).
      variables: mask variables, shape (P, ..., n).

    Returns:
      (J - best) / best, shape (P, ...).

    Raises:
      ValueError: if the shapes do not fit.

    Example:
      >>> losses = jnp.array([[2.0, 0.75, 2.75, 1.5]])
      >>> gap_to_optimum(losses, jnp.array([[[0.1, -0.1], [0.1, 0.1]]])).tolist()
      [[0.0, 1.0]]
    """
    _check_fit("gap_to_optimum", losses, variables)
    numbers = mask_numbers(variables)
    flat = numbers.reshape(len(losses), -1)
    ends = jnp.take_along_axis(losses, flat, axis=1).reshape(numbers.shape)
    best = losses.min(axis=1).reshape(-1, *[1] * (numbers.ndim - 1))
    return (ends - best) / best


def stuck(losses: jax.Array, variables: jax.Array, ste: STE) -> jax.Array:
    """Tell which masks ought to flip, and have a proxy gradient that forbids it.

    Args:
      losses: what `enumerate_masks` returns, shape (P, 2**n).
      variables: mask variables where they rest, shape (P, n).
      ste: the estimator they were trained with.

    Returns:
      bool, shape (P, n): flipping this mask alone would lower the loss, and
      p(s) <= 0, so that its mask variable rests, or moves away. Never true of an
      estimator with a positive proxy gradient.

    Raises:
      ValueError: if the shapes do not fit.

    Example:
      >>> losses = jnp.array([[2.0, 0.75, 2.75, 1.5]])
      >>> cut = jnp.array([[-0.1, -0.1]])
      >>> stuck(losses, cut, scl_jax.ReLU()).tolist()
      [[True, False]]
      >>> stuck(losses, cut, scl_jax.identity).tolist()
      [[False, False]]
    """
    _check_fit("stuck", losses, variables)
    numbers = mask_numbers(variables)[:, None]
    flipped = numbers ^ _bits(variables)[None]
    here = jnp.take_along_axis(losses, numbers, axis=1)
    better = jnp.take_along_axis(losses, flipped, axis=1) < here
    return better & (ste(variables) <= 0)


def _bits(variables: jax.Array) -> jax.Array:
    """Return what each connection adds to the number of a mask, shape (n,)."""
    return 1 << jnp.arange(variables.shape[-1])


def _check_fit(caller: str, losses: jax.Array, variables: jax.Array) -> None:
    expected = (variables.shape[0], 2 ** variables.shape[-1])
    if variables.ndim < 2 or losses.shape != expected:
        raise ValueError(
            f"{caller}: losses must have the shape (P, 2**n) of mask variables of "
            f"shape (P, ..., n); got {losses.shape} and {variables.shape}"
        )
