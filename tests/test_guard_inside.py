"""The guard of the last connections in trees, transforms, loops, and on devices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.mesh import make_mesh
from scl_jax import (
    add_connection_penalty,
    keep_connections,
    mask_params,
    normalize_by_feature,
    partition,
)

# Trees


def test_leaves_are_guarded_each_for_itself_and_none_is_left_alone():
    s = {"a": {"kernel": jnp.array([0.5, 0.2]), "bias": None}, "b": jnp.array([[0.1]])}
    tx = keep_connections()
    pruning_all = jax.tree.map(lambda x: -jnp.ones_like(x), s)
    new, _ = tx.update(pruning_all, tx.init(s), s)
    after = optax.apply_updates(s, new)
    expected = {
        "a": {"kernel": jnp.array([0, -0.8]), "bias": None},
        "b": jnp.zeros((1, 1)),
    }
    chex.assert_trees_all_close(after, expected, rtol=0, atol=0)


def test_of_masked_params_the_weights_are_left_alone():
    params = mask_params({"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)})
    tx = keep_connections(6)
    pruning_all = jax.tree.map(lambda x: jnp.full_like(x, -5), params)
    new, _ = tx.update(pruning_all, tx.init(params), params)
    chex.assert_trees_all_equal(new.weights, pruning_all.weights)
    assert new.masks["bias"] is None
    after = optax.apply_updates(params, new)
    np.testing.assert_array_equal(after.masks["kernel"], np.zeros((3, 2)))


def test_a_tree_without_masks_is_left_as_it_is():
    tx = keep_connections()
    new, _ = tx.update({"bias": None}, tx.init({"bias": None}), {"bias": None})
    assert new == {"bias": None}


def test_init_works_on_shapes():
    shapes = {"k": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16), "none": None}
    assert keep_connections(6).init(shapes) == optax.EmptyState()


# Inside other transformations

MASKS = {
    "a": jnp.array([[0.4, 0.3], [0.2, 0.1]]),
    "b": None,
    "c": jnp.array([0.2, 0.1]),
}
KEPT = {"a": [[0, 0], [-0.8, -0.9]], "c": [0, 0]}  # of two, after a step of -1


def guarded():
    return optax.chain(optax.sgd(1.0), keep_connections(2))


def ones():
    return jax.tree.map(jnp.ones_like, MASKS)


def assert_kept(masks):
    for name, kept in KEPT.items():
        np.testing.assert_allclose(masks[name], kept, rtol=1e-6)
        assert np.sum(np.asarray(masks[name]) >= 0) == 2


COMPOSITIONS = {
    "chain": guarded,
    "extra_args": lambda: optax.with_extra_args_support(guarded()),
    "masked": lambda: optax.masked(guarded(), {"a": True, "b": True, "c": True}),
    "partition": lambda: optax.partition({"x": guarded()}, "x"),
    "hyperparams": lambda: optax.inject_hyperparams(
        lambda rate: optax.chain(optax.sgd(rate), keep_connections(2))
    )(rate=1.0),
    "static_hyperparam": lambda: optax.chain(
        optax.sgd(1.0),
        optax.inject_hyperparams(keep_connections, "minimum")(minimum=2),
    ),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("make", COMPOSITIONS.values(), ids=[*COMPOSITIONS])
def test_inside_other_transforms(make, jit):
    tx = make()
    step = jax.jit(tx.update) if jit else tx.update
    new, _ = step(ones(), tx.init(MASKS), MASKS)
    assert_kept(optax.apply_updates(MASKS, new))


def test_inside_a_chain_extra_arguments_are_ignored():
    tx = guarded()
    new, _ = tx.update(ones(), tx.init(MASKS), MASKS, value=1.0, batch=None)
    assert_kept(optax.apply_updates(MASKS, new))


def test_inside_multi_steps_the_accumulated_update_is_guarded():
    tx = optax.MultiSteps(guarded(), 2)
    masks, state = MASKS, tx.init(MASKS)
    new, state = tx.update(ones(), state, masks)
    masks = optax.apply_updates(masks, new)
    chex.assert_trees_all_equal(masks, MASKS)
    new, state = tx.update(ones(), state, masks)
    assert_kept(optax.apply_updates(masks, new))


def test_under_vmap_each_copy_is_guarded_for_itself():
    s = jnp.array([[0.5, 0.2, 0.1], [3.0, 3.0, 3.0]])
    u = -jnp.ones((2, 3))
    tx = keep_connections()
    new = jax.vmap(lambda u, s: tx.update(u, optax.EmptyState(), s)[0])(u, s)
    expected = [[-0.5, -1, -1], [-1, -1, -1]]
    np.testing.assert_array_equal(new, np.array(expected, np.float32))


def test_in_scan_and_cond():
    tx = guarded()

    def step(masks, on):
        new, _ = jax.lax.cond(
            on,
            lambda: tx.update(ones(), tx.init(MASKS), masks),
            lambda: (jax.tree.map(jnp.zeros_like, MASKS), tx.init(MASKS)),
        )
        return optax.apply_updates(masks, new), None

    masks, _ = jax.lax.scan(step, MASKS, jnp.array([False, True, False]))
    assert_kept(masks)


def test_one_compilation():
    tx = guarded()
    step = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state, masks = tx.init(MASKS), MASKS
    for _ in range(4):
        new, state = step(ones(), state, masks)
        masks = optax.apply_updates(masks, new)


def test_it_must_be_the_last_transform():
    first = optax.chain(keep_connections(2), optax.scale(1.5))
    pruning_all = jax.tree.map(lambda x: -jnp.ones_like(x), MASKS)
    new, _ = first.update(pruning_all, first.init(MASKS), MASKS)
    after = optax.apply_updates(MASKS, new)
    assert np.sum(np.asarray(after["c"]) >= 0) == 0
    last = optax.chain(optax.scale(1.5), keep_connections(2))
    new, _ = last.update(pruning_all, last.init(MASKS), MASKS)
    after = optax.apply_updates(MASKS, new)
    assert np.sum(np.asarray(after["c"]) >= 0) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_huge_penalty_leaves_the_minimum_at_every_step(dtype):
    random = np.random.default_rng(0)
    kernels = {"a": (16, 24), "b": (24, 4)}
    weights = {
        name: {"kernel": jnp.asarray(random.normal(size=shape), jnp.float32)}
        for name, shape in kernels.items()
    }
    start = random.uniform(0.05, 0.15, 16 * 24)
    params = mask_params(
        weights,
        initial=lambda path, leaf: start[: leaf.size].reshape(leaf.shape),
        dtype=jnp.dtype(dtype),
    )
    masks_tx = optax.chain(
        add_connection_penalty(0.5),
        normalize_by_feature(),
        optax.sgd(0.01, 0.9),
        keep_connections(5),
    )
    tx = partition(optax.sgd(0.1), masks_tx)

    def step(carry, noise):
        params, state = carry
        noise = jax.tree.map(lambda x, n: n.astype(x.dtype), params, noise)
        new, state = tx.update(noise, state, params)
        params = optax.apply_updates(params, new)
        counts = jax.tree.map(lambda s: jnp.sum(s >= 0), params.masks)
        return (params, state), counts

    noise = jax.tree.map(
        lambda x: random.normal(0, 0.3, (60, *x.shape)).astype(np.float32), params
    )
    _, counts = jax.jit(lambda *carry: jax.lax.scan(step, carry, noise))(
        params, tx.init(params)
    )
    for name, shape in kernels.items():
        count = np.asarray(counts[name]["kernel"])
        assert count[0] == np.prod(shape)
        assert np.all(count >= 5)
        assert np.mean(count[-30:] < 10) > 0.9  # without the guard, 0


# Over devices


def with_seven(moved):
    """Return mask variables, of which the seven largest do not go below 0."""
    seven = moved >= np.sort(moved, axis=None)[-7]
    return np.where(seven, np.maximum(moved, 0), moved)


@pytest.mark.parametrize("spec", [("data", "model"), (None, ("data", "model"))])
def test_over_devices_it_is_the_same_and_mask_variables_are_not_sent(spec):
    mesh = make_mesh(8, 2)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    random = np.random.default_rng(0)
    s, u = (random.normal(size=(16, 32)).astype(np.float32) for _ in range(2))
    s, u = -np.abs(s), u / 100
    tx = keep_connections(7)
    step = jax.jit(lambda u, s: tx.update(u, optax.EmptyState(), s)[0])
    there = [jax.device_put(x, sharding) for x in (u, s)]
    new = step(*there)
    assert new.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(new, step(u, s))
    np.testing.assert_array_equal(s + np.asarray(new), with_seven(s + u))
    text = step.lower(*there).compile().as_text()
    assert " all-reduce(" in text
    for other in ("all-gather", "all-to-all", "collective-permute"):
        assert other not in text
    # Of all devices are taken the sum of counts (floats up to 2**24), the highest rank
    # and its place: one number each.
    sums = [line for line in text.splitlines() if " all-reduce(" in line]
    kinds = ("= f32[] all-reduce(", "= u32[] all-reduce(")
    assert all(any(kind in line for kind in kinds) for line in sums)


@pytest.mark.parametrize("spec", [("data", "model"), (("data", "model"), None)])
@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_over_devices_a_minimum_per_feature_sends_counts_alone(spec, types):
    names = ("data", "model")
    mesh = jax.make_mesh((4, 2), names, axis_types=(types, types))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    s = -np.abs(np.random.default_rng(0).normal(size=(16, 32))).astype(np.float32)
    there = jax.device_put(s, sharding)
    tx = keep_connections(3, feature_axes=-1)
    step = jax.jit(lambda s: tx.update(jnp.zeros_like(s), optax.EmptyState(), s)[0])
    new = step(there)
    assert new.sharding.is_equivalent_to(sharding, 2)
    largest = s >= np.sort(s, axis=0)[-3][None, :]
    np.testing.assert_array_equal(s + np.asarray(new) >= 0, largest)
    text = step.lower(there).compile().as_text()
    sums = [line for line in text.splitlines() if " all-reduce(" in line]
    assert sums
    shapes = ("[1,32]", "[32]", "[1,16]", "[16]")
    kinds = ["= pred[]", *(f"= {dtype}{s}" for dtype in ("f32", "u32") for s in shapes)]
    assert all(any(kind in line for kind in kinds) for line in sums), sums
    for other in ("all-gather", "all-to-all", "collective-permute"):
        assert other not in text
