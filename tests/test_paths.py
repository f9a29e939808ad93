"""One spelling of paths, whatever framework made the tree."""

import dataclasses
from typing import Any, NamedTuple

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import scl_jax
from scl_jax._paths import leaf_path, leaves_by_path, listed


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    """As Equinox makes it: a dataclass whose leaves sit behind attributes."""

    weight: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Attention:
    query: Linear
    value: Linear


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Stack:
    layers: list


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(nn.Dense(3, name="dense")(x))


class NNXNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.dense = nnx.Linear(4, 3, rngs=rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)


def linear():
    return Linear(weight=np.zeros((2, 3)), bias=np.zeros(2))


def linen_params():
    return LinenNet().init(jax.random.key(0), jnp.ones((1, 4)))["params"]


NET_PATHS = ["dense/bias", "dense/kernel", "head/bias", "head/kernel"]


@pytest.mark.parametrize(
    "make",
    [
        linen_params,
        lambda: flax.core.freeze(linen_params()),
        lambda: nnx.state(NNXNet(), nnx.Param),
        lambda: nnx.to_pure_dict(nnx.state(NNXNet(), nnx.Param)),
        NNXNet,
    ],
    ids=["linen", "frozen_dict", "nnx_state", "nnx_pure_dict", "nnx_module"],
)
def test_path_is_the_same_in_linen_and_nnx(make):
    assert sorted(leaves_by_path(make())) == NET_PATHS


def test_path_of_a_boxed_linen_parameter_is_that_of_the_bare_one():
    init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
    dense = nn.Dense(3, kernel_init=init)
    params = dense.init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    assert isinstance(params["kernel"], nn.Partitioned)
    assert sorted(leaves_by_path(params)) == ["bias", "kernel"]


def test_path_of_attributes_and_list_items_is_joined_by_slashes():
    assert list(leaves_by_path(Stack(layers=[linear(), linear()]))) == [
        "layers/0/weight",
        "layers/0/bias",
        "layers/1/weight",
        "layers/1/bias",
    ]


def test_path_of_tuples_and_named_tuples_uses_index_and_field():
    class Pair(NamedTuple):
        left: Any
        right: Any

    tree = {"pair": Pair(left=1.0, right=(2.0, 3.0))}
    assert list(leaves_by_path(tree)) == ["pair/left", "pair/right/0", "pair/right/1"]


@pytest.mark.parametrize("index", [7, "7"], ids=["int", "str"])
def test_integer_and_string_keys_are_spelled_alike(index):
    assert list(leaves_by_path({"layers": {index: 1.0}})) == ["layers/7"]


def test_path_keeps_a_dict_entry_called_value():
    assert list(leaves_by_path({"attention": {"value": 1.0}})) == ["attention/value"]


def test_path_keeps_an_inner_attribute_called_value():
    assert list(leaves_by_path(Attention(query=linear(), value=linear()))) == [
        "query/weight",
        "query/bias",
        "value/weight",
        "value/bias",
    ]


def test_path_keeps_the_value_projection_of_linen_attention():
    attention = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4)
    params = attention.init(jax.random.key(0), jnp.ones((1, 3, 4)))["params"]
    assert {"value/kernel", "value/bias"} <= set(leaves_by_path(params))


def test_path_keeps_an_nnx_param_called_value_and_drops_only_the_trailing_one():
    class ValueNet(nnx.Module):
        def __init__(self):
            self.value = nnx.Param(jnp.ones((2, 2)))

    state = nnx.state(ValueNet(), nnx.Param)
    [(key_path, _)] = jax.tree_util.tree_flatten_with_path(state)[0]
    assert len(key_path) == 2, "nnx no longer puts .value behind its Variables"
    assert leaf_path(key_path) == "value"


def test_path_of_a_root_attribute_called_value_is_not_empty():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Scale:
        value: Any

    assert list(leaves_by_path(Scale(value=1.0))) == ["value"]


def test_leaves_come_in_tree_order_with_none_kept():
    tree = {"b": None, "a": [1.0, None]}
    by_path = leaves_by_path(tree)
    assert by_path == {"a/0": 1.0, "a/1": None, "b": None}
    assert list(by_path) == ["a/0", "a/1", "b"]


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ({"a/kernel": 1.0, "a": {"kernel": 2.0}}, "a/kernel"),
        ({"a": [1.0], "a/0": 2.0}, "a/0"),
        ({"a": Linear(weight=1.0, bias=None), "a/weight": 2.0}, "a/weight"),
    ],
    ids=["dict", "list", "dataclass"],
)
def test_duplicate_paths_are_refused_by_name(tree, path):
    with pytest.raises(ValueError, match=f"unique; two leaves are at {path}$"):
        leaves_by_path(tree)


def test_mask_params_refuses_duplicate_paths():
    kernel = jnp.ones((2, 2))
    with pytest.raises(ValueError, match="two leaves are at a/kernel"):
        scl_jax.mask_params({"a/kernel": kernel, "a": {"kernel": kernel}})


def test_long_lists_of_names_say_how_many_were_left_out():
    names = [f"layer_{i}" for i in range(23)]
    assert listed(names) == ", ".join(names[:20]) + ", ... (3 more)"
    assert listed(iter(names[:20])) == ", ".join(names[:20])
