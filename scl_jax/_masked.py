"""MaskedParams and what is done with it: mask, apply, fold."""

import numbers
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from scl_jax._paths import PyTree, is_none, leaf_path, leaves_by_path, listed
from scl_jax._product import checked_part, masked_product
from scl_jax._select import Rule, kernels, selected
from scl_jax._step import STE, checked_ste, identity, unit_step

Initial = float | Callable[[str, jax.Array], jax.Array]

_ADVICE = "train a model with apply_masks(masked), evaluate it with fold_masks(masked)"


class MaskedParams(NamedTuple):
    """Parameters of which some are masked: one pytree for the optimizer.

    Attributes:
      weights: the parameters, as the model made them.
      masks: the same structure; a mask variable of the weight's shape where a
        leaf is masked, None elsewhere.
    """

    weights: PyTree
    masks: PyTree

    if not TYPE_CHECKING:  # which find misspelt names only without it
        # A model that is handed this takes it for a dict.
        def __getattr__(self, name):
            raise AttributeError(f"MaskedParams has no attribute {name!r}; {_ADVICE}")

        def __getitem__(self, key):
            if isinstance(key, str):
                raise TypeError(f"MaskedParams has no entry {key!r}; {_ADVICE}")
            return tuple.__getitem__(self, key)


def mask_params(
    params: PyTree,
    *,
    select: Rule = kernels,
    initial: Initial = 0.1,
    dtype: Any = None,
) -> MaskedParams:
    """Put a mask variable beside every selected weight.

    Args:
      params: the parameters, a pytree of arrays.
      select: which leaves are masked: `kernels`, `select(...)`, `exclude(...)`
        or any rule (path, leaf) -> bool.
      initial: the mask variables' start value: how far they are from the
        threshold, 0. With rms normalization a typical step is the mask learning
        rate (ten times it with momentum 0.9). Or a function (path, leaf) -> array
        of the leaf's shape. The default is our choice; the source names none.
      dtype: the mask variables' floating dtype; that of each weight by default.

    Returns:
      `MaskedParams`; mask variables are sharded as their weights.

    Raises:
      ValueError: if `params` is empty, a rule matches nothing, or start values are
        not finite or have another shape than their leaf.
      TypeError: if a selected leaf or `dtype` is not floating, `initial` is neither
        number nor function, or `params` is masked already.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"Dense_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
      >>> masked = mask_params(params)
      >>> masked.masks["Dense_0"]["kernel"].shape, masked.masks["Dense_0"]["bias"]
      ((3, 2), None)

    Reference:
      Tang et al., "Automatic Sparse Connectivity Learning for Neural Networks",
      IEEE TNNLS 34(10), 2023 (arXiv 2201.05020).
    """
    if isinstance(params, MaskedParams):
        raise TypeError("mask_params: params is a MaskedParams already")
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"mask_params: dtype must be floating, got {dtype}")
    if not callable(initial) and not isinstance(initial, numbers.Real | jax.Array):
        raise TypeError(
            "mask_params: initial must be a number or a function (path, leaf) -> "
            f"array, got {initial!r}"
        )

    def start(key_path, chosen, leaf):
        if not chosen:
            return None
        path = leaf_path(key_path)
        # Without 64-bit mode JAX stores a float64 NumPy array as float32.
        mask_dtype = jax.dtypes.canonicalize_dtype(dtype or leaf.dtype)
        if callable(initial):
            return _start_values(initial, path, leaf, mask_dtype)
        if not abs(initial) <= float(jnp.finfo(mask_dtype).max):
            raise ValueError(
                f"mask_params: initial must be finite in {mask_dtype}, the mask "
                f"variables' dtype at {path}; got {initial}"
            )
        return jnp.full_like(leaf, initial, dtype=mask_dtype)

    chosen = selected(params, select, "mask_params")
    masks = jax.tree_util.tree_map_with_path(start, chosen, params)
    return MaskedParams(weights=params, masks=masks)


