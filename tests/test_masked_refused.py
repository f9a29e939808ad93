"""MaskedParams that are wrong: a NaN shows, the rest is refused and said where."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from masked_trees import make_masked

from scl_jax import (
    LeakyReLU,
    MaskedParams,
    apply_masks,
    binary_masks,
    connection_count,
    fold_masks,
)

# NaN shows


def nan_masked():
    masks = {"conv": {"kernel": jnp.ones((2, 2))}, "dense": {"kernel": jnp.ones(3)}}
    masks["dense"]["kernel"] = masks["dense"]["kernel"].at[1:].set(jnp.nan)
    return MaskedParams(jax.tree.map(jnp.ones_like, masks), masks)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_nan_mask_variable_shows_in_applied_weights_and_count(transform):
    applied = transform(apply_masks)(nan_masked())
    np.testing.assert_array_equal(applied["dense"]["kernel"], [1.0, np.nan, np.nan])
    np.testing.assert_array_equal(applied["conv"]["kernel"], np.ones((2, 2)))
    assert np.isnan(transform(connection_count)(nan_masked()))


def test_nan_mask_variable_shows_even_where_the_weight_is_zero():
    masked = nan_masked()
    masked = masked._replace(weights=jax.tree.map(jnp.zeros_like, masked.weights))
    assert np.isnan(apply_masks(masked)["dense"]["kernel"][1:]).all()
    assert np.isnan(jax.jit(fold_masks)(masked)["dense"]["kernel"][1:]).all()


@pytest.mark.parametrize("function", [fold_masks, binary_masks])
def test_nan_mask_variable_is_refused_by_path(function):
    match = (
        f"{function.__name__}: mask variables must be numbers; "
        "2 of 3 at dense/kernel are NaN"
    )
    with pytest.raises(ValueError, match=match):
        function(nan_masked())


def test_nan_mask_variable_shows_in_weights_folded_under_jit():
    folded = jax.jit(fold_masks)(nan_masked())
    np.testing.assert_array_equal(folded["dense"]["kernel"], [1.0, np.nan, np.nan])


def test_binary_masks_of_a_traced_tree_are_refused():
    with pytest.raises(TypeError, match=r"concrete arrays.*use scl_jax\.unit_step"):
        jax.jit(binary_masks)(make_masked())


# Bad input, to each function

FUNCTIONS = [apply_masks, fold_masks, binary_masks, connection_count]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    "plain",
    [{"kernel": jnp.ones, "bias": None}, ({"w": 1.0}, {"w": 1.0}), None],
    ids=["dict", "tuple", "none"],
)
def test_what_is_no_masked_params_is_refused(function, plain):
    match = (
        f"^{function.__name__}: needs a MaskedParams, as mask_params returns it; "
        f"got {type(plain).__name__}$"
    )
    with pytest.raises(TypeError, match=match):
        function(plain)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(1, 3), (3, 5), (3,), (), (5, 3, 1)])
def test_mask_of_another_shape_is_refused_by_path(function, shape):
    masked = MaskedParams(
        {"dense": {"kernel": np.zeros((5, 3), np.float32)}},
        {"dense": {"kernel": np.zeros(shape, np.float32)}},
    )
    match = re.escape(
        f"{function.__name__}: a mask must have the shape of its weight; at "
        f"dense/kernel the mask is {shape}, the weight (5, 3)"
    )
    with pytest.raises(ValueError, match=match):
        function(masked)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("masks", "where"),
    [
        ({"dense": {"kernel": np.zeros((2, 2), np.float32)}}, "dense/bias"),
        (
            {
                "dense": {"kernel": None, "bias": None, "extra": None},
            },
            "dense/extra",
        ),
        ({"dense": None}, "dense, dense/bias, dense/kernel"),
        ({}, "dense/bias, dense/kernel"),
    ],
    ids=["missing", "extra", "shallow", "empty"],
)
def test_masks_of_another_structure_are_refused_by_path(function, masks, where):
    weights = {"dense": {"kernel": np.zeros((2, 2)), "bias": np.zeros(2)}}
    match = (
        f"{function.__name__}: masks must have the structure of weights .*; "
        f"they differ at {where}$"
    )
    with pytest.raises(ValueError, match=match):
        function(MaskedParams(weights, masks))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_masks_in_a_tuple_beside_weights_in_a_list_are_refused(function):
    weights = [jnp.ones((2, 2))]
    with pytest.raises(ValueError, match="masks must have the structure of weights"):
        function(MaskedParams(weights, tuple(weights)))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_mask_beside_no_weight_is_refused_by_path(function):
    masked = MaskedParams({"a": None}, {"a": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match=rf"{function.__name__}: .*at a\b"):
        function(masked)


@pytest.mark.parametrize("function", [apply_masks, connection_count])
@pytest.mark.parametrize("ste", ["leaky", LeakyReLU, None])
def test_what_is_no_estimator_is_refused_even_where_nothing_is_masked(function, ste):
    masked = MaskedParams({"w": jnp.ones(2)}, {"w": None})
    match = f"{function.__name__}: ste must be a hashable callable"
    with pytest.raises(TypeError, match=match):
        function(masked, ste=ste)
