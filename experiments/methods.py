"""The ways to train a network that the experiments put side by side."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

import scl_jax
from experiments.baselines import autoprune, dst, magnitude, rigl, st3, str_
from experiments.config import Config, parse_ste
from experiments.method import Method, freeze_step, weights_optimizer
from experiments.models import MODELS
from experiments.network import macs_of_connections, make_network

PyTree = Any


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
    """Train weights and connectivity together, to a sparsity or by a fixed penalty."""
    ste = parse_ste(config.ste)
    costs = None
    if config.costs == "macs":
        costs = macs_of_connections(make_network(config))
    transforms = (
        weights_optimizer(config, steps),
        masks_optimizer(config, steps, costs),
    )

    def penalty(masked):
        if config.sparsity:  # the optimizer has the penalty then
            return jnp.zeros(())
        weights = costs if config.weigh else None
        count = scl_jax.connection_count(masked, ste=ste, costs=weights)
        return config.penalty * count

    return Method(
        name="scl",
        wrap=lambda params: scl_jax.mask_params(
            params, initial=config.mask_initial, dtype=jnp.dtype(config.mask_dtype)
        ),
        effective=lambda masked: scl_jax.apply_masks(
            masked, ste=ste, pruned_gradient=config.pruned_gradient
        ),
        penalty=penalty,
        fold=scl_jax.fold_masks,
        tx=scl_jax.partition(*transforms),
        freeze_step=freeze_step(config, steps),
        frozen_tx=scl_jax.partition(*transforms, frozen=True),
    )


def scl_macs(config: Config, steps: int) -> Method:
    """Train as `scl` does, with the penalty and the sparsity those of the MACs."""
    way = scl(dataclasses.replace(config, costs="macs"), steps)
    return way._replace(name="scl_macs")


def masks_optimizer(
    config: Config, steps: int, costs: PyTree | None
) -> optax.GradientTransformation:
    """Return the optimizer of the mask variables, which rest from `freeze_at` on."""
    normalize = scl_jax.normalize_by_feature(
        MODELS[config.model].feature_axes, norm=config.norm, decay=config.norm_decay
    )
    momentum = config.mask_momentum or None
    if config.sparsity:
        end_step = max(1, round(config.schedule_end * steps))
        begin_step = min(round(config.schedule_begin * steps), end_step - 1)
        return scl_jax.meet_budget(
            optax.chain(normalize, optax.sgd(config.mask_learning_rate, momentum)),
            1 - config.sparsity,
            freeze_step=freeze_step(config, steps),
            begin_step=begin_step,
            end_step=end_step,
            schedule=config.schedule,
            costs=costs,
            weigh=config.weigh,
            minimum=max(1, config.minimum_connections),
            ste=parse_ste(config.ste),
        )
    rate = optax.piecewise_constant_schedule(
        config.mask_learning_rate, {freeze_step(config, steps): 0.0}
    )
    transforms = [normalize, optax.sgd(rate, momentum)]
    if config.minimum_connections:
        transforms.append(scl_jax.keep_connections(config.minimum_connections))
    return optax.chain(*transforms)


METHODS: dict[str, Callable[[Config, int], Method]] = {
    "dense": dense,
    "scl": scl,
    "scl_macs": scl_macs,
    "gmp": magnitude.gmp,
    "gmp_uniform": magnitude.gmp_uniform,
    "magnitude_ste": magnitude.magnitude_ste,
    "rigl": rigl.rigl,
    "st3": st3.st3,
    "str": str_.str_,
    "dst": dst.dst,
    "autoprune": autoprune.autoprune,
}
