"""Feature axes: which axes of a kernel tell its output units apart."""

import operator
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

Axes = int | tuple[int, ...]
FeatureAxes = Axes | Callable[[str, Any], Axes]


def reduced_axes(
    feature_axes: FeatureAxes, path: str, leaf: Any, caller: str
) -> tuple[int, ...]:
    """Return the axes of `leaf` that are not feature axes.

    Raises:
      TypeError: if the leaf is not floating, or the axes are no ints.
      ValueError: if an axis is out of range for the leaf or given twice.
    """
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(
            f"{caller}: mask variables and their gradients must be floating; "
            f"{path} is {leaf.dtype}"
        )
    given, origin = feature_axes, caller
    if callable(feature_axes):
        given, origin = feature_axes(path, leaf), f"{caller}: at {path}"
    axes = axes_tuple(given, origin)
    if any(not -leaf.ndim <= axis < leaf.ndim for axis in axes):
        raise ValueError(
            f"{caller}: feature axes {given} are out of range for "
            f"{path} of shape {leaf.shape}"
        )
    features = {axis % leaf.ndim for axis in axes}
    if len(features) < len(axes):
        raise ValueError(
            f"{caller}: feature axes {given} name an axis of {path} of "
            f"shape {leaf.shape} twice"
        )
    return tuple(axis for axis in range(leaf.ndim) if axis not in features)


def axes_tuple(axes: Any, caller: str) -> tuple[int, ...]:
    """Return feature axes as a tuple; raise TypeError where they are no ints."""
    try:
        given = axes if isinstance(axes, tuple) else (axes,)
        return tuple(operator.index(axis) for axis in given)
    except TypeError:
        raise TypeError(
            f"{caller}: feature_axes must be an int or a tuple of ints, or a function "
            f"(path, leaf) to such; got {axes!r}"
        ) from None
