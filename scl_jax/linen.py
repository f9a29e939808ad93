"""Flax Linen without touching the trainer: masks that live in a module's `params`."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import optax

import scl_jax
from scl_jax._masked import Initial, check_masked
from scl_jax._paths import PyTree, leaves_by_path, listed
from scl_jax._product import checked_part
from scl_jax._select import Rule
from scl_jax._step import STE, checked_ste

_SUFFIX = "_mask"  # Dense_0/kernel_mask is the mask variable of Dense_0/kernel

Module = TypeVar("Module", bound=nn.Module | type[nn.Module])


def masked(
    module: Module,
    *,
    select: Rule = scl_jax.kernels,
    initial: Initial = 0.1,
    dtype: Any = None,
    ste: STE = scl_jax.identity,
    pruned_gradient: float = 0.1,
) -> Module:
    """Wrap a Linen module so that it makes, keeps and applies its masks itself.

    `init` puts the mask variable of `kernel` beside it into the `params`, as
    `kernel_mask`; all other paths stay as they are. `apply` computes with W * H(S).
    The trainer stays as it was but for the optimizer, `scl_jax.linen.partition`;
    without that one, the optimizer takes mask variables for weights and decays them.

    Args:
      module: an instance or, inside other modules, a class; it may have BatchNorm,
        dropout, scanned or rematerialized layers, and methods beside `__call__`.
      select: which parameters are masked; paths begin at this module.
      initial: the mask variables' start value, as in `scl_jax.mask_params`.
      dtype: the mask variables' floating dtype; that of each weight by default.
      ste: the straight-through estimator; see `scl_jax.unit_step`.
      pruned_gradient: the part of its gradient that a pruned weight gets, as in
        `scl_jax.apply_masks`.

    Returns:
      A module of the same fields and name, or a class of such. `init` itself
      computes with the weights as they start. Whatever is called on it is masked; a
      submodule taken out of it by `bind` has its plain weights. A dense module
      ignores, as Flax does, parameters that it does not know: it takes
      `scl_jax.fold_masks(scl_jax.linen.split(params))`, never `params`.

    Raises:
      TypeError: if `module` is neither module nor class, `ste` no hashable
        callable, or `pruned_gradient` no number; at `init`, as `scl_jax.mask_params`.
      ValueError: if an instance inside another module is wrapped, or
        `pruned_gradient` is not from 0 to 1; at `init`, as
        `scl_jax.mask_params`, or if a parameter has a mask variable's name; at
        `apply`, if the parameters have no mask variables.

    Example:
      >>> import jax.numpy as jnp
      >>> model = masked(nn.Dense(3))
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 2)))["params"]
      >>> sorted(params)
      ['bias', 'kernel', 'kernel_mask']
      >>> pruned = params | {"kernel_mask": -params["kernel_mask"]}
      >>> model.apply({"params": pruned}, jnp.ones((1, 2))).tolist()
      [[0.0, 0.0, 0.0]]
    """
    checked_ste(ste, "masked")
    checked_part(pruned_gradient, "masked")
    if isinstance(module, nn.Module):
        if isinstance(module.parent, nn.Module):
            raise ValueError(
                "masked: inside a module, wrap the class and then call it, as in "
                f"masked(nn.Dense)(3); got the instance {type(module).__name__}"
            )
        wrap: Any = functools.partial(
            masked,
            select=select,
            initial=initial,
            dtype=dtype,
            ste=ste,
            pruned_gradient=pruned_gradient,
        )
        fields = {f.name for f in dataclasses.fields(module) if f.init} - {"parent"}
        return wrap(type(module))(**{name: getattr(module, name) for name in fields})
    if not (inspect.isclass(module) and issubclass(module, nn.Module)):
        raise TypeError(
            f"masked: module must be a Linen module or a class of such, got {module!r}"
        )

    def use(variables):
        pair = split(variables.get("params", {}))
        applied = scl_jax.apply_masks(pair, ste=ste, pruned_gradient=pruned_gradient)
        return {"params": applied}

    def show(variables):
        return {"params": _parted(variables.get("params", {})).weights}

    def create(variables):
        pair = scl_jax.mask_params(
            variables.get("params", {}), select=select, initial=initial, dtype=dtype
        )
        return {"params": join(pair)}

    methods = _methods(module)
    using = nn.map_variables(module, "params", use, methods=methods)
    # Initialized through `use`, weights whose masks start at 0 would be lost.
    creating = nn.map_variables(
        module, "params", show, create, mutable=True, methods=methods
    )

    def dispatched(name: str) -> Callable[..., Any]:
        plain = getattr(module, name)

        @functools.wraps(plain, updated=())
        def call(self, *args, **kwargs):
            if self.scope is None:
                return plain(self, *args, **kwargs)
            lifted = creating if self.is_initializing() else using
            return getattr(lifted, name)(self, *args, **kwargs)

        return call

    # Flax names a submodule, and its parameters, by its class.
    namespace = {name: dispatched(name) for name in methods}
    namespace |= {"__module__": module.__module__, "__doc__": module.__doc__}
    return type(module.__name__, (module,), namespace)  # pyright: ignore


def split(params: PyTree) -> scl_jax.MaskedParams:
    """Take weights and mask variables in a masked module's parameters apart.

    Args:
      params: the parameters of a masked module or of one that contains such, or a
        tree like them: gradients, shapes, averages.

    Returns:
      A `MaskedParams` for `report`, `fold_masks`, `connection_count` and the like;
      its weights are what the module's dense twin has as parameters.

    Raises:
      TypeError: if `params` is no mapping.
      ValueError: if there is no mask variable in it.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((2, 2)), "kernel_mask": -jnp.ones((2, 2))}
      >>> scl_jax.fold_masks(split(params))
      {'kernel': Array([[0., 0.], [0., 0.]], dtype=float32)}
    """
    if isinstance(params, scl_jax.MaskedParams) or not isinstance(params, Mapping):
        raise TypeError(
            "split: needs the params of a masked module, a dict with a kernel_mask "
            f"beside each kernel; got {type(params).__name__}"
        )
    pair = _parted(params)
    if not jax.tree.leaves(pair.masks):
        raise ValueError(
            "split: a masked module's params have a mask variable such as kernel_mask "
            "beside each masked kernel, and these have none; init makes them, and "
            "scl_jax.linen.join(scl_jax.mask_params(params)) puts them beside dense "
            f"parameters. Got: {listed(leaves_by_path(params)) or 'no parameters'}"
        )
    return pair


def join(pair: scl_jax.MaskedParams) -> PyTree:
    """Put mask variables beside their weights: the parameters of a masked module.

    Args:
      pair: what `split` or `scl_jax.mask_params` returned. The latter masks
        parameters of the dense module, to start from trained ones.

    Returns:
      A dict (or FrozenDict) like the weights with a `kernel_mask` beside each
      masked `kernel`.

    Raises:
      TypeError: if `pair` is no `MaskedParams`.
      ValueError: if weights and masks do not fit, or a parameter has the name of
        another's mask variable.

    Example:
      >>> import jax.numpy as jnp
      >>> sorted(join(scl_jax.mask_params({"kernel": jnp.ones((2, 2))})))
      ['kernel', 'kernel_mask']
    """
    check_masked(pair, "join")
    paths = leaves_by_path(pair.weights)
    for path in paths:
        if path + _SUFFIX in paths:
            raise ValueError(
                f"join: {path}{_SUFFIX} would be taken for the mask variable of "
                f"{path}; rename the parameter"
            )
    return _joined(*pair)


def partition(
    weights_tx: optax.GradientTransformation,
    masks_tx: optax.GradientTransformation,
    *,
    frozen: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Update weights and mask variables of a masked module each by its transform.

    `scl_jax.partition` for parameters in which masks live beside their weights:
    `weights_tx` sees the parameters of the dense module, so that weight decay for
    `ndim > 1` never reaches a mask variable, and `masks_tx` the mask variables, at
    the paths of their weights.

    Args:
      weights_tx: the optimizer the trainer had.
      masks_tx: the optimizer of the mask variables.
      frozen: True leaves mask variables and pruned weights alone, as in
        `scl_jax.partition`.

    Returns:
      An `optax.GradientTransformationExtraArgs` over `params`.

    Raises:
      TypeError: if `frozen` is no bool; at init and update, if the parameters are no
        mapping; at update, if the state is another optimizer's.
      ValueError: at init and update, if there is no mask variable in the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> masks_tx = optax.chain(scl_jax.normalize_by_feature(), optax.sgd(1e-2))
      >>> tx = partition(optax.sgd(0.1), masks_tx)
      >>> params = {"kernel": jnp.ones((1, 1)), "kernel_mask": jnp.ones((1, 1))}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> {name: round(update.item(), 3) for name, update in updates.items()}
      {'kernel': -0.1, 'kernel_mask': -0.01}
    """
    tx = scl_jax.partition(weights_tx, masks_tx, frozen=frozen)

    def init_fn(params):
        # optax.tree_map_params asks with a placeholder that has no leaves.
        return tx.init(split(params) if jax.tree.leaves(params) else params)

    def update_fn(updates, state, params=None, **extra_args):
        if params is not None:
            params = split(params)
        new: Any = split(updates)
        new, state = tx.update(new, state, params, **extra_args)
        return _joined(*new), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _parted(params: Any) -> scl_jax.MaskedParams:
    """Return weights, and masks of the same structure, None where there is none."""
    weights, masks = {}, {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            weights[name], masks[name] = _parted(value)
        elif not _is_mask(name, params):
            weights[name] = value
            has_mask = _is_mask(name + _SUFFIX, params)
            # A box (of flax.linen.with_partitioning) stays around the None.
            none = jax.tree.map(lambda _: None, value)
            masks[name] = params[name + _SUFFIX] if has_mask else none
    return scl_jax.MaskedParams(type(params)(weights), type(params)(masks))


def _is_mask(name: str, params: Any) -> bool:
    """Tell a mask variable from a parameter or submodule of a similar name."""
    both = params.get(name), params.get(name.removesuffix(_SUFFIX))
    return name.endswith(_SUFFIX) and not any(
        x is None or isinstance(x, Mapping) for x in both
    )


def _joined(weights: Any, masks: Any) -> Any:
    """Return one mapping, with each mask beside its weight."""
    joint = {}
    for name, weight in weights.items():
        joint[name] = weight
        if isinstance(weight, Mapping):
            joint[name] = _joined(weight, masks[name])
        elif jax.tree.leaves(masks[name]):
            joint[name + _SUFFIX] = masks[name]
    return type(weights)(joint)


def _methods(module: type[nn.Module]) -> list[str]:
    """Return the names of the methods that a module's user can call."""
    # A field's default, an activation say, is an attribute of the class too.
    fields = {field.name for field in dataclasses.fields(module)}
    names = set(dir(module)) - set(dir(nn.Module)) - fields - {"setup"}
    names = {name for name in names if not name.startswith("_")} | {"__call__"}
    found = {name: inspect.getattr_static(module, name, None) for name in names}
    return sorted(
        name
        for name, method in found.items()
        if inspect.isfunction(method) and not getattr(method, "nowrap", False)
    )
