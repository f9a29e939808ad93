"""Baselines that keep the largest weights: for good, or chosen anew at every step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import scl_jax
from experiments.baselines.schedule import due, sparsity_at
from experiments.baselines.straight_through import straight_through
from experiments.config import Config
from experiments.method import Method, freeze_step, weights_optimizer
from scl_jax import MaskedParams, _rank

PyTree = Any
Renew = Callable[[PyTree, PyTree, jax.Array], PyTree]


def gmp(config: Config, steps: int) -> Method:
    """Prune the smallest weights of all kernels together, more and more, for good.

    From Zhu & Gupta, "To prune, or not to prune: exploring the efficacy of pruning
    for model compression", ICLR 2018 workshop (arXiv 1710.01878): the cubic schedule,
    pruning by magnitude at intervals, no gradient for what is pruned. Differs in one
    ranking of all kernels, where they rank each layer by itself, and in that nothing
    pruned is ranked again. No kernel is promised a connection.
    """
    count = connections_at(config, steps)

    def renew(weights, masks, taken):
        magnitudes = _magnitudes(weights, masks, remaining=True)
        return _largest(magnitudes, count(taken, _size(magnitudes)))

    return _gradual("gmp", config, steps, renew)


def gmp_uniform(config: Config, steps: int) -> Method:
    """Prune the smallest weights of every kernel alike, more and more, for good.

    From Zhu & Gupta, as `gmp`, and as they do with the same sparsity in every layer;
    here that is every kernel, the first and the last too, which keeps one connection
    at least. Differs in that nothing pruned is ranked again.
    """
    count = connections_at(config, steps)

    def renew(weights, masks, taken):
        return jax.tree.map(
            lambda kernel: _largest(kernel, count(taken, kernel.size)),
            _magnitudes(weights, masks, remaining=True),
        )

    return _gradual("gmp_uniform", config, steps, renew)


def magnitude_ste(config: Config, steps: int) -> Method:
    """Connect the largest weights at every step; train all weights straight through.

    From Lin et al., "Dynamic Model Pruning with Feedback", ICLR 2020 (arXiv
    2006.07253): the gradient at the pruned weights moves all weights, so that pruned
    ones can return. Differs in that masks are renewed at every step, not at
    intervals, up to `config.freeze_at` of the training, and rest then; sparsity is
    that of Zhu & Gupta's schedule, over all kernels together, as in `gmp`.
    """
    count = connections_at(config, steps)
    last = freeze_step(config, steps)

    def renew(weights, masks, taken):
        magnitudes = _magnitudes(weights, masks, remaining=False)
        return _largest(magnitudes, count(taken, _size(magnitudes)))

    tx = _renew_masks(
        weights_optimizer(config, steps), lambda taken: taken <= last, renew
    )
    return _method("magnitude_ste", straight_through, tx)


def _gradual(name: str, config: Config, steps: int, renew: Renew) -> Method:
    """Return a method that renews masks on schedule and trains what is connected."""

    def effective(masked):
        return scl_jax.apply_masks(
            masked._replace(masks=jax.lax.stop_gradient(masked.masks)),
            pruned_gradient=0,
        )

    tx = _renew_masks(weights_optimizer(config, steps), due(config, steps), renew)
    return _method(name, effective, tx)


def _method(
    name: str,
    effective: Callable[[MaskedParams], PyTree],
    tx: optax.GradientTransformation,
) -> Method:
    """Return a method with mask variables that are 1 or -1, at first all 1."""
    return Method(
        name=name,
        wrap=lambda params: scl_jax.mask_params(params, initial=1.0),
        effective=effective,
        penalty=lambda masked: jnp.zeros(()),
        fold=scl_jax.fold_masks,
        tx=tx,
    )


class _State(NamedTuple):
    taken: jax.Array  # int32, steps
    weights: optax.OptState


def _renew_masks(
    weights_tx: optax.GradientTransformation,
    is_due: Callable[[jax.Array], jax.Array],
    renew: Renew,
) -> optax.GradientTransformation:
    """Return the optimizer of a `MaskedParams` whose masks follow from its weights.

    Args:
      weights_tx: the optimizer of the weights.
      is_due: from the steps taken to whether masks are renewed.
      renew: from the new weights, the masks and the steps taken to the new masks.
    """

    def init(params):
        return _State(jnp.zeros((), jnp.int32), weights_tx.init(params.weights))

    def keep(weights, masks, taken):
        del weights, taken
        return masks

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("masks follow from the weights: update needs params")
        taken = state.taken + 1
        moves, inner = weights_tx.update(updates.weights, state.weights, params.weights)
        weights = optax.apply_updates(params.weights, moves)
        masks = jax.lax.cond(is_due(taken), renew, keep, weights, params.masks, taken)
        # Between 1 and -1 the difference and its sum are exact.
        turns = jax.tree.map(jnp.subtract, masks, params.masks)
        return MaskedParams(moves, turns), _State(taken, inner)

    return optax.GradientTransformation(init, update)


def connections_at(config: Config, steps: int) -> Callable[[jax.Array, int], jax.Array]:
    """Return the function (taken, total) -> connections left of `total` by then."""
    scheduled = sparsity_at(config, steps)

    def count(taken, total):
        sparsity = scheduled(taken)
        # float32 miscounts millions: the last count is computed by the host, and none
        # before it is smaller.
        last = max(1, round((1 - config.sparsity) * total))
        left = total - jnp.round(sparsity * total).astype(jnp.int32)
        over = sparsity >= jnp.float32(config.sparsity)
        return jnp.where(over, last, jnp.maximum(left, last))

    return count


def _magnitudes(weights: PyTree, masks: PyTree, *, remaining: bool) -> PyTree:
    """Return |w| of the kernels; if only of the remaining ones, -1 for the others."""

    def magnitude(mask, weight):
        if mask is None:
            return None
        return jnp.where(mask >= 0, abs(weight), -1) if remaining else abs(weight)

    return jax.tree.map(magnitude, masks, weights, is_leaf=lambda x: x is None)


def _size(tree: PyTree) -> int:
    """Return the number of entries of all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _largest(magnitudes: PyTree, count: jax.Array) -> PyTree:
    """Return 1 for the `count` largest of all leaves, any of equal ones; -1 else."""
    flat, unravel = ravel_pytree(magnitudes)
    # Counting is much faster than sorting on a CPU.
    ranked = [_rank.ranks(flat)]
    border = _rank.affordable(
        ranked, lambda marked: _rank.count(marked[0], (0,)), count
    )
    (largest,) = _rank.above(ranked, border)
    return unravel(jnp.where(largest, 1, -1).astype(flat.dtype))
