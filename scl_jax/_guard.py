"""The Optax transform that keeps a layer from losing its last connections."""

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from scl_jax._features import FeatureAxes, axes_tuple, reduced_axes
from scl_jax._masked import map_masks, with_mask_leaves
from scl_jax._paths import KeyPath, leaf_path
from scl_jax._rank import count, highest, marks

_NAME = "keep_connections"

# For each masked leaf, where the connections are that are kept: `minimum` uint32, one
# leaf after the other; or, per feature, an array for each leaf, of shape (minimum, ...)
# with the shape of the leaf, but 1 where it is counted along.
Places = jax.Array | tuple[jax.Array, ...]


def keep_connections(
    minimum: int = 1, *, feature_axes: FeatureAxes | None = None
) -> optax.GradientTransformation:
    r"""Keep at least `minimum` connections in every masked leaf, or every feature.

    An update that would leave a leaf with fewer is changed for the mask variables
    that it would leave largest, `minimum` of them: those that it would prune end at
    the threshold 0, where they connect. All others move as they would have. A layer
    without a connection cuts the network in two: this is what it costs to make that
    impossible.

    It must be the last transform of the mask variables: what follows it could prune
    again. `meet_budget` does the same by itself, leaf by leaf.

    Args:
      minimum: connections per leaf, at least 1. Of equal mask variables some are
        kept, always the same.
      feature_axes: where it is given, as in `normalize_by_feature`, the minimum is
        that of each feature: of each neuron or filter, which without input would be
        a constant. Many features that have no use are then kept alive.

    Returns:
      A stateless `optax.GradientTransformation` for a tree of mask variables (or a
      `MaskedParams`, of which the weights are left alone). `update` needs params.
      It counts the connections of each leaf in every step, and searches only when a
      leaf has too few; across devices it sends counts and, in that search, the largest
      of each leaf, never a leaf. NaN is no connection, and is left where it is.

    Raises:
      TypeError: if `minimum` is no int, or `feature_axes` are no axes. (Under
        `optax.inject_hyperparams` name `minimum` among `static_args`: Optax makes
        an array of every other number.)
      ValueError: if it is less than 1; at init and update, if a leaf, or a feature,
        has fewer entries, or a feature axis does not fit; at update, if params is
        None.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = keep_connections(1)
      >>> masks = {"kernel": jnp.array([[0.5], [0.25]])}
      >>> pruning_all = {"kernel": jnp.array([[-1.0], [-1.0]])}
      >>> updates, _ = tx.update(pruning_all, tx.init(masks), masks)
      >>> updates["kernel"].tolist()
      [[-0.5], [-1.0]]

    Reference:
      Our choice. Layer collapse: Tanaka et al., "Pruning neural networks without any
      data by iteratively conserving synaptic flow", arXiv 2006.05467.
    """
    guard = Guard(minimum, feature_axes, _NAME)

    def init_fn(params):
        map_masks(guard.axes, params)
        return optax.EmptyState()

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError(
                "keep_connections: reads the mask variables; call "
                "update(updates, state, params)"
            )
        found = []  # (update, mask variable, axes)
        map_masks(
            lambda path, u, s: found.append((u, s, guard.axes(path, s))),
            updates,
            params,
        )
        us, masks, axes = zip(*found, strict=True) if found else ((), (), ())
        moved = list(map(after, us, masks))
        kept = jax.lax.cond(
            guard.broken([count(m >= 0, a) for m, a in zip(moved, axes, strict=True)]),
            lambda: list(map(guard.kept, us, masks, axes)),
            lambda: list(us),
        )
        return with_mask_leaves(updates, kept), state

    return optax.GradientTransformation(init_fn, update_fn)


