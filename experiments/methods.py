"""The ways to train a network that the experiments put side by side."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import scl_jax
from experiments.config import Config, parse_ste

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
    """

    name: str
    wrap: Callable[[PyTree], PyTree]
    effective: Callable[[PyTree], PyTree]
    penalty: Callable[[PyTree], jax.Array]
    fold: Callable[[PyTree], PyTree]
    tx: optax.GradientTransformation


def dense(config: Config, steps: int) -> Method:
    """Train all weights: the network every other method is compared with."""

    def unchanged(params):
        return params

    return Method(
        name="dense",
        wrap=unchanged,
        effective=unchanged,
        penalty=lambda params: jnp.zeros(()),
        fold=unchanged,
        tx=weights_optimizer(config, steps),
    )


def scl(config: Config, steps: int) -> Method:
    """Train weights and connectivity together, with the penalty in the loss."""
    ste = parse_ste(config.ste)
    freeze_step = round(config.freeze_at * steps)
    mask_rate = optax.piecewise_constant_schedule(
        config.mask_learning_rate, {freeze_step: 0.0}
    )
    masks_tx = optax.chain(
        scl_jax.normalize_by_feature(norm=config.norm),
        optax.sgd(mask_rate, config.mask_momentum or None),
    )
    return Method(
        name="scl",
        wrap=lambda params: scl_jax.mask_params(params, initial=config.mask_initial),
        effective=lambda masked: scl_jax.apply_masks(masked, ste=ste),
        penalty=lambda masked: (
            config.penalty * scl_jax.connection_count(masked, ste=ste)
        ),
        fold=scl_jax.fold_masks,
        tx=scl_jax.partition(weights_optimizer(config, steps), masks_tx),
    )


def weights_optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """Return SGD with momentum and a cosine schedule, the same for every method."""
    decay = optax.add_decayed_weights(
        config.weight_decay,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
    )
    schedule = optax.cosine_decay_schedule(config.learning_rate, steps)
    sgd = optax.sgd(schedule, config.momentum or None)
    return optax.chain(decay, sgd) if config.weight_decay else sgd


METHODS: dict[str, Callable[[Config, int], Method]] = {"dense": dense, "scl": scl}
