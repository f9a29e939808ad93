"""One table of our transforms, and what every one of them must be able to do.

Wrapped by Optax or by JAX, a transform moves the parameters as it does alone. What it
does alone, the tests of each say.
"""

import functools
import inspect
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scl_jax import (
    LeakyReLU,
    MaskedParams,
    add_connection_penalty,
    keep_connections,
    meet_budget,
    normalize_by_feature,
    partition,
)

STEPS = 5  # in which the budgets fall, cut and rest
make = functools.partial


class Row(NamedTuple):
    """A transform of ours, and whether it is for a whole `MaskedParams`."""

    tx: Any  # functools.partial: inject_hyperparams needs the factory itself
    whole: bool = False


def momentum():
    # Optax's own momentum follows the dtype of the gradient, where none is said.
    sgd = optax.sgd(0.1, 0.9, accumulator_dtype=jnp.float32)
    return optax.chain(normalize_by_feature(), sgd)


def penalty_at(step):
    return 0.1 * step


TABLE = {
    "rms": Row(make(normalize_by_feature)),
    "l2": Row(make(normalize_by_feature, 0, norm="l2")),
    "max": Row(make(normalize_by_feature, (0, 1), norm="max")),
    "none": Row(make(normalize_by_feature, lambda path, leaf: -1, norm="none")),
    "penalty": Row(make(add_connection_penalty, 0.3, costs={"a": 1.0, "c": 2.0})),
    "penalty_schedule": Row(make(add_connection_penalty, penalty_at, ste=LeakyReLU())),
    "keep": Row(make(keep_connections, 30)),
    "keep_features": Row(make(keep_connections, 4, feature_axes=-1)),
    "budget": Row(make(meet_budget, momentum(), 0.25, freeze_step=4)),
    "budget_features": Row(
        make(
            meet_budget,
            optax.scale(-0.1),
            60,
            freeze_step=4,
            costs={"a": 1.0, "c": 1.5},
            minimum=2,
            feature_axes=-1,
        )
    ),
    "partition": Row(make(partition, optax.sgd(0.1), momentum()), whole=True),
    "partition_of_ours": Row(
        make(
            partition,
            optax.scale(-0.1),
            optax.chain(
                add_connection_penalty(0.1),
                normalize_by_feature(),
                optax.scale(-0.5),
                keep_connections(3),
            ),
        ),
        whole=True,
    ),
}
OWN_DTYPE = sorted(TABLE.keys() - {"budget", "partition"})  # not that of a momentum

every_row = pytest.mark.parametrize("row", TABLE.values(), ids=[*TABLE])


def tree(row, seed, *, positive=False, names=("a", "c")):
    """Return numbers like the parameters of a row, or those of some leaves."""
    random = np.random.default_rng(seed)
    shapes = {"a": (8, 4), "c": (4, 12)}

    def one():
        drawn = {n: random.normal(size=s).astype("f4") for n, s in shapes.items()}
        return {n: np.abs(x) if positive else x for n, x in drawn.items() if n in names}

    return MaskedParams(one(), one()) if row.whole else one()


def start(row, **options):
    return tree(row, 0, positive=True, **options)


def gradients(row, **options):
    return [tree(row, 1 + step, **options) for step in range(STEPS)]


def of_leaves(row, a, c):
    """Return `a` and `c` in the places of the two leaves."""
    leaves = {"a": a, "c": c}
    return MaskedParams(leaves, leaves) if row.whole else leaves


def jitted(function):
    # Compiling takes most of the time here.
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def trained(tx, params, gradients, **extra):
    """Return the parameters after every step."""
    update, state, seen = jitted(tx.update), tx.init(params), []
    for gradient in gradients:
        updates, state = update(gradient, state, params, **extra)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen


@functools.cache
def alone(name):
    row = TABLE[name]
    return trained(row.tx(), start(row), gradients(row))


def name_of(row):
    return next(name for name, other in TABLE.items() if other is row)


def assert_as_alone(row, seen, *, rtol=1e-5):
    expected = alone(name_of(row))
    assert len(seen) == len(expected)
    assert not np.allclose(jax.tree.leaves(seen[0])[-1], jax.tree.leaves(seen[-1])[-1])
    chex.assert_trees_all_close(seen, expected, rtol=rtol, atol=1e-6)


# Inside Optax


def all_static(row):
    names = tuple(inspect.signature(row.tx.func).parameters)
    inject = optax.inject_hyperparams(row.tx.func, static_args=names)
    return inject(*row.tx.args, **row.tx.keywords)


WRAPPERS = {
    "a_chain_in_inject_hyperparams": lambda row: optax.inject_hyperparams(
        lambda factor: optax.chain(optax.scale(factor), row.tx())
    )(factor=1.0),
    "inject_hyperparams": all_static,
}


@every_row
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=[*WRAPPERS])
def test_wrapped_by_optax_it_moves_as_alone(row, wrap):
    assert_as_alone(row, trained(wrap(row), start(row), gradients(row)))


@every_row
def test_unexpected_extra_arguments_are_accepted(row):
    tx = optax.chain(row.tx(), optax.identity())
    extra = {"value": np.float32(2), "surprise": {"batch": np.ones(3)}}
    assert_as_alone(row, trained(tx, start(row), gradients(row), **extra))


