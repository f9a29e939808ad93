"""The baseline that learns a threshold per layer: STR."""

from typing import Any

import jax
import jax.numpy as jnp

import scl_jax
from experiments.config import Config
from experiments.method import Method, weights_optimizer
from scl_jax._paths import is_none, leaf_path

PyTree = Any


def str_(config: Config, steps: int) -> Method:
    """Shrink the weights of each layer by a trained threshold, and cut those below it.

    From Kusupati, Ramanujan, Somani, Wortsman, Jain, Kakade & Farhadi, "Soft threshold
    weight reparameterization for learnable sparsity", ICML 2020 (arXiv 2002.03231):
    a kernel is `sign(w) * relu(|w| - sigmoid(s))`, with one s per layer, trained and
    decayed as the weights are. A dict of "weights" and "thresholds" is trained.

    Sparsity cannot be asked for: `config.sparsity` is ignored. It follows from the
    decay of w and s, `config.weight_decay`, and from where s starts,
    `config.mask_initial`, which are searched for it; the source starts at s of -5 and
    far below (the config's default, 0.1, would cut all weights under 0.5).
    """

    def wrap(params):
        def start(key_path, leaf):
            if not scl_jax.kernels(leaf_path(key_path), leaf):
                return None
            # One number, with the axes of a kernel: so the optimizer decays it, too.
            return jnp.full((1,) * leaf.ndim, config.mask_initial, leaf.dtype)

        thresholds = jax.tree_util.tree_map_with_path(start, params)
        return {"weights": params, "thresholds": thresholds}

    def thresholded(trained):
        return jax.tree.map(
            lambda s, weight: weight if s is None else _shrink(weight, s),
            *(trained["thresholds"], trained["weights"]),
            is_leaf=is_none,
        )

    return Method(
        name="str",
        wrap=wrap,
        effective=thresholded,
        penalty=lambda trained: jnp.zeros(()),
        fold=thresholded,
        tx=weights_optimizer(config, steps),
    )


def _shrink(weight: jax.Array, s: jax.Array) -> jax.Array:
    """Return sign(w) * relu(|w| - sigmoid(s)), in which no 0 is negative."""
    threshold = jax.nn.sigmoid(s)
    shrunk = weight - jnp.sign(weight) * threshold
    return jnp.where(jnp.abs(weight) > threshold, shrunk, jnp.zeros_like(weight))
