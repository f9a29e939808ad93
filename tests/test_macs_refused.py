"""Arguments that count_macs refuses, and what it says of them."""

import operator

import pytest
from counting import spec

import scl_jax
from scl_jax._macs import count_macs


@pytest.mark.parametrize("batch_size", [0, -1, 1.0, True, "1", None])
def test_batch_size_must_be_a_positive_int(batch_size):
    with pytest.raises(ValueError, match="count_macs: batch_size must be a positive"):
        count_macs(operator.matmul, spec(2, 2), spec(2), batch_size=batch_size)


@pytest.mark.parametrize("args", [(), ({},), (None, [])])
def test_example_args_must_hold_an_array(args):
    with pytest.raises(ValueError, match="count_macs: example_args must hold an array"):
        count_macs(lambda w, *x: w, spec(2, 2), *args)


@pytest.mark.parametrize("params", [{}, None, {"a": None}])
def test_params_must_hold_an_array(params):
    with pytest.raises(ValueError, match="count_macs: params must hold an array"):
        count_macs(lambda p, x: x, params, spec(2))


def test_leaves_that_are_no_arrays_are_named():
    params = {"Dense_0": {"kernel": spec(2, 2), "rate": 0.5}, "name": "net"}
    with pytest.raises(TypeError, match=r"are neither: Dense_0/rate, name$"):
        count_macs(lambda p, x: x, params, spec(2))


def test_apply_fn_must_be_callable():
    with pytest.raises(TypeError, match="apply_fn must be callable, got dict"):
        count_macs({}, {"w": spec(2)}, spec(2))


def test_masks_that_do_not_fit_their_weights_are_an_error():
    masked = scl_jax.MaskedParams({"w": spec(2, 2)}, {"v": spec(2, 2)})
    with pytest.raises(ValueError, match="count_macs: masks must have the structure"):
        count_macs(lambda m, x: x, masked, spec(2))


def test_batch_size_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match=r"batch_size=7 examples; at w the count 60"):
        count_macs(lambda p, x: x @ p["w"], {"w": spec(3, 5)}, spec(4, 3), batch_size=7)
