"""The last connections of a layer are kept: which ones, and nothing else changes."""

import functools

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scl_jax import keep_connections, mask_params
from scl_jax._guard import kth_largest

DTYPES = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}


def in_numpy(s, u, minimum):
    """Return mask variables after the step, and which were revived, by sorting."""
    after = (np.asarray(s, np.float32) + np.asarray(u, np.float32)).astype(s.dtype)
    if np.sum(after >= 0) >= minimum:
        return after, np.zeros(s.shape, bool)
    last_kept = np.sort(after, axis=None)[::-1][minimum - 1]
    revived = (after >= last_kept) & (after < 0)
    return np.where(revived, s.dtype.type(0), after), revived


def update(u, s, minimum=1):
    """Return the update and the mask variables that it leads to."""
    new, state = keep_connections(minimum).update(
        {"k": u}, optax.EmptyState(), {"k": s}
    )
    assert state == optax.EmptyState()
    return new["k"], np.asarray(optax.apply_updates({"k": s}, new)["k"])


@functools.cache
def jitted(minimum):
    tx = keep_connections(minimum)
    return jax.jit(lambda u, s: tx.update(u, optax.EmptyState(), s)[0])


# Few values, so that there are ties, zeros of both signs, and sums of exactly 0; few
# sizes, because each is compiled.
halves = st.sampled_from([-3.0, -1.5, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 1.5, 3.0])
numbers = st.one_of(halves, st.floats(-4, 4, width=16, allow_subnormal=False))
cases = st.sampled_from([(1, 1), (7, 1), (7, 3), (7, 7)]).flatmap(
    lambda case: st.tuples(
        st.lists(numbers, min_size=case[0], max_size=case[0]),
        st.lists(numbers, min_size=case[0], max_size=case[0]),
        st.just(case[1]),
    )
)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=[*DTYPES])
@given(case=cases)
def test_the_largest_are_kept_and_all_others_move_as_they_would(dtype, case):
    s, u = (np.array(x, dtype) for x in case[:2])
    minimum = case[2]
    new = jitted(minimum)(u, s)
    after = np.asarray(optax.apply_updates(jnp.asarray(s), new))
    expected, revived = in_numpy(s, u, minimum)
    np.testing.assert_array_equal(after, expected)
    np.testing.assert_array_equal(np.asarray(new)[~revived], u[~revived])
    assert new.dtype == after.dtype == dtype
    assert np.sum(after >= 0) >= minimum


@pytest.mark.parametrize("mask_dtype", DTYPES.values(), ids=[*DTYPES])
@pytest.mark.parametrize("update_dtype", DTYPES.values(), ids=[*DTYPES])
def test_kept_connections_are_connected_in_every_precision(mask_dtype, update_dtype):
    s = jnp.asarray(np.random.default_rng(0).normal(size=(40, 5)), mask_dtype)
    u = jnp.full((40, 5), -9, update_dtype)
    new, after = update(u, s, 200)
    assert new.dtype == update_dtype
    assert after.dtype == mask_dtype
    assert np.all(after >= 0)
    if jnp.finfo(update_dtype).nmant >= jnp.finfo(mask_dtype).nmant:
        np.testing.assert_array_equal(after, np.zeros_like(after))
    else:  # the update has too few bits to end at 0
        assert np.max(after / np.abs(s)) < 2 * float(jnp.finfo(update_dtype).eps)


def test_equal_mask_variables_are_kept_together():
    s = jnp.array([0.5, 0.5, 0.25, 0.5])
    _, after = update(jnp.full(4, -1.0), s)
    np.testing.assert_array_equal(after, [0, 0, -0.75, 0])


def test_those_that_stay_connected_are_not_moved_to_the_threshold():
    s = jnp.array([3.0, 0.5, 0.25])
    _, after = update(jnp.full(3, -1.0), s, 2)
    np.testing.assert_array_equal(after, [2, 0, -0.75])


def test_a_pruned_mask_variable_comes_back_where_too_few_are_left():
    _, after = update(jnp.array([0.0, 0.0]), jnp.array([-0.5, -0.25]))
    np.testing.assert_array_equal(after, [-0.5, 0])


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zero_of_either_sign_is_a_connection(zero):
    u = jnp.array([zero, -1.0])
    new, after = update(u, jnp.array([zero, 0.5]))
    np.testing.assert_array_equal(new, u)
    np.testing.assert_array_equal(after, [0, -0.5])


