"""Gradients are divided by the running mean of their feature's norm."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from norms import gradients, numpy_normalized, numpy_running

from scl_jax import mask_params, normalize_by_feature


@pytest.mark.parametrize("norm", ["rms", "l2", "max"])
@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
@pytest.mark.parametrize(("shape", "axes"), [((7, 5), -1), ((6, 2, 4), (-2, -1))])
def test_running_norm_is_that_of_numpy_at_every_step(norm, decay, shape, axes):
    g = [gradients(*shape, seed=seed) for seed in range(12)]
    tx = normalize_by_feature(axes, norm=norm, decay=decay)
    state, got = tx.init({"kernel": g[0]}), []
    for one in g:
        updates, state = tx.update({"kernel": one}, state)
        got.append(updates["kernel"])
    expected = numpy_running(g, axes, norm, decay)
    np.testing.assert_allclose(np.stack(got), expected, rtol=2e-5)


def test_larger_gradient_makes_a_larger_update_but_a_bounded_one():
    tx = normalize_by_feature(decay=0.9)
    g = jnp.ones((4, 1))
    state = tx.init(g)
    for _ in range(150):  # so that the first steps are forgotten
        updates, state = tx.update(g, state)
    np.testing.assert_allclose(updates, g, rtol=1e-5)
    tripled, _ = tx.update(3 * g, state)
    np.testing.assert_allclose(tripled, 3 / np.sqrt(0.9 + 0.1 * 9) * g, rtol=1e-4)
    huge, _ = tx.update(1e6 * g, state)
    np.testing.assert_allclose(huge, np.sqrt(10) * g, rtol=1e-4)


def test_feature_without_gradient_stays_at_rest_and_wakes_up():
    tx = normalize_by_feature(decay=0.9)
    zero = jnp.zeros((4, 2))
    state = tx.init(zero)
    for _ in range(3):
        updates, state = tx.update(zero, state)
        np.testing.assert_array_equal(updates, zero)
    updates, _ = tx.update(zero.at[:, 1].set(-2.0), state)
    assert (updates[:, 0] == 0).all()
    assert np.isfinite(updates).all()
    assert (updates[:, 1] < 0).all()


def test_nan_stays_visible_in_its_feature_alone():
    tx = normalize_by_feature(decay=0.9)
    g = jnp.ones((3, 2))
    state = tx.init(g)
    _, state = tx.update(g.at[0, 0].set(jnp.nan), state)
    updates, _ = tx.update(g, state)
    assert np.isnan(updates[:, 0]).all()
    np.testing.assert_allclose(updates[:, 1], 1.0, rtol=1e-5)


def test_state_holds_a_number_per_feature_and_no_weights():
    params = mask_params({"a": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}})
    state = normalize_by_feature().init(params)
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [(), (1, 4)]


def test_every_leaf_has_its_own_features():
    shapes = {"a": (5, 3), "b": (2, 3, 4), "c": (3, 1)}
    g = [
        {name: gradients(*shape, seed=seed) for name, shape in shapes.items()}
        for seed in range(4)
    ]
    tx = normalize_by_feature(lambda path, leaf: (0, 2) if path == "b" else -1)
    state = tx.init(g[0])
    assert [x.shape for x in state.squares] == [(1, 3), (2, 1, 4), (1, 1)]
    got = []
    for one in g:
        updates, state = tx.update(one, state)
        got.append(updates)
    for name, axes in {"a": -1, "b": (0, 2), "c": -1}.items():
        expected = numpy_running([one[name] for one in g], axes, "rms", 0.9)
        np.testing.assert_allclose([one[name] for one in got], expected, rtol=2e-5)


def test_decay_may_be_a_hyperparameter_that_changes():
    g = [gradients(7, 5, seed=seed) for seed in range(3)]
    inject = optax.inject_hyperparams(normalize_by_feature, "feature_axes")
    tx = inject(decay=0.9)
    state = tx.init(g[0])
    update = jax.jit(tx.update)
    for one, expected in zip(g, numpy_running(g, -1, "rms", 0.9), strict=True):
        updates, state = update(one, state)
        np.testing.assert_allclose(updates, expected, rtol=2e-5)
    state.hyperparams["decay"] = jnp.float32(0.5)
    updates, state = update(g[0], state)
    # Each square counts by the product of the decays since.
    counts = np.array([0.9 * 0.9 * 0.5, 0.9 * 0.5, 0.5, 1])
    squares = np.mean(np.square(np.array([*g, g[0]], np.float64)), 1)
    mean = counts @ squares / counts.sum()
    expected = np.asarray(g[0]) / np.sqrt(mean)
    np.testing.assert_allclose(updates, expected, rtol=2e-5)
    state.hyperparams["decay"] = jnp.float32(0.0)
    updates, _ = update(g[1], state)
    np.testing.assert_allclose(updates, numpy_normalized(g[1], -1, "rms"), rtol=1e-5)


@pytest.mark.parametrize("decay", [-0.1, 1, 1.0, 2, np.nan])
def test_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got"):
        normalize_by_feature(decay=decay)


@pytest.mark.parametrize("decay", ["0.9", None, (0.9,)])
def test_decay_that_is_no_number_is_refused(decay):
    with pytest.raises(TypeError, match="decay must be a number, got"):
        normalize_by_feature(decay=decay)


def test_state_of_other_leaves_is_refused():
    tx = normalize_by_feature()
    state = tx.init({"kernel": jnp.ones((3, 2))})
    with pytest.raises(
        ValueError,
        match=r"have the shapes \[\(1, 4\)\], those of the state \[\(1, 2\)\]",
    ):
        tx.update({"kernel": jnp.ones((3, 4))}, state)
    with pytest.raises(TypeError, match="its init made; got EmptyState"):
        tx.update({"kernel": jnp.ones((3, 4))}, optax.EmptyState())
