"""What connections cost: MACs of each, errors by path, and the penalty with costs."""

import math
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scl_jax import (
    LeakyReLU,
    MaskedParams,
    UnknownMacs,
    add_connection_penalty,
    connection_count,
    count_macs,
    identity,
    macs_per_connection,
    mask_params,
    normalize_by_feature,
)
from scl_jax._costs import cost_of

# macs_per_connection


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), padding="VALID")(x))
        return nn.Dense(5)(x.reshape(x.shape[0], -1))


def net_and_macs():
    images = jnp.ones((1, 6, 8, 2))
    params = jax.eval_shape(Net().init, jax.random.key(0), images)["params"]
    return params, count_macs(
        lambda p, x: Net().apply({"params": p}, x), params, images
    )


def test_a_connection_costs_as_many_macs_as_it_has_output_positions():
    params, macs = net_and_macs()
    costs = macs_per_connection(macs, params)
    # VALID: 6 x 8 images have 4 x 6 positions, and at each a tap is used once.
    assert costs["Conv_0"]["kernel"] == 4 * 6
    assert costs["Dense_0"]["kernel"] == 1
    assert costs["Conv_0"]["bias"] == costs["Dense_0"]["bias"] == 0


def test_costs_are_those_of_the_weights_of_masked_params():
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    macs = {"kernel": 60, "bias": 0}
    masked = macs_per_connection(macs, mask_params(params))
    assert masked == macs_per_connection(macs, params) == {"kernel": 10.0, "bias": 0.0}


def test_unknown_macs_stay_unknown():
    unknown = UnknownMacs("gather: looked up")
    params = {"embedding": jnp.ones((9, 2)), "kernel": jnp.ones((2, 2))}
    costs = macs_per_connection({"embedding": unknown, "kernel": 8}, params)
    assert costs == {"embedding": unknown, "kernel": 2.0}


@pytest.mark.parametrize(
    "macs", [{"kernel": 6}, {"kernel": 6, "other": 0}, {"kernel": 6, "bias": {"x": 0}}]
)
def test_macs_of_another_structure_are_refused_with_both(macs):
    params = {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))}
    given = {"other": "kernel, other", "bias": "bias/x, kernel"}
    others = next((given[name] for name in given if name in macs), "kernel")
    words = "macs must have the structure .* they are: bias, kernel; macs has: "
    with pytest.raises(ValueError, match=f"macs_per_connection: {words}{others}$"):
        macs_per_connection(macs, params)


# cost_of

LEAF = jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)


def find(cost, leaf=LEAF):
    return cost_of({"a": {"kernel": cost}, "b": 1.0}, "someone")("a/kernel", leaf)


@pytest.mark.parametrize(
    "cost", [2, 2.0, np.float64(2), np.float32(2), np.int64(2), np.uint8(2)]
)
def test_a_number_is_the_cost_of_each_connection(cost):
    got = find(cost)
    assert (type(got), got) == (float, 2.0)


@pytest.mark.parametrize("make", [np.array, jnp.array])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_an_array_has_the_cost_of_each_connection(make, dtype, shape):
    values = np.arange(6).reshape(2, 3) if shape else np.array(3)
    dtype = jax.dtypes.canonicalize_dtype(dtype) if make is jnp.array else dtype
    got = find(make(values, dtype))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, values)


@pytest.mark.parametrize("cost", [2, np.ones((2, 3)), jnp.ones((2, 3), jnp.int32)])
def test_inside_a_jitted_function_costs_are_still_numbers(cost):
    @jax.jit
    def total(x):
        return x + float(np.asarray(find(cost)).mean())

    assert total(0.0) == np.mean(cost)


def test_costs_may_be_traced():
    @jax.jit
    def doubled(cost):
        return 2 * find(cost)

    np.testing.assert_array_equal(doubled(np.full((2, 3), 4)), np.full((2, 3), 8.0))
    with pytest.raises(ValueError, match="must have the shape of their leaf"):
        doubled(np.ones(3))
    with pytest.raises(TypeError, match="a cost must be a number"):
        doubled(True)


def test_without_costs_every_connection_costs_one():
    assert cost_of(None, "someone")("anything", LEAF) == 1.0


def test_a_leaf_without_a_cost_is_named():
    find = cost_of({"a": 1.0, "b": 2.0}, "someone")
    words = "someone: costs must have .*; there is none for c/kernel; there are: a, b"
    with pytest.raises(ValueError, match=words):
        find("c/kernel", LEAF)