class Guard:
    """A minimum of connections per leaf, or per feature.

    Raises:
      TypeError, ValueError: as `keep_connections` says; `caller` is named.
    """

    def __init__(self, minimum: int, feature_axes: FeatureAxes | None, caller: str):
        if type(minimum) is not int:
            raise TypeError(f"{caller}: minimum must be an int, got {minimum!r}")
        if minimum < 1:
            raise ValueError(f"{caller}: minimum must be >= 1, got {minimum}")
        if feature_axes is not None and not callable(feature_axes):
            axes_tuple(feature_axes, caller)
        self.minimum, self.feature_axes, self.caller = minimum, feature_axes, caller

    def axes(self, key_path: KeyPath, leaf: Any) -> tuple[int, ...]:
        """Return the axes along which the minimum counts."""
        path = leaf_path(key_path)
        if self.feature_axes is None:
            axes = tuple(range(leaf.ndim))
        else:
            axes = reduced_axes(self.feature_axes, path, leaf, self.caller)
        size = math.prod(leaf.shape[axis] for axis in axes)
        if size < self.minimum:
            what = "leaf" if self.feature_axes is None else "feature"
            raise ValueError(
                f"{self.caller}: minimum must be at most the size of every masked "
                f"{what}; {path} has {size} entries, got {self.minimum}"
            )
        return axes

    def broken(self, counts: list[jax.Array]) -> jax.Array:
        """Tell whether a count of connections is below the minimum, shape ()."""
        few = [jnp.any(number < self.minimum) for number in counts]
        return functools.reduce(operator.or_, few, jnp.array(False))

    def kept(self, u: jax.Array, s: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        """Return an update that leaves the minimum."""
        moved = after(u, s)
        largest = highest(moved, self.minimum, axes)
        return settled(u, s, marks(largest, s.shape, axes) | (moved >= 0))

    def largest(self, masks: list[jax.Array], axes: list[tuple[int, ...]]) -> Places:
        """Return where as many of the largest numbers of each leaf are."""
        found = [highest(s, self.minimum, a) for s, a in zip(masks, axes, strict=True)]
        if self.feature_axes is not None:
            return tuple(found)
        # One array, since each costs a launch where it is handed through a branch.
        return jnp.concatenate([x.ravel() for x in found])

    def marks(
        self, largest: Places, masks: list[jax.Array], axes: list[tuple[int, ...]]
    ) -> list[jax.Array]:
        """Mark the places of each leaf that `largest` found."""
        if not isinstance(largest, tuple):
            parts = jnp.split(largest, len(masks))
            largest = tuple(
                part.reshape(self.minimum, *[1] * s.ndim)
                for part, s in zip(parts, masks, strict=True)
            )
        return [
            marks(part, s.shape, a)
            for part, s, a in zip(largest, masks, axes, strict=True)
        ]


def after(u: jax.Array, s: jax.Array) -> jax.Array:
    """Return what `optax.apply_updates` makes of a mask variable."""
    return (s + u).astype(s.dtype)


def settled(u: jax.Array, s: jax.Array, connected: jax.Array) -> jax.Array:
    """Change updates of mask variables where they would not end as they shall.

    Args:
      u: updates, of any floating dtype.
      s: mask variables, of the same shape; NaN stays as it is.
      connected: bool, of the same shape: on which side of the threshold to end.

    Returns:
      Updates of the dtype of `u`: those that lead to the wrong side lead to the
      threshold 0 instead, or to just below it.
    """
    to_zero = (-s).astype(u.dtype)
    if u.dtype != s.dtype:
        # In fewer bits than s has, -s may be rounded to below the threshold.
        to_zero = jnp.where(s + to_zero < 0, jnp.nextafter(to_zero, jnp.inf), to_zero)
    # By more than it is rounded, and than what either dtype takes for 0.
    least = 2 * max(float(jnp.finfo(x.dtype).tiny) for x in (u, s))
    below = (-s - jnp.abs(s) / 32).astype(u.dtype) - least
    moved = after(u, s)
    wrong = ((moved >= 0) != connected) & ~jnp.isnan(moved)
    return jnp.where(wrong, jnp.where(connected, to_zero, below), u)
