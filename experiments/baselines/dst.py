"""The baseline that learns a threshold per output unit: dynamic sparse training."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import scl_jax
from experiments.config import Config
from experiments.method import Method, weights_optimizer
from experiments.models import MODELS
from scl_jax import MaskedParams
from scl_jax._paths import is_none, leaf_path

PyTree = Any


def dst(config: Config, steps: int) -> Method:
    """Connect the weights that are not below the trained threshold of their unit.

    From Liu, Xu, Shi, Cheung & So, "Dynamic sparse training: find efficient sparse
    network from scratch with trainable masked layers", ICLR 2020 (arXiv 2005.06870): a
    kernel is `w * H(|w| - t)`, with one t per feature of the model's `feature_axes`, 0
    at first. `long_tailed` stands for the derivative of H, so that the loss moves w
    through the product and through the mask, and t through the mask. The penalty is
    `config.penalty * sum(exp(-t))` over the thresholds of all kernels. As in the
    authors' code, thresholds take the step of the weights, and those of a kernel that
    is left with 1 % of its connections or less are 0 again before the next step, with
    the momentum they had. A dict of "weights" and "thresholds" is trained.

    Differs from that code in that thresholds do not decay and that |w| = t connects.
    Sparsity cannot be asked for: `config.sparsity` is ignored. It follows from
    `config.penalty`, which is searched for it; the authors' commands have 5e-4 for
    LeNet and 5e-6 for VGG-16 and WideResNet.
    """
    shape_of = _thresholds_shape(MODELS[config.model].feature_axes)

    def wrap(params):
        def start(key_path, leaf):
            if not scl_jax.kernels(leaf_path(key_path), leaf):
                return None
            # A vector, however many axes tell features apart: no optimizer decays it.
            return jnp.zeros(math.prod(shape_of(key_path, leaf)), leaf.dtype)

        thresholds = jax.tree_util.tree_map_with_path(start, params)
        return {"weights": params, "thresholds": thresholds}

    def masked(trained):
        def distance(key_path, t, weight):
            if t is None:
                return None
            return jnp.abs(weight) - t.reshape(shape_of(key_path, weight))

        masks = jax.tree_util.tree_map_with_path(
            distance, trained["thresholds"], trained["weights"], is_leaf=is_none
        )
        return MaskedParams(trained["weights"], masks)

    def penalty(trained):
        thresholds = jax.tree.leaves(trained["thresholds"])
        terms = (jnp.sum(jnp.exp(-t)) for t in thresholds)
        return config.penalty * sum(terms, start=jnp.zeros(()))

    def reset_starved(moves: PyTree, params: PyTree) -> PyTree:
        masks = masked(optax.apply_updates(params, moves)).masks

        def reset(s, move, t):
            if s is None:
                return None
            starved = jnp.sum(s >= 0, dtype=jnp.int32) <= s.size // 100
            return jnp.where(starved, -t, move)

        thresholds = jax.tree.map(
            reset, masks, moves["thresholds"], params["thresholds"], is_leaf=is_none
        )
        return {**moves, "thresholds": thresholds}

    return Method(
        name="dst",
        wrap=wrap,
        effective=lambda trained: scl_jax.apply_masks(
            masked(trained), ste=long_tailed, pruned_gradient=0
        ),
        penalty=penalty,
        fold=lambda trained: scl_jax.fold_masks(masked(trained)),
        tx=optax.chain(
            weights_optimizer(config, steps), optax.stateless(reset_starved)
        ),
    )


def long_tailed(x: jax.Array) -> jax.Array:
    """Return what stands for the derivative of the unit step.

    Args:
      x: what the step is taken of, any shape, floating.

    Returns:
      2 - 4|x| up to |x| = 0.4, then 0.4 up to |x| = 1, and 0 beyond.

    Example:
      >>> print(long_tailed(jnp.array([0.0, -0.25, 0.75, -2.0])))
      [2.  1.  0.4 0. ]
    """
    size = jnp.abs(x)
    return jnp.where(size <= 0.4, 2 - 4 * size, jnp.where(size <= 1, 0.4, 0.0))


def _thresholds_shape(feature_axes: Any) -> Callable[[Any, Any], tuple[int, ...]]:
    """Return the function (key path, kernel) -> shape that broadcasts a feature's t."""

    def shape(key_path, leaf):
        axes = feature_axes
        if callable(axes):
            axes = axes(leaf_path(key_path), leaf)
        features = np.array(axes, ndmin=1) % leaf.ndim
        return tuple(n if i in features else 1 for i, n in enumerate(leaf.shape))

    return shape
