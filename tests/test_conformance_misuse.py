"""Trees with a leading axis of copies, and optimizers without a branch for the masks.

What cannot be told from a right use is not refused: these tests say what it does.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scl_jax import (
    MaskedParams,
    apply_masks,
    connection_count,
    keep_connections,
    mask_params,
    mask_statistics,
    meet_budget,
    normalize_by_feature,
    partition,
)

COPIES = 8


def stacked_gradients():
    """Return gradients of eight copies, each of its own size: (copies, inputs, out)."""
    random = np.random.default_rng(0)
    g = random.normal(size=(COPIES, 6, 4)) * 10.0 ** np.arange(-4, 4)[:, None, None]
    return g.astype("f4")


def jitted(function):
    # Compiling takes most of the time here.
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def rms(g, axes):
    return np.sqrt(np.mean(np.square(g, dtype="f8"), axis=axes, keepdims=True))


# A leading axis of copies, as ensembles, seeds and pmap have


def test_copies_are_normalized_each_for_itself_by_vmap_or_by_a_feature_axis():
    g, nothing = {"kernel": stacked_gradients()}, optax.EmptyState()
    normalize = normalize_by_feature(decay=0)
    under_vmap, _ = jax.vmap(normalize.update, (0, None))(g, nothing)
    by_axis, _ = normalize_by_feature((0, -1), decay=0).update(g, nothing)
    expected = g["kernel"] / rms(g["kernel"], 1)
    np.testing.assert_allclose(under_vmap["kernel"], expected, rtol=1e-5)
    np.testing.assert_allclose(by_axis["kernel"], expected, rtol=1e-5)


def test_a_stacked_tree_is_taken_for_one_kernel_where_nothing_tells_its_copies():
    # It has the shape of a one-dimensional convolution's kernel.
    g = {"kernel": stacked_gradients()}
    updates, _ = normalize_by_feature(decay=0).update(g, optax.EmptyState())
    np.testing.assert_allclose(
        updates["kernel"], g["kernel"] / rms(g["kernel"], (0, 1)), rtol=1e-5
    )
    assert np.max(np.abs(updates["kernel"][0])) < 1e-5 * np.max(
        np.abs(updates["kernel"][-1])
    )


def test_connections_are_counted_over_a_stack_and_under_vmap_in_each_copy():
    s = {"kernel": np.arange(1.0, 7.0, dtype="f4").reshape(2, 3, 1)}
    u = {"kernel": np.full((2, 3, 1), -9, "f4")}
    tx, nothing = keep_connections(2), optax.EmptyState()
    over_all, _ = jitted(tx.update)(u, nothing, s)
    of_each, _ = jitted(jax.vmap(tx.update, (0, None, 0)))(u, nothing, s)
    kept = [
        np.sum(s["kernel"] + x["kernel"] >= 0, axis=(1, 2)) for x in (over_all, of_each)
    ]
    np.testing.assert_array_equal(kept, [[0, 2], [2, 2]])
    all_of_each, _ = jitted(keep_connections(2, feature_axes=0).update)(u, nothing, s)
    np.testing.assert_array_equal(all_of_each["kernel"], of_each["kernel"])


def test_a_budget_is_of_all_copies_and_under_vmap_of_each():
    tx = meet_budget(optax.sgd(0.1), 0.5, freeze_step=1)
    s = {"kernel": np.stack([np.full((4, 2), size, "f4") for size in (0.1, 0.2)])}
    zero = jax.tree.map(np.zeros_like, s)

    def cut(s, zero):
        return optax.apply_updates(s, tx.update(zero, tx.init(s), s)[0])

    cuts = [jitted(f)(s, zero)["kernel"] for f in (cut, jax.vmap(cut))]
    kept = [np.sum(np.asarray(x) >= 0, (1, 2)) for x in cuts]
    np.testing.assert_array_equal(kept, [[0, 8], [4, 4]])


def pmapped(before, after):
    """Return a step in pmap: transforms before and after the mean over devices."""

    def step(masked, gradient):
        gradient, _ = before.update(gradient, before.init(masked), masked)
        gradient = jax.lax.pmean(gradient, "devices")
        updates, _ = after.update(gradient, after.init(masked), masked)
        return optax.apply_updates(masked, updates)

    return jax.pmap(step, "devices")


def test_in_pmap_every_copy_moves_by_the_normalized_mean_gradient():
    masked = mask_params({"kernel": np.ones((6, 4), "f4")})
    g = MaskedParams(
        {"kernel": 0 * stacked_gradients()}, {"kernel": stacked_gradients()}
    )
    copies = jax.tree.map(lambda x: np.stack([x] * COPIES), masked)
    tx = partition(optax.sgd(0.1), optax.chain(normalize_by_feature(), optax.sgd(0.01)))
    right = pmapped(optax.identity(), tx)(copies, g).masks["kernel"]
    mean = np.mean(g.masks["kernel"], axis=0, dtype="f8")
    expected = 0.1 - 0.01 * mean / rms(mean, 0)
    for copy in np.asarray(right):
        np.testing.assert_allclose(copy, expected, rtol=1e-5, atol=1e-7)
    # What each device normalizes for itself is not the mean's.
    wrong = pmapped(tx, optax.identity())(copies, g).masks["kernel"]
    assert not np.allclose(wrong[0], expected, rtol=1e-2)


# No branch for the masks


def loss(masked, x):
    return jnp.sum(jnp.square(x @ apply_masks(masked)["kernel"] - 1))


@pytest.fixture
def problem():
    random = np.random.default_rng(0)
    x = random.normal(size=(16, 6)).astype("f4")
    masked = mask_params({"kernel": random.normal(size=(6, 4)).astype("f4")})
    return masked, x, jax.jit(jax.grad(loss))(masked, x)


def test_a_partition_without_a_branch_for_the_masks_cannot_be_made():
    with pytest.raises(TypeError, match="masks_tx"):
        partition(optax.sgd(0.1))  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("make", [optax.partition, optax.multi_transform])
def test_optax_says_that_a_label_has_no_transform(make, problem):
    tx = make({"weights": optax.sgd(0.1)}, MaskedParams("weights", "masks"))
    match = r"no corresponding transformation(.|\n)*masks"
    with pytest.raises(ValueError, match=match):
        tx.init(problem[0])


def test_a_partition_is_not_initialized_or_updated_with_the_weights_alone(problem):
    masked, _, gradient = problem
    tx = partition(optax.sgd(0.1), optax.sgd(0.1))
    with pytest.raises(TypeError, match="partition: updates a MaskedParams"):
        tx.init(masked.weights)
    with pytest.raises(TypeError, match="partition: updates a MaskedParams"):
        tx.update(gradient.weights, tx.init(masked), masked)


def test_optax_masked_lets_raw_mask_gradients_through_which_are_no_descent(problem):
    # Not silent, but worse than it: optax.masked freezes nothing. Against it helps
    # partition, or set_to_zero for the masks where they shall rest.
    masked, x, gradient = problem
    tx = optax.masked(optax.sgd(1e-4), MaskedParams(True, False))
    updates, _ = tx.update(gradient, tx.init(masked), masked)
    chex.assert_trees_all_equal(updates.masks, gradient.masks)
    resting = partition(optax.sgd(1e-4), optax.set_to_zero())
    updates, _ = resting.update(gradient, resting.init(masked), masked)
    after = optax.apply_updates(masked, updates)
    chex.assert_trees_all_equal(after.masks, masked.masks)
    assert loss(after, x) < loss(masked, x)


def test_masks_that_nothing_moves_show_in_the_statistics(problem):
    masked, x, _ = problem
    start, count = masked, float(connection_count(masked))
    tx = optax.sgd(0.001)
    state = tx.init(masked.weights)

    @jax.jit
    def step(masked, state):
        gradient = jax.grad(loss)(masked, x)
        updates, state = tx.update(gradient.weights, state, masked.weights)
        weights = optax.apply_updates(masked.weights, updates)
        seen = mask_statistics(masked, start, gradient)
        return masked._replace(weights=weights), state, seen

    seen = None
    for _ in range(5):
        masked, state, seen = step(masked, state)
    # Pushed by the loss, and yet as at the start.
    assert seen is not None
    assert np.all(np.asarray(seen.gradient_norm["kernel"]) > 0)
    assert float(seen.flips) == 0
    assert float(seen.connections) == count
    chex.assert_trees_all_equal(masked.masks, start.masks)
    # Moved as far by the same gradient, they would have flipped.
    masks_tx = optax.chain(normalize_by_feature(), optax.sgd(0.1))
    moves = partition(optax.sgd(0.001), masks_tx)
    gradient, state = jax.grad(loss)(start, x), moves.init(start)
    updates, _ = moves.update(gradient, state, start)
    moved = optax.apply_updates(start, updates)
    assert float(mask_statistics(moved, start).flips) > 0
