"""The Optax transform that normalizes mask gradients per feature."""

import jax
import jax.numpy as jnp
import optax

from scl_jax._features import FeatureAxes, axes_tuple, reduced_axes
from scl_jax._masked import map_masks
from scl_jax._paths import leaf_path

_NAME = "normalize_by_feature"
_LARGEST_SIZE = float(1 / jnp.finfo(jnp.float32).tiny)


def _rms(g: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(g), axis=axes, keepdims=True))


def _l2(g: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(g), axis=axes, keepdims=True))


def _max(g: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.max(jnp.abs(g), axis=axes, keepdims=True)


_NORMS = {"rms": _rms, "l2": _l2, "max": _max, "none": None}


def normalize_by_feature(
    feature_axes: FeatureAxes = -1, *, norm: str = "rms"
) -> optax.GradientTransformation:
    r"""Divide each feature's slice of the mask gradients by the slice's norm.

    .. math::
      N(g)_{\cdot f} = g_{\cdot f} / \lVert g_{\cdot f} \rVert

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

    Returns:
      A stateless `optax.GradientTransformation`. Squares are summed in float32;
      an update has the dtype of its gradient. A feature whose gradient is zero
      (or has squares below float32's range) is left as it is. NaN and infinity
      show as NaN in their feature. Given a `MaskedParams`, it normalizes the
      masks' gradients and leaves those of the weights alone.

    Raises:
      ValueError: if the norm is unknown; at init and update, if a feature axis is
        out of range for a leaf or given twice.
      TypeError: if `feature_axes` is no int, tuple of ints or callable, or a
        gradient is not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = normalize_by_feature()
      >>> gradient = {"kernel": jnp.array([[64.0, 0.25, 0.0], [-64.0, 0.25, 0.0]])}
      >>> updates, _ = tx.update(gradient, tx.init(gradient))
      >>> print(updates["kernel"])
      [[ 1.  1.  0.]
       [-1.  1.  0.]]

    Reference:
      Tang et al., arXiv 2201.05020, for the idea; the norm and the order with the
      penalty are our choice.
    """
    if norm not in _NORMS:
        raise ValueError(
            f"normalize_by_feature: norm must be one of {', '.join(_NORMS)}; "
            f"got {norm!r}"
        )
    if not callable(feature_axes):
        axes_tuple(feature_axes, _NAME)
    measure = _NORMS[norm]

    def axes_of(key_path, leaf):
        return reduced_axes(feature_axes, leaf_path(key_path), leaf, _NAME)

    def normalize(key_path, g):
        axes = axes_of(key_path, g)
        if measure is None:
            return g
        g_float32 = g.astype(jnp.float32)
        size = measure(g_float32, axes)
        # A size that overflowed, or whose reciprocal would underflow, must not turn
        # finite gradients into zeros in silence.
        size = jnp.where(size > _LARGEST_SIZE, jnp.nan, size)
        return jnp.where(size == 0, g_float32, g_float32 / size).astype(g.dtype)

    def init_fn(params):
        # Nothing to keep: only to say as early as possible what does not fit.
        map_masks(axes_of, params)
        return optax.EmptyState()

    def update_fn(updates, state, params=None):
        del params
        return map_masks(normalize, updates), state

    return optax.GradientTransformation(init_fn, update_fn)
