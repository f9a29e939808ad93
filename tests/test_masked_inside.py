"""MaskedParams inside JAX's transformations: jit, checkpoint, vmap, scan, donation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from masked_trees import make_masked, make_params

import scl_jax
from scl_jax import (
    MaskedParams,
    Softplus,
    apply_masks,
    connection_count,
    fold_masks,
    mask_params,
)


def objective(masked, x):
    kernel = apply_masks(masked, ste=Softplus(2.0))["dense"]["kernel"]
    return jnp.sum(jnp.tanh(x @ kernel)) + 0.1 * connection_count(masked)


def only_dense(seed):
    masked = make_masked(seed)
    return MaskedParams(
        {"dense": masked.weights["dense"]}, {"dense": masked.masks["dense"]}
    )


X = np.random.default_rng(7).normal(size=(4, 5)).astype(np.float32)


@pytest.mark.parametrize(
    "transform",
    [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))],
    ids=["jit", "checkpoint", "jit_checkpoint"],
)
def test_gradient_is_the_same_under(transform):
    masked = only_dense(0)
    expected = jax.grad(objective)(masked, X)
    got = jax.grad(transform(objective))(masked, X)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


def test_seeds_can_be_stacked_and_vmapped():
    seeds = [only_dense(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    gradients = jax.vmap(jax.grad(objective), in_axes=(0, None))(stacked, X)
    counts = jax.vmap(connection_count)(stacked)
    folded = jax.vmap(fold_masks)(stacked)
    for i, seed in enumerate(seeds):
        one = jax.tree.map(lambda leaf: leaf[i], gradients)  # noqa: B023
        chex.assert_trees_all_close(
            one, jax.grad(objective)(seed, X), rtol=1e-5, atol=1e-6
        )
        assert float(counts[i]) == float(connection_count(seed))
        chex.assert_trees_all_equal(
            jax.tree.map(lambda leaf: leaf[i], folded),  # noqa: B023
            fold_masks(seed),
        )


def test_mask_params_can_be_vmapped_over_seeds():
    params = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), make_params())
    masked = jax.vmap(mask_params)(params)
    assert masked.masks["dense"]["kernel"].shape == (2, 5, 3)
    chex.assert_trees_all_equal(jax.vmap(fold_masks)(masked), params)


def train_step(carry, x):
    masked, state = carry
    value, gradient = jax.value_and_grad(objective)(masked, x)
    updates, state = TX.update(gradient, state, masked)
    return (optax.apply_updates(masked, updates), state), value


TX = scl_jax.partition(
    optax.adamw(1e-2),
    optax.chain(scl_jax.normalize_by_feature(), optax.sgd(0.05, 0.9)),
)


def test_scanned_training_is_the_same_as_stepwise():
    masked = only_dense(0)
    xs = np.random.default_rng(0).normal(size=(6, 4, 5)).astype(np.float32)
    carry = (masked, TX.init(masked))
    (scanned, _), losses = jax.lax.scan(train_step, carry, xs)
    for x, loss in zip(xs, losses, strict=True):
        carry, value = train_step(carry, x)
        np.testing.assert_allclose(value, loss, rtol=1e-4)
    chex.assert_trees_all_close(carry[0], scanned, rtol=1e-4, atol=1e-5)
    assert float(connection_count(scanned)) != float(connection_count(masked))


def test_train_step_can_take_its_state_by_donation_and_compiles_once():
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(train_step, n=1), donate_argnums=0)
    masked = jax.tree.map(jnp.copy, only_dense(0))
    carry = (masked, TX.init(masked))
    for _ in range(3):
        carry, _ = step(carry, X)
    assert masked.masks["dense"]["kernel"].is_deleted()
    chex.assert_tree_all_finite(carry)
