"""MACs per example: known networks, matrix products, masked weights, batches."""

import math
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from counting import assert_unknown, spec
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import scl_jax
from scl_jax._macs import count_macs


def count_module(module, *args):
    """Return the parameters' shapes and MACs of a Linen module."""
    params = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]

    def apply(p, *a):
        return module.apply({"params": p}, *a)

    return params, count_macs(apply, params, *args)


# Networks whose numbers are known.


class LeNet300(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        for features in (300, 100):
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(10)(x)


class LeNet5Caffe(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (20, 50):
            x = nn.Conv(features, (5, 5), padding="VALID")(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(500)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


def test_each_weight_of_lenet_300_100_is_one_mac():
    params, macs = count_module(LeNet300(), spec(1, 28, 28, 1))
    weights = [layer["kernel"] for layer in params.values()]
    assert sum(math.prod(kernel.shape) for kernel in weights) == 266_200
    assert macs == {
        "Dense_0": {"kernel": 235_200, "bias": 0},
        "Dense_1": {"kernel": 30_000, "bias": 0},
        "Dense_2": {"kernel": 1_000, "bias": 0},
    }
    assert sum(jax.tree.leaves(macs)) == 266_200


def test_lenet_5_caffe_has_the_published_macs():
    params, macs = count_module(LeNet5Caffe(), spec(1, 28, 28, 1))
    weights = [layer["kernel"] for layer in params.values()]
    assert sum(math.prod(kernel.shape) for kernel in weights) == 430_500
    assert macs == {
        "Conv_0": {"kernel": 20 * 24 * 24 * 25, "bias": 0},
        "Conv_1": {"kernel": 50 * 8 * 8 * 500, "bias": 0},
        "Dense_0": {"kernel": 400_000, "bias": 0},
        "Dense_1": {"kernel": 5_000, "bias": 0},
    }
    assert sum(jax.tree.leaves(macs)) == 2_293_000


def test_attention_counts_projections_and_not_the_product_of_activations():
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)
    params, macs = count_module(module, spec(1, 5, 8))
    assert params["query"]["kernel"].shape == (8, 2, 3)
    for name in ("query", "key", "value", "out"):
        assert macs[name] == {"kernel": 5 * 8 * 6, "bias": 0}


def test_normalization_scale_is_unknown_and_does_not_hide_the_kernel():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm()(nn.Dense(4)(x))
            return nn.Dense(2)(x)

    _, macs = count_module(Block(), spec(1, 3))
    assert macs["Dense_0"] == {"kernel": 12, "bias": 0}
    assert macs["Dense_1"] == {"kernel": 8, "bias": 0}
    assert macs["LayerNorm_0"]["bias"] == 0
    assert macs["LayerNorm_0"]["scale"].reason.startswith("mul: ")


def test_nnx_state_is_counted_in_its_own_structure():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model, nnx.Param)
    macs = count_macs(lambda s, x: nnx.merge(graph, s)(x), state, spec(1, 3))
    assert jax.tree.structure(macs) == jax.tree.structure(state)
    assert sorted(jax.tree.leaves(macs)) == [0, 12]


# Matrix products.


@given(
    roles=st.lists(st.sampled_from("bclr"), min_size=1, max_size=5),
    sizes=st.lists(st.integers(1, 5), min_size=5, max_size=5),
    swap=st.booleans(),
)
def test_matrix_product_counts_the_product_of_all_index_ranges(roles, sizes, swap):
    letters = dict(zip("vwxyz", roles, strict=False))
    size = dict(zip("vwxyz", sizes, strict=True))
    lhs = "".join(i for i, role in letters.items() if role in "bcl")
    rhs = "".join(i for i, role in letters.items() if role in "brc")[::-1]
    out = "".join(i for i, role in letters.items() if role != "c")

    def apply(w, x):
        a, b = (x, w) if swap else (w, x)
        return lax.dot_general(
            a,
            b,
            (
                ([lhs.index(i) for i in out_c], [rhs.index(i) for i in out_c]),
                ([lhs.index(i) for i in out_b], [rhs.index(i) for i in out_b]),
            ),
        )

    out_c = [i for i, role in letters.items() if role == "c"]
    out_b = [i for i in out if letters[i] == "b"]
    operands = [spec(*(size[i] for i in side)) for side in (lhs, rhs)]
    w, x = reversed(operands) if swap else operands
    assert count_macs(apply, w, x) == math.prod(size[i] for i in letters)


def test_counts_are_exact_integers_beyond_floating_point():
    n, k, m = 2**22 + 7, 2**22 + 1, 2**22 + 3
    macs = count_macs(operator.matmul, spec(n, k), spec(k, m))
    assert type(macs) is int
    assert macs == n * k * m
    assert macs > 2**64
    assert float(macs) != macs
    assert count_macs(operator.matmul, spec(2**16, 2**16), spec(2**16)) == 2**32


def test_a_weight_used_twice_counts_twice():
    def tied(params, x):
        w = params["w"]
        return jnp.tanh(x @ w) @ w.T @ params["v"]

    macs = count_macs(tied, {"w": spec(3, 5), "v": spec(3, 2)}, spec(1, 3))
    assert macs == {"w": 2 * 15, "v": 6}


def test_a_weight_that_meets_no_example_counts_zero():
    def apply(params, x):
        return x @ params["used"], params["returned"]

    params = {"used": spec(3, 2), "returned": spec(7, 7), "unused": spec(9)}
    macs = count_macs(apply, params, spec(1, 3))
    assert macs == {"used": 6, "returned": 0, "unused": 0}


def test_example_may_be_a_pytree_of_arrays():
    def apply(w, batch, scale):
        return batch["a"] @ w + scale * (batch["b"] @ w)

    batch = {"a": np.ones((1, 3), np.float32), "b": jnp.ones((1, 3))}
    assert count_macs(apply, jnp.ones((3, 4)), batch, 2.0) == 24


# Masks.


def test_masked_parameters_count_as_plain_ones():
    model, x = LeNet300(), spec(1, 28, 28, 1)
    params, plain = count_module(model, x)

    def apply(masked, x):
        return model.apply({"params": scl_jax.apply_masks(masked)}, x)

    masked = jax.eval_shape(scl_jax.mask_params, params)
    assert count_macs(apply, masked, x) == plain
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    masked = scl_jax.mask_params(zeros, select=scl_jax.select("Dense_1/kernel"))
    assert count_macs(apply, masked, x) == plain


def test_masks_do_not_make_an_unknown_weight_known():
    masked = scl_jax.MaskedParams({"w": spec(3, 3)}, {"w": spec(3, 3)})

    def apply(masked, x):
        return x @ jnp.sin(scl_jax.apply_masks(masked)["w"])

    assert_unknown(count_macs(apply, masked, spec(1, 3))["w"], "sin: ")


# Batches.


def test_vmap_over_a_batch_counts_per_example():
    def apply(params, x):
        return jax.vmap(lambda row: jnp.tanh(row @ params["w"]) + params["b"])(x)

    params = {"w": spec(3, 5), "b": spec(5)}
    macs = count_macs(apply, params, spec(4, 3), batch_size=4)
    assert macs == {"w": 15, "b": 0}
    assert count_macs(apply, params, spec(4, 3)) == {"w": 60, "b": 0}