def test_unknown_macs_at_a_masked_leaf_tell_their_reason():
    words = (
        "someone: costs must be numbers; at a/kernel the MACs are unknown: "
        "gather: looked up"
    )
    with pytest.raises(ValueError, match=words):
        find(UnknownMacs("gather: looked up"))


@pytest.mark.parametrize(
    "cost", [-1, -1e-9, math.inf, -math.inf, math.nan, np.float32(np.nan), np.int32(-1)]
)
def test_a_cost_that_is_negative_or_not_finite_is_refused(cost):
    words = f"someone: a cost must be a finite number >= 0; at a/kernel it is {cost}"
    with pytest.raises(ValueError, match=re.escape(words)):
        find(cost)


@pytest.mark.parametrize("make", [np.array, jnp.array])
@pytest.mark.parametrize("wrong", [-1.0, math.inf, -math.inf, math.nan])
def test_costs_that_are_negative_or_not_finite_are_refused(make, wrong):
    costs = np.ones((2, 3), np.float32)
    costs[1, 2] = wrong
    words = "someone: costs must be finite and >= 0; at a/kernel they are not"
    for cost in (make(costs), make(costs[1, 2])):
        with pytest.raises(ValueError, match=words):
            find(cost)


WRONG = [True, np.True_, "1", np.array("1"), None, 1j, np.ones((2, 3), complex)]


@pytest.mark.parametrize(
    "cost", [*WRONG, np.ones((2, 3), bool), optax.EmptyState], ids=repr
)
def test_a_cost_that_is_no_number_is_refused(cost):
    words = "someone: a cost must be a number, or an array of them; at a/kernel it is "
    with pytest.raises(TypeError, match=re.escape(words + repr(cost))):
        find(cost)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (1, 3), (2, 3, 1)])
