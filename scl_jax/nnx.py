"""The adapter for the object style of Flax NNX; import it as `scl_jax.nnx`."""

from typing import Any, cast

import jax
import optax
from flax import nnx

from scl_jax import _optimizer
from scl_jax._masked import (
    Initial,
    MaskedParams,
    apply_masks,
    check_masked,
    mask_params,
)
from scl_jax._paths import is_none, leaf_path, leaves_by_path, listed
from scl_jax._product import checked_part
from scl_jax._select import Rule, kernels
from scl_jax._step import STE, checked_ste, identity

_SHARDING = ("out_sharding", "optimizer_sharding", "sharding_rules", "mesh")


class MaskVariable(nnx.Variable):
    """A mask variable: no `nnx.Param`, so that filters tell it from the weights.

    Example:
      >>> issubclass(MaskVariable, nnx.Param)
      False
    """


# The filter of what is trained, for nnx.Optimizer and nnx.DiffState.
TRAINED = (nnx.Param, MaskVariable)


class Masked(nnx.Module):
    """A model and its mask variables, called like the model.

    A call runs the model with W * H(S) in the place of its masked weights. The
    weights themselves are never overwritten; BatchNorm statistics, random streams
    and every other variable are the model's own, and are updated as ever. Gradient
    and optimizer are told to go to the masks as well, by the filter `TRAINED`:
    what NNX takes without it is `nnx.Param`, and the masks would never train.

    Attributes:
      model: the model, as it was given.
      masks: nested dictionaries like the model's `nnx.Param` state; a `MaskVariable`
        where a leaf is masked, None elsewhere. Part of `nnx.state`, and so of
        checkpoints.
      ste: the straight-through estimator of a call.
      pruned_gradient: the part of its gradient that a pruned weight gets.

    Args:
      model: an `nnx.Module`. Its `nnx.Param`s are looked at.
      select: which of them are masked; paths are those inside `model`. This and
        what follows is as in `mask_params`.
      initial: the mask variables' start value, or a function (path, leaf) -> array.
      dtype: the mask variables' floating dtype; that of each weight by default.
      ste: the straight-through estimator, as in `apply_masks`.
      pruned_gradient: the part of its gradient that a pruned weight gets, likewise.

    Raises:
      TypeError: if `model` is no `nnx.Module`, or a `Masked` already; and what
        `mask_params` raises.
      ValueError: what `mask_params` raises.

    Example:
      >>> import jax.numpy as jnp
      >>> from scl_jax import normalize_by_feature
      >>> model = Masked(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
      >>> masks_tx = optax.chain(normalize_by_feature(), optax.sgd(1e-2))
      >>> tx = partition(optax.adamw(1e-3), masks_tx)
      >>> optimizer = nnx.Optimizer(model, tx, wrt=TRAINED)
      >>> def loss_fn(model):
      ...     return jnp.square(model(jnp.ones((1, 3)))).sum()
      >>> gradient = nnx.grad(loss_fn, argnums=nnx.DiffState(0, TRAINED))(model)
      >>> _ = optimizer.update(model, gradient)
      >>> model.masks["kernel"].shape, model.masks["bias"]
      ((3, 2), None)
    """

    def __init__(
        self,
        model: nnx.Module,
        *,
        select: Rule = kernels,
        initial: Initial = 0.1,
        dtype: Any = None,
        ste: STE = identity,
        pruned_gradient: float = 0.1,
    ):
        if not isinstance(model, nnx.Module) or isinstance(model, Masked):
            raise TypeError(
                "Masked: model must be an nnx.Module without masks, "
                f"got {type(model).__name__}"
            )
        params = nnx.state(model, nnx.Param)
        masks = mask_params(
            nnx.to_pure_dict(params), select=select, initial=initial, dtype=dtype
        ).masks

        def variable(mask, param):
            if mask is None:
                return None
            known = param.get_metadata()
            sharding = {key: known[key] for key in _SHARDING if key in known}
            return MaskVariable(mask, **sharding)

        self.model: Any = model
        self.masks = nnx.data(
            jax.tree.map(variable, masks, params.raw_mapping, is_leaf=is_none)
        )
        self.ste = checked_ste(ste, "Masked")
        self.pruned_gradient = checked_part(pruned_gradient, "Masked")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with W * H(S)."""
        return self.effective()(*args, **kwargs)

    def effective(self) -> Any:
        """Return the model with W * H(S) as its weights, for its other methods.

        Returns:
          A module of the model's class with `nnx.Param`s of its own; all other
          variables are those of the model. What a call adds to the module (`sow`)
          is found there, and lost with it.

        Example:
          >>> import jax.numpy as jnp
          >>> model = Masked(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), initial=-0.1)
          >>> jnp.abs(model.effective().kernel[...]).tolist()
          [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
        """
        graph, _, others = nnx.split(self.model, nnx.Param, ...)
        applied = apply_masks(
            self.masked_params(), ste=self.ste, pruned_gradient=self.pruned_gradient
        )
        return nnx.merge(graph, nnx.State(applied), others)

    def masked_params(self) -> MaskedParams:
        """Return weights and mask variables as arrays, in nested dictionaries.

        Returns:
          What `report`, `fold_masks`, `connection_count` and all other functions on
          a `MaskedParams` take; inside a loss too. `nnx.update(model, folded)` puts
          what `fold_masks` returns into a model without masks.

        Example:
          >>> from scl_jax import connection_count
          >>> model = Masked(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
          >>> connection_count(model.masked_params()).item()
          6.0
        """
        weights = nnx.to_pure_dict(nnx.state(self.model, nnx.Param))
        return MaskedParams(weights, nnx.as_pure(self.masks))

    def set_masked_params(self, masked: MaskedParams) -> None:
        """Put arrays into the model's weights and into its mask variables.

        Args:
          masked: like what `masked_params` returns, or a `MaskedParams` of NNX
            states, as training in the functional style leaves it.

        Raises:
          TypeError: if `masked` is no `MaskedParams`.
          ValueError: if its trees do not fit each other, or do not fit the model.

        Example:
          >>> from scl_jax import mask_params
          >>> model = Masked(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
          >>> weights, _ = model.masked_params()
          >>> model.set_masked_params(mask_params(weights, initial=-1.0))
          >>> float(model.masks["kernel"][0, 0])
          -1.0
        """
        caller = "Masked.set_masked_params"
        check_masked(masked, caller)
        masked = MaskedParams(*map(nnx.as_pure, masked))
        given, own = _described(masked), _described(self.masked_params())
        differing = [leaf for leaf in own | given if own.get(leaf) != given.get(leaf)]
        if differing:
            leaf = differing[0]
            raise ValueError(
                f"{caller}: leaves must be those of the model, which differs at "
                f"{listed(differing)}; {leaf} is {own.get(leaf, 'missing')} there, "
                f"{given.get(leaf, 'missing')} in the argument"
            )
        nnx.update(self.model, masked.weights)
        new = leaves_by_path(masked.masks)
        masks = jax.tree_util.tree_map_with_path(
            lambda key_path, _: new[leaf_path(key_path)],
            nnx.as_pure(nnx.state(self.masks)),
        )
        nnx.update(self.masks, masks)


def partition(
    weights_tx: optax.GradientTransformation,
    masks_tx: optax.GradientTransformation,
    *,
    frozen: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Update weights and mask variables of a `Masked` each by its transform.

    `scl_jax.partition` for `nnx.Optimizer`, which calls `init` with variables and
    `update` with bare arrays: labels that are made from types are right in the first
    and wrong in the second. Here the place tells them apart. Each transform sees its
    bare tree, with the paths inside the model: weight decay, clipping by global norm
    or averaging inside `weights_tx` never touch a mask variable.

    Args:
      weights_tx: the optimizer the trainer had.
      masks_tx: the optimizer of the mask variables.
      frozen: True leaves mask variables and pruned weights alone, as in
        `scl_jax.partition`.

    Returns:
      An `optax.GradientTransformationExtraArgs` over the state of a `Masked`,
      filtered by `TRAINED`.

    Raises:
      TypeError: if `frozen` is no bool; at init and update, if the tree is not that:
        the optimizer is not on a `Masked`, or `wrt` or the gradient leaves the mask
        variables out.

    Example:
      >>> model = Masked(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
      >>> tx = partition(optax.adamw(1e-3), optax.sgd(1e-2))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=TRAINED)
      >>> nnx.Optimizer(model, tx, wrt=nnx.Param)
      Traceback (most recent call last):
      TypeError: partition: updates the state of a Masked, its model and its masks;
      got a state of model. Say TRAINED to both: nnx.Optimizer(model, tx, wrt=TRAINED)
      and nnx.grad(loss_fn, argnums=nnx.DiffState(0, TRAINED))
    """
    tx = _optimizer.partition(weights_tx, masks_tx, frozen=frozen)

    def masked(tree):
        is_state = isinstance(tree, nnx.State)
        # optax.tree_map_params asks with a placeholder, which carries nothing.
        if not is_state and not jax.tree.leaves(tree):
            return tree
        if not is_state or set(tree) != {"model", "masks"}:
            found = (
                f"a state of {listed(tree) or 'nothing'}" if is_state else type(tree)
            )
            raise TypeError(
                "partition: updates the state of a Masked, its model and its masks; "
                f"got {found}. Say TRAINED to both: nnx.Optimizer(model, tx, "
                "wrt=TRAINED) and nnx.grad(loss_fn, argnums=nnx.DiffState(0, TRAINED))"
            )
        # What State's own access returns is wrapped, and no part of it any more.
        fields = tree.raw_mapping
        return MaskedParams(weights=fields["model"], masks=fields["masks"])

    def init_fn(params):
        return tx.init(masked(params))

    def update_fn(updates, state, params=None, **extra_args):
        params = None if params is None else masked(params)
        updates, state = tx.update(masked(updates), state, params, **extra_args)
        new = cast(MaskedParams, updates)
        return nnx.State({"model": new.weights, "masks": new.masks}), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _described(masked: MaskedParams) -> dict[str, str]:
    """Return dtype and shape of all leaves, by field and path."""
    return {
        f"{field}/{path}": "not masked" if x is None else f"{x.dtype}{list(x.shape)}"
        for field, tree in masked._asdict().items()
        for path, x in leaves_by_path(tree).items()
    }
