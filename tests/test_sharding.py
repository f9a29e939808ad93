"""Mask variables and their state live where their weights live; nothing gathers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import scl_jax
from scl_jax import (
    add_connection_penalty,
    apply_masks,
    connection_count,
    fold_masks,
    keep_connections,
    mask_params,
    normalize_by_feature,
    partition,
)

SPECS = {
    "features": PartitionSpec(None, "model"),
    "inputs": PartitionSpec("model", None),
    "both": PartitionSpec("data", "model"),
    "both_axes_on_one": PartitionSpec(None, ("data", "model")),
}


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    devices = jax.devices("cpu")
    assert len(devices) == 8, "conftest asks for eight virtual devices"
    return jax.make_mesh(
        (2, 4), ("data", "model"), axis_types=(request.param,) * 2, devices=devices
    )


@pytest.fixture(params=SPECS.values(), ids=[*SPECS])
def kernel_sharding(request, mesh):
    return NamedSharding(mesh, request.param)


def make_params(kernel_sharding):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(16, 32)).astype(np.float32)
    everywhere = NamedSharding(kernel_sharding.mesh, PartitionSpec())
    return {
        "kernel": jax.device_put(kernel, kernel_sharding),
        "bias": jax.device_put(np.ones(32, np.float32), everywhere),
    }


def make_gradient(masked):
    """Gradients sharded as the parameters, as a data-parallel step leaves them."""
    rng = np.random.default_rng(1)

    def normal(leaf):
        values = rng.normal(size=leaf.shape).astype(np.float32)
        return jax.device_put(values, leaf.sharding)

    return jax.tree.map(normal, masked)


def optimizer():
    masks_tx = optax.chain(
        add_connection_penalty(0.1),
        normalize_by_feature(),
        optax.sgd(0.5, 0.9),
        keep_connections(3),
    )
    return partition(optax.adamw(1e-2), masks_tx)


def assert_sharded_as(leaf, sharding):
    assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), leaf.sharding


def collectives(function, *args):
    """Return which collectives the compiled function contains."""
    text = jax.jit(function).lower(*args).compile().as_text()
    names = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    return {name for name in names if name in text}


INITIALS = {
    "jax_function": lambda path, leaf: jnp.full(leaf.shape, -0.1),
    "numpy_function": lambda path, leaf: np.full(leaf.shape, -0.1, np.float32),
    "function_of_the_leaf": lambda path, leaf: 0.1 * leaf,
}


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_mask_variable_is_sharded_as_its_weight(kernel_sharding, dtype):
    masked = mask_params(make_params(kernel_sharding), dtype=dtype)
    assert_sharded_as(masked.masks["kernel"], kernel_sharding)


@pytest.mark.parametrize("initial", INITIALS.values(), ids=[*INITIALS])
def test_mask_variable_from_a_function_is_sharded_as_its_weight(mesh, initial):
    sharding = NamedSharding(mesh, SPECS["both"])
    masked = mask_params(make_params(sharding), initial=initial)
    assert_sharded_as(masked.masks["kernel"], sharding)


def test_momentum_of_a_mask_variable_is_sharded_as_its_weight(kernel_sharding):
    masked = mask_params(make_params(kernel_sharding))
    tx = optimizer()
    state = tx.init(masked)
    shape = masked.masks["kernel"].shape
    kernels = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == shape]
    assert len(kernels) == 3  # adam's two moments and the masks' momentum
    for leaf in kernels:
        assert_sharded_as(leaf, kernel_sharding)


def test_train_step_keeps_masks_and_state_sharded_as_their_weights(kernel_sharding):
    masked = mask_params(make_params(kernel_sharding))
    tx = optimizer()
    x = np.random.default_rng(2).normal(size=(8, 16)).astype(np.float32)

    @jax.jit
    def step(masked, state):
        def loss(masked):
            kernel = apply_masks(masked)["kernel"]
            return jnp.sum((x @ kernel) ** 2) + 0.1 * connection_count(masked)

        updates, state = tx.update(jax.grad(loss)(masked), state, masked)
        return optax.apply_updates(masked, updates), state

    sharded, state = step(masked, tx.init(masked))
    for leaf in jax.tree.leaves((sharded, state)):
        if leaf.shape == masked.masks["kernel"].shape:
            assert_sharded_as(leaf, kernel_sharding)

    on_one = jax.tree.map(np.asarray, masked)
    expected, _ = step(on_one, tx.init(on_one))
    chex.assert_trees_all_close(
        jax.tree.map(np.asarray, sharded),
        jax.tree.map(np.asarray, expected),
        rtol=1e-4,
        atol=1e-5,
    )


def test_an_all_gather_would_be_seen(mesh):
    x = jax.device_put(
        np.ones((16, 32), np.float32), NamedSharding(mesh, SPECS["both"])
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    gathering = jax.jit(lambda x: 2 * x, out_shardings=everywhere)
    assert "all-gather" in gathering.lower(x).compile().as_text()


def test_masking_and_folding_communicate_nothing(kernel_sharding):
    masked = mask_params(make_params(kernel_sharding), initial=lambda _, leaf: leaf * 1)
    assert collectives(apply_masks, masked) == set()
    assert collectives(fold_masks, masked) == set()
    applied = jax.jit(apply_masks)(masked)
    assert_sharded_as(applied["kernel"], kernel_sharding)
    w = np.asarray(masked.weights["kernel"])
    np.testing.assert_array_equal(applied["kernel"], w * (w >= 0))


def test_counting_sums_over_devices_and_gathers_nothing(kernel_sharding):
    masked = mask_params(make_params(kernel_sharding), initial=lambda _, leaf: leaf * 1)
    assert collectives(connection_count, masked) == {"all-reduce"}
    expected = np.sum(np.asarray(masked.weights["kernel"]) >= 0)
    assert float(jax.jit(connection_count)(masked)) == expected


@pytest.mark.parametrize("norm", ["rms", "l2", "max"])
def test_normalization_gathers_nothing(kernel_sharding, norm):
    masked = mask_params(make_params(kernel_sharding))
    g = make_gradient(masked).masks
    tx = normalize_by_feature(norm=norm)
    split_inputs = kernel_sharding.spec[0] is not None
    expected = {"all-reduce"} if split_inputs else set()
    state = tx.init(g)
    assert collectives(lambda g: tx.update(g, state)[0], g) == expected
    update = jax.jit(tx.update)(g, state)[0]["kernel"]
    assert_sharded_as(update, kernel_sharding)
    one = jax.tree.map(np.asarray, g)
    np.testing.assert_allclose(update, tx.update(one, state)[0]["kernel"], rtol=1e-5)


def test_keeping_connections_sums_counts_and_gathers_nothing(kernel_sharding):
    masked = mask_params(make_params(kernel_sharding), initial=lambda _, leaf: leaf * 1)
    tx = keep_connections(5)
    masks = masked.masks
    pruning_all = jax.tree.map(lambda s: -9 * jnp.ones_like(s), masks)
    args = (pruning_all, optax.EmptyState(), masks)
    assert collectives(tx.update, *args) == {"all-reduce"}
    update = jax.jit(tx.update)(*args)[0]["kernel"]
    assert_sharded_as(update, kernel_sharding)
    moved = np.asarray(masks["kernel"]) - 9
    kept = moved >= np.sort(moved, axis=None)[-5]
    after = np.asarray(masks["kernel"] + update)
    np.testing.assert_array_equal(after, np.where(kept, 0, moved))


def test_the_whole_update_gathers_nothing(kernel_sharding):
    masked = mask_params(make_params(kernel_sharding))
    tx = optimizer()
    state, g = tx.init(masked), make_gradient(masked)
    assert "all-gather" not in collectives(tx.update, g, state, masked)
    assert "all-to-all" not in collectives(tx.update, g, state, masked)


def test_binary_masks_are_sharded_as_their_weights(kernel_sharding):
    masked = mask_params(make_params(kernel_sharding))
    assert_sharded_as(scl_jax.binary_masks(masked)["kernel"], kernel_sharding)
