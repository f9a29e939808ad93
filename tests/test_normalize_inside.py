"""Normalization inside trainings: other transforms, loops, trees with weights."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from norms import gradients, numpy_normalized, numpy_running

from scl_jax import MaskedParams, mask_params, normalize_by_feature


def masks_and_gradients():
    params = {"dense": {"kernel": jnp.ones((7, 5)), "bias": jnp.ones(5)}}
    masks = mask_params(params).masks
    return masks, {"dense": {"kernel": gradients(7, 5), "bias": None}}


@pytest.mark.parametrize("decay", [0, 0.0, 0.9])
def test_transform_needs_no_params(decay):
    masks, g = masks_and_gradients()
    tx = normalize_by_feature(decay=decay)
    state = tx.init(masks)
    updates, _ = tx.update(g, state)
    chex.assert_trees_all_equal(updates, tx.update(g, state, masks)[0])
    assert updates["dense"]["bias"] is None


@pytest.mark.parametrize("options", [{"decay": 0}, {"decay": 0.0}, {"norm": "none"}])
def test_without_a_running_mean_it_is_stateless(options):
    masks, g = masks_and_gradients()
    tx = normalize_by_feature(**options)
    assert tx.init(masks) == optax.EmptyState()
    assert tx.update(g, tx.init(masks))[1] == optax.EmptyState()


def test_init_works_on_shapes():
    shapes, _ = jax.eval_shape(masks_and_gradients)
    assert isinstance(shapes["dense"]["kernel"], jax.ShapeDtypeStruct)
    (squares,) = normalize_by_feature().init(shapes).squares
    assert squares.shape == (1, 5)
    assert squares.dtype == jnp.float32
    for decay in (0, 0.9):
        with pytest.raises(ValueError, match="out of range for dense/kernel"):
            normalize_by_feature(2, decay=decay).init(shapes)


def numpy_updates(g):
    return {
        "dense": {
            "kernel": numpy_normalized(g["dense"]["kernel"], -1, "rms"),
            "bias": None,
        }
    }


def test_inside_chain():
    masks, g = masks_and_gradients()
    tx = optax.chain(normalize_by_feature(), optax.sgd(0.5))
    updates, _ = tx.update(g, tx.init(masks), masks)
    expected = jax.tree.map(lambda u: -0.5 * u, numpy_updates(g))
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


def test_inside_optax_partition_and_masked():
    masks, g = masks_and_gradients()
    tree, grads = {"a": masks, "b": masks}, {"a": g, "b": g}
    for tx in (
        optax.partition(
            {"scl": normalize_by_feature(), "zero": optax.set_to_zero()},
            {"a": "scl", "b": "zero"},
        ),
        optax.chain(
            optax.masked(normalize_by_feature(), {"a": True, "b": False}),
            optax.masked(optax.set_to_zero(), {"a": False, "b": True}),
        ),
    ):
        updates, _ = tx.update(grads, tx.init(tree), tree)
        zero = jax.tree.map(jnp.zeros_like, g)
        expected = {"a": numpy_updates(g), "b": zero}
        chex.assert_trees_all_close(updates, expected, rtol=1e-5)


def test_inside_multi_steps_it_sees_the_averaged_gradient():
    masks, g = masks_and_gradients()
    other = jax.tree.map(lambda leaf: jnp.flip(leaf, 0) * 3, g)
    tx = optax.MultiSteps(normalize_by_feature(), every_k_schedule=2)
    state = tx.init(masks)
    updates, state = tx.update(g, state, masks)
    assert not np.asarray(updates["dense"]["kernel"]).any()
    updates, state = tx.update(other, state, masks)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, g, other)
    chex.assert_trees_all_close(updates, numpy_updates(mean), rtol=1e-4)
    apart = jax.tree.map(
        lambda a, b: (a + b) / 2, numpy_updates(g), numpy_updates(other)
    )
    assert not np.allclose(updates["dense"]["kernel"], apart["dense"]["kernel"])


def test_inside_inject_hyperparams():
    masks, g = masks_and_gradients()

    def make(learning_rate):
        return optax.chain(normalize_by_feature(), optax.sgd(learning_rate))

    tx = optax.inject_hyperparams(make)(learning_rate=0.5)
    state = tx.init(masks)
    state.hyperparams["learning_rate"] = jnp.float32(0.25)
    updates, _ = jax.jit(tx.update)(g, state, masks)
    expected = jax.tree.map(lambda u: -0.25 * u, numpy_updates(g))
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)

    static = optax.inject_hyperparams(normalize_by_feature, "feature_axes")(-1)
    updates, _ = jax.jit(static.update)(g, static.init(masks), masks)
    chex.assert_trees_all_close(updates, numpy_updates(g), rtol=1e-5)


def test_extra_arguments_are_accepted_and_ignored():
    masks, g = masks_and_gradients()
    tx = optax.with_extra_args_support(normalize_by_feature())
    updates, _ = tx.update(g, tx.init(masks), masks, value=1.0, surprise="yes")
    chex.assert_trees_all_close(updates, numpy_updates(g), rtol=1e-5)
    chained = optax.chain(normalize_by_feature(), optax.identity())
    updates, _ = chained.update(g, chained.init(masks), masks, value=jnp.ones(()))
    chex.assert_trees_all_close(updates, numpy_updates(g), rtol=1e-5)


def test_one_compilation_under_jit():
    masks, g = masks_and_gradients()
    tx = normalize_by_feature()
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state = jax.jit(tx.init)(masks)
    first, state = update(g, state)
    chex.assert_trees_all_close(first, numpy_updates(g), rtol=1e-5)
    # The mean of 1 and 4 with weights 0.09 and 0.1, as parts of their sum.
    second, _ = update(jax.tree.map(lambda x: 2 * x, g), state)
    size = np.sqrt((0.09 * 1 + 0.1 * 4) / 0.19)
    expected = jax.tree.map(lambda x: 2 * x / size, numpy_updates(g))
    chex.assert_trees_all_close(second, expected, rtol=1e-5)


def test_under_vmap_and_scan():
    g = jnp.stack([gradients(7, 5, seed=seed) for seed in range(3)])
    tx = normalize_by_feature()
    expected = np.stack([numpy_normalized(one, -1, "rms") for one in g])
    vmapped, _ = jax.vmap(tx.update, in_axes=(0, None))({"k": g}, tx.init({"k": g[0]}))
    np.testing.assert_allclose(vmapped["k"], expected, rtol=1e-5)

    def body(state, one):
        updates, state = tx.update({"k": one}, state)
        return state, updates["k"]

    _, scanned = jax.lax.scan(body, tx.init({"k": g[0]}), g)
    np.testing.assert_allclose(scanned, numpy_running(g, -1, "rms", 0.9), rtol=1e-5)


def test_weights_gradients_of_a_whole_masked_params_are_untouched():
    params = {"kernel": gradients(7, 5), "bias": jnp.ones(5)}
    g = MaskedParams(params, {"kernel": gradients(7, 5, seed=1), "bias": None})
    for tx in (normalize_by_feature(), optax.chain(normalize_by_feature())):
        updates, _ = tx.update(g, tx.init(g), g)
        assert isinstance(updates, MaskedParams)
        chex.assert_trees_all_equal(updates.weights, params)
        expected = numpy_normalized(g.masks["kernel"], -1, "rms")
        np.testing.assert_allclose(updates.masks["kernel"], expected, rtol=1e-5)
        assert updates.masks["bias"] is None


def test_a_bias_too_small_for_the_axes_is_no_matter_where_it_is_not_masked():
    params = {"kernel": gradients(6, 2, 4), "bias": jnp.ones(4)}
    g = MaskedParams(params, {"kernel": gradients(6, 2, 4), "bias": None})
    tx = normalize_by_feature((-3, -1))
    updates, _ = tx.update(g, tx.init(g))
    expected = numpy_normalized(g.masks["kernel"], (0, 2), "rms")
    np.testing.assert_allclose(updates.masks["kernel"], expected, rtol=1e-5)


def test_weights_of_a_masked_params_inside_a_tree_are_untouched():
    # A trainer of two networks holds {"actor": MaskedParams, "critic": MaskedParams}.
    g = {"actor": MaskedParams({"kernel": jnp.full((2, 2), 3.0)}, {"kernel": None})}
    tx = normalize_by_feature()
    updates, _ = tx.update(g, tx.init(g))
    chex.assert_trees_all_equal(updates, g)
