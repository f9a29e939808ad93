"""The last connections of a layer are kept: which ones, and nothing else changes."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scl_jax import keep_connections, mask_params
from scl_jax._guard import settled

DTYPES = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}


def in_numpy(s, u):
    """Return the mask variables after the step without a guard."""
    moved = np.asarray(s, np.float32) + np.asarray(u, np.float32)
    with np.errstate(over="ignore"):
        return moved.astype(s.dtype)


def assert_guarded(moved, got, minimum):
    """Check by sorting, for numbers without NaN, what a step by `moved` came to."""
    assert np.sum(got >= 0) == max(minimum, np.sum(moved >= 0))
    revived = (got >= 0) & (moved < 0)
    np.testing.assert_array_equal(got[revived], 0)
    np.testing.assert_array_equal(got[~revived], moved[~revived])
    kept = np.sort(moved[got >= 0].astype(np.float32))
    largest = np.sort(moved, axis=None)[::-1][: kept.size].astype(np.float32)
    np.testing.assert_array_equal(kept[::-1], largest)


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
    moved = in_numpy(s, u)
    assert_guarded(moved, after, minimum)
    same = after == moved
    np.testing.assert_array_equal(np.asarray(new)[same], u[same])
    assert new.dtype == after.dtype == dtype


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


@pytest.mark.parametrize("minimum", [1, 2, 6, 7])
def test_of_equal_mask_variables_exactly_the_minimum_is_kept(minimum):
    s = jnp.array([0.5, 0.5, 0.25, 0.5, 0.5, 0.5, 0.5])
    u = jnp.full(7, -1.0)
    _, after = update(u, s, minimum)
    assert_guarded(in_numpy(np.asarray(s), np.asarray(u)), after, minimum)
    np.testing.assert_array_equal(update(u, s, minimum)[1], after)  # the same ones


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
    np.testing.assert_array_equal(np.sort(after), [-np.inf, 0, 0])  # all tied


# A minimum per feature


@pytest.mark.parametrize(
    ("feature_axes", "features"),
    [
        (-1, (2,)),
        (0, (0,)),
        ((-2, -1), (1, 2)),
        (lambda path, leaf: leaf.ndim - 2, (1,)),
        ((), ()),
    ],
)
@pytest.mark.parametrize("minimum", [1, 3])
def test_each_feature_keeps_its_largest(feature_axes, features, minimum):
    random = np.random.default_rng(0)
    s = random.normal(-0.5, 1, (4, 5, 6)).astype(np.float32)
    u = random.normal(-1, 1, s.shape).astype(np.float32)
    u[0] = -0.5  # ties and connections, too
    s[0] = np.arange(30).reshape(5, 6) % 2
    tx = keep_connections(minimum, feature_axes=feature_axes)
    new, _ = tx.update({"k": u}, tx.init({"k": s}), {"k": s})
    after = np.asarray(optax.apply_updates({"k": jnp.asarray(s)}, new)["k"])
    moved = in_numpy(s, u)

    def by_feature(x):
        x = np.moveaxis(x, features, range(len(features)))
        return x.reshape(int(np.prod(x.shape[: len(features)])), -1)

    for one, other in zip(by_feature(moved), by_feature(after), strict=True):
        assert_guarded(one, other, minimum)


def test_a_feature_that_has_enough_is_left_alone_beside_one_that_has_not():
    s = jnp.array([[0.5, 0.5], [0.25, -1.0], [-1.0, 0.25]])
    u = jnp.array([[-1.0, -0.125], [-1.0, 0.0], [-1.0, -0.125]])
    tx = keep_connections(2, feature_axes=-1)
    new, _ = tx.update(u, tx.init(s), s)
    np.testing.assert_array_equal(new, [[-0.5, -0.125], [-0.25, 0], [-1, -0.125]])


# settled

# To both sides of where float16 and float32 have their smallest normal numbers.
MAGNITUDES = [
    0,
    1.2e-38,
    3e-38,
    1e-30,
    6e-8,
    1.2e-7,
    1e-5,
    6.1e-5,
    1e-3,
    0.3,
    1,
    3,
    6e4,
]
MOVES = [-9.0, -0.3, -1e-9, -0.0, 0.0, 1e-9, 0.3, 9.0, np.inf, -np.inf, np.nan]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("mask_dtype", DTYPES.values(), ids=[*DTYPES])
@pytest.mark.parametrize("update_dtype", DTYPES.values(), ids=[*DTYPES])
def test_updates_settle_on_the_asked_side_and_right_ones_are_untouched(
    mask_dtype, update_dtype, jit
):
    values = np.array([*MAGNITUDES, *(-np.array(MAGNITUDES)), np.nan])
    s, u, connected = (
        x.astype(dtype)
        for x, dtype in zip(
            np.meshgrid(values, MOVES, [False, True]),
            [mask_dtype, update_dtype, bool],
            strict=True,
        )
    )
    new = (jax.jit(settled) if jit else settled)(*map(jnp.asarray, (u, s, connected)))
    assert new.dtype == update_dtype
    after = np.asarray(optax.apply_updates(jnp.asarray(s), new))
    assert after.dtype == mask_dtype
    # In float64: NumPy warns where it compares a NaN in bfloat16.
    s, after, moved = (x.astype(np.float64) for x in (s, after, in_numpy(s, u)))
    nan = np.isnan(moved)
    np.testing.assert_array_equal(np.isnan(after), nan)
    np.testing.assert_array_equal((after >= 0)[~nan], connected[~nan])
    right = ((moved >= 0) == connected) | nan
    bits = np.dtype(f"u{np.dtype(update_dtype).itemsize}")
    np.testing.assert_array_equal(
        np.asarray(new)[right].view(bits), u[right].view(bits)
    )
    # The others end near the threshold: what is cut could come back.
    tiny = max(float(jnp.finfo(x).tiny) for x in (mask_dtype, update_dtype))
    assert np.all(np.abs(after) <= np.abs(s) / 20 + 4 * tiny, where=~right)


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


def test_feature_that_is_too_small_is_named():
    masks = {"a": jnp.ones((4, 3)), "b": {"kernel": jnp.ones((3, 9))}}
    tx = keep_connections(4, feature_axes=-1)
    words = "minimum must be .* masked feature; b/kernel has 3 entries, got 4"
    with pytest.raises(ValueError, match=words):
        tx.init(masks)
    with pytest.raises(ValueError, match=words):
        tx.update(masks, optax.EmptyState(), masks)
    keep_connections(3, feature_axes=-1).init(masks)


def test_feature_axis_out_of_range_is_refused():
    tx = keep_connections(1, feature_axes=(0, 2))
    words = r"keep_connections: feature axes \(0, 2\) are out of range for a/kernel"
    with pytest.raises(ValueError, match=words):
        tx.init({"a": {"kernel": jnp.ones((4, 3))}})


@pytest.mark.parametrize("feature_axes", ["-1", 1.5, [0], (0, None)])
def test_feature_axes_that_are_none_are_refused(feature_axes):
    words = "keep_connections: feature_axes must be an int or a tuple of ints"
    with pytest.raises(TypeError, match=words):
        keep_connections(1, feature_axes=feature_axes)


def test_a_function_that_gives_no_feature_axes_is_refused_by_path():
    tx = keep_connections(1, feature_axes=lambda path, leaf: "last")
    with pytest.raises(TypeError, match="at a/kernel: feature_axes must be an int"):
        tx.init({"a": {"kernel": jnp.ones((4, 3))}})


def test_masks_beside_plain_params_are_refused():
    params = mask_params({"kernel": jnp.ones((3, 2))})
    with pytest.raises(TypeError, match="MaskedParams"):
        keep_connections().update(params, optax.EmptyState(), params.weights)
