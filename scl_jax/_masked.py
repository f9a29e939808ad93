"""MaskedParams and what is done with it: mask, apply, fold, count."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from scl_jax._paths import PyTree, is_none, leaf_path, leaves_by_path, listed
from scl_jax._select import Rule, kernels, selected
from scl_jax._step import STE, checked_ste, identity, unit_step

Initial = float | Callable[[str, jax.Array], jax.Array]


class MaskedParams(NamedTuple):
    """Parameters of which some are masked: one pytree for the optimizer.

    Attributes:
      weights: the parameters, as the model made them.
      masks: the same structure; a mask variable of the weight's shape where a
        leaf is masked, None elsewhere.
    """

    weights: PyTree
    masks: PyTree


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
      initial: the mask variables' start value, in units of the mask learning
        rate: with rms normalization and no momentum, 0.1 is 100 typical steps
        of 1e-3 above the threshold. Or a function (path, leaf) -> array of the
        leaf's shape. The default is our choice; the source names none.
      dtype: the mask variables' floating dtype; that of each weight by default.

    Returns:
      `MaskedParams`; mask variables are sharded as their weights.

    Raises:
      ValueError: if `params` is empty, a rule matches nothing, `initial` is not
        finite, or a start value has another shape than its leaf.
      TypeError: if a selected leaf or `dtype` is not floating, or `params` is
        masked already.

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
    if not callable(initial) and not math.isfinite(initial):
        raise ValueError(f"mask_params: initial must be finite, got {initial}")

    def start(path, leaf):
        if not callable(initial):
            return jnp.full_like(leaf, initial, dtype=dtype)
        value = jnp.asarray(initial(path, leaf), dtype=dtype or leaf.dtype)
        if value.shape != leaf.shape:
            raise ValueError(
                f"mask_params: initial({path!r}, leaf) must have the leaf's shape "
                f"{leaf.shape}, got {value.shape}"
            )
        return value

    masks = jax.tree_util.tree_map_with_path(
        lambda path, chosen, leaf: start(leaf_path(path), leaf) if chosen else None,
        selected(params, select, "mask_params"),
        params,
    )
    check_no_nan(masks, "mask_params")
    return MaskedParams(weights=params, masks=masks)


def apply_masks(masked: MaskedParams, *, ste: STE = identity) -> PyTree:
    """Return W * H(S), the parameters a model is called with in training.

    Args:
      masked: what `mask_params` made.
      ste: the straight-through estimator that carries the gradient to the mask
        variables; see `unit_step`.

    Returns:
      A pytree like `masked.weights`, in the weights' dtypes. With G the gradient
      of a loss at it, the weights get G * H(S), the mask variables G * W * p(S).
      NaN in a mask variable shows as NaN here.

    Raises:
      TypeError: if `masked` is no MaskedParams or `ste` no hashable callable.
      ValueError: if a mask has another shape than its weight, or the trees
        differ in structure.

    Example:
      >>> import jax.numpy as jnp
      >>> masked = MaskedParams({"w": jnp.array([2.0, 3.0])},
      ...                       {"w": jnp.array([0.1, -0.1])})
      >>> apply_masks(masked)["w"].tolist()
      [2.0, 0.0]
    """
    checked_ste(ste, "apply_masks")

    def product(weight, mask):
        return weight * unit_step(mask, ste).astype(weight.dtype)

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
        # A product alone would turn negative weights into -0, infinite into NaN.
        return jnp.where(h == 0, jnp.zeros_like(weight), weight * h)

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


def connection_count(masked: MaskedParams, *, ste: STE = identity) -> jax.Array:
    """Count the connections, differentiably: the penalty's term of the loss.

    Args:
      masked: what `mask_params` made.
      ste: the straight-through estimator; use the one given to `apply_masks`.

    Returns:
      The sum of H(S) over all masked leaves, a float32 scalar. Its gradient is
      p(S). Above 2**24 it is rounded, as float32 is: `report` counts in
      integers. NaN in a mask variable makes it NaN.

    Raises:
      TypeError: if `masked` is no MaskedParams or `ste` no hashable callable.
      ValueError: if the trees do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> masked = mask_params({"kernel": jnp.ones((3, 2))})
      >>> float(connection_count(masked))
      6.0
    """
    check_masked(masked, "connection_count")
    checked_ste(ste, "connection_count")
    counts = [
        jnp.sum(unit_step(mask, ste), dtype=jnp.float32)
        for mask in jax.tree.leaves(masked.masks)
    ]
    return sum(counts, start=jnp.zeros((), jnp.float32))


def check_masked(masked: Any, caller: str) -> None:
    """Raise where `masked` is no MaskedParams or its two trees do not fit."""
    if not isinstance(masked, MaskedParams):
        raise TypeError(
            f"{caller}: needs a MaskedParams, as mask_params returns it; "
            f"got {type(masked).__name__}"
        )
    weights, masks = leaves_by_path(masked.weights), leaves_by_path(masked.masks)
    if list(weights) != list(masks):
        differing = sorted(set(weights) ^ set(masks)) or list(masks)
        raise ValueError(
            f"{caller}: masks must have the structure of weights (None where a leaf "
            f"is not masked); they differ at {listed(differing)}"
        )
    for path, mask in masks.items():
        if mask is not None and jnp.shape(mask) != jnp.shape(weights[path]):
            raise ValueError(
                f"{caller}: a mask must have the shape of its weight; at {path} "
                f"the mask is {jnp.shape(mask)}, the weight "
                f"{jnp.shape(weights[path])}"
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

    Of a `MaskedParams` the masks are mapped and the weights kept, so that a
    transform meant for mask variables never touches a weight.
    """
    if isinstance(tree, MaskedParams):
        return tree._replace(
            masks=map_masks(function, tree.masks, *(other.masks for other in rest))
        )
    return jax.tree_util.tree_map_with_path(function, tree, *rest)


def _map_masked(
    function: Callable[[jax.Array, jax.Array], jax.Array],
    masked: MaskedParams,
    caller: str,
) -> PyTree:
    """Map (weight, mask) -> weight over the masked leaves, and keep the others."""
    check_masked(masked, caller)
    return jax.tree.map(
        lambda mask, weight: weight if mask is None else function(weight, mask),
        masked.masks,
        masked.weights,
        is_leaf=is_none,
    )
