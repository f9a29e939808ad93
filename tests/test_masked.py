"""MaskedParams: what is applied, what is folded, and weights are never destroyed."""

import chex
import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis.extra import numpy as hnp
from masked_trees import BF16, F16, F32, as_numpy, make_masked

import scl_jax
from scl_jax import (
    MaskedParams,
    ReLU,
    apply_masks,
    binary_masks,
    connection_count,
    fold_masks,
    mask_params,
)


def numpy_product(masked):
    """W * (S >= 0) leaf by leaf, in NumPy."""
    return {
        layer: {
            "kernel": np.asarray(leaves["kernel"])
            * (np.asarray(masked.masks[layer]["kernel"]).astype(np.float32) >= 0),
            "bias": np.asarray(leaves["bias"]),
        }
        for layer, leaves in masked.weights.items()
    }


# apply_masks, fold_masks, binary_masks


@pytest.mark.parametrize("mask_dtype", [F32, BF16, F16])
def test_applied_and_folded_weights_are_the_numpy_product(mask_dtype):
    masked = make_masked(dtype=mask_dtype)
    expected = numpy_product(masked)
    for got in (apply_masks(masked), fold_masks(masked)):
        assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype(np.float32)}
        chex.assert_trees_all_equal(as_numpy(got), expected)


@pytest.mark.parametrize("weight_dtype", [BF16, F16])
def test_applied_weights_keep_their_dtype_under_float32_masks(weight_dtype):
    masked = mask_params(
        {"kernel": jnp.asarray([[1.5, -2.5]], weight_dtype)},
        initial=lambda path, leaf: jnp.array([[-1.0, 1.0]]),
        dtype=F32,
    )
    for got in (apply_masks(masked), fold_masks(masked)):
        assert got["kernel"].dtype == weight_dtype
        assert got["kernel"].tolist() == [[0.0, -2.5]]
    gradient = jax.grad(lambda m: apply_masks(m)["kernel"].sum().astype(F32))(masked)
    assert gradient.weights["kernel"].dtype == weight_dtype
    assert gradient.masks["kernel"].dtype == F32
    assert gradient.masks["kernel"].tolist() == [[1.5, -2.5]]


def test_gradient_through_bfloat16_masks_is_rounded_once():
    weights = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    masked = mask_params({"kernel": jnp.asarray(weights)}, dtype=BF16)
    gradient = jax.grad(lambda m: 3.0 * apply_masks(m)["kernel"].sum())(masked)
    assert gradient.masks["kernel"].dtype == BF16
    got = np.asarray(gradient.masks["kernel"]).astype(np.float32)
    np.testing.assert_allclose(got, 3.0 * weights, rtol=2**-8)


def test_numpy_weights_can_be_masked_and_folded():
    params = {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}
    chex.assert_trees_all_equal(fold_masks(mask_params(params)), params)
    chex.assert_trees_all_equal(apply_masks(mask_params(params)), params)


def test_float64_numpy_weights_can_be_masked_and_folded():
    # What np.load or scikit-learn gives. JAX computes with them in float32.
    params = {"kernel": np.array([[1.0, -2.0]]), "bias": np.ones(2)}
    chex.assert_trees_all_close(as_numpy(fold_masks(mask_params(params))), params)
    chex.assert_trees_all_close(as_numpy(apply_masks(mask_params(params))), params)


def test_folded_zeros_are_positive_and_other_weights_untouched():
    weights = np.float32([-3.0, 3.0, -0.0, 0.0, np.inf, -np.inf, np.nan, -5.0])
    pruned = {"kernel": jnp.asarray(weights), "bias": jnp.float32([-0.0])}
    masks = {"kernel": jnp.full(8, -0.5), "bias": None}
    folded = fold_masks(MaskedParams(pruned, masks))
    np.testing.assert_array_equal(folded["kernel"], np.zeros(8))
    assert not np.signbit(folded["kernel"]).any()
    assert np.signbit(folded["bias"]).all()

    kept = fold_masks(MaskedParams(pruned, {"kernel": jnp.full(8, 0.5), "bias": None}))
    chex.assert_trees_all_equal(
        np.asarray(kept["kernel"]).view(np.uint32), weights.view(np.uint32)
    )


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_fold_leaves_any_connected_weight_untouched_bit_for_bit(transform):
    fold = transform(fold_masks)

    @hypothesis.given(hnp.arrays(np.uint32, 32))
    def check(bits):
        weights = jnp.asarray(bits.view(np.float32))
        folded = fold(MaskedParams({"w": weights}, {"w": jnp.zeros(32)}))["w"]
        nan = np.isnan(bits.view(np.float32))
        np.testing.assert_array_equal(np.isnan(folded), nan)
        np.testing.assert_array_equal(
            np.asarray(folded).view(np.uint32)[~nan], bits[~nan]
        )

    check()