@every_row
def test_inside_multi_steps_it_sees_the_mean(row):
    tx = optax.MultiSteps(row.tx(), 2)
    micro = [
        jax.tree.map(lambda g, k=k: k * g, gradient)
        for gradient in gradients(row)
        for k in (0.5, 1.5)
    ]
    seen = trained(tx, start(row), micro)
    chex.assert_trees_all_equal(seen[0], start(row))
    assert_as_alone(row, seen[1::2], rtol=1e-4)


OTHERS = {
    "masked": lambda row: optax.masked(row.tx(), of_leaves(row, True, False)),
    "partition": lambda row: optax.partition(
        {"ours": row.tx(), "other": optax.scale(1.0)}, of_leaves(row, "ours", "other")
    ),
}


@pytest.mark.parametrize("name", sorted(TABLE.keys() - {"budget_features", "penalty"}))
@pytest.mark.parametrize("wrap", OTHERS.values(), ids=[*OTHERS])
def test_of_leaves_given_to_others_it_knows_nothing(name, wrap):
    row = TABLE[name]
    if name == "keep":
        row = Row(make(keep_connections, 10))
    one = trained(row.tx(), start(row, names="a"), gradients(row, names="a"))
    both = trained(wrap(row), start(row), gradients(row))
    total = start(row)
    for gradient, mine, seen in zip(gradients(row), one, both, strict=True):
        total = jax.tree.map(np.add, total, gradient)
        fields = (mine, seen, total)
        parts = zip(*fields, strict=True) if row.whole else [fields]
        for ours, got, summed in parts:
            np.testing.assert_allclose(got["a"], ours["a"], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(got["c"], summed["c"], rtol=1e-5, atol=1e-6)


@every_row
def test_optimizer_state_can_be_mapped_over_the_parameters(row):
    # How trainers cast or shard an optimizer's state.
    tx = row.tx()
    state = tx.init(start(row))
    mapped = optax.tree.map_params(tx, lambda x: np.full(x.shape, 7.0), state)
    shapes = {x.shape for x in jax.tree.leaves(start(row))}
    # Of features, and not of parameters, even where each connection is a feature.
    squares = {*map(id, jax.tree.leaves(optax.tree.get(state, "squares", ())))}
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(mapped), strict=True):
        like = old.shape in shapes and id(old) not in squares
        expected = np.full(old.shape, 7.0) if like else old
        np.testing.assert_array_equal(new, expected)


# Under JAX


def stepping(tx):
    """Return a step for `jax.lax.scan`, which a flag can pass over."""

    def step(carry, given):
        gradient, on = given
        params, state = carry
        updates, state = jax.lax.cond(
            on,
            lambda: tx.update(gradient, state, params),
            lambda: (jax.tree.map(jnp.zeros_like, gradient), state),
        )
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return step


def stacked(trees):
    return jax.tree.map(lambda *x: np.stack(x), *trees)


def unstacked(tree, count):
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(count)]


@every_row
def test_in_a_scan_that_passes_over_steps_under_cond(row):
    tx = row.tx()
    given = stacked([g for gradient in gradients(row) for g in (gradient, gradient)])
    on = np.arange(2 * STEPS) % 2 == 1

    @jitted
    def run(params):
        return jax.lax.scan(stepping(tx), (params, tx.init(params)), (given, on))[1]

    seen = unstacked(run(start(row)), 2 * STEPS)
    chex.assert_trees_all_equal(seen[0], start(row))
    assert_as_alone(row, seen[1::2])


@every_row
def test_under_vmap_each_copy_moves_as_alone(row):
    tx = row.tx()
    flipped = jax.tree.map(lambda x: x[::-1], (start(row), gradients(row)))
    starts = stacked([flipped[0], start(row)])
    given = stacked([stacked(flipped[1]), stacked(gradients(row))])

    def run(params, given):
        on = np.ones(STEPS, bool)
        return jax.lax.scan(stepping(tx), (params, tx.init(params)), (given, on))[1]

    copies = unstacked(jitted(jax.vmap(run))(starts, given), 2)
    assert_as_alone(row, unstacked(copies[1], STEPS))
    first = jax.tree.leaves(copies[0])[0]
    assert not np.allclose(first, jax.tree.leaves(copies[1])[0])


@every_row
def test_it_is_compiled_once(row):
    tx, traces = row.tx(), []

    def update(*args):
        traces.append(args)
        return tx.update(*args)

    once = optax.GradientTransformation(tx.init, update)
    assert_as_alone(row, trained(once, start(row), gradients(row)))
    assert len(traces) == 1


# Shapes and dtypes


def shapes_of(tree, dtype="float32"):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)


@every_row
@pytest.mark.parametrize("masks", ["float32", "bfloat16"])
@pytest.mark.parametrize("gradient", ["float32", "bfloat16"])
def test_state_and_update_keep_their_dtypes(row, masks, gradient):
    tx = row.tx()
    params, g = shapes_of(start(row), masks), shapes_of(start(row), gradient)
    before = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, g, before, params)
    # Weakly typed too, or the second step would be compiled again.
    assert jax.tree.leaves(before) == jax.tree.leaves(after)
    if name_of(row) in OWN_DTYPE:
        assert jax.tree.leaves(updates) == jax.tree.leaves(g)


@every_row
def test_init_on_shapes_is_like_init_on_arrays(row):
    tx, params = row.tx(), start(row)
    of_shapes, of_arrays = tx.init(shapes_of(params)), tx.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(of_shapes, of_arrays)
    chex.assert_trees_all_equal_structs(of_shapes, of_arrays)
