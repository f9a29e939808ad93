"""The baseline that shrinks the largest weights by a rising threshold: ST-3."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from experiments.baselines.magnitude import magnitude_ste
from experiments.config import Config
from experiments.method import Method
from experiments.models import MODELS
from scl_jax import MaskedParams
from scl_jax._features import reduced_axes
from scl_jax._paths import is_none, leaf_path

PyTree = Any


def st3(config: Config, steps: int) -> Method:
    """Shrink the largest weights by a rising threshold; train all straight through.

    From Vanderschueren & De Vleeschouwer, "Are straight-through gradients and
    soft-thresholding all you need for sparse training?", WACV 2023 (arXiv 2212.01076),
    in the form of the authors' code (github.com/vanderschuea/stthree): a kernel is
    `scale * sign(w) * relu(|w| - t)`, with one threshold t for all kernels, chosen at
    every step for the sparsity of a cubic schedule, and a scale per feature of the
    model's `feature_axes`. With r the share that connected weights have in the
    feature's mean |w|, before they are shrunk, the scale is `1.01 / (r + 0.01)`. The
    gradient comes to all weights as it is, without scale and pruned ones too.

    Masks are those of `magnitude_ste`, but renewed up to the last step:
    `config.freeze_at` is ignored. `scl_jax.fold_masks` would give the connected weights
    before they are shrunk; only the method's own `fold` is what was trained.

    Differs in that t is the largest pruned magnitude, where the code takes a quantile
    between it and the next larger one; of equal magnitudes there the connected ones are
    shrunk by a little less, so that none of them vanishes and counts are exact. Left
    out is what the code does after the training: to train the folded weights further.
    """
    feature_axes = MODELS[config.model].feature_axes

    def fold(masked):
        threshold = _threshold(masked)

        def visit(key_path, mask, weight):
            if mask is None:
                return weight
            axes = reduced_axes(feature_axes, leaf_path(key_path), weight, "st3")
            return _shrunk(weight, mask >= 0, threshold, axes)

        return jax.tree_util.tree_map_with_path(
            visit, masked.masks, masked.weights, is_leaf=is_none
        )

    def effective(masked):
        still = jax.lax.stop_gradient(masked)
        # What is added is 0, and has the gradient.
        return jax.tree.map(
            lambda weight, fixed, folded: folded + (weight - fixed),
            *(masked.weights, still.weights, fold(still)),
        )

    way = magnitude_ste(dataclasses.replace(config, freeze_at=1.0), steps)
    return way._replace(name="st3", effective=effective, fold=fold)


def _threshold(masked: MaskedParams) -> jax.Array:
    """Return the largest pruned |w| of all kernels, or 0; below every connected one."""
    masks = jax.tree.leaves(masked.masks, is_leaf=is_none)
    pairs = [
        (mask, jnp.abs(weight))
        for mask, weight in zip(masks, jax.tree.leaves(masked.weights), strict=True)
        if mask is not None
    ]
    pruned = [jnp.max(size, where=mask < 0, initial=0) for mask, size in pairs]
    connected = [
        jnp.min(size, where=mask >= 0, initial=jnp.inf) for mask, size in pairs
    ]
    below = jnp.nextafter(jnp.min(jnp.stack(connected)), 0)
    return jnp.minimum(jnp.max(jnp.stack(pruned)), below)


def _shrunk(
    weight: jax.Array, connected: jax.Array, threshold: jax.Array, axes: tuple[int, ...]
) -> jax.Array:
    """Return scale * (w - sign(w) * threshold) where connected, 0 elsewhere."""
    size, zero = jnp.abs(weight), jnp.zeros_like(weight)
    every, kept = (
        jnp.mean(x, axes, keepdims=True) + 1e-6
        for x in (size, jnp.where(connected, size, zero))
    )
    scale = 1.01 / (kept / every + 0.01)
    return jnp.where(connected, scale * jnp.sign(weight) * (size - threshold), zero)
