"""The Optax transform that normalizes mask gradients per feature."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from scl_jax._features import FeatureAxes, axes_tuple, reduced_axes
from scl_jax._masked import mask_leaves, with_mask_leaves
from scl_jax._paths import is_none, leaf_path

_NAME = "normalize_by_feature"


def _sum(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sum(x, axis=axes, keepdims=True)


def _mean(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.mean(x, axis=axes, keepdims=True)


def _max(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.max(x, axis=axes, keepdims=True)


# What becomes of a feature's squares in the norms.
_REDUCTIONS = {"rms": _mean, "l2": _sum, "max": _max, "none": None}


class NormalizeByFeatureState(NamedTuple):
    """State of `normalize_by_feature`, unless `decay` is 0."""

    # The two sums that make a running mean: over the steps, each times `decay` for
    # every step since.
    weight: jax.Array  # shape (), float32: of ones
    # Of squared norms: for each leaf float32, of the leaf's shape with 1 for the axes
    # that are no feature axes.
    squares: tuple[jax.Array, ...]


def normalize_by_feature(
    feature_axes: FeatureAxes = -1, *, norm: str = "rms", decay: float = 0.9
) -> optax.GradientTransformation:
    r"""Divide each feature's slice of the mask gradients by the slice's norm.

    .. math::
      v_f \leftarrow d \, v_f + \lVert g_{\cdot f} \rVert^2, \qquad
      w \leftarrow d \, w + 1, \qquad
      N(g)_{\cdot f} = g_{\cdot f} / \sqrt{v_f / w}

    A feature `f` is one output unit, a neuron or a filter; its slice holds the
    mask gradients of all its incoming weights. Mask gradients are G * W, so
    their sizes differ by orders of magnitude between features; without the
    normalization the features with large gradients decide alone. The penalty is
    coupled (part of what is divided) where it is in the loss or
    `add_connection_penalty` stands before this transform, and decoupled where it
    stands behind. It must see the averaged gradient: behind gradient
    accumulation and the sum over devices.

    Args:
      feature_axes: the axes of a leaf that tell its features apart; the norm
        reduces over all others. -1 for Dense and Conv, (-2, -1) for attention
        query, key and value, -2 for ConvTranspose with transpose_kernel=True, 0
        for Equinox. Leading layer axes of scanned stacks are batch axes, and
        belong to it: (0, -1). An int, a tuple, or a function (path, leaf) ->
        axes where leaves differ.
      norm: "rms" (the default), "l2", "max" (of absolute values) or "none". The
        source names none. On LeNet-300-100 rms, l2 and max came out alike in
        accuracy over sparsity (experiments/configs/fashion_mnist_lenet300.py);
        with rms, a learning rate does not depend on a feature's number of inputs.
      decay: d, from 0 to below 1, of the running mean of squared norms. At 0 each
        gradient is divided by its own norm, and a step with a large gradient, which
        says more, counts no more than one with a small gradient.

    Returns:
      An `optax.GradientTransformation`, whose state is a number for each feature;
      there is none if `decay` is 0. Squares are summed in float32; an update has the
      dtype of its gradient. A feature whose gradient is zero (or has squares below
      float32's range) is left as it is. NaN and infinity show as NaN in their
      feature, and stay in its running mean. Given a `MaskedParams`, it normalizes
      the masks' gradients and leaves those of the weights alone.

    Raises:
      ValueError: if the norm is unknown or the decay is not in [0, 1); at init and
        update, if a feature axis is out of range for a leaf or given twice; at update,
        if the state is of other leaves.
      TypeError: if `feature_axes` is no int, tuple of ints or callable, the decay is
        no number, or a gradient is not floating; at update, if the state is another
        transform's.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = normalize_by_feature()
      >>> gradient = {"kernel": jnp.array([[64.0, 0.25, 0.0], [-64.0, 0.25, 0.0]])}
      >>> updates, state = tx.update(gradient, tx.init(gradient))
      >>> print(updates["kernel"].round(3))
      [[ 1.  1.  0.]
       [-1.  1.  0.]]
      >>> print(state.squares[0].shape)
      (1, 3)

    Reference:
      Tang et al., arXiv 2201.05020, for the idea; the norm, its running mean (measured
      in experiments/README.md) and the order with the penalty are our choice.
    """
    if norm not in _REDUCTIONS:
        raise ValueError(
            f"normalize_by_feature: norm must be one of {', '.join(_REDUCTIONS)}; "
            f"got {norm!r}"
        )
    if not callable(feature_axes):
        axes_tuple(feature_axes, _NAME)
    reduction = _REDUCTIONS[norm]
    stateless = _is_zero(decay) or reduction is None

    def reduced(leaves):
        """Return the axes that the norm of each leaf reduces over."""
        return [
            reduced_axes(feature_axes, leaf_path(key_path), leaf, _NAME)
            for key_path, leaf in leaves
        ]

    def init_fn(params):
        leaves = mask_leaves(params)
        axes = reduced(leaves)  # stateless or not, what does not fit is said here
        if stateless:
            return optax.EmptyState()
        shapes = map(_shape, [leaf for _, leaf in leaves], axes)
        zeros: Any = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
        # optax.tree_map_params asks with a placeholder, in which not even a None is.
        if not jax.tree.leaves(params, is_leaf=is_none):
            zeros = jnp.zeros(())
        return NormalizeByFeatureState(jnp.zeros((), jnp.float32), zeros)

    def update_fn(updates, state, params=None):
        del params
        leaves = mask_leaves(updates)
        axes = reduced(leaves)
        if reduction is None:
            return updates, state
        gradients = [g for _, g in leaves]
        squares = [
            reduction(jnp.square(g.astype(jnp.float32)), own)
            for g, own in zip(gradients, axes, strict=True)
        ]
        if not stateless:
            squares, state = _accumulated(squares, state, decay)

        def divided(g, square):
            return (g.astype(jnp.float32) / _size(square)).astype(g.dtype)

        return with_mask_leaves(updates, map(divided, gradients, squares)), state

    return optax.GradientTransformation(init_fn, update_fn)


def _shape(leaf: Any, own: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a leaf's norms."""
    return tuple(1 if axis in own else n for axis, n in enumerate(leaf.shape))


def _is_zero(decay: Any) -> bool:
    """Check a decay, and tell whether it is a 0 that will stay one."""
    # Of optax.inject_hyperparams it is an array that changes, and may be traced.
    if isinstance(decay, jax.Array):
        return False
    if not isinstance(decay, int | float):
        raise TypeError(f"{_NAME}: decay must be a number, got {decay!r}")
    if not 0 <= decay < 1:
        raise ValueError(f"{_NAME}: decay must be in [0, 1), got {decay}")
    return decay == 0


def _accumulated(
    squares: list[jax.Array], state: NormalizeByFeatureState, decay: Any
) -> tuple[list[jax.Array], NormalizeByFeatureState]:
    """Return the running means of each leaf's squared norms, and the new state."""
    if not isinstance(state, NormalizeByFeatureState):
        raise TypeError(
            f"{_NAME}: needs the state that its init made; got {type(state).__name__}"
        )
    shapes, known = ([one.shape for one in x] for x in (squares, state.squares))
    if shapes != known:
        raise ValueError(
            f"{_NAME}: needs the state that its init made for these leaves; their "
            f"features have the shapes {shapes}, those of the state {known}"
        )
    weight = decay * state.weight + 1
    # XLA makes one kernel of those that read the same array, but not of those that read
    # the same scalar: so a GPU launches one for all leaves of a size, and not each its
    # own. The barrier keeps the array one.
    factors = jnp.stack([jnp.asarray(decay, jnp.float32), 1 / weight])
    decay, part = jax.lax.optimization_barrier(factors)
    sums = [decay * old + x for old, x in zip(state.squares, squares, strict=True)]
    return [part * x for x in sums], NormalizeByFeatureState(weight, tuple(sums))


def _size(square: jax.Array) -> jax.Array:
    """Return the root of squared norms; 1 where that is 0."""
    # What is chosen is chosen of a feature, not of each of its gradients: a CPU takes
    # a twentieth of a step of LeNet-300-100 for that.
    size = jnp.sqrt(square)
    size = jnp.where(size == 0, 1.0, size)
    # Squares that overflowed must not turn finite gradients into zeros in silence.
    return jnp.where(jnp.isinf(size), jnp.nan, size)
