"""What the masks do from step to step, in numbers for a training log."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scl_jax._features import FeatureAxes, reduced_axes
from scl_jax._masked import MaskedParams, check_masked
from scl_jax._paths import PyTree, is_none, leaves_by_path, listed

_NAME = "mask_statistics"
_LARGEST_COUNT = np.iinfo(np.int32).max


class MaskStatistics(NamedTuple):
    """What `mask_statistics` returns: arrays of float32, None where nothing was given.

    Attributes:
      connections: shape (); the masks that are 1.
      features_without_input: shape (); the fraction, 0 to 1, of all features that have
        no connection. Such a neuron or filter is a constant.
      flips: shape (); the masks that differ from `previous`.
      returned: shape (); those of the flips that are connections again.
      gradient_norm: a pytree like `masked.masks` of the rms of the mask gradient per
        feature, of the shape of the leaf's feature axes; None where unmasked.
    """

    connections: jax.Array
    features_without_input: jax.Array
    flips: jax.Array | None
    returned: jax.Array | None
    gradient_norm: PyTree


def mask_statistics(
    masked: MaskedParams,
    previous: MaskedParams | None = None,
    gradient: PyTree | None = None,
    *,
    feature_axes: FeatureAxes = -1,
) -> MaskStatistics:
    """Measure what the masks do: how many connect, change, return, and are pushed.

    It is for use inside the jitted train step, where `report` cannot go. It must read
    the mask variables, those of `previous` and the gradient: 4 bytes each in float32.
    On a CPU XLA does not fuse that into the sums, and takes 3.5 times the bytes of the
    mask variables as temporary memory. Across devices counts and squares are summed,
    and mask variables stay. Give it one layer's subtrees for the numbers of that layer.

    Args:
      masked: what `mask_params` made, as it is now.
      previous: the same some steps ago, one or many, for `flips` and `returned`. A
        mask that flipped twice in between has not flipped.
      gradient: the gradient of the mask variables, before it is normalized: a pytree
        like `masked.masks`, or what `jax.grad` returns for a `MaskedParams`.
      feature_axes: the axes of a leaf that tell its features apart, as in
        `normalize_by_feature`.

    Returns:
      `MaskStatistics`. Counts are summed in integers, and given in float32: exactly up
      to 2**24, above to seven digits (`report` is exact). NaN in a mask variable makes
      every number NaN that was counted from it; NaN or infinity in the gradient shows
      in the norm of its feature.

    Raises:
      TypeError: if `masked` or `previous` is no MaskedParams, a mask variable or its
        gradient not floating, or `feature_axes` no int, tuple of ints or callable.
      ValueError: if the trees do not fit, no leaf is masked or a masked one is empty,
        a feature axis is out of range or given twice, or 2**31 weights belong to one
        feature.

    Example:
      >>> before = MaskedParams({"w": jnp.ones((2, 3))},
      ...                       {"w": jnp.array([[0.1, 0.1, -0.1], [0.1, -0.1, -0.1]])})
      >>> now = MaskedParams({"w": jnp.ones((2, 3))},
      ...                    {"w": jnp.array([[0.1, -0.1, 0.2], [0.1, -0.1, -0.1]])})
      >>> seen = mask_statistics(now, before, {"w": jnp.full((2, 3), 0.5)})
      >>> print(*(f"{name} {value:.2f}" for name, value in seen._asdict().items()
      ...         if name != "gradient_norm"), sep=", ")
      connections 3.00, features_without_input 0.33, flips 2.00, returned 1.00
      >>> seen.gradient_norm["w"].tolist()
      [0.5, 0.5, 0.5]
    """
    check_masked(masked, _NAME)
    masks = {p: s for p, s in leaves_by_path(masked.masks).items() if s is not None}
    if not masks or not all(s.size for s in masks.values()):
        shapes = listed(f"{path} {s.shape}" for path, s in masks.items())
        raise ValueError(
            f"{_NAME}: there must be masked leaves, and none of them empty; masked "
            f"are: {shapes or 'none'}"
        )
    axes = {p: _axes(feature_axes, p, s) for p, s in masks.items()}

    def counted(marked):
        return {p: jnp.sum(x, axes[p], dtype=jnp.int32) for p, x in marked.items()}

    def total(counts):
        # Where int32 can hold it: many small terms in float32 would be rounded each.
        dtypes = {
            p: jnp.int32 if masks[p].size <= _LARGEST_COUNT else jnp.float32
            for p in counts
        }
        terms = [jnp.sum(n, dtype=dtypes[p]) for p, n in counts.items()]
        return sum((n.astype(jnp.float32) for n in terms), jnp.float32(0))

    connected = {p: s >= 0 for p, s in masks.items()}
    inputs = counted(connected)
    features = sum(n.size for n in inputs.values())
    without_input = total({p: n == 0 for p, n in inputs.items()}) / features
    damage = _nan_where_nan(masks)

    flips = returned = norms = None
    if previous is not None:
        check_masked(previous, _NAME)
        before = _fitting(masks, previous.masks, "previous")
        flipped = {p: h != (before[p] >= 0) for p, h in connected.items()}
        again = {p: flipped[p] & h for p, h in connected.items()}
        either = damage + _nan_where_nan(before)
        flips, returned = (total(counted(x)) + either for x in (flipped, again))
    if gradient is not None:
        given = gradient.masks if isinstance(gradient, MaskedParams) else gradient
        gs = _fitting(masks, given, "gradient")
        rms = {p: _rms(g, _axes(feature_axes, p, g)) for p, g in gs.items()}
        leaves = [rms.get(path) for path in leaves_by_path(masked.masks)]
        norms = jax.tree.structure(masked.masks, is_leaf=is_none).unflatten(leaves)

    return MaskStatistics(
        connections=total(inputs) + damage,
        features_without_input=without_input + damage,
        flips=flips,
        returned=returned,
        gradient_norm=norms,
    )


def _axes(feature_axes: FeatureAxes, path: str, leaf: Any) -> tuple[int, ...]:
    """Return the axes that are summed over; int32 must hold what is counted there."""
    axes = reduced_axes(feature_axes, path, leaf, _NAME)
    if math.prod(leaf.shape[axis] for axis in axes) > _LARGEST_COUNT:
        raise ValueError(
            f"{_NAME}: less than 2**31 weights must belong to a feature; {path} has "
            f"shape {leaf.shape}"
        )
    return axes


def _fitting(masks: dict[str, Any], tree: PyTree, argument: str) -> dict[str, Any]:
    """Return the leaves of a tree by path; raise where they are not like the masks."""
    leaves = {p: x for p, x in leaves_by_path(tree).items() if x is not None}
    differing = sorted(set(masks) ^ set(leaves))
    if differing:
        raise ValueError(
            f"{_NAME}: {argument} must have a leaf for each mask variable of masked, "
            f"and no other; they differ at {listed(differing)}"
        )
    for path, leaf in leaves.items():
        if jnp.shape(leaf) != masks[path].shape:
            raise ValueError(
                f"{_NAME}: {argument} must have the shapes of the mask variables; at "
                f"{path} it has {jnp.shape(leaf)}, the mask {masks[path].shape}"
            )
    return leaves


def _nan_where_nan(masks: dict[str, Any]) -> jax.Array:
    """Return NaN if a mask variable is NaN, else 0."""
    found = jnp.stack([jnp.isnan(s).any() for s in masks.values()]).any()
    return jnp.where(found, jnp.float32(jnp.nan), jnp.float32(0))


def _rms(g: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(jnp.asarray(g, jnp.float32)), axes))
