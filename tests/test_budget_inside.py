"""A budget inside trainings: other transforms, loops, precisions, devices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from scl_jax import (
    LeakyReLU,
    MaskedParams,
    meet_budget,
    normalize_by_feature,
    partition,
)

FREEZE = 4  # the schedule ends at 2


def normal(seed, *leading):
    random = np.random.default_rng(seed)
    shapes = {"a": (16, 8), "b": None, "c": (8, 24)}
    return {
        name: shape and random.normal(size=(*leading, *shape)).astype("f4")
        for name, shape in shapes.items()
    }


MASKS, GRADIENT = jax.tree.map(np.abs, normal(0)), normal(1)


def inner():
    return optax.chain(normalize_by_feature(), optax.sgd(0.1, 0.9))


def budget(masks_tx=None, target=0.25, **options):
    masks_tx = inner() if masks_tx is None else masks_tx
    return meet_budget(masks_tx, target, freeze_step=FREEZE, **options)


def jitted(function):
    # Compiling takes most of the time here.
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def penalty(state):
    return float(optax.tree_utils.tree_get(state, "penalty"))


def trained(tx, masks=MASKS, gradient=GRADIENT, steps=FREEZE + 1, **extra):
    """Return mask variables and state after a few steps with the same gradient."""
    update, state = jitted(tx.update), tx.init(masks)
    for _ in range(steps):
        updates, state = update(gradient, state, masks, **extra)
        masks = optax.apply_updates(masks, updates)
    return masks, state


def count(masks):
    return sum(np.sum(np.asarray(s) >= 0) for s in jax.tree.leaves(masks))


@pytest.fixture(scope="module")
def alone():
    masks, state = trained(budget())
    assert count(masks) == 0.25 * (128 + 192)
    assert penalty(state) > 0
    return masks, penalty(state)


# Other transforms

EVERY_ARGUMENT = (
    "masks_tx",
    "target",
    "freeze_step",
    "end_step",
    "begin_step",
    "schedule",
    "costs",
    "weigh",
    "minimum",
    "feature_axes",
    "ste",
)
COMPOSITIONS = {
    "chain": lambda: optax.chain(optax.identity(), budget()),
    "masked": lambda: optax.masked(budget(), {"a": True, "b": True, "c": True}),
    "apply_if_finite": lambda: optax.apply_if_finite(budget(), 3),
    "hyperparams_inside": lambda: budget(
        optax.chain(
            normalize_by_feature(),
            optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9),
        )
    ),
    "static_hyperparams": lambda: optax.inject_hyperparams(
        meet_budget, static_args=EVERY_ARGUMENT
    )(inner(), 0.25, freeze_step=FREEZE),
}


@pytest.mark.parametrize("make", COMPOSITIONS.values(), ids=[*COMPOSITIONS])
def test_inside_other_transforms(make, alone):
    masks, state = trained(make())
    chex.assert_trees_all_close(masks, alone[0], rtol=1e-6)
    assert penalty(state) == pytest.approx(alone[1], rel=1e-5)


def test_inside_partition_the_weights_train_on(alone):
    tx = partition(optax.sgd(0.5), budget(costs={"a": 1.0, "b": None, "c": 1}))
    masked = MaskedParams({**MASKS, "b": np.ones(3, np.float32)}, MASKS)
    gradient = MaskedParams({**GRADIENT, "b": np.ones(3, np.float32)}, GRADIENT)
    after, state = trained(tx, masked, gradient)
    chex.assert_trees_all_close(after.masks, alone[0], rtol=1e-6)
    weights = jax.tree.map(lambda w, g: w - 2.5 * g, masked.weights, gradient.weights)
    chex.assert_trees_all_close(after.weights, weights, rtol=1e-5, atol=1e-5)
    assert penalty(state) == pytest.approx(alone[1], rel=1e-5)


def test_inside_multi_steps_the_average_is_penalized(alone):
    tx = optax.MultiSteps(budget(), 2)
    update, state, masks = jitted(tx.update), tx.init(MASKS), MASKS
    halves = [jax.tree.map(lambda g, k=k: k * g, GRADIENT) for k in (0.5, 1.5)]
    for step in range(2 * FREEZE):
        updates, state = update(halves[step % 2], state, masks)
        masks = optax.apply_updates(masks, updates)
    chex.assert_trees_all_close(masks, alone[0], rtol=1e-4, atol=1e-6)
    assert penalty(state) == pytest.approx(alone[1], rel=1e-4)


def test_a_gradient_that_is_not_finite_can_be_passed_over():
    tx = optax.apply_if_finite(budget(), 3)
    update, state = jitted(tx.update), tx.init(MASKS)
    _, state = update(GRADIENT, state, MASKS)
    before = state.inner_state
    updates, state = update(
        jax.tree.map(lambda g: np.full_like(g, np.nan), GRADIENT), state, MASKS
    )
    chex.assert_trees_all_equal(state.inner_state, before)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("name", ["target", "freeze_step", "minimum", "ste"])
def test_under_inject_hyperparams_every_argument_must_be_static(name):
    others = [argument for argument in EVERY_ARGUMENT if argument != name]
    make = optax.inject_hyperparams(meet_budget, static_args=others)
    with pytest.raises(TypeError, match="meet_budget: "):
        make(inner(), 0.25, freeze_step=FREEZE).init(MASKS)


def test_extra_arguments_reach_the_inner_transform():
    def scaled(updates, state, params=None, *, factor, **others):
        assert set(others) <= {"note"}
        return jax.tree.map(lambda u: -factor * u, updates), state

    scale = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), scaled)
    masks, _ = trained(budget(scale), factor=np.float32(0.1), note=None)
    expected, _ = trained(budget(optax.sgd(0.1)))
    chex.assert_trees_all_close(masks, expected, rtol=1e-6)


# Loops and compilations


def test_one_compilation_moves_cuts_and_freezes(alone):
    tx = budget()
    # A step is traced for its shapes, and then once.
    once = optax.GradientTransformation(tx.init, chex.assert_max_traces(tx.update, n=1))
    masks, _ = trained(once, steps=FREEZE + 2)
    chex.assert_trees_all_equal(masks, alone[0])


def test_from_the_freeze_on_nothing_moves():
    tx = budget(optax.adam(0.1))
    update, state, masks, seen = jitted(tx.update), tx.init(MASKS), MASKS, []
    for step in range(FREEZE + 3):
        updates, state = update(normal(step), state, masks)
        masks = optax.apply_updates(masks, updates)
        seen.append(jax.tree.leaves(masks))
        assert state.step == min(step + 1, FREEZE)
        moving = [np.any(u) for u in jax.tree.leaves(updates)]
        assert all(moving) if step < FREEZE else not any(moving)
    for before, last, *rest in zip(*seen[FREEZE - 2 :], strict=True):
        assert not np.array_equal(before, last)
        assert all(np.array_equal(x, last) for x in rest)


def test_in_a_scan_under_vmap_each_seed_has_its_own_coefficient():
    tx = budget()
    masks = jax.tree.map(lambda *s: np.stack(s), MASKS, jax.tree.map(np.abs, normal(2)))
    gradients = jax.tree.map(lambda *g: np.stack(g), GRADIENT, normal(3))

    def train(masks, gradient):
        def step(carry, _):
            masks, state = carry
            updates, state = tx.update(gradient, state, masks)
            return (optax.apply_updates(masks, updates), state), None

        start = masks, tx.init(masks)
        return jax.lax.scan(step, start, length=FREEZE + 1)[0]

    together, states = jitted(jax.vmap(train))(masks, gradients)
    for i in range(2):
        one = jax.tree.map(lambda x, i=i: x[i], (masks, gradients, together))
        expected, state = trained(tx, *one[:2])
        chex.assert_trees_all_close(one[2], expected, rtol=1e-4, atol=1e-6)
        assert count(one[2]) == 80
        assert float(states.penalty[i]) == pytest.approx(penalty(state), rel=1e-4)
    assert states.penalty[0] != states.penalty[1]


# Shapes and precisions


def shapes_of(tree, dtype):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)


@pytest.mark.parametrize("options", [{}, {"costs": MASKS, "ste": LeakyReLU(0.5)}])
@pytest.mark.parametrize("masks_dtype", ["float32", "bfloat16"])
def test_low_precision_gradients_keep_their_dtype(masks_dtype, options):
    tx = budget(**options)
    masks, gradient = shapes_of(MASKS, masks_dtype), shapes_of(GRADIENT, "bfloat16")
    state = tx.init(masks)
    given = jax.eval_shape(lambda: state)
    updates, after = jax.eval_shape(tx.update, gradient, state, masks)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), given
    )
    through = budget(normalize_by_feature())
    updates, _ = jax.eval_shape(through.update, gradient, through.init(masks), masks)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("feature_axes", [None, -1])
def test_init_on_shapes_has_the_shapes_of_init_on_arrays(feature_axes):
    tx = budget(optax.sgd(0.1), 0.75, minimum=2, feature_axes=feature_axes)
    of_shapes, of_arrays = tx.init(shapes_of(MASKS, "float32")), tx.init(MASKS)
    chex.assert_trees_all_equal_shapes_and_dtypes(of_shapes, of_arrays)


@pytest.mark.parametrize("schedule", ["cubic", "constant", lambda t: 1 - 0.375 * t])
def test_in_64_bit_mode_the_state_keeps_its_dtypes(schedule):
    with jax.enable_x64(True):
        tx = meet_budget(inner(), 0.25, freeze_step=2, schedule=schedule)
        state = tx.init(MASKS)
        masks = shapes_of(MASKS, "float64")
        _, after = jax.eval_shape(tx.update, masks, tx.init(masks), masks)
    dtypes = [x.dtype.name for x in (after.step, after.penalty, after.excess)]
    assert dtypes == ["int32", "float32", "float32"]
    chex.assert_trees_all_equal_dtypes(state[:3], after[:3])


def test_it_lowers_for_every_platform():
    tx = budget(feature_axes=-1, costs=MASKS, target=0.75)
    start = jax.eval_shape(jax.jit(tx.init), MASKS)
    platforms = ["tpu", "cuda", "cpu"]
    exported = jax.export.export(jax.jit(tx.update), platforms=platforms)(
        MASKS, start, MASKS
    )
    assert exported.platforms == tuple(platforms)


# Devices

SPECS = {
    "features": (PartitionSpec(None, "model"), AxisType.Auto),
    "inputs": (PartitionSpec("model", None), AxisType.Auto),
    "both": (PartitionSpec("data", "model"), AxisType.Auto),
    "explicit": (PartitionSpec("data", "model"), AxisType.Explicit),
}


@pytest.mark.parametrize(("spec", "kind"), SPECS.values(), ids=[*SPECS])
def test_over_devices_it_is_the_same_and_mask_variables_are_not_sent(spec, kind, alone):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    sharding = NamedSharding(mesh, spec)
    masks, gradient = jax.device_put((MASKS, GRADIENT), sharding)
    tx = budget()
    state = tx.init(masks)
    compiled = jitted(tx.update).lower(gradient, state, masks).compile()
    for _ in range(FREEZE + 1):
        updates, state = compiled(gradient, state, masks)
        masks = optax.apply_updates(masks, updates)
        like_masks = optax.tree_utils.tree_get(state.inner, "trace")
        assert jax.tree.map(jnp.shape, like_masks) == jax.tree.map(jnp.shape, MASKS)
        for x in jax.tree.leaves((masks, updates, like_masks)):
            assert x.sharding.is_equivalent_to(sharding, 2)
    one_device, coefficient = alone
    for name in ("a", "c"):
        np.testing.assert_array_equal(masks[name] >= 0, one_device[name] >= 0)
        np.testing.assert_allclose(masks[name], one_device[name], rtol=1e-4, atol=1e-6)
    assert penalty(state) == pytest.approx(coefficient, rel=1e-5)
    assert count(masks) == 80
    text = compiled.as_text()
    assert " all-reduce(" in text
    for other in ("all-gather", "all-to-all", "collective-permute"):
        assert other not in text
    # What is summed over devices is a number, or one for each feature.
    lines = [line for line in text.splitlines() if " all-reduce(" in line]
    kernels = (
        "[16,8]",
        "[8,24]",
        "[16,2]",
        "[4,8]",
        "[8,2]",
        "[8,6]",
        "[2,24]",
        "[4,6]",
    )
    assert not any(shape in line for line in lines for shape in kernels)


@pytest.mark.parametrize(("spec", "kind"), SPECS.values(), ids=[*SPECS])
def test_over_devices_every_feature_keeps_its_minimum(spec, kind):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    sharding = NamedSharding(mesh, spec)
    tx = budget(minimum=3, feature_axes=-1, target=0.375)
    masks, _ = trained(tx, *jax.device_put((MASKS, GRADIENT), sharding))
    expected, _ = trained(tx)
    for name in ("a", "c"):
        assert np.min(np.sum(np.asarray(masks[name]) >= 0, 0)) >= 3
        np.testing.assert_array_equal(masks[name] >= 0, expected[name] >= 0)
    assert count(masks) == 120


# Trees


def test_a_tree_without_mask_variables_is_refused():
    with pytest.raises(ValueError, match=r"meet_budget: .* there are 0 mask variables"):
        budget().init({"a": None})


def test_only_a_bare_tree_with_params_is_updated():
    tx, masked = budget(), MaskedParams(MASKS, MASKS)
    with pytest.raises(TypeError, match=r"meet_budget: .* give it to partition"):
        tx.init(masked)
    with pytest.raises(TypeError, match=r"meet_budget: .* give it to partition"):
        tx.update(masked, tx.init(MASKS), masked)
    with pytest.raises(ValueError, match=r"meet_budget: .*\(updates, state, params\)"):
        tx.update(MASKS, tx.init(MASKS))
