"""What a masked Linen module leaves as it is in the module that it wraps."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

import scl_jax
from scl_jax.linen import join, masked, partition, split


def doubled(x):
    return 2 * x


class Net(nn.Module):
    """A layer with what modules have besides."""

    activation: Callable = doubled
    width: int = 3

    def outputs(self):
        return self.width

    @nn.nowrap
    def names(self):
        return sorted(self.variables["params"]["Dense_0"])

    @nn.compact
    def __call__(self, x):
        x = self.activation(nn.Dense(self.width)(x))
        return x, self.names()


X = jnp.ones((2, 4))


def test_methods_can_be_asked_before_there_are_parameters():
    assert masked(Net(width=7)).outputs() == 7


def test_a_class_keeps_its_name_its_module_and_what_it_says_of_itself():
    wrapped = masked(Net)
    for name in ("__name__", "__module__", "__doc__"):
        assert getattr(wrapped, name) == getattr(Net, name)


def test_a_method_that_flax_does_not_wrap_sees_the_variables_as_they_are():
    variables = masked(Net()).init(jax.random.key(0), X)
    names = masked(Net()).apply(variables, method="names")
    assert names == ["bias", "kernel", "kernel_mask"]


@pytest.mark.parametrize("activation", [doubled, jnp.negative])
def test_functions_that_are_fields_are_called_as_they_are(activation):
    params = Net().init(jax.random.key(0), X)["params"]
    model = masked(Net(activation)) if activation is not doubled else masked(Net())
    given = join(scl_jax.mask_params(params))
    expected, _ = Net(activation).apply({"params": params}, X)
    chex.assert_trees_all_close(model.apply({"params": given}, X)[0], expected)


def test_a_submodule_that_init_calls_twice_is_masked_once():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = masked(nn.Dense, select=lambda path, leaf: leaf.ndim > 1)(4)
            return layer(layer(x))

    params = Twice().init(jax.random.key(0), X)["params"]
    assert sorted(params["Dense_0"]) == ["bias", "kernel", "kernel_mask"]


def test_boxes_of_parameters_without_a_mask_stay_in_both_trees():
    boxed = nn.with_partitioning(nn.initializers.zeros, ("model",))
    model = masked(nn.Dense(3, bias_init=boxed))
    pair = split(model.init(jax.random.key(0), X)["params"])
    weights, masks = (
        jax.tree.structure(tree, is_leaf=lambda x: x is None) for tree in pair
    )
    assert weights == masks


def test_optimizers_that_read_no_parameters_need_none():
    params = masked(Net()).init(jax.random.key(0), X)["params"]
    tx = partition(optax.sgd(0.5), optax.sgd(2.0))
    updates, _ = tx.update(params, tx.init(params))
    weights, masks = split(updates)
    chex.assert_trees_all_close(
        weights, jax.tree.map(lambda w: -0.5 * w, split(params).weights)
    )
    chex.assert_trees_all_close(
        masks, jax.tree.map(lambda s: -2.0 * s, split(params).masks)
    )


def test_extra_arguments_come_to_both_optimizers():
    def update(updates, state, params: Any = None, **extra_args: Any) -> Any:
        return jax.tree.map(lambda u: extra_args["value"] * u, updates), state

    scaling = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )
    params = masked(Net()).init(jax.random.key(0), X)["params"]
    tx = partition(scaling, scaling)
    updates, _ = tx.update(params, tx.init(params), params, value=3.0)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda x: 3.0 * x, params))
