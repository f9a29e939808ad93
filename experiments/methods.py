"""The ways to train a network that the experiments put side by side."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import scl_jax
from experiments.config import Config, parse_ste
from experiments.models import MODELS

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
    feature_axes = MODELS[config.model].feature_axes
    masks_tx = optax.chain(
        scl_jax.normalize_by_feature(feature_axes, norm=config.norm),
        optax.sgd(mask_rate, config.mask_momentum or None),
    )
    if config.minimum_connections:
        guard = scl_jax.keep_connections(config.minimum_connections)
        masks_tx = optax.chain(masks_tx, guard)
    return Method(
        name="scl",
        wrap=lambda params: scl_jax.mask_params(
            params, initial=config.mask_initial, dtype=jnp.dtype(config.mask_dtype)
        ),
        effective=lambda masked: scl_jax.apply_masks(masked, ste=ste),
        penalty=lambda masked: (
            config.penalty * scl_jax.connection_count(masked, ste=ste)
        ),
        fold=scl_jax.fold_masks,
        tx=scl_jax.partition(weights_optimizer(config, steps), masks_tx),
    )


def weights_optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """Return the optimizer of the weights, the same for every method."""

    def kernels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: scl_jax.kernels(
                jax.tree_util.keystr(path, simple=True, separator="/"), leaf
            ),
            params,
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


METHODS: dict[str, Callable[[Config, int], Method]] = {"dense": dense, "scl": scl}
