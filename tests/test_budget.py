"""Meeting a budget: the controller, the cut at the freeze, the guard, the errors."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scl_jax import (
    LeakyReLU,
    UnknownMacs,
    identity,
    meet_budget,
)

SHAPES = {"a": (24, 10), "b": None, "c": (40, 15), "d": (6, 2)}
SIZES = [240, 600, 12]
TOTAL = sum(SIZES)
LARGEST = slice(240, 840)  # the leaf whose gradient is the unit of the coefficient


def tree_of(make):
    """Return make(shape) for each masked leaf."""
    return {name: shape and make(shape) for name, shape in SHAPES.items()}


def unflattened(flat):
    parts = iter(np.split(flat, np.cumsum(SIZES)[:-1], axis=-1))
    return tree_of(lambda shape: next(parts).reshape(*flat.shape[:-1], *shape))


def flattened(tree):
    return np.concatenate([np.ravel(x).astype("f4") for x in jax.tree.leaves(tree)])


def jitted(function):
    # Compiling takes most of the time here.
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


# The controller

BEGIN, END, FREEZE = 3, 63, 70


def falling(power):
    return lambda t: (
        0.1 + 0.9 * (1 - np.clip((t - BEGIN) / (END - BEGIN), 0, 1)) ** power
    )


def constant(t):
    return 0.1 if t >= BEGIN else 1.0


def own(t):
    return jnp.maximum(0.1, 1.0 - 0.03 * t)


def recording():
    """Return a transform whose state is what it was given last.

    Its updates lead to the mask variables that are `following`.
    """
    return optax.GradientTransformationExtraArgs(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params, *, following: (
            jax.tree.map(jnp.subtract, following, params),
            updates,
        ),
    )


def in_numpy(gradients, masks, allowed, cost, slope, weigh, falls_for, every):
    """Return coefficients, in units of their limits' too; excesses; gradients."""
    penalty, excess, found = 0.0, 0.0, []
    weight = cost if weigh else np.ones(TOTAL)
    for t, (g, s) in enumerate(zip(gradients, masks, strict=True)):
        if t % every == 0:
            before = excess
            spent = max(np.sum(cost[s >= 0]) / np.sum(cost), 1e-9)
            excess = math.log(spent / float(allowed(t + 1)))
            change = 10 * (excess - before) + every * 10 * excess / (falls_for / 8)
            unit = np.mean(np.abs(g[LARGEST])) / np.mean(weight)
            penalty = np.clip(penalty * np.exp(change), 1e-3 * unit, 1e2 * unit)
        penalized = g + penalty * weight * np.where(s >= 0, 1, slope)
        found.append((penalty / unit, penalty, excess, penalized))
    return [np.stack(values) for values in zip(*found, strict=True)]


SCALARS = {"a": 4.0, "b": UnknownMacs("not masked"), "c": np.float32(0.5), "d": 0}
ARRAYS = unflattened(np.random.default_rng(5).integers(0, 9, TOTAL))
ONES = np.ones(TOTAL)
PLAIN, SCALAR = (None, ONES), (SCALARS, np.repeat([4, 0.5, 0], SIZES))
ARRAY = ARRAYS, flattened(ARRAYS).astype(float)
CONTROLLED = {
    "plain": ("cubic", falling(3), PLAIN, 1, True),
    "constant": ("constant", constant, PLAIN, 1, False),
    "leaky": (own, own, PLAIN, 0.25, True),
    "scalar_costs": ("linear", falling(1), SCALAR, 1, True),
    "leaky_array_costs": ("cubic", falling(3), ARRAY, 0.25, True),
    "scalar_costs_not_weighed": ("cubic", falling(3), SCALAR, 0.25, False),
    "array_costs_not_weighed": (own, own, ARRAY, 1, False),
}


