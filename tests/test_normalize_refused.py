"""What normalization refuses: axes, norms and gradients; what is said, and when."""

import re

import jax.numpy as jnp
import optax
import pytest
from norms import gradients

from scl_jax import normalize_by_feature


def both(tx, tree):
    """Call init, then update, which must raise the same."""
    with pytest.raises((TypeError, ValueError)) as at_init:
        tx.init(tree)
    with pytest.raises(type(at_init.value)) as at_update:
        tx.update(tree, optax.EmptyState())
    assert str(at_init.value) == str(at_update.value)
    raise at_init.value


@pytest.mark.parametrize("axes", [2, -3, (0, 2), (-1, 5)])
def test_feature_axis_out_of_range_is_refused_by_path(axes):
    match = re.escape(
        f"normalize_by_feature: feature axes {axes} are out of range for "
        "dense/kernel of shape (7, 5)"
    )
    with pytest.raises(ValueError, match=match):
        both(normalize_by_feature(axes), {"dense": {"kernel": gradients(7, 5)}})


def test_feature_axis_of_a_scalar_is_out_of_range():
    with pytest.raises(ValueError, match=r"out of range for scale of shape \(\)"):
        both(normalize_by_feature(), {"scale": jnp.ones(())})


@pytest.mark.parametrize("axes", [(0, 0), (-1, 1), (0, 1, -2)])
def test_feature_axis_given_twice_is_refused_by_path(axes):
    match = re.escape(
        f"feature axes {axes} name an axis of dense/kernel of shape (7, 5) twice"
    )
    with pytest.raises(ValueError, match=match):
        both(normalize_by_feature(axes), {"dense": {"kernel": gradients(7, 5)}})


@pytest.mark.parametrize("norm", ["L2", "", None, "unknown"])
def test_unknown_norm_is_refused_when_the_transform_is_made(norm):
    match = f"norm must be one of rms, l2, max, none; got {norm!r}"
    with pytest.raises(ValueError, match=match):
        normalize_by_feature(norm=norm)


@pytest.mark.parametrize("axes", ["-1", None, 1.0, [0, 1], (0, "1"), ((0,),)])
def test_feature_axes_that_are_no_ints_are_refused_when_made(axes):
    match = "normalize_by_feature: feature_axes must be an int or a tuple of ints"
    with pytest.raises(TypeError, match=match):
        normalize_by_feature(axes)


@pytest.mark.parametrize("axes", [None, 1.0, [0, 1], "x"])
def test_feature_axes_function_that_returns_no_ints_is_refused_by_path(axes):
    tx = normalize_by_feature(lambda path, leaf: axes)
    tree = {"dense": {"kernel": gradients(7, 5)}}
    with pytest.raises(TypeError, match="must be an int or a tuple of ints"):
        both(tx, tree)
    with pytest.raises(TypeError, match="dense/kernel"):
        tx.init(tree)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.complex64])
def test_gradient_that_is_not_floating_is_refused_by_path(dtype):
    match = f"gradients must be floating; dense/kernel is {dtype.dtype}"
    with pytest.raises(TypeError, match=match):
        both(normalize_by_feature(), {"dense": {"kernel": jnp.ones((7, 5), dtype)}})
