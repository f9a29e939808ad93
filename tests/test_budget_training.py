"""Small trainings that meet a budget: exactly, interrupted, over devices, guarded."""

import functools
import io
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments.data import load
from experiments.mesh import make_mesh
from scl_jax import (
    add_connection_penalty,
    apply_masks,
    fold_masks,
    mask_params,
    meet_budget,
    normalize_by_feature,
    partition,
)

SIZES = (49, 48, 32, 10)
TOTAL = 49 * 48 + 48 * 32 + 32 * 10
STEPS, END, FREEZE, PART = 200, 75, 150, 50
TARGETS = (0.5, 0.1, 0.01)
SEEDS = (0, 1)


@functools.cache
def digits():
    """Return (inputs, labels) to train and to test: mnist5k in 7 x 7 pixels."""
    dataset = load("mnist5k", validation=0)

    def small(split):
        pixels = split.inputs.reshape(-1, 7, 4, 7, 4).mean((2, 4)).reshape(-1, 49)
        return (pixels / 128 - 0.5).astype(np.float32), split.labels

    return small(dataset.train), small(dataset.test)


def initial(seed):
    random = np.random.default_rng(seed)
    return mask_params(
        {
            f"Dense_{i}": {
                "kernel": (random.normal(size=shape) / shape[0] ** 0.5).astype("f4"),
                "bias": np.zeros(shape[1], np.float32),
            }
            for i, shape in enumerate(itertools.pairwise(SIZES))
        }
    )


def batches(seed):
    train, _ = digits()
    chosen = np.random.default_rng(seed).integers(0, len(train[1]), (STEPS, 64))
    return [x[chosen] for x in train]


def network(params, x):
    for i in range(3):
        x = jax.nn.relu(x) if i else x
        layer = params[f"Dense_{i}"]
        x = x @ layer["kernel"] + layer["bias"][None]
    return x


def accuracy(masked):
    inputs, labels = digits()[1]
    return np.mean(np.argmax(network(fold_masks(masked), inputs), -1) == labels)


def masks_tx():
    return optax.chain(normalize_by_feature(), optax.sgd(0.01, 0.9))


def counts(masks, axes=None):
    return [np.sum(np.asarray(s) >= 0, axes) for s in jax.tree.leaves(masks)]


def jitted(function):
    # Compiling takes most of the time here.
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def steps_of(tx):
    """Return the function that trains on batches: (masked, state), excesses."""

    def step(carry, batch):
        masked, state = carry
        inputs, labels = batch

        def loss(masked):
            logits = network(apply_masks(masked), inputs)
            entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.mean(entropy)

        updates, state = tx.update(jax.grad(loss)(masked), state, masked)
        carry = optax.apply_updates(masked, updates), state
        return carry, optax.tree_utils.tree_get(state, "excess", jnp.nan)

    return lambda carry, batches: jax.lax.scan(step, carry, batches)


@functools.cache
def budgeted(target):
    """Return the optimizer and the training with a budget."""
    tx = partition(
        optax.adam(5e-3),
        meet_budget(masks_tx(), target, freeze_step=FREEZE, end_step=END),
    )
    return tx, jitted(steps_of(tx))


def train_on(run, carry, batches, first=0, last=STEPS):
    """Train part by part, as a training does that is interrupted now and then."""
    excess = []
    for start in range(first, last, PART):
        part = [x[start : start + PART] for x in batches]
        carry, seen = run(carry, part)
        excess.append(seen)
    return carry, np.concatenate(excess)


@functools.cache
def trained(target, seed):
    tx, run = budgeted(target)
    masked = initial(seed)
    return train_on(run, (masked, tx.init(masked)), batches(seed))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_training_ends_at_its_budget_and_has_learned(target, seed):
    (masked, _), _ = trained(target, seed)
    assert sum(counts(masked.masks)) == math.floor(target * TOTAL)
    # Chance is 0.1. Measured: 0.84 and 0.85, 0.83 and 0.83, 0.47 and 0.37.
    assert accuracy(masked) > {0.5: 0.75, 0.1: 0.75, 0.01: 0.25}[target]


