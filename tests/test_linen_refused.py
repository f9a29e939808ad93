"""What masked Linen modules refuse, and what they say of it."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from test_linen import Net, inputs

import scl_jax
from scl_jax.linen import join, masked


def test_a_rule_that_matches_nothing_is_an_error_at_init():
    model = masked(Net(), select=scl_jax.select("Dense_7/kernel"))
    with pytest.raises(ValueError, match=r"Dense_7/kernel.*Dense_0/kernel"):
        model.init(jax.random.key(0), inputs())


def test_dense_parameters_given_to_a_masked_module_are_refused():
    dense = Net().init(jax.random.key(0), inputs())
    match = r"join\(scl_jax.mask_params\(params\)\).*Got: .*Dense_0/kernel"
    with pytest.raises(ValueError, match=match):
        masked(Net()).apply(dense, inputs())


def test_parameters_called_like_a_mask_variable_are_refused():
    weights = {"a": {"kernel": jnp.ones((2, 2)), "kernel_mask": jnp.ones(3)}}
    with pytest.raises(ValueError, match="a/kernel_mask would be taken for"):
        join(scl_jax.mask_params(weights))


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match="masked: module must be a Linen module"):
        masked(jnp.sin)
    with pytest.raises(TypeError, match="masked"):
        masked(Net(), ste=0.5)  # pyright: ignore


def test_an_instance_inside_a_module_is_refused():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return masked(nn.Dense(3))(x)

    with pytest.raises(ValueError, match="inside a module, wrap the class"):
        Outer().init(jax.random.key(0), inputs())
