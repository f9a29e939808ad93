"""What a connection costs: one, or MACs, bytes or any other number for each."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from scl_jax._macs import UnknownMacs
from scl_jax._masked import MaskedParams, check_masked
from scl_jax._paths import PyTree, leaves_by_path, listed
from scl_jax._step import STE, checked_ste, identity, unit_step

Cost = float | jax.Array
CostOf = Callable[[str, Any], Cost]


def connection_count(
    masked: MaskedParams, *, ste: STE = identity, costs: PyTree | None = None
) -> jax.Array:
    """Count the connections, differentiably: the penalty's term of the loss.

    Args:
      masked: what `mask_params` made.
      ste: the straight-through estimator; use the one given to `apply_masks`.
      costs: what a connection counts, c: a pytree like the parameters, at each
        masked leaf a number >= 0, or an array of the leaf's shape with one for each
        connection; see `macs_per_connection`. None: each counts 1.

    Returns:
      The sum of c * H(S) over all masked leaves, a float32 scalar. Its gradient is
      c * p(S). Above 2**24 it is rounded, as float32 is: `report` counts in
      integers. NaN in a mask variable makes it NaN.

    Raises:
      TypeError: if `masked` is no MaskedParams, `ste` no hashable callable, or a
        cost no number.
      ValueError: if the trees do not fit, or a masked leaf has no cost, or one that
        is unknown, negative, infinite, NaN, or of another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from scl_jax import mask_params
      >>> masked = mask_params({"kernel": jnp.ones((3, 2))})
      >>> float(connection_count(masked))
      6.0
      >>> float(connection_count(masked, costs={"kernel": 49.0}))
      294.0
    """
    check_masked(masked, "connection_count")
    checked_ste(ste, "connection_count")
    find_cost = cost_of(costs, "connection_count")
    total = jnp.zeros((), jnp.float32)
    for path, mask in leaves_by_path(masked.masks).items():
        if mask is None:
            continue
        cost, h = find_cost(path, mask), unit_step(mask, ste)
        if np.ndim(cost):
            total += jnp.sum(cost * h, dtype=jnp.float32)
        else:
            total += cost * jnp.sum(h, dtype=jnp.float32)
    return total


def macs_per_connection(macs: PyTree, params: PyTree) -> PyTree:
    """Return what each connection of a leaf adds to the MACs of an example.

    Args:
      macs: what `count_macs` returned: the MACs of whole leaves.
      params: the parameters that it counted, or a `MaskedParams` of them.

    Returns:
      A pytree like `macs` of floats: costs for `meet_budget`, `connection_count` and
      `add_connection_penalty`. `UnknownMacs` stays; only masked leaves need a cost.

    Raises:
      ValueError: if the trees differ in structure.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"conv": jnp.ones((3, 3, 1, 8)), "dense": jnp.ones((72, 10))}
      >>> macs_per_connection({"conv": 3528, "dense": 720}, params)
      {'conv': 49.0, 'dense': 1.0}
    """
    weights = params.weights if isinstance(params, MaskedParams) else params
    entries, leaves = leaves_by_path(macs), leaves_by_path(weights)
    if list(entries) != list(leaves):
        raise ValueError(
            "macs_per_connection: macs must have the structure of the parameters, as "
            f"count_macs returns it; they are: {listed(leaves)}; macs has: "
            f"{listed(entries)}"
        )

    def per_connection(entry, leaf):
        return entry if isinstance(entry, UnknownMacs) else entry / leaf.size

    return jax.tree.map(per_connection, macs, weights)


def cost_of(costs: PyTree | None, caller: str) -> CostOf:
    """Return the function from a masked leaf to what its connections cost.

    Args:
      costs: a pytree whose leaves at the masked paths are the cost of a connection,
        or arrays of the leaf's shape with the cost of each; None: all cost 1.
      caller: whom to name in errors.

    Returns:
      A function (path, leaf) -> number or array of the leaf's shape. It raises
      ValueError if there is no cost for the leaf, or one that is unknown, negative,
      infinite, NaN, or of another shape; TypeError if it is no number. What is traced
      cannot be looked at; all else is concrete, inside a jitted function too.
    """
    if costs is None:
        return lambda path, leaf: 1.0
    by_path = leaves_by_path(costs)

    def find(path, leaf):
        if path not in by_path:
            raise ValueError(
                f"{caller}: costs must have the structure of the parameters; there is "
                f"none for {path}; there are: {listed(by_path)}"
            )
        cost = by_path[path]
        if isinstance(cost, UnknownMacs):
            raise ValueError(
                f"{caller}: costs must be numbers; at {path} the MACs are unknown: "
                f"{cost.reason}"
            )
        if not _is_real(cost):
            raise TypeError(
                f"{caller}: a cost must be a number, or an array of them; at {path} "
                f"it is {cost!r}"
            )
        if isinstance(cost, numbers.Real):
            number = float(cost)
            if not 0 <= number < math.inf:
                raise ValueError(
                    f"{caller}: a cost must be a finite number >= 0; at {path} it is "
                    f"{number}"
                )
            return number
        if cost.shape not in ((), leaf.shape):
            raise ValueError(
                f"{caller}: costs of single connections must have the shape of their "
                f"leaf; at {path} they have {cost.shape}, the leaf {leaf.shape}"
            )
        if isinstance(cost, Tracer):
            return cost.astype(jnp.float32)
        with jax.ensure_compile_time_eval():
            each = jnp.asarray(cost, jnp.float32)
            if not jnp.all((each >= 0) & (each < jnp.inf)):
                raise ValueError(
                    f"{caller}: costs must be finite and >= 0; at {path} they are not"
                )
        return each

    return find


def _is_real(x: Any) -> bool:
    """Tell whether `x` is a real number, or an array of such; bool is none."""
    if isinstance(x, np.ndarray | np.generic | jax.Array):
        return jnp.isdtype(x.dtype, ("integral", "real floating"))
    return isinstance(x, numbers.Real) and not isinstance(x, bool)
