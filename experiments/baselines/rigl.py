"""The baseline that moves connections to where the gradient is largest: RigL."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import scl_jax
from experiments.baselines.straight_through import straight_through
from experiments.config import Config
from experiments.method import Method, freeze_step, weights_optimizer
from scl_jax import MaskedParams
from scl_jax._paths import is_none, leaf_path

PyTree = Any


def rigl(config: Config, steps: int) -> Method:
    """Train a fixed number of connections, and move the smallest at intervals.

    From Evci, Gale, Menick, Castro & Elsen, "Rigging the lottery: making all tickets
    winners", ICML 2020 (arXiv 1911.11134), algorithm 1: random masks at the start, as
    many connections per layer as `erk` says. At steps t = 0, prune_every, ..., before
    `end = config.freeze_at * steps`, each layer drops the fraction
    `drop_fraction / 2 * (1 + cos(pi t / end))`, rounded down to whole connections, of
    its connections with the smallest |w|, and grows as many where the gradient of the
    loss, dense, is largest among those that are not connected then. As in the authors'
    code, grown weights and their momentum start at 0, and a connection that is dropped
    and grown in one step keeps both.

    Differs in that weights take their step in a step that moves connections, too, so
    that the learning rate is that of every method, and in that every kernel keeps one
    connection. Pruned weights are 0, and no decay or momentum moves them.
    """
    weights_tx = weights_optimizer(config, steps)
    end = freeze_step(config, steps)

    def wrap(params):
        masked = _random_masks(params, 1 - config.sparsity)
        return masked._replace(weights=scl_jax.fold_masks(masked))

    def init(params: Any):
        return _State(jnp.zeros((), jnp.int32), weights_tx.init(params.weights))

    def update(updates: Any, state: Any, params: Any = None):
        t, gradient = state.taken, updates.weights
        fraction = config.drop_fraction / 2 * (1 + jnp.cos(jnp.pi * t / max(1, end)))
        masks = jax.lax.cond(
            (t < end) & (t % config.prune_every == 0),
            lambda: _moved(params.masks, params.weights, gradient, fraction),
            lambda: params.masks,
        )
        stays = jax.tree.map(_stays, params.masks, masks, is_leaf=is_none)

        def rest(x, stay):
            return jnp.where(stay, x, jnp.zeros_like(x))

        # What does not stay is 0 for the optimizer: weight, gradient and momentum.
        weights, gradient = (
            jax.tree.map(rest, tree, stays) for tree in (params.weights, gradient)
        )
        inner = optax.tree_utils.tree_map_params(weights_tx, rest, state.weights, stays)
        moves, inner = weights_tx.update(gradient, inner, weights)
        moves = jax.tree.map(
            lambda move, new, old: move + (new - old), moves, weights, params.weights
        )
        # Between 1 and -1 the difference and its sum are exact.
        turns = jax.tree.map(jnp.subtract, masks, params.masks)
        return MaskedParams(moves, turns), _State(t + 1, inner)

    return Method(
        name="rigl",
        wrap=wrap,
        effective=straight_through,
        penalty=lambda masked: jnp.zeros(()),
        fold=scl_jax.fold_masks,
        tx=optax.GradientTransformation(init, update),
    )


def erk(shapes: dict[str, tuple[int, ...]], density: float) -> dict[str, int]:
    """Return the connections of each layer, small layers denser than large ones.

    The Erdos-Renyi-Kernel distribution of Evci et al.: the density of a layer is in
    proportion to the sum of its dimensions, divided by their product. Layers that
    would have more than all connections are dense, and the others get the rest.

    Args:
      shapes: of the kernels, by name.
      density: the fraction of all connections that there are to be, 0..1.

    Returns:
      The connections by name, at least 1 each; they add up to `density` of all to
      within one a layer.

    Example:
      >>> erk({"small": (2, 3), "wide": (10, 10), "tall": (40, 5)}, 0.5)
      {'small': 6, 'wide': 45, 'tall': 102}
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    left = round(density * sum(sizes.values()))
    free = dict(shapes)
    while True:
        # In integers, so that of what fits exactly nothing is taken for too much.
        dimensions = sum(sum(shape) for shape in free.values())
        full = [n for n in free if left * sum(free[n]) > sizes[n] * dimensions]
        if not full:
            break
        for name in full:
            del free[name]
            left -= sizes[name]
    shared = {
        name: max(1, round(left * sum(shape) / dimensions))
        for name, shape in free.items()
    }
    return {**sizes, **shared}


class _State(NamedTuple):
    taken: jax.Array  # int32, steps
    weights: optax.OptState


def _random_masks(params: PyTree, density: float) -> MaskedParams:
    """Connect weights at random, as many per kernel as `erk` says."""
    kernels = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = leaf_path(key_path)
        if scl_jax.kernels(path, leaf):
            kernels[path] = leaf
    counts = erk({path: leaf.shape for path, leaf in kernels.items()}, density)
    # Parameters are all that is known of the seed, and two seeds are to have different
    # masks. Signs, since the last bits of a weight may be the machine's.
    signs = next(iter(kernels.values())).ravel()[:32] > 0
    places = jnp.arange(signs.size, dtype=jnp.uint32)
    key = jax.random.key(jnp.sum(signs.astype(jnp.uint32) << places))
    paths = list(counts)

    def initial(path, leaf):
        own = jax.random.fold_in(key, paths.index(path))
        return _signs(_lowest(jax.random.uniform(own, leaf.shape), counts[path]), leaf)

    return scl_jax.mask_params(params, initial=initial)


def _moved(
    masks: PyTree, weights: PyTree, gradient: PyTree, fraction: jax.Array
) -> PyTree:
    """Return the masks with a fraction of each layer's connections elsewhere."""

    def move(s, weight, g):
        if s is None:
            return None
        connected = s >= 0
        total = jnp.sum(connected, dtype=jnp.int32)
        number = (fraction * total).astype(jnp.int32)
        magnitude = jnp.where(connected, jnp.abs(weight), jnp.inf)
        left = connected & ~_lowest(magnitude, number)
        grown = _lowest(jnp.where(left, jnp.inf, -jnp.abs(g)), number)
        return _signs(left | grown, s)

    return jax.tree.map(move, masks, weights, gradient, is_leaf=is_none)


def _lowest(x: jax.Array, number: int | jax.Array) -> jax.Array:
    """Mark as many of the lowest numbers, the first of equal ones."""
    ranks = jnp.argsort(jnp.argsort(x.ravel()))
    return (ranks < number).reshape(x.shape)


def _signs(connected: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.where(connected, 1, -1).astype(like.dtype)


def _stays(old: jax.Array | None, new: jax.Array | None) -> jax.Array:
    """Mark what was connected and still is; of what is not masked, all."""
    if old is None or new is None:
        return jnp.array(True)
    return (old >= 0) & (new >= 0)
