"""The optimizer of weights and masks: each is updated as it would be alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from random_masked import gradients, make_masked, run

from scl_jax import normalize_by_feature, partition

DENSE_OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1, 0.9),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "clip_by_global_norm": lambda: optax.chain(
        optax.clip_by_global_norm(0.5), optax.adam(1e-2)
    ),
    "ema": lambda: optax.chain(optax.sgd(0.1), optax.ema(0.9)),
    "trust_ratio": lambda: optax.lamb(1e-2, weight_decay=0.1),
    "schedule": lambda: optax.adamw(optax.cosine_decay_schedule(0.1, 10)),
    "decay_mask_by_flatten_dict": lambda: optax.adamw(
        1e-2,
        weight_decay=0.5,
        mask=lambda params: traverse_util.path_aware_map(
            lambda path, _: path[-1] == "kernel" and path[0] != "head", params
        ),
    ),
    "decay_mask_by_flat_keys": lambda: optax.adamw(
        1e-2,
        weight_decay=0.5,
        mask=lambda params: traverse_util.unflatten_dict(
            {k: k != ("head", "kernel") for k in traverse_util.flatten_dict(params)}
        ),
    ),
    "decay_mask_by_path": lambda: optax.adamw(
        1e-2,
        weight_decay=0.5,
        mask=lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: jax.tree_util.keystr(path) == "['dense']['kernel']", params
        ),
    ),
    "decay_mask_as_tree": lambda: optax.adamw(
        1e-2,
        weight_decay=0.5,
        mask={
            "dense": {"kernel": True, "bias": False},
            "norm": {"scale": False},
            "head": {"kernel": False},
        },
    ),
    "labels_for_the_bare_tree": lambda: optax.partition(
        {"fast": optax.sgd(1.0), "slow": optax.adam(1e-3)},
        {"dense": "fast", "norm": "slow", "head": "slow"},
    ),
}


@pytest.mark.parametrize("name", DENSE_OPTIMIZERS)
def test_weights_are_updated_bit_for_bit_as_in_the_dense_network(name):
    masked = make_masked()
    make = DENSE_OPTIMIZERS[name]
    dense = run(make(), masked.weights, [g.weights for g in gradients()])
    tx = partition(make(), optax.chain(normalize_by_feature(), optax.sgd(0.1, 0.9)))
    both = run(tx, masked, gradients())
    for (dense_updates, dense_params), (updates, params) in zip(
        dense, both, strict=True
    ):
        chex.assert_trees_all_equal(updates.weights, dense_updates)
        chex.assert_trees_all_equal(params.weights, dense_params)


@pytest.mark.parametrize("name", DENSE_OPTIMIZERS)
def test_optimizer_of_the_weights_never_touches_a_mask_variable(name):
    masked = make_masked()
    make = DENSE_OPTIMIZERS[name]

    def momentum():
        return optax.sgd(0.1, 0.9)

    alone = run(momentum(), masked.masks, [g.masks for g in gradients()])
    both = run(partition(make(), momentum()), masked, gradients())
    for (updates, params), (both_updates, both_params) in zip(alone, both, strict=True):
        chex.assert_trees_all_equal(both_updates.masks, updates)
        chex.assert_trees_all_equal(both_params.masks, params)


def test_masks_stay_where_they_are_when_only_the_weights_move():
    masked = make_masked()
    tx = partition(optax.adamw(1.0, weight_decay=1.0), optax.set_to_zero())
    for _, params in run(tx, masked, gradients()):
        chex.assert_trees_all_equal(params.masks, masked.masks)
        assert not np.allclose(
            params.weights["head"]["kernel"], masked.weights["head"]["kernel"]
        )


def test_clipping_the_weights_does_not_count_the_mask_gradients():
    masked = make_masked()
    huge = gradients()[0]._replace(
        masks=jax.tree.map(lambda g: 1e6 * g, gradients()[0].masks)
    )
    tx = partition(optax.clip_by_global_norm(1e3), optax.sgd(1.0))
    updates, _ = tx.update(huge, tx.init(masked), masked)
    chex.assert_trees_all_equal(updates.weights, huge.weights)


def test_each_transform_sees_its_bare_tree():
    masked, seen = make_masked(), {}

    def spy(name):
        def init(params):
            seen[name, "init"] = params
            return optax.EmptyState()

        def update(updates, state, params=None):
            seen[name, "update"], seen[name, "params"] = updates, params
            return updates, state

        return optax.GradientTransformation(init, update)

    tx = partition(spy("weights"), spy("masks"))
    gradient = gradients()[0]
    tx.update(gradient, tx.init(masked), masked)
    expected = {
        ("weights", "init"): masked.weights,
        ("weights", "update"): gradient.weights,
        ("weights", "params"): masked.weights,
        ("masks", "init"): masked.masks,
        ("masks", "update"): gradient.masks,
        ("masks", "params"): masked.masks,
    }
    assert set(seen) == set(expected)
    for key, tree in expected.items():
        chex.assert_trees_all_equal(seen[key], tree)


def test_extra_arguments_reach_both_transforms():
    masked, seen = make_masked(), []

    def update(updates, state, params=None, *, value):
        seen.append(value)
        return updates, state

    wants_value = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )
    tx = partition(
        optax.chain(optax.sgd(0.1), wants_value),
        optax.chain(normalize_by_feature(), wants_value),
    )
    tx.update(gradients()[0], tx.init(masked), masked, value=3.0)
    assert seen == [3.0, 3.0]
    # A transform that takes none is given none.
    plain = partition(optax.sgd(0.1), optax.sgd(0.1))
    plain.update(gradients()[0], plain.init(masked), masked, value=3.0)


def test_update_needs_no_params_where_its_transforms_need_none():
    masked = make_masked()
    tx = partition(optax.sgd(0.1), optax.chain(normalize_by_feature(), optax.sgd(1.0)))
    state = tx.init(masked)
    chex.assert_trees_all_equal(
        tx.update(gradients()[0], state)[0], tx.update(gradients()[0], state, masked)[0]
    )


def test_partition_works_inside_chain_multi_steps_and_apply_if_finite():
    masked = make_masked()

    def inner():
        masks_tx = optax.chain(normalize_by_feature(), optax.sgd(0.1))
        return partition(optax.sgd(0.1), masks_tx)

    a, b = gradients()[:2]
    mean = jax.tree.map(lambda x, y: (x + y) / 2, a, b)
    [(expected, _)] = run(inner(), masked, [mean])
    multi = run(optax.MultiSteps(inner(), 2), masked, [a, b])
    chex.assert_trees_all_close(multi[1][0], expected, rtol=1e-5, atol=1e-7)

    [(chained, _)] = run(optax.chain(optax.scale(2.0), inner()), masked, [a])
    [(alone, _)] = run(inner(), masked, [a])
    double = alone._replace(weights=jax.tree.map(lambda u: 2 * u, alone.weights))
    chex.assert_trees_all_close(chained, double, rtol=1e-5)

    nan = jax.tree.map(lambda g: g * jnp.nan, a)
    skipped = run(optax.apply_if_finite(inner(), 3), masked, [nan])
    chex.assert_trees_all_equal(skipped[0][1], masked)


def test_partition_works_on_shapes_and_compiles_once():
    masked = make_masked()
    tx = partition(optax.adam(1e-2), optax.chain(normalize_by_feature(), optax.sgd(1)))
    shapes = jax.eval_shape(lambda: masked)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(tx.init, shapes), jax.eval_shape(tx.init, masked)
    )
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state = tx.init(masked)
    for gradient in gradients():
        _, state = update(gradient, state, masked)


def test_optimizer_state_can_be_mapped_over_the_parameters():
    # optax.tree_map_params: how trainers shard or cast an optimizer's state.
    tx = partition(optax.sgd(1.0, 0.9), optax.sgd(1.0, 0.9))
    state = tx.init(make_masked())
    ones = optax.tree.map_params(tx, jnp.ones_like, state)
    assert len(jax.tree.leaves(state)) == 6
    assert {float(leaf.mean()) for leaf in jax.tree.leaves(state)} == {0.0}
    assert {float(leaf.mean()) for leaf in jax.tree.leaves(ones)} == {1.0}


@pytest.mark.parametrize(
    "tree",
    [{"weights": jnp.ones(2), "masks": jnp.ones(2)}, (jnp.ones(2), jnp.ones(2))],
    ids=["dict", "tuple"],
)
def test_partition_of_what_is_no_masked_params_is_refused(tree):
    tx = partition(optax.sgd(0.1), optax.sgd(0.1))
    match = (
        "partition: updates a MaskedParams, as mask_params returns it; "
        f"got {type(tree).__name__}"
    )
    with pytest.raises(TypeError, match=match):
        tx.init(tree)
    with pytest.raises(TypeError, match=match):
        tx.update(tree, tx.init(make_masked()), tree)
