"""MaskedParams as mask_params makes them: where masks are, their start, refusals."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from masked_trees import BF16, F16, F32, make_params

from scl_jax import (
    MaskedParams,
    apply_masks,
    connection_count,
    fold_masks,
    mask_params,
)


def test_masks_stand_beside_the_kernels_and_none_elsewhere():
    params = make_params()
    masked = mask_params(params)
    assert isinstance(masked, MaskedParams)
    assert masked.weights is params
    assert jax.tree.map(jnp.shape, masked.masks) == {
        "conv": {"kernel": (3, 3, 2, 4), "bias": None},
        "dense": {"kernel": (5, 3), "bias": None},
    }


def test_everything_is_connected_at_the_start():
    params = make_params()
    masked = mask_params(params)
    chex.assert_trees_all_equal(apply_masks(masked), params)
    chex.assert_trees_all_equal(fold_masks(masked), params)
    assert float(connection_count(masked)) == 3 * 3 * 2 * 4 + 5 * 3


@pytest.mark.parametrize("initial", [0.25, -0.25, 0, np.float32(0.5), jnp.float32(2)])
def test_initial_number_fills_every_mask(initial):
    masks = mask_params(make_params(), initial=initial).masks
    for mask in jax.tree.leaves(masks):
        np.testing.assert_array_equal(mask, np.full(mask.shape, initial, np.float32))


def test_initial_function_gets_path_and_leaf_of_the_masked_ones_only():
    seen = {}

    def initial(path, leaf):
        seen[path] = leaf.shape
        return jnp.full(leaf.shape, len(path), F32)

    masks = mask_params(make_params(), initial=initial).masks
    assert seen == {"conv/kernel": (3, 3, 2, 4), "dense/kernel": (5, 3)}
    assert float(masks["dense"]["kernel"][0, 0]) == len("dense/kernel")


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("initial", [0.5, lambda path, leaf: np.full(leaf.shape, 0.5)])
def test_masks_have_the_dtype_of_their_weight_or_the_one_asked_for(dtype, initial):
    own = mask_params(make_params(dtype=dtype), initial=initial)
    asked = mask_params(make_params(), initial=initial, dtype=dtype)
    for masked in (own, asked):
        dtypes = {mask.dtype for mask in jax.tree.leaves(masked.masks)}
        assert dtypes == {np.dtype(dtype)}


def test_mask_params_works_without_values():
    shapes = jax.eval_shape(mask_params, jax.eval_shape(make_params))
    assert shapes.masks["dense"]["kernel"] == jax.ShapeDtypeStruct((5, 3), F32)
    assert shapes.masks["dense"]["bias"] is None


def test_initial_that_returns_the_leaf_itself_shares_no_buffer_with_it():
    # A shared buffer cannot be donated twice, as a jitted train step does.
    masked = mask_params({"kernel": jnp.ones((2, 2))}, initial=lambda path, leaf: leaf)
    weight, mask = masked.weights["kernel"], masked.masks["kernel"]
    assert weight.unsafe_buffer_pointer() != mask.unsafe_buffer_pointer()


@pytest.mark.parametrize("initial", [np.nan, np.inf, -np.inf, jnp.float32(np.nan)])
def test_initial_number_that_is_not_finite_is_refused(initial):
    with pytest.raises(ValueError, match="initial must be finite in float32"):
        mask_params(make_params(), initial=initial)


def test_initial_function_that_returns_nan_is_refused_by_path():
    def initial(path, leaf):
        value = jnp.ones(leaf.shape)
        return value.at[0, 0].set(jnp.nan) if path == "dense/kernel" else value

    match = r"initial\(.dense/kernel., leaf\) must be finite"
    with pytest.raises(ValueError, match=match):
        mask_params(make_params(), initial=initial)


def test_initial_function_that_returns_infinity_is_refused_by_path():
    def initial(path, leaf):
        return jnp.full(leaf.shape, jnp.inf)

    with pytest.raises(ValueError, match=r"finite.*conv/kernel|conv/kernel.*finite"):
        mask_params(make_params(), initial=initial)


def test_initial_number_that_overflows_the_masks_dtype_is_refused():
    with pytest.raises(ValueError, match="finite"):
        mask_params(make_params(), initial=1e6, dtype=F16)


@pytest.mark.parametrize("shape", [(), (3,), (1, 3), (3, 5)])
def test_initial_function_of_the_wrong_shape_is_refused_by_path(shape):
    params = {"dense": {"kernel": jnp.ones((5, 3))}}
    match = re.escape(
        "mask_params: initial('dense/kernel', leaf) must have the leaf's shape "
        f"(5, 3), got {shape}"
    )
    with pytest.raises(ValueError, match=match):
        mask_params(params, initial=lambda path, leaf: np.ones(shape))


@pytest.mark.parametrize("initial", ["0.1", None])
def test_initial_that_is_no_number_is_refused_by_name(initial):
    with pytest.raises(TypeError, match="mask_params: initial must be"):
        mask_params(make_params(), initial=initial)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.complex64, int])
def test_masks_of_a_dtype_that_is_not_floating_are_refused(dtype):
    with pytest.raises(TypeError, match="mask_params: dtype must be floating, got"):
        mask_params(make_params(), dtype=dtype)


def test_masking_twice_is_refused():
    with pytest.raises(TypeError, match="params is a MaskedParams already"):
        mask_params(mask_params(make_params()))