def test_nothing_changes_where_enough_are_left():
    s, u = jnp.array([0.5, 0.25, -1.0]), jnp.array([-0.5, -0.25, 0.1])
    new, _ = update(u, s, 2)
    np.testing.assert_array_equal(new, u)


def test_nan_stays_visible_and_is_no_connection():
    nan = np.nan
    new, after = update(jnp.array([nan, -1.0, -1.0, -nan]), jnp.zeros(4), 4)
    np.testing.assert_array_equal(after, [nan, 0, 0, nan])
    assert np.isnan(new[jnp.array([0, 3])]).all()
    _, after = update(jnp.full(2, -1.0), jnp.array([nan, 0.5]), 2)
    np.testing.assert_array_equal(after, [nan, 0])
    _, after = update(jnp.full(3, -1.0), jnp.array([nan, 0.5, 0.25]), 1)
    np.testing.assert_array_equal(after, [nan, 0, -0.75])


def test_infinite_updates_are_taken_back():
    _, after = update(jnp.full(3, -jnp.inf), jnp.array([1.0, 2.0, 3.0]), 2)
    np.testing.assert_array_equal(after, [0, 0, 0])  # all tied


# kth_largest

kth_largest_jitted = jax.jit(kth_largest, static_argnums=1)
SPECIAL = [0.0, -0.0, np.inf, -np.inf, 1.0, 1.0, -1.0, -1.0]


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES.values(), np.float64])
def test_kth_largest_is_that_of_a_sort(dtype, x64):
    with jax.enable_x64(x64):
        dtype = jax.dtypes.canonicalize_dtype(dtype)
        tiny = np.array(jnp.finfo(dtype).smallest_subnormal, dtype)
        subnormal = np.array([1, 2, 2, 3, -1, -2, -3], dtype) * tiny
        normal = np.random.default_rng(0).normal(size=20).astype(dtype)
        x = np.concatenate([np.array(SPECIAL, dtype), subnormal, normal, normal[:3]])
        assert len(np.unique(x)) < len(x)
        expected = np.sort(x)[::-1]
        every = jax.jit(jax.vmap(kth_largest, (None, 0)))
        got = np.asarray(every(x.reshape(2, -1), np.arange(1, x.size + 1)))
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, expected)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=6, max_size=6))
def test_kth_largest_of_any_floats(values):
    x = np.array(values, np.float32)
    got = [kth_largest_jitted(x, k) for k in (1, 3, 6)]
    np.testing.assert_array_equal(got, np.sort(x)[::-1][[0, 2, 5]])


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


def test_init_works_on_shapes():
    shapes = {"k": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16), "none": None}
    assert keep_connections(6).init(shapes) == optax.EmptyState()


# Errors


@pytest.mark.parametrize("minimum", [1.0, True, "1", None, jnp.array(1), np.int32(1)])
def test_minimum_must_be_an_int(minimum):
    with pytest.raises(TypeError, match="keep_connections: minimum must be an int"):
        keep_connections(minimum)


@pytest.mark.parametrize("minimum", [0, -1])
def test_minimum_must_be_positive(minimum):
    with pytest.raises(ValueError, match=f"minimum must be >= 1, got {minimum}"):
        keep_connections(minimum)


def test_leaf_that_is_too_small_is_named():
    masks = {
        "Dense_0": {"kernel": jnp.ones(4)},
        "Dense_1": {"kernel": jnp.ones((3, 1))},
    }
    tx = keep_connections(4)
    words = "minimum must be .* size .*; Dense_1/kernel has 3 entries, got 4"
    with pytest.raises(ValueError, match=words):
        tx.init(masks)
    with pytest.raises(ValueError, match=words):
        tx.update(masks, optax.EmptyState(), masks)
    keep_connections(3).init(masks)


def test_update_needs_params():
    masks = {"k": jnp.ones(3)}
    with pytest.raises(
        ValueError, match=r"keep_connections: .*\(updates, state, params"
    ):
        keep_connections().update(masks, optax.EmptyState())
