"""A pruned weight gets a part of its gradient, and may come back as another."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import scl_jax
from scl_jax import MaskedParams, apply_masks

F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("part", [0, 0.25, 1, 1.0])
def test_pruned_weight_gets_a_part_of_its_gradient_and_no_other_does(dtype, part):
    rng = np.random.default_rng(0)
    w, s, g = (jnp.asarray(rng.normal(size=(6, 5)), dtype) for _ in range(3))
    s = s.at[0].set(jnp.asarray([0.0, -0.0, 1e-4, -1e-4, 0.05], dtype))  # the border
    masked = MaskedParams({"w": w, "b": w[0]}, {"w": s, "b": None})

    def loss(masked):
        applied = apply_masks(masked, pruned_gradient=part)
        return jnp.sum(applied["w"] * g) + jnp.sum(applied["b"] * g[0])

    gradient = jax.grad(loss)(masked)
    exact = np.asarray(g, np.float64)
    expected = np.where(np.asarray(s, np.float64) >= 0, exact, part * exact)
    assert gradient.weights["w"].dtype == dtype
    np.testing.assert_array_equal(gradient.weights["w"], expected.astype(dtype))
    # What is not masked, and the mask variables, know nothing of the part.
    np.testing.assert_array_equal(gradient.weights["b"], g[0])
    np.testing.assert_array_equal(gradient.masks["w"], g * w)


def test_a_tenth_is_the_default():
    masked = MaskedParams({"w": jnp.ones(2)}, {"w": jnp.float32([1.0, -1.0])})
    gradient = jax.grad(lambda masked: apply_masks(masked)["w"].sum())(masked)
    np.testing.assert_allclose(gradient.weights["w"], [1.0, 0.1], rtol=1e-6)


def test_weight_that_was_pruned_with_the_wrong_sign_can_turn_and_come_back():
    # The loss wants 1. The weight is below 0: connected as it is, it would do harm.
    start = MaskedParams({"w": jnp.float32([-0.2])}, {"w": jnp.float32([-0.1])})
    tx = scl_jax.partition(optax.sgd(0.1), optax.sgd(0.02))

    def trained(part):
        def loss(masked):
            applied = apply_masks(masked, pruned_gradient=part)
            return jnp.sum((applied["w"] - 1.0) ** 2)

        masked, state = start, tx.init(start)
        for _ in range(100):
            updates, state = tx.update(jax.grad(loss)(masked), state, masked)
            masked = optax.apply_updates(masked, updates)
        return apply_masks(masked)["w"].item()

    assert trained(0) == 0.0
    np.testing.assert_allclose(trained(0.1), 1.0, rtol=1e-3)


@pytest.mark.parametrize("part", [-0.1, 1.1, np.nan, np.inf])
def test_part_out_of_range_is_refused(part):
    masked = MaskedParams({"w": jnp.ones(2)}, {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="pruned_gradient must be from 0 to 1, got"):
        apply_masks(masked, pruned_gradient=part)


@pytest.mark.parametrize("part", ["0.1", None, jnp.float32(0.1)])
def test_part_that_is_no_number_is_refused(part):
    masked = MaskedParams({"w": jnp.ones(2)}, {"w": jnp.ones(2)})
    with pytest.raises(TypeError, match="pruned_gradient must be a number, got"):
        apply_masks(masked, pruned_gradient=part)


@pytest.mark.parametrize("value", [-2.0, np.inf, np.nan])
def test_pruned_weight_is_zero_whatever_its_value_and_nan_masks_show(value):
    masked = MaskedParams(
        {"w": jnp.array([value, value, 3.0])}, {"w": jnp.array([-0.1, 0.1, np.nan])}
    )
    pruned, connected, unknown = np.asarray(apply_masks(masked)["w"])
    assert pruned == 0
    assert not np.signbit(pruned)  # as in fold_masks
    np.testing.assert_equal(connected, np.float32(value))
    assert np.isnan(unknown)
