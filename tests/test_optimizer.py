"""Weights and masks are updated apart; the order of the penalty is meaning."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

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
    mask_params,
    normalize_by_feature,
    partition,
)


def random_like(tree, seed):
    rng = np.random.default_rng(seed)

    def normal(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape).astype(np.float32))

    return jax.tree.map(normal, tree)


def make_masked(dtype=None):
    shapes = {
        "dense": {"kernel": jnp.ones((7, 5)), "bias": jnp.ones(5)},
        "norm": {"scale": jnp.ones(5)},
        "head": {"kernel": jnp.ones((5, 3))},
    }
    params, start = random_like(shapes, 0), random_like(shapes, 1)
    return mask_params(
        params,
        initial=lambda path, _: start[path.split("/")[0]]["kernel"],
        dtype=dtype,
    )


def run(tx, params, gradients, **extra_args):
    """Take a step for each gradient, eagerly; return updates and parameters."""
    state, history = tx.init(params), []
    for gradient in gradients:
        updates, state = tx.update(gradient, state, params, **extra_args)
        params = optax.apply_updates(params, updates)
        history.append((updates, params))
    return history


@functools.cache
def gradients():
    return [random_like(make_masked(), seed) for seed in range(10, 14)]


# partition: no hidden coupling

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


# add_connection_penalty: order is meaning

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