def test_folded_network_computes_what_the_masked_one_does():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x)).reshape((x.shape[0], -1))
            return nn.Dense(3, name="dense")(x)

    x = jax.random.normal(jax.random.key(1), (2, 5, 5, 2))
    params = Net().init(jax.random.key(0), x)["params"]
    rng = np.random.default_rng(0)
    masked = mask_params(
        params, initial=lambda path, leaf: rng.normal(size=leaf.shape).astype("f4")
    )
    in_training = Net().apply({"params": apply_masks(masked)}, x)
    folded = Net().apply({"params": fold_masks(masked)}, x)
    np.testing.assert_array_equal(in_training, folded)
    assert not np.allclose(folded, Net().apply({"params": params}, x))


def test_fold_has_no_gradient_toward_the_mask_variables():
    masked = make_masked()
    gradient = jax.grad(lambda m: fold_masks(m)["dense"]["kernel"].sum())(masked)
    np.testing.assert_array_equal(gradient.masks["dense"]["kernel"], np.zeros((5, 3)))
    np.testing.assert_array_equal(
        gradient.weights["dense"]["kernel"],
        np.asarray(masked.masks["dense"]["kernel"]) >= 0,
    )


def test_binary_masks_are_bool_and_none_where_unmasked():
    masked = make_masked()
    masks = binary_masks(masked)
    assert masks["dense"]["bias"] is None
    for layer in ("dense", "conv"):
        assert masks[layer]["kernel"].dtype == bool
        expected = np.asarray(masked.masks[layer]["kernel"]) >= 0
        np.testing.assert_array_equal(masks[layer]["kernel"], expected)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_binary_folded_and_applied_masks_agree_at_the_threshold(dtype):
    s = jnp.asarray([0.0, -0.0, 1e-4, -1e-4, 300.0, -300.0], dtype)
    masked = MaskedParams({"w": jnp.ones(6)}, {"w": s})
    expected = [True, True, True, False, True, False]
    assert binary_masks(masked)["w"].tolist() == expected
    assert fold_masks(masked)["w"].tolist() == expected
    assert apply_masks(masked)["w"].tolist() == expected
    assert float(connection_count(masked)) == 4.0


def test_all_of_it_works_on_nnx_variables():
    class Net(nnx.Module):
        def __init__(self):
            self.dense = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.dense(x)

    graph, state = nnx.split(Net(), nnx.Param)
    x = jnp.ones((2, 4))
    masked = mask_params(state, initial=-1.0)
    np.testing.assert_array_equal(
        nnx.merge(graph, fold_masks(masked))(x), np.zeros((2, 3))
    )

    def loss(masked):
        applied = apply_masks(masked, pruned_gradient=0)
        return nnx.merge(graph, applied)(x).sum() + connection_count(masked)

    gradient = jax.grad(loss)(masked)
    kernel = np.asarray(state["dense"]["kernel"][...])
    np.testing.assert_allclose(
        gradient.masks["dense"]["kernel"][...], 2 * kernel + 1, rtol=1e-6
    )
    assert not np.asarray(gradient.weights["dense"]["kernel"][...]).any()


# Weights are never destroyed


def test_pruned_weight_keeps_its_value():
    masked = make_masked()
    expected = as_numpy(masked.weights)
    pruned = as_numpy(binary_masks(masked))

    def loss(masked):
        applied = apply_masks(masked, pruned_gradient=0)
        return sum(jnp.sum((leaf - 1) ** 2) for leaf in jax.tree.leaves(applied))

    tx = scl_jax.partition(optax.sgd(0.1), optax.set_to_zero())
    state = tx.init(masked)
    for _ in range(3):
        updates, state = tx.update(jax.grad(loss)(masked), state, masked)
        masked = optax.apply_updates(masked, updates)
    for layer in ("conv", "dense"):
        connected = pruned[layer]["kernel"]
        before, after = expected[layer]["kernel"], masked.weights[layer]["kernel"]
        assert 0 < connected.sum() < connected.size
        np.testing.assert_array_equal(after[~connected], before[~connected])
        assert (np.asarray(after)[connected] != before[connected]).all()


def test_connection_comes_back_with_its_old_weight():
    # The loss wants 2, which is what the weight is: its mask variable moves up.
    masked = MaskedParams({"w": jnp.float32([2.0])}, {"w": jnp.float32([-0.25])})

    def loss(masked):
        return jnp.sum((apply_masks(masked, pruned_gradient=0)["w"] - 2.0) ** 2)

    tx = scl_jax.partition(optax.sgd(0.1), optax.sgd(0.02))
    state, counts = tx.init(masked), []
    for _ in range(4):
        counts.append(float(connection_count(masked)))
        updates, state = tx.update(jax.grad(loss)(masked), state, masked)
        masked = optax.apply_updates(masked, updates)
    assert counts == [0.0, 0.0, 1.0, 1.0]
    assert apply_masks(masked)["w"].tolist() == [2.0]


def test_connection_never_comes_back_under_the_relu_counter_example():
    masked = MaskedParams({"w": jnp.float32([2.0])}, {"w": jnp.float32([-0.25])})

    def loss(masked):
        return jnp.sum((apply_masks(masked, ste=ReLU())["w"] - 2.0) ** 2)

    assert jax.grad(loss)(masked).masks["w"].tolist() == [0.0]