def _start_values(
    initial: Callable[[str, Any], jax.Array], path: str, leaf: Any, dtype: Any
) -> jax.Array:
    """Return the user's start values for one leaf, placed as the leaf is."""
    # A copy: returned as it is, the weight itself could not be donated any more.
    value = jnp.array(initial(path, leaf), dtype=dtype)
    if value.shape != leaf.shape:
        raise ValueError(
            f"mask_params: initial({path!r}, leaf) must have the leaf's shape "
            f"{leaf.shape}, got {value.shape}"
        )
    if isinstance(value, Tracer):
        return value
    if not jnp.isfinite(value).all():
        raise ValueError(
            f"mask_params: initial({path!r}, leaf) must be finite in {value.dtype}"
        )
    return jax.device_put(value, getattr(leaf, "sharding", None))


def apply_masks(
    masked: MaskedParams, *, ste: STE = identity, pruned_gradient: float = 0.1
) -> PyTree:
    """Return W * H(S), the parameters a model is called with in training.

    Call it inside the loss, of which the gradient is taken with respect to `masked`:
    a model that is given `masked` itself fails (Flax: "Each collection should be a
    dictionary"), and behind `fold_masks` no mask would ever move.

    Args:
      masked: what `mask_params` made.
      ste: the straight-through estimator that carries the gradient to the mask
        variables; see `unit_step`.
      pruned_gradient: the part of its gradient that a pruned weight gets, 0..1. At 0,
        the exact gradient, it keeps its value until it is connected again. A little
        lets it move, so that it comes back as one that is of use now.

    Returns:
      A pytree like `masked.weights`, in the weights' dtypes. With G the gradient
      of a loss at it, the weights get G where they are connected and
      pruned_gradient * G where not, the mask variables G * W * p(S).
      NaN in a mask variable shows as NaN here.

    Raises:
      TypeError: if `masked` is no MaskedParams, `ste` no hashable callable, or
        `pruned_gradient` no number.
      ValueError: if a mask has another shape than its weight, the trees
        differ in structure, or `pruned_gradient` is not from 0 to 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> masked = MaskedParams({"w": jnp.array([2.0, 3.0])},
      ...                       {"w": jnp.array([0.1, -0.1])})
      >>> apply_masks(masked)["w"].tolist()
      [2.0, 0.0]
      >>> gradient = jax.grad(lambda masked: apply_masks(masked)["w"].sum())(masked)
      >>> print(gradient.weights["w"], gradient.masks["w"])
      [1.  0.1] [2. 3.]

    Reference:
      `pruned_gradient` is our choice, between 0 and the 1 of straight-through weights
      (Lin et al., arXiv 2006.07253): measured in experiments/README.md.
    """
    checked_ste(ste, "apply_masks")
    part = checked_part(pruned_gradient, "apply_masks")

    def product(weight, mask) -> Any:
        return masked_product(weight, mask, ste, part)

    return _map_masked(product, masked, "apply_masks")


def fold_masks(masked: MaskedParams) -> PyTree:
    """Bake the masks into plain parameters, for evaluation and export.

    Args:
      masked: what `mask_params` made.

    Returns:
      A pytree like `masked.weights`; pruned weights are exactly zero (+0), the
      others untouched. It has no gradient toward the mask variables.

    Raises:
      TypeError: if `masked` is no MaskedParams.
      ValueError: if the trees do not fit, or a mask variable is NaN. Inside a
        jitted function nothing can be raised: NaN shows in the weights.

    Example:
      >>> import jax.numpy as jnp
      >>> masked = MaskedParams({"w": jnp.array([-2.0, -3.0])},
      ...                       {"w": jnp.array([0.1, -0.1])})
      >>> fold_masks(masked)["w"].tolist()
      [-2.0, 0.0]
    """

    def bake(weight, mask):
        h = unit_step(jax.lax.stop_gradient(mask)).astype(weight.dtype)
        # Selected, not multiplied: a product turns negative weights into -0.
        kept = jnp.where(h == 0, jnp.zeros_like(weight), weight)
        return jnp.where(jnp.isnan(h), h, kept)

    folded = _map_masked(bake, masked, "fold_masks")
    check_no_nan(masked.masks, "fold_masks")
    return folded


