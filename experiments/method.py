"""What a way to train consists of, and the optimizer that all of them share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import scl_jax
from experiments.config import Config
from scl_jax._paths import leaf_path

PyTree = Any


class Method(NamedTuple):
    """A way to train: what is trained, and what the model is called with.

    Attributes:
      name: as it stands in records and tables.
      wrap: from the model's parameters to what is trained.
      effective: from what is trained to the parameters for the training loss.
      penalty: from what is trained to a scalar that is added to the loss.
      fold: from what is trained to plain parameters, for evaluation.
      tx: the optimizer of what is trained.
      freeze_step: the number of steps in which masks are trained; None: all.
      frozen_tx: an optimizer with the same state for the steps in which they rest;
        `rested` makes what is trained ready for it.
    """

    name: str
    wrap: Callable[[PyTree], PyTree]
    effective: Callable[[PyTree], PyTree]
    penalty: Callable[[PyTree], jax.Array]
    fold: Callable[[PyTree], PyTree]
    tx: optax.GradientTransformation
    freeze_step: int | None = None
    frozen_tx: optax.GradientTransformation | None = None


def rested(masked: scl_jax.MaskedParams) -> scl_jax.MaskedParams:
    """Return what is trained while masks rest: pruned weights are zero, and stay it."""
    return masked._replace(weights=scl_jax.fold_masks(masked))


def freeze_step(config: Config, steps: int) -> int:
    """Return the number of steps in which masks move; one at least, to a sparsity."""
    return max(1 if config.sparsity else 0, round(config.freeze_at * steps))


def weights_optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """Return the optimizer of the weights, the same for every method."""

    def kernels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: scl_jax.kernels(leaf_path(path), leaf), params
        )

    # One step at least is left for the decay.
    warmup = min(round(steps * config.warmup_epochs / config.epochs), steps - 1)
    if warmup:
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, warmup, steps
        )
    else:
        schedule = optax.cosine_decay_schedule(config.learning_rate, steps)
    if config.optimizer == "adamw":
        return optax.adamw(schedule, weight_decay=config.weight_decay, mask=kernels)
    sgd = optax.sgd(schedule, config.momentum or None)
    decay = optax.add_decayed_weights(config.weight_decay, mask=kernels)
    return optax.chain(decay, sgd) if config.weight_decay else sgd