def test_costs_of_another_shape_are_refused_with_both(shape):
    words = (
        "someone: costs of single connections must have the shape of their leaf; at "
        f"a/kernel they have {shape}, the leaf (2, 3)"
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        find(np.ones(shape))


# connection_count and add_connection_penalty with costs

STES = {
    "identity": (identity, np.ones_like),
    "leaky": (LeakyReLU(0.25), lambda s: np.where(s < 0, 0.25, 1.0)),
}
S = {
    "conv": np.array([[0.5, -0.5, 0.0], [-0.25, -0.0, 2.0]]),
    "dense": np.array([-1.0, 1.0, 0.5, -2.0]),
    "bias": None,
}
EACH = np.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
COSTS = {
    "of_leaves": {"conv": 49, "dense": 1.0, "bias": UnknownMacs("not masked")},
    "of_connections": {"conv": EACH, "dense": np.float32(3), "bias": 0.0},
    "free_leaf": {"conv": 0, "dense": jnp.array(5), "bias": None},
}
COUNTS = {  # by hand: of conv four are connected, of dense two
    "of_leaves": 4 * 49 + 2 * 1,
    "of_connections": 1 + 4 + 16 + 32 + 2 * 3,
    "free_leaf": 2 * 5,
}


def make_masked(dtype=np.float32):
    masks = {
        name: None if s is None else jnp.asarray(s, dtype) for name, s in S.items()
    }
    weights = {"conv": jnp.ones((2, 3)), "dense": jnp.ones(4), "bias": jnp.ones(3)}
    return MaskedParams(weights, masks)


def by_hand(costs, proxy, factor=1.0):
    return {
        name: None if s is None else factor * np.float32(costs[name]) * proxy(s)
        for name, s in S.items()
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", COSTS)
def test_the_count_is_what_the_connections_cost(name, dtype):
    for transform in (lambda f: f, jax.jit):
        count = transform(lambda m: connection_count(m, costs=COSTS[name]))
        got = count(make_masked(dtype))
        assert (got.shape, got.dtype, float(got)) == ((), jnp.float32, COUNTS[name])


@pytest.mark.parametrize("ste", STES)
@pytest.mark.parametrize("name", COSTS)
def test_the_gradient_of_the_count_is_cost_times_proxy(name, ste):
    function, proxy = STES[ste]
    gradient = jax.grad(
        lambda m: 0.5 * connection_count(m, ste=function, costs=COSTS[name])
    )(make_masked())
    chex.assert_trees_all_close(
        gradient.masks, by_hand(COSTS[name], proxy, 0.5), rtol=1e-6
    )
    assert not any(g.any() for g in jax.tree.leaves(gradient.weights))


@pytest.mark.parametrize("ste", STES)
@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize(
    "coefficient", [0.5, lambda step: 0.5 + step], ids=["", "step"]
)
def test_the_penalty_adds_coefficient_times_cost_times_proxy(name, ste, coefficient):
    function, proxy = STES[ste]
    masks = make_masked().masks
    tx = add_connection_penalty(coefficient, ste=function, costs=COSTS[name])
    g = jax.tree.map(lambda s: jnp.full_like(s, 7), masks)
    got, _ = jax.jit(tx.update)(g, tx.init(masks), masks)
    expected = jax.tree.map(lambda x: 7 + x, by_hand(COSTS[name], proxy, 0.5))
    chex.assert_trees_all_close(got, expected, rtol=1e-6)
    assert {x.dtype for x in jax.tree.leaves(got)} == {np.dtype(np.float32)}


def test_before_normalization_the_penalty_with_costs_is_that_in_the_loss():
    masked, costs = make_masked(), COSTS["of_connections"]
    g = jax.grad(lambda m: 0.1 * connection_count(m, costs=costs))(masked)
    tx = normalize_by_feature()
    in_loss, _ = tx.update(g.masks, tx.init(masked.masks))
    tx = optax.chain(add_connection_penalty(0.1, costs=costs), tx)
    zero = jax.tree.map(jnp.zeros_like, masked.masks)
    got, _ = tx.update(zero, tx.init(masked.masks), masked.masks)
    chex.assert_trees_all_close(got, in_loss, rtol=1e-6)


def test_half_precision_holds_a_small_coefficient_of_a_large_cost():
    # 1e6 is more than float16 can hold, and 1e-9 less: their product is neither.
    masks = {"kernel": jnp.ones((2, 2), jnp.float16)}
    for cost in (1e6, np.full((2, 2), 1e6)):
        tx = add_connection_penalty(1e-9, costs={"kernel": cost})
        zero = jax.tree.map(jnp.zeros_like, masks)
        got, _ = tx.update(zero, tx.init(masks), masks)
        np.testing.assert_allclose(got["kernel"], np.full((2, 2), 1e-3), rtol=1e-3)
        assert got["kernel"].dtype == jnp.float16


def test_without_costs_all_is_as_with_ones():
    masked, ones = make_masked(), {"conv": 1, "dense": 1, "bias": 1}
    assert connection_count(masked) == connection_count(masked, costs=ones) == 6
    g = jax.tree.map(lambda s: s / 3, masked.masks)
    got = [
        tx.update(g, tx.init(masked.masks), masked.masks)
        for tx in (add_connection_penalty(0.3), add_connection_penalty(0.3, costs=ones))
    ]
    chex.assert_trees_all_equal(*got)


def test_the_costs_of_the_count_may_be_traced():
    count = jax.jit(lambda m, costs: connection_count(m, costs=costs))
    assert (
        float(count(make_masked(), {"conv": EACH, "dense": 3})) == 1 + 4 + 16 + 32 + 6
    )


def test_nan_shows_in_the_count_even_where_it_is_free():
    masked = make_masked()
    nan = masked._replace(masks=masked.masks | {"dense": jnp.full(4, jnp.nan)})
    for cost in (0.0, np.zeros(4)):
        assert np.isnan(connection_count(nan, costs={"conv": 1.0, "dense": cost}))


def init(masked, costs):
    add_connection_penalty(0.1, costs=costs).init(masked.masks)


def update(masked, costs):
    state = add_connection_penalty(0.1).init(masked)
    add_connection_penalty(0.1, costs=costs).update(masked, state, masked)


@pytest.mark.parametrize(
    ("use", "name"),
    [
        (
            lambda masked, costs: connection_count(masked, costs=costs),
            "connection_count",
        ),
        (init, "add_connection_penalty"),
        (update, "add_connection_penalty"),
    ],
    ids=["count", "init", "update"],
)
@pytest.mark.parametrize(
    ("costs", "error", "words"),
    [
        ({"conv": 1.0}, ValueError, "there is none for dense; there are: conv"),
        ({"conv": 1.0, "dense": -1}, ValueError, "at dense it is -1"),
        ({"conv": np.ones(3), "dense": 1}, ValueError, r"at conv they have \(3,\)"),
        ({"conv": "1", "dense": 1}, TypeError, "at conv it is '1'"),
    ],
    ids=["none", "negative", "shape", "string"],
)
def test_costs_that_do_not_fit_are_refused_by_path(use, name, costs, error, words):
    with pytest.raises(error, match=f"{name}: .*{words}"):
        use(make_masked(), costs)