def binary_masks(masked: MaskedParams) -> PyTree:
    """Return the masks: True where a weight is connected.

    Args:
      masked: what `mask_params` made.

    Returns:
      A pytree like `masked.weights` of bool arrays, None where unmasked.

    Raises:
      TypeError: if `masked` is no MaskedParams, or if it is traced: a bool could
        not show a NaN. Inside a jitted function use `unit_step`.
      ValueError: if the trees do not fit, or a mask variable is NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> masked = MaskedParams({"w": jnp.ones(2), "b": jnp.ones(1)},
      ...                       {"w": jnp.array([0.0, -0.1]), "b": None})
      >>> masks = binary_masks(masked)
      >>> masks["w"].tolist(), masks["b"]
      ([True, False], None)
    """
    check_masked(masked, "binary_masks")
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(masked.masks)):
        raise TypeError(
            "binary_masks: needs concrete arrays, since a bool cannot show a NaN "
            "mask variable; inside a jitted function use scl_jax.unit_step"
        )
    check_no_nan(masked.masks, "binary_masks")
    return jax.tree.map(lambda s: s >= 0, masked.masks)


def check_masked(masked: Any, caller: str) -> None:
    """Raise where `masked` is no MaskedParams or its two trees do not fit."""
    if not isinstance(masked, MaskedParams):
        raise TypeError(
            f"{caller}: needs a MaskedParams, as mask_params returns it; "
            f"got {type(masked).__name__}"
        )
    weights, masks = leaves_by_path(masked.weights), leaves_by_path(masked.masks)
    structures = [jax.tree.structure(tree, is_leaf=is_none) for tree in masked]
    if structures[0] != structures[1]:
        differing = sorted(set(weights) ^ set(masks)) or list(masks)
        raise ValueError(
            f"{caller}: masks must have the structure of weights (None where a leaf "
            f"is not masked); they differ at {listed(differing)}"
        )
    for path, mask in masks.items():
        if mask is None:
            continue
        weight = weights[path]
        if weight is None or jnp.shape(mask) != jnp.shape(weight):
            shape = "missing" if weight is None else jnp.shape(weight)
            raise ValueError(
                f"{caller}: a mask must have the shape of its weight; at {path} "
                f"the mask is {jnp.shape(mask)}, the weight {shape}"
            )


def check_no_nan(masks: PyTree, caller: str) -> None:
    """Raise ValueError where a concrete mask variable is NaN."""
    for path, mask in leaves_by_path(masks).items():
        if mask is None or isinstance(mask, Tracer):
            continue
        if jnp.isnan(mask).any():
            raise ValueError(
                f"{caller}: mask variables must be numbers; "
                f"{int(jnp.isnan(mask).sum())} of {mask.size} at {path} are NaN"
            )


def map_masks(function: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Map (key path, leaf, ...) over trees like the masks, as optimizers see them.

    Of a `MaskedParams`, alone or somewhere in the tree, the masks are mapped and
    the weights kept: a transform meant for mask variables never touches a weight.
    """

    def is_masked(x):
        return isinstance(x, MaskedParams)

    def visit(key_path, leaf, *others):
        if not is_masked(leaf):
            return function(key_path, leaf, *others)
        for other in others:
            check_masked(other, "params")
        masks = [other.masks for other in others]
        return leaf._replace(masks=map_masks(function, leaf.masks, *masks))

    return jax.tree_util.tree_map_with_path(visit, tree, *rest, is_leaf=is_masked)


def mask_leaves(tree: PyTree) -> list[tuple[Any, Any]]:
    """Return (key path, leaf) of what `map_masks` maps, in its order."""
    found = []
    map_masks(lambda key_path, leaf: found.append((key_path, leaf)), tree)
    return found


def with_mask_leaves(tree: PyTree, leaves: Iterable[Any]) -> PyTree:
    """Return the tree with other leaves in the place of its `mask_leaves`."""
    new = iter(leaves)
    return map_masks(lambda key_path, leaf: next(new), tree)


def _map_masked(
    function: Callable[[jax.Array, jax.Array], jax.Array],
    masked: MaskedParams,
    caller: str,
) -> PyTree:
    """Map (weight, mask) -> weight over the masked leaves, and keep the others."""
    check_masked(masked, caller)

    def visit(mask, weight):
        return weight if mask is None else function(jnp.asarray(weight), mask)

    return jax.tree.map(visit, masked.masks, masked.weights, is_leaf=is_none)