@pytest.mark.parametrize("case", CONTROLLED.values(), ids=[*CONTROLLED])
def test_the_controller_follows_its_recursion(case):
    schedule, allowed, (costs, cost), slope, weigh = case
    random = np.random.default_rng(1)
    steps = FREEZE - 1
    gradients = random.normal(size=(steps, TOTAL)) * random.uniform(0.5, 2, (steps, 1))
    masks = random.normal(size=(steps, TOTAL))
    for t in range(steps):
        # Some more, or fewer, than are allowed; in one step, one a leaf, which is
        # what the guard leaves in all.
        wanted = min(1, float(allowed(t + 1)) * random.uniform(0.9, 1.1))
        masks[t] -= (
            np.max(masks[t]) + 1 if t == 20 else np.quantile(masks[t], 1 - wanted)
        )
        masks[t, [0, 240, 840]] = 1
    both = gradients.astype("f4"), masks.astype("f4")
    inputs = [unflattened(x) for x in (*both, np.roll(both[1], -1, axis=0))]
    tx = meet_budget(
        recording(),
        0.1,
        freeze_step=FREEZE,
        end_step=None if schedule == "linear" else END,  # by default 9/10
        begin_step=BEGIN,
        schedule=schedule,
        costs=costs,
        weigh=weigh,
        ste=LeakyReLU(slope) if slope < 1 else identity,
    )

    def step(state, inputs):
        _, state = tx.update(*(inputs[0], state, inputs[1]), following=inputs[2])
        return state, state

    start = tx.init(jax.tree.map(lambda x: x[0], inputs[1]))
    _, states = jitted(lambda *x: jax.lax.scan(step, *x))(start, tuple(inputs))
    units, penalty, excess, penalized = in_numpy(
        *(gradients, masks, allowed, cost, slope, weigh),
        falls_for=END - BEGIN,
        every=1,
    )
    at_lowest, at_highest = np.isclose(units, 1e-3), np.isclose(units, 1e2)
    assert np.any(at_lowest)
    assert np.any(at_highest)
    assert np.mean(at_lowest | at_highest) < 0.7
    np.testing.assert_allclose(states.excess, excess, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(states.penalty, penalty, rtol=1e-3)
    np.testing.assert_array_equal(states.step, np.arange(1, FREEZE))
    for given, expected in zip(
        jax.tree.leaves(states.inner),
        jax.tree.leaves(unflattened(penalized)),
        strict=True,
    ):
        np.testing.assert_allclose(given, expected, rtol=1e-3, atol=1e-4)


# (begin, end), steps between two looks
LOOKS = [((0, 64), 1), ((10, 137), 1), ((10, 138), 2), ((0, 999), 15), ((0, 4000), 50)]


@pytest.mark.parametrize(("steps", "every"), LOOKS)
def test_it_looks_64_times_while_the_budget_falls_but_every_50_steps(steps, every):
    begin, end = steps
    random = np.random.default_rng(2)
    many = 2 * every + 2
    gradients, masks = random.normal(size=(2, many, TOTAL)).astype("f4")
    falls = optax.linear_schedule(1.0, 0.1, end - begin, begin)
    tx = meet_budget(
        *(optax.set_to_zero(), 0.1),
        freeze_step=end,
        end_step=end,
        begin_step=begin,
        schedule="linear",
    )
    state, seen = tx.init(unflattened(masks[0])), []
    update = jitted(tx.update)
    for g, s in zip(gradients, masks, strict=True):
        _, state = update(unflattened(g), state, unflattened(s))
        seen.append((float(state.penalty), float(state.excess)))
    _, penalty, excess, _ = in_numpy(
        *(gradients, masks, falls, ONES, 1, True), falls_for=end - begin, every=every
    )
    np.testing.assert_allclose(seen, np.stack([penalty, excess], 1), rtol=1e-3)
    assert len({excess for _, excess in seen}) == -(-many // every)


# The cut at the freeze


@functools.cache
def last_step(target):
    tx = meet_budget(optax.set_to_zero(), target, freeze_step=1)
    return tx, jitted(tx.update)


def cut(masks, target=0.5):
    """Return mask variables, flat, after a last step that would not move them."""
    tx, update = last_step(target)
    updates, _ = update(masks, tx.init(masks), masks)
    return flattened(optax.apply_updates(masks, updates))


def normal(dtype=np.float32, seed=0):
    """Return mask variables, of which the three largest lie in three leaves."""
    s = np.random.default_rng(seed).normal(size=TOTAL)
    s[[0, 240, 840]] = [5, 6, 7]
    return unflattened(s.astype(dtype))


TARGETS = {0.5: 426, 0.1: 85, 0.02: 17, 0.005: 4, 1.0: 852, 3: 3, 852: 852}


@pytest.mark.parametrize(("target", "count"), TARGETS.items())
def test_the_largest_mask_variables_of_all_layers_together_are_left(target, count):
    s = flattened(normal())
    largest = np.zeros(TOTAL, bool)
    largest[np.argsort(s)[TOTAL - count :]] = True
    after = cut(normal(), target)
    np.testing.assert_array_equal(after >= 0, largest)
    # Those on the right side are left where they are; others end just across.
    right = (s >= 0) == largest
    np.testing.assert_array_equal(after[right], s[right])
    np.testing.assert_array_equal(after[largest], np.maximum(s, 0)[largest])
    assert np.all(after[~right & ~largest] > -0.05 * np.max(s))


@pytest.mark.parametrize(
    ("mask", "target", "count"),
    [
        # 0.29 * 100 is a hair below 29.
        (jnp.arange(100.0), 0.29, 29),
        (jnp.ones((1500, 1500), jnp.bfloat16), 0.6, 1_350_000),
    ],
)
def test_a_fraction_of_all_connections_is_counted_exactly(mask, target, count):
    assert np.sum(cut({"kernel": mask}, target) >= 0) == count


@pytest.mark.parametrize("value", [0.1, 0.0, -0.0, -0.1])
def test_of_equal_mask_variables_exactly_as_many_are_left_from_all_layers(value):
    after = cut(unflattened(np.full(TOTAL, value, np.float32)))
    counts = np.array([np.sum(x >= 0) for x in jax.tree.leaves(unflattened(after))])
    assert np.sum(counts) == 426
    np.testing.assert_allclose(counts[:2] / SIZES[:2], 0.5, atol=0.1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shift", [-0.7, 0, 0.7])
def test_low_precision_is_cut_exactly_and_in_order(dtype, shift):
    masks = normal(jnp.dtype(dtype))
    s = flattened(masks)
    assert len(np.unique(s)) < TOTAL, "some are equal"
    masks = jax.tree.map(lambda x: x + jnp.asarray(shift, dtype), masks)
    s, after = flattened(masks), cut(masks)
    assert np.sum(after >= 0) == 426
    assert np.min(s[after >= 0]) >= np.max(s[after < 0])


def test_the_largest_pruned_ones_return_where_too_few_are_left():
    s = flattened(normal())
    masks = unflattened(s - np.sort(s)[-100])
    after, s = cut(masks), flattened(masks)
    assert np.sum(s >= 0) == 100
    returned = (np.argsort(np.argsort(s)) >= TOTAL - 426) & (s < 0)
    np.testing.assert_array_equal(after, np.where(returned, 0, s))


def test_the_last_step_cuts_and_moves_nothing():
    s, g = flattened(normal()), flattened(normal(seed=1))
    tx = meet_budget(optax.sgd(1.0), 0.5, freeze_step=1)
    masks = unflattened(s)
    updates, _ = jitted(tx.update)(unflattened(g), tx.init(masks), masks)
    after = flattened(optax.apply_updates(masks, updates))
    largest = np.argsort(np.argsort(s)) >= TOTAL - 426
    np.testing.assert_array_equal(after >= 0, largest)
    right = (s >= 0) == largest
    np.testing.assert_array_equal(after[right], s[right])


def test_nan_is_no_connection_and_stays():
    s = flattened(normal())
    s[1:200:2] = np.nan
    s[300:400] = -np.float32(np.nan)
    after = cut(unflattened(s))
    np.testing.assert_array_equal(np.isnan(after), np.isnan(s))
    assert np.sum(after >= 0) == 426
    assert np.sum(cut(unflattened(s), 1.0) >= 0) == TOTAL - 200
    tx = meet_budget(optax.set_to_zero(), 1.0, freeze_step=9)
    masks = unflattened(np.where(np.isnan(s), s, 1))
    _, state = jitted(tx.update)(normal(), tx.init(masks), masks)
    assert float(state.excess) == pytest.approx(math.log(1 - 200 / TOTAL), rel=1e-5)


MACS = {"a": 49.0, "b": UnknownMacs("not masked"), "c": 1.5, "d": 12}
COSTS = {
    "scalars": (MACS, np.repeat([49, 1.5, 12], SIZES)),
    "arrays": (jax.tree.map(jnp.asarray, ARRAYS), flattened(ARRAYS)),
}


@pytest.mark.parametrize("target", [0.02, 1000])
@pytest.mark.parametrize("case", COSTS.values(), ids=[*COSTS])
def test_the_cost_is_at_most_the_target_and_less_by_no_connection(case, target):
    costs, cost = case
    masks, s = normal(), flattened(normal())
    tx = meet_budget(optax.set_to_zero(), target, freeze_step=1, costs=costs)
    updates, _ = jitted(tx.update)(masks, tx.init(masks), masks)
    after = flattened(optax.apply_updates(masks, updates))
    budget = target if target > 1 else target * np.sum(cost)
    assert budget - np.max(cost) < np.sum(cost[after >= 0]) <= budget
    assert np.min(s[after >= 0]) > np.max(s[after < 0])


def test_a_budget_of_bytes():
    masks = normal()
    masks = {**masks, "c": masks["c"].astype(jnp.bfloat16)}
    costs = jax.tree.map(lambda x: x.dtype.itemsize, masks)
    tx = meet_budget(optax.set_to_zero(), 1001, freeze_step=1, costs=costs)
    updates, _ = jitted(tx.update)(masks, tx.init(masks), masks)
    after = flattened(optax.apply_updates(masks, updates))
    assert 1001 - 4 < np.sum(np.repeat([4, 2, 4], SIZES)[after >= 0]) <= 1001
