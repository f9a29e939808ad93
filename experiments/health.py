"""Whether a training can still come to something: finite numbers, a network that reads.

Nothing of this is in the training step. Where numbers are no longer finite, the steps
before are repeated one by one to find the place; layers are counted between steps.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict

import scl_jax
from experiments.feed import Feed
from experiments.network import Network
from experiments.step import Objective, TrainState

PyTree = Any


@jax.jit
def all_finite(tree: PyTree) -> jax.Array:
    """Tell whether every number of a tree is finite."""
    leaves = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]
    return jnp.array(True) if not leaves else jnp.stack(leaves).all()


def make_examination(
    objective: Objective, feed: Feed
) -> Callable[[TrainState, Any], tuple[TrainState, str | None]]:
    """Return the step that says where it leaves the finite numbers, if it does.

    Returns:
      A function (state, item) -> (new state, place). The state is not donated. The
      place is the first layer whose output is not finite; if all are finite, the loss;
      if that is, too, the gradient that went wrong first, which is that of the last
      layer; if all those are finite, what the update spoiled.
    """
    layers: list[str] = []  # in the order in which they finish; noted in tracing

    def loss(trained, statistics, batch):
        layers.clear()
        finite = []

        def watch(layer, args, kwargs, context):
            out = layer(*args, **kwargs)
            if context.method_name == "__call__":
                layers.append("/".join(context.module.path) or "the network")
                finite.append(all_finite(out))
            return out

        with nn.intercept_methods(watch):
            total, (statistics, seen) = objective.loss(trained, statistics, batch)
        return total, (statistics, seen, finite)

    @jax.jit
    def examine(state, source, item):
        trained, statistics, opt_state = state
        (total, (statistics, _, outputs)), gradient = jax.value_and_grad(
            loss, has_aux=True
        )(trained, statistics, feed.batch(source, item))
        updates, opt_state = objective.method.tx.update(gradient, opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        new = TrainState(trained, statistics, opt_state)
        flags = (outputs, all_finite(total), *map(_flags, (gradient, new)))
        return new, flags

    def depth(name):
        """Return the place among the layers of the one that has a parameter."""
        owners = [layer for layer in layers if f"/{layer}/" in f"/{name}"]
        return layers.index(max(owners, key=len)) if owners else -1

    def run(state, item):
        new, flags = examine(state, feed.source, item)
        outputs, total, gradient, state = jax.device_get(flags)
        broken = [name for name, ok in zip(layers, outputs, strict=True) if not ok]
        if broken:
            return new, f"the output of {broken[0]}"
        if not total:
            return new, "the loss, of finite logits"
        # Backward begins at the last layer: the first place of all is the last here.
        broken = [name for name, ok in gradient.items() if not ok]
        if broken:
            return new, f"the gradient of {max(broken, key=depth)}"
        broken = [name for name, ok in state.items() if not ok]
        return new, f"the update of {broken[0]}" if broken else None

    return run


def _flags(tree: PyTree) -> dict[str, jax.Array]:
    """Tell of each leaf, by its path, whether it is finite."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): jnp.isfinite(x).all()
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


class Layer(NamedTuple):
    """What is left of a kernel."""

    nnz: int  # nonzero weights
    size: int
    features: int


def kernel_counts(params: PyTree) -> dict[str, Layer]:
    """Count the nonzero weights of every kernel of plain parameters, by its path."""
    leaves: dict[str, Any] = flatten_dict(params, sep="/")
    chosen = {path: x for path, x in leaves.items() if scl_jax.kernels(path, x)}
    counts = jax.device_get(_nonzeros(chosen))
    return {
        path: Layer(int(counts[path]), x.size, x.shape[-1])
        for path, x in chosen.items()
    }


@jax.jit
def _nonzeros(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.count_nonzero, leaves)


def collapse(
    network: Network,
    params: PyTree,
    statistics: PyTree,
    inputs: jax.Array,
    counts: dict[str, Layer],
) -> list[str]:
    """Say which layers are about to lose their last connection, and what follows.

    A layer is named when it has a connection left for one in a hundred features, or
    fewer. The network is said not to read its input when all of `inputs` have
    the same logits, up to rounding.

    Args:
      network: the network.
      params: plain parameters, folded.
      statistics: what its normalization layers keep.
      inputs: a few inputs that differ.
      counts: of `params`, as `kernel_counts` returns them.
    """
    found = []
    for path, layer in counts.items():
        if layer.nnz == 0:
            found.append(f"{path} has lost its last connection")
        elif layer.nnz <= max(1, layer.features // 100) < layer.size:
            left = "connection is" if layer.nnz == 1 else "connections are"
            found.append(f"{path} collapses: {layer.nnz} {left} left of {layer.size}")
    if not _reads(network, params, statistics, inputs):
        found.append("the output of the network does not depend on its input")
    return found


@functools.partial(jax.jit, static_argnums=0)
def _reads(network: Network, params: PyTree, statistics: PyTree, inputs: Any) -> Any:
    logits = network.apply(params, statistics, inputs)
    spread = jnp.max(jnp.max(logits, axis=0) - jnp.min(logits, axis=0))
    # Not finite is another matter, and is said elsewhere.
    return ~(spread <= 1e-6 * jnp.max(jnp.abs(logits)))