# Without a penalty 0.65 of the connections are left: all targets are below.
# The largest excess measured from step 20 on, of either sign: 0.14, 0.41 and 1.26; the
# last falls by a factor of 100 within 75 steps.
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("target", "most"), [(0.5, 0.3), (0.1, 0.7), (0.01, 1.6)])
def test_the_schedule_is_followed_after_the_first_tenth(target, most, seed):
    _, excess = trained(target, seed)
    assert np.max(np.abs(excess[STEPS // 10 : FREEZE])) < most
    assert np.max(np.abs(excess[FREEZE - PART : FREEZE])) < 0.4  # measured: 0.29
    assert np.all(excess[FREEZE:] == excess[FREEZE - 1])


def test_an_interrupted_training_ends_with_the_same_bits():
    tx, run = budgeted(0.1)
    masked = initial(0)
    carry, _ = train_on(run, (masked, tx.init(masked)), batches(0), last=PART)
    leaves, structure = jax.tree.flatten(carry)
    file = io.BytesIO()
    np.savez(file, *leaves)
    file.seek(0)
    with np.load(file) as saved:
        carry = structure.unflatten([saved[name] for name in saved.files])
    carry, _ = train_on(run, carry, batches(0), first=PART)
    expected, _ = trained(0.1, 0)
    for x, y in zip(jax.tree.leaves(carry), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


def test_over_devices_a_training_ends_at_its_budget_too():
    mesh = make_mesh(8, 2)
    kernels = NamedSharding(mesh, PartitionSpec(None, "model"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    divided = NamedSharding(mesh, PartitionSpec(None, "data"))

    def placed(x):
        return jax.device_put(x, kernels if x.ndim == 2 else everywhere)

    tx, run = budgeted(0.1)
    masked = initial(0)
    carry = jax.tree.map(placed, (masked, tx.init(masked)))
    given = jax.device_put(batches(0), divided)
    (masked, _), excess = run(carry, given)
    assert sum(counts(masked.masks)) == math.floor(0.1 * TOTAL)
    for s in jax.tree.leaves(masked.masks):
        assert s.sharding.is_equivalent_to(kernels, 2)
    (expected, _), excess_on_one = trained(0.1, 0)
    # Sums over devices are rounded otherwise, which a training could amplify.
    np.testing.assert_allclose(excess[:PART], excess_on_one[:PART], atol=0.02)
    assert abs(accuracy(jax.device_get(masked)) - accuracy(expected)) < 0.05


@pytest.mark.parametrize("target", [0.5, 0.1])
def test_a_fixed_penalty_of_its_size_comes_to_a_similar_sparsity(target):
    masked = initial(0)
    _, state = trained(target, 0)[0]
    coefficient = optax.tree_utils.tree_get(state, "penalty")

    @jitted
    def run(coefficient, batches):
        penalized = optax.chain(add_connection_penalty(coefficient), masks_tx())
        tx = partition(optax.adam(5e-3), penalized)
        return steps_of(tx)((masked, tx.init(masked)), batches)

    (after, _), _ = run(coefficient, [x[:FREEZE] for x in batches(0)])
    assert target / 2 < sum(counts(after.masks)) / TOTAL < target * 2


# (minimum, feature axes, axes that are counted over, features or leaves, steps)
GUARDS = {
    "leaves": (40, None, None, 3, 40),
    "features": (2, -1, 0, 48 + 32 + 10, 40),
    # It looks every 4 steps only.
    "leaves_between_looks": (40, None, None, 3, 300),
    "features_between_looks": (2, -1, 0, 48 + 32 + 10, 300),
}


@pytest.mark.parametrize("case", GUARDS.values(), ids=[*GUARDS])
def test_the_minimum_is_left_in_every_step_and_the_cut_is_exact(case):
    minimum, feature_axes, axes, groups, steps = case
    tx = meet_budget(
        masks_tx(), 0.1, freeze_step=steps, minimum=minimum, feature_axes=feature_axes
    )
    random = np.random.default_rng(0)

    def between(low, high, tree):
        return jax.tree.map(
            lambda x: random.uniform(low, high, x.shape).astype("f4"), tree
        )

    masks = between(0.05, 0.15, initial(0).masks)
    gradient = between(-1, 0, masks)
    # The last layer, and a neuron of the first, would rather have no connection.
    gradient["Dense_2"]["kernel"][:] = 0.5
    gradient["Dense_0"]["kernel"][:, 0] = 0.5

    def step(carry, _):
        masks, state = carry
        updates, state = tx.update(gradient, state, masks)
        masks = optax.apply_updates(masks, updates)
        return (masks, state), masks

    carry = masks, tx.init(masks)
    masks = jitted(lambda *carry: jax.lax.scan(step, carry, length=steps)[1])(*carry)
    left = [
        np.concatenate([np.ravel(n) for n in counts(masks_at_step, axes)])
        for masks_at_step in (
            jax.tree.map(lambda s, t=t: s[t], masks) for t in range(steps)
        )
    ]
    assert np.shape(left) == (steps, groups)
    assert np.min(left) == minimum, "the guard had work to do"
    assert np.sum(left[-1]) == math.floor(0.1 * TOTAL)
