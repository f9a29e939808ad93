"""Optimizer compositions: weights and masks apart, penalties in gradient space."""

import math
import numbers
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from scl_jax._costs import cost_of
from scl_jax._masked import MaskedParams, map_masks, mask_leaves
from scl_jax._paths import PyTree, leaf_path, leaves_by_path
from scl_jax._step import STE, checked_ste, identity, proxy_gradient


def partition(
    weights_tx: optax.GradientTransformation,
    masks_tx: optax.GradientTransformation,
    *,
    frozen: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Update weights and mask variables of a `MaskedParams` each by its transform.

    `optax.partition` over the two fields, in which each transform sees the bare
    tree: `weights_tx` the parameters as the model made them, so that weight
    decay masks, labels and paths written for the dense network go on working;
    `masks_tx` the mask variables (None where a leaf is not masked). Weight
    decay, clipping by global norm or averaging inside `weights_tx` never touch
    a mask variable. (`optax.masked` in its place would hand the gradients of the
    masks on as they are, and move them up.)

    Args:
      weights_tx: the optimizer the trainer had.
      masks_tx: the optimizer of the mask variables.
      frozen: True leaves the mask variables alone, the state of `masks_tx`, and the
        pruned weights: for the steps after the freeze, a second transform that takes
        over the state of the first. In a jitted step that takes gradient and update no
        gradient of the masks is computed. With `weights=fold_masks(masked)` put into
        the `MaskedParams` once, the loss can take its weights as they are, for what is
        pruned stays zero: such a step is the dense one.

    Returns:
      An `optax.GradientTransformationExtraArgs` over `MaskedParams`.

    Raises:
      TypeError: if `frozen` is no bool; at init and update, if the tree is no
        `MaskedParams`; at update, if the state is that of another optimizer, such as
        one for dense parameters.
      ValueError: at update, if `frozen` is True and params is None.

    Example:
      >>> import jax.numpy as jnp
      >>> from scl_jax import mask_params, normalize_by_feature
      >>> params = mask_params({"kernel": jnp.ones((2, 2))})
      >>> tx = partition(
      ...     optax.adamw(1e-3), optax.chain(normalize_by_feature(), optax.sgd(1e-3))
      ... )
      >>> gradient = jax.tree.map(jnp.ones_like, params)
      >>> updates, state = tx.update(gradient, tx.init(params), params)
      >>> print(updates.masks["kernel"])
      [[-0.001 -0.001]
       [-0.001 -0.001]]
      >>> at_rest = partition(optax.adamw(1e-3), optax.sgd(1e-3), frozen=True)
      >>> updates, _ = at_rest.update(gradient, tx.init(params), params)
      >>> print(updates.masks["kernel"])
      [[0. 0.]
       [0. 0.]]
    """
    if not isinstance(frozen, bool):
        raise TypeError(
            f"partition: frozen must be True or False, got {frozen!r}: whether masks "
            "rest is known when a step is compiled"
        )
    labels = MaskedParams(weights="weights", masks="masks")

    def checked_labels(tree):
        # A tree without leaves carries nothing to update: optax.tree_map_params
        # asks with such a placeholder.
        if not isinstance(tree, MaskedParams) and jax.tree.leaves(tree):
            raise TypeError(
                "partition: updates a MaskedParams, as mask_params returns it; "
                f"got {type(tree).__name__}. Dense parameters, and their gradients, "
                "need the optimizer without partition"
            )
        return labels

    transforms: dict[Hashable, optax.GradientTransformation] = {
        "weights": _within("weights", weights_tx),
        "masks": _within("masks", _resting(masks_tx) if frozen else masks_tx),
    }
    tx = optax.with_extra_args_support(optax.partition(transforms, checked_labels))

    def update_fn(updates, state, params=None, **extra_args):
        if not isinstance(state, optax.PartitionState):
            raise TypeError(
                "partition: needs the state that its init made for a MaskedParams; "
                f"got {type(state).__name__}, another optimizer's. Where dense "
                "parameters have become masked, call init again"
            )
        if not frozen:
            return tx.update(updates, state, params, **extra_args)
        if params is None:
            raise ValueError(
                "partition: frozen reads the mask variables; call "
                "update(updates, state, params)"
            )
        # Gradients, lest pruned weights count in a norm or leave a momentum; and
        # updates, because of the momentum that they had.
        updates = _of_connected(updates, params)
        updates, state = tx.update(updates, state, params, **extra_args)
        return _of_connected(updates, params), state

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def _within(
    field: str, tx: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Apply `tx` to the bare tree in one field of a `MaskedParams`."""
    tx = optax.with_extra_args_support(tx)

    def bare(tree):
        return getattr(tree, field) if isinstance(tree, MaskedParams) else tree

    def init_fn(params):
        return tx.init(bare(params))

    def update_fn(updates, state, params=None, **extra_args):
        new, state = tx.update(bare(updates), state, bare(params), **extra_args)
        return updates._replace(**{field: new}), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _of_connected(updates: Any, params: Any) -> MaskedParams:
    """Put zeros in the place of the updates of pruned weights."""
    masks = leaves_by_path(params.masks)  # of NNX they lack what is not masked

    def connected(key_path, u):
        s = masks.get(leaf_path(key_path))
        return u if s is None else jnp.where(s < 0, jnp.zeros_like(u), u)

    weights = jax.tree_util.tree_map_with_path(connected, updates.weights)
    return updates._replace(weights=weights)


def _resting(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return a transform with the state of another one that moves nothing."""

    def update_fn(updates, state, params=None):
        del params
        return jax.tree.map(jnp.zeros_like, updates), state

    return optax.GradientTransformation(tx.init, update_fn)


class ConnectionPenaltyState(NamedTuple):
    """State of `add_connection_penalty`."""

    count: jax.Array  # shape (), int32: steps taken


def add_connection_penalty(
    coefficient: float | optax.Schedule,
    *,
    ste: STE = identity,
    costs: PyTree | None = None,
) -> optax.GradientTransformation:
    r"""Add the gradient of the connection penalty to the mask gradients.

    .. math::
      g \leftarrow g + \lambda \, c \, p(S)

    which is the gradient of lambda * `connection_count`, for trainers whose loss
    cannot be touched. Order is meaning: before `normalize_by_feature` it is the
    coupled form, the same as the penalty in the loss; behind it the decoupled
    form, in which lambda is in units of a normalized gradient.

    Args:
      coefficient: lambda, loss per connection: a number >= 0, or a schedule from
        the step to it.
      ste: the straight-through estimator p; use the one given to `apply_masks`.
      costs: what a connection costs, c, as in `connection_count`: a pytree like the
        parameters. None: each costs 1.

    Returns:
      An `optax.GradientTransformation` for a tree of mask variables (or a
      `MaskedParams`, of which the weights are left alone). It reads the mask
      variables: `update` needs params.

    Raises:
      ValueError: if a coefficient is negative, infinite or NaN; at init and update,
        if a masked leaf has no cost, or one that is unknown, negative, infinite, NaN,
        or of another shape; at update, if params is None.
      TypeError: if `ste` is not a hashable callable, or the coefficient is neither
        number nor schedule; at init and update, if a cost is no number.

    Under `optax.inject_hyperparams` name `ste` among `static_args`: Optax takes
    every other callable for a schedule.

    Example:
      >>> import jax.numpy as jnp
      >>> from scl_jax import normalize_by_feature
      >>> coupled = optax.chain(add_connection_penalty(1e-6), normalize_by_feature())
      >>> decoupled = optax.chain(normalize_by_feature(), add_connection_penalty(0.5))
      >>> masks = {"kernel": jnp.zeros((2, 1))}
      >>> gradient = {"kernel": jnp.array([[3.0], [-3.0]])}
      >>> updates, _ = decoupled.update(gradient, decoupled.init(masks), masks)
      >>> print(updates["kernel"].round(1))
      [[ 1.5]
       [-0.5]]
    """
    checked_ste(ste, "add_connection_penalty")
    find_cost = cost_of(costs, "add_connection_penalty")
    # A traced number, as optax.inject_hyperparams gives it, cannot be looked at.
    if callable(coefficient):
        schedule = coefficient
    elif not isinstance(coefficient, numbers.Real | np.ndarray | jax.Array):
        raise TypeError(
            "add_connection_penalty: coefficient must be a number or a schedule, "
            f"got {coefficient!r}"
        )
    elif isinstance(coefficient, Tracer) or 0 <= coefficient < math.inf:
        schedule = optax.constant_schedule(coefficient)
    else:
        raise ValueError(
            "add_connection_penalty: coefficient must be a finite number >= 0, "
            f"got {coefficient}"
        )

    def init_fn(params):
        for key_path, s in mask_leaves(params):
            find_cost(leaf_path(key_path), s)
        return ConnectionPenaltyState(count=jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError(
                "add_connection_penalty: reads the mask variables; call "
                "update(updates, state, params)"
            )
        value = schedule(state.count)

        def add(key_path, g, s):
            each = value * find_cost(leaf_path(key_path), s)
            return g + (each * proxy_gradient(ste, s)).astype(g.dtype)

        count: Any = optax.safe_increment(state.count)
        return map_masks(add, updates, params), ConnectionPenaltyState(count)

    return optax.GradientTransformation(init_fn, update_fn)
