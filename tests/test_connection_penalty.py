"""The penalty on connections in an optimizer: what it adds; its order is meaning."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_masked import gradients, make_masked, run

from scl_jax import (
    Clipped,
    LeakyReLU,
    MaskedParams,
    ReLU,
    Softplus,
    add_connection_penalty,
    apply_masks,
    connection_count,
    identity,
    normalize_by_feature,
    partition,
)

STES = {
    "identity": (identity, np.ones_like),
    "leaky": (LeakyReLU(0.2), lambda s: np.where(s < 0, 0.2, 1.0)),
    "softplus": (Softplus(3.0), lambda s: 1 / (1 + np.exp(-3.0 * s))),
    "relu": (ReLU(), lambda s: (s >= 0) * 1.0),
    "clipped": (Clipped(), lambda s: (np.abs(s) <= 1) * 1.0),
}


def task_loss(masked, ste):
    applied = apply_masks(masked, ste=ste)
    return jnp.sum(jnp.sin(applied["dense"]["kernel"] @ applied["head"]["kernel"]))


def numpy_rms(g):
    g = np.asarray(g, np.float64)
    return g / np.sqrt(np.mean(g**2, axis=0, keepdims=True))


@pytest.mark.parametrize("name", STES)
def test_penalty_adds_its_coefficient_times_the_proxy_gradient(name):
    ste, proxy = STES[name]
    masked = make_masked()
    tx = add_connection_penalty(0.3, ste=ste)
    updates, _ = tx.update(gradients()[0].masks, tx.init(masked.masks), masked.masks)
    expected = jax.tree.map(
        lambda g, s: np.asarray(g) + 0.3 * proxy(np.asarray(s, np.float64)),
        gradients()[0].masks,
        masked.masks,
    )
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", STES)
def test_penalty_before_normalization_is_the_penalty_in_the_loss(name):
    ste, _ = STES[name]
    masked, coefficient = make_masked(), 0.3

    def penalized(masked):
        return task_loss(masked, ste) + coefficient * connection_count(masked, ste=ste)

    def make(*first):
        masks_tx = optax.chain(*first, normalize_by_feature(), optax.sgd(0.1))
        return partition(optax.adam(1e-2), masks_tx)

    in_loss, in_gradient = make(), make(add_connection_penalty(coefficient, ste=ste))
    a, _ = in_loss.update(jax.grad(penalized)(masked), in_loss.init(masked), masked)
    gradient = jax.grad(lambda m: task_loss(m, ste))(masked)
    b, _ = in_gradient.update(gradient, in_gradient.init(masked), masked)
    chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["identity", "softplus"])
def test_penalty_after_normalization_is_the_decoupled_form(name):
    ste, proxy = STES[name]
    masks, g, coefficient = make_masked().masks, gradients()[0].masks, 0.3
    penalty = add_connection_penalty(coefficient, ste=ste)
    decoupled = optax.chain(normalize_by_feature(), penalty)
    coupled = optax.chain(penalty, normalize_by_feature())
    after, _ = decoupled.update(g, decoupled.init(masks), masks)
    before, _ = coupled.update(g, coupled.init(masks), masks)
    for layer in ("dense", "head"):
        s = np.asarray(masks[layer]["kernel"], np.float64)
        expected = numpy_rms(g[layer]["kernel"]) + coefficient * proxy(s)
        np.testing.assert_allclose(after[layer]["kernel"], expected, rtol=1e-4)
        expected = numpy_rms(np.asarray(g[layer]["kernel"]) + coefficient * proxy(s))
        np.testing.assert_allclose(before[layer]["kernel"], expected, rtol=1e-4)
        assert not np.allclose(after[layer]["kernel"], expected, rtol=1e-2)


def test_schedule_gives_the_coefficient_of_each_step():
    masks = make_masked().masks
    tx = add_connection_penalty(lambda step: 0.5 * step)
    zero = jax.tree.map(jnp.zeros_like, masks)
    state, got = tx.init(masks), []
    update = jax.jit(tx.update)
    for _ in range(4):
        updates, state = update(zero, state, masks)
        got.append(float(updates["head"]["kernel"][0, 0]))
    assert got == [0.0, 0.5, 1.0, 1.5]


def test_coefficient_can_be_injected_and_changed():
    masks, g = make_masked().masks, gradients()[0].masks
    # The estimator is a function; inject_hyperparams would take it for a schedule.
    inject = optax.inject_hyperparams(add_connection_penalty, static_args="ste")
    tx = inject(coefficient=0.5)
    state = tx.init(masks)
    for coefficient in (0.5, 2.0):
        state.hyperparams["coefficient"] = jnp.float32(coefficient)
        updates, state = jax.jit(tx.update)(g, state, masks)
        expected = jax.tree.map(lambda x: x + coefficient, g)  # noqa: B023
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_coefficient_may_be_traced():
    masks, g = make_masked().masks, gradients()[0].masks

    @jax.jit
    def penalized(coefficient):
        tx = add_connection_penalty(coefficient)
        return tx.update(g, tx.init(masks), masks)[0]

    chex.assert_trees_all_close(
        penalized(0.25), jax.tree.map(lambda x: x + 0.25, g), rtol=1e-6
    )


def test_zero_coefficient_changes_nothing():
    masks, g = make_masked().masks, gradients()[0].masks
    tx = add_connection_penalty(0)
    chex.assert_trees_all_equal(tx.update(g, tx.init(masks), masks)[0], g)


@pytest.mark.parametrize("coefficient", [0.25, lambda step: jnp.float32(0.25)])
def test_update_has_the_dtype_of_its_gradient(coefficient):
    masks = make_masked(dtype=jnp.bfloat16).masks
    g = jax.tree.map(lambda s: jnp.ones(s.shape, jnp.bfloat16), masks)
    tx = add_connection_penalty(coefficient, ste=Softplus(1.0))
    updates, _ = tx.update(g, tx.init(masks), masks)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {np.dtype(jnp.bfloat16)}


def test_penalty_leaves_the_weights_of_a_whole_masked_params_alone():
    masked, g = make_masked(), gradients()[0]
    for coefficient in (0.5, lambda step: 0.5):
        tx = add_connection_penalty(coefficient)
        updates, _ = tx.update(g, tx.init(masked), masked)
        chex.assert_trees_all_equal(updates.weights, g.weights)
        expected = jax.tree.map(lambda x: x + 0.5, g.masks)
        chex.assert_trees_all_close(updates.masks, expected, rtol=1e-6)


def test_penalty_state_does_not_depend_on_values():
    shapes = jax.eval_shape(lambda: make_masked().masks)
    tx = add_connection_penalty(optax.constant_schedule(0.1))
    chex.assert_trees_all_equal(tx.init(shapes), tx.init(make_masked().masks))


def test_penalty_works_inside_multi_steps_and_scan():
    masks, g = make_masked().masks, gradients()[0].masks
    tx = optax.MultiSteps(add_connection_penalty(lambda step: 0.5 + step), 2)

    def body(state, _):
        updates, state = tx.update(g, state, masks)
        return state, updates["head"]["kernel"]

    _, got = jax.lax.scan(body, tx.init(masks), length=4)
    kernel = np.asarray(g["head"]["kernel"])
    expected = [0 * kernel, kernel + 0.5, 0 * kernel, kernel + 1.5]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "coefficient", [-1e-9, -1, math.nan, math.inf, -math.inf, np.float32(np.nan)]
)
def test_coefficient_that_is_negative_or_not_finite_is_refused(coefficient):
    match = "add_connection_penalty: coefficient must be a finite number >= 0, got"
    with pytest.raises(ValueError, match=match):
        add_connection_penalty(coefficient)
    with pytest.raises(ValueError, match=match):
        add_connection_penalty(jnp.float32(coefficient))


@pytest.mark.parametrize("coefficient", ["0.1", None, [0.1]])
def test_coefficient_that_is_no_number_is_refused_by_name(coefficient):
    match = "add_connection_penalty: coefficient must be"
    with pytest.raises(TypeError, match=match):
        add_connection_penalty(coefficient)


@pytest.mark.parametrize("ste", ["leaky", LeakyReLU, None])
def test_penalty_with_what_is_no_estimator_is_refused(ste):
    match = "add_connection_penalty: ste must be a hashable callable"
    with pytest.raises(TypeError, match=match):
        add_connection_penalty(0.1, ste=ste)


@pytest.mark.parametrize("coefficient", [0.1, lambda step: 0.1])
def test_penalty_without_params_is_refused(coefficient):
    masks = make_masked().masks
    tx = add_connection_penalty(coefficient)
    match = r"reads the mask variables; call update\(updates, state, params\)"
    with pytest.raises(ValueError, match=match):
        tx.update(masks, tx.init(masks))


def test_penalty_on_masks_beside_plain_params_is_refused():
    masked = make_masked()
    tx = add_connection_penalty(0.1)
    with pytest.raises((TypeError, ValueError), match="MaskedParams"):
        tx.update(masked, tx.init(masked), masked.weights)


def test_penalty_drives_every_connection_out_where_the_loss_has_no_say():
    masked = make_masked()
    masks_tx = optax.chain(add_connection_penalty(1.0), optax.sgd(10.0))
    tx = partition(optax.sgd(0.1), masks_tx)
    zero = jax.tree.map(jnp.zeros_like, masked)
    [(_, params)] = run(tx, masked, [zero])
    assert isinstance(params, MaskedParams)
    assert float(connection_count(masked)) > 0
    assert float(connection_count(params)) == 0
    chex.assert_trees_all_equal(params.weights, masked.weights)
