"""Ranking by counting marks what sorting would: in any dtype, on any devices."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from experiments.mesh import make_mesh
from scl_jax._rank import (
    FIRST,
    LAST,
    _lots,
    above,
    affordable,
    highest,
    marks,
    places,
    ranks,
)

DTYPES = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}


def mark(xs, budget, costs=None):
    """Mark the numbers that the budget pays for."""
    costs = [1.0] * len(xs) if costs is None else costs

    def spent(marked):
        pairs = zip(marked, costs, strict=True)
        return sum(
            jnp.sum(m * jnp.broadcast_to(jnp.float32(c), m.shape)) for m, c in pairs
        )

    ranked = [ranks(jnp.asarray(x)) for x in xs]
    return above(ranked, affordable(ranked, spent, jnp.float32(budget)))


mark_jitted = jax.jit(mark)


def mark_highest(x, number, axes):
    """Mark the highest numbers along the axes."""
    return marks(highest(jnp.asarray(x), number, axes), x.shape, axes)


def in_numpy(xs, budget, costs):
    """Mark from the largest on while the budget lasts; there must be no ties."""
    x = np.concatenate([np.ravel(x).astype(np.float64) for x in xs])
    pairs = zip(xs, costs, strict=True)
    c = np.concatenate([np.broadcast_to(c, np.shape(x)).ravel() for x, c in pairs])
    order = np.argsort(-x)  # NaN comes last
    paid = np.cumsum(np.where(np.isnan(x), np.inf, c)[order]) <= budget
    marked = np.zeros(x.size, bool)
    marked[order[paid]] = True
    ends = np.cumsum([np.size(x) for x in xs])[:-1]
    parts = zip(np.split(marked, ends), xs, strict=True)
    return [part.reshape(np.shape(x)) for part, x in parts]


def before(x, y):
    """Tell in NumPy whether x comes before y: the order, with -0 before 0."""
    return (x < y) | ((x == y) & np.signbit(x) & ~np.signbit(y))


def assert_marked(got, expected):
    assert [m.dtype for m in got] == [np.bool_] * len(expected)
    for m, e in zip(got, expected, strict=True):
        np.testing.assert_array_equal(m, e)


# ranks

SPECIAL = [0.0, -0.0, np.inf, -np.inf, 1.0, -1.0, 1.0, -1.0]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=[*DTYPES])
def test_ranks_are_in_the_order_of_the_numbers(dtype, jit):
    tiny = float(jnp.finfo(dtype).smallest_subnormal)
    subnormal = np.array([1, 2, 3, -1, -2, -3]) * tiny
    random = np.random.default_rng(0).normal(size=40) * np.repeat([1e-4, 1e4], 20)
    x = np.concatenate([SPECIAL, subnormal, random]).astype(dtype)
    got = np.asarray((jax.jit(ranks) if jit else ranks)(jnp.asarray(x)))
    assert got.dtype == np.uint32
    x = x.astype(np.float64)
    np.testing.assert_array_equal(
        got[:, None] < got[None, :], before(x[:, None], x[None, :])
    )
    assert got.min() > LAST
    assert got.max() < FIRST


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=[*DTYPES])
def test_nan_of_either_sign_has_the_last_rank(dtype):
    got = ranks(jnp.asarray(np.array([np.nan, -np.nan, -np.inf], dtype)))
    np.testing.assert_array_equal(got == LAST, [True, True, False])


def test_ranks_have_the_shape_of_the_numbers():
    for shape in [(), (0,), (2, 3), (2, 1, 3)]:
        assert ranks(jnp.zeros(shape)).shape == shape


# affordable

# Few values, so that there are ties, and any others.
few = st.sampled_from([*SPECIAL, np.nan, 0.5, -0.5])
floats = st.one_of(few, st.floats(width=32))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=[*DTYPES])
@given(values=st.lists(floats, min_size=12, max_size=12), budget=st.integers(-1, 13))
def test_as_many_of_the_largest_are_marked_as_the_budget_pays_for(
    dtype, values, budget
):
    with np.errstate(over="ignore"):
        x = np.array(values, np.float32).astype(dtype).reshape(3, 4)
    [got] = mark_jitted([x], budget)
    assert np.sum(got) == np.clip(budget, 0, np.sum(~np.isnan(x)))
    x, got = x.astype(np.float64), np.asarray(got)
    assert not np.any(got & np.isnan(x))
    left, taken = x[~got & ~np.isnan(x)], x[got]
    assert not np.any(before(taken[:, None], left[None, :]))


def three_leaves(dtype=np.float32):
    """Return 45 numbers without ties and a NaN, in three leaves."""
    x = np.random.default_rng(1).permutation(np.linspace(-3, 2, 46)).astype(dtype)
    x[7] = np.nan
    return [x[:30].reshape(5, 6), x[30:45], x[45]]


COSTS = {
    "one": [1.0, 1.0, 1.0],
    "of_each_leaf": [1.0, 49.0, 3.0],
    "free_leaf": [0.0, 2.0, 0.0],
    "of_each_number": [
        np.random.default_rng(2).integers(0, 9, (5, 6)).astype(np.float32),
        4.0,
        np.float32(2),
    ],
}


@pytest.mark.parametrize("costs", COSTS.values(), ids=[*COSTS])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=[*DTYPES])
def test_of_several_leaves_those_are_marked_that_a_sort_of_all_marks(dtype, costs):
    xs = three_leaves(dtype)
    counts = set()
    for budget in [0, 1, 2.5, 17, 60, 99, 120, 400, 1e6]:
        expected = in_numpy(xs, budget, costs)
        counts.add(sum(int(m.sum()) for m in expected))
        assert_marked(mark_jitted(xs, budget, costs), expected)
    assert len(counts) >= 4


@pytest.mark.parametrize("costs", COSTS.values(), ids=[*COSTS])
def test_what_can_all_be_paid_for_is_all_marked_but_nan(costs):
    xs = three_leaves()
    total = sum(
        np.sum(np.where(np.isnan(x), 0, c)) for x, c in zip(xs, costs, strict=True)
    )
    assert_marked(mark_jitted(xs, total, costs), [~np.isnan(x) for x in xs])


@pytest.mark.parametrize("budget", [0, 0.99, -5])
def test_what_is_too_dear_is_not_marked(budget):
    xs = three_leaves()
    nothing = [np.zeros(np.shape(x), bool) for x in xs]
    assert_marked(mark_jitted(xs, budget), nothing)


def test_the_first_rank_is_marked_before_infinity():
    ranked = [
        jnp.where(jnp.arange(4) == 2, jnp.uint32(FIRST), ranks(jnp.full(4, jnp.inf)))
    ]
    border = affordable(ranked, lambda marked: jnp.sum(marked[0]), jnp.int32(1))
    [got] = above(ranked, border)
    np.testing.assert_array_equal(got, [False, False, True, False])


# Ties


def test_of_equal_numbers_as_many_are_marked_as_can_be_paid_for_from_all_leaves():
    xs = [np.full((20, 50), 0.5), np.full(1000, 0.5), np.array([0.25, 0.75])]
    for budget in [1, 2, 3, 501, 1001, 2000, 2001]:
        got = [np.asarray(m) for m in mark_jitted(xs, budget)]
        np.testing.assert_array_equal(got[2], [False, True])  # 0.75 comes first
        equal = [int(m.sum()) for m in got[:2]]
        assert sum(equal) == budget - 1
    half = [np.asarray(m) for m in mark_jitted(xs, 1001)]
    assert all(400 < m.sum() < 600 for m in half[:2])
    assert all(200 < m.ravel()[:500].sum() < 300 for m in half[:2])


def test_the_lots_are_always_the_same():
    xs = [np.zeros((6, 7)), np.zeros(9)]
    expected = mark(xs, 20)
    assert_marked(mark(xs, 20), expected)
    assert_marked(mark_jitted(xs, 20), expected)


@pytest.mark.parametrize("budget", [5.0, 48.0, 500.0, 700.0])
def test_of_equal_numbers_of_different_costs_no_cheap_one_is_left_over(budget):
    xs, costs = [np.zeros(40), np.zeros((4, 5))], [1.0, 49.0]
    got = [np.asarray(m) for m in mark_jitted(xs, budget, costs)]
    spent = got[0].sum() + 49 * got[1].sum()
    assert budget - 49 < spent <= budget


def test_zeros_of_both_signs_are_told_apart():
    [got] = mark([np.array([-0.0, 0.0, -0.0, 0.0])], 2)
    np.testing.assert_array_equal(got, [False, True, False, True])


def test_no_two_lots_are_equal_and_none_is_last():
    shapes, lots = [(64, 1000), (), (70_000,), (3, 5, 7), (0, 4)], []
    for shape, got in zip(shapes, _lots([jnp.zeros(s) for s in shapes]), strict=True):
        assert (got.dtype, got.shape) == (np.uint32, shape)
        lots.append(np.ravel(got))
    lots = np.concatenate(lots)
    assert len(np.unique(lots)) == lots.size
    assert lots.min() > LAST
    # They look random: of each bit about half are set, whatever half of the places.
    bits = (lots[:, None] >> np.arange(32, dtype=np.uint32)[None, :]) & 1
    for some in (bits, bits[: len(bits) // 2], bits[::2]):
        np.testing.assert_allclose(some.mean(0), 0.5, atol=0.01)


# The highest along some axes


@pytest.mark.parametrize("number", [1, 2, 5, 12])
@pytest.mark.parametrize("axes", [(0,), (0, 1), (1, 2), (2,), (0, 1, 2)], ids=str)
def test_of_each_group_the_highest_are_found(axes, number):
    random = np.random.default_rng(3)
    x = random.permutation(60).reshape(3, 4, 5).astype(np.float32)
    x[0, 0, 0], x[1, 2] = np.nan, 7.5  # a NaN, and ties
    got = np.asarray(mark_highest(x, number, axes))
    kept = [axis for axis in range(3) if axis not in axes]
    for index in itertools.product(*(range(x.shape[axis]) for axis in kept)):
        where = [slice(None)] * 3
        for axis, i in zip(kept, index, strict=True):
            where[axis] = slice(i, i + 1)
        group, marked = x[tuple(where)], got[tuple(where)]
        numbers = np.sort(group[~np.isnan(group)])[::-1]
        # The same numbers as the first of the sorted ones, ties included.
        taken = np.sort(group[marked & ~np.isnan(group)])[::-1]
        np.testing.assert_array_equal(taken, numbers[:number])
        assert marked.sum() <= number


def test_places_are_counted_along_axes():
    got = places((2, 3, 4), (0, 2))
    expected = np.arange(8).reshape(2, 1, 4) * np.ones((1, 3, 1))
    assert got.dtype == np.uint32
    np.testing.assert_array_equal(got, expected)


# Inside other transformations


def test_under_vmap_each_copy_is_marked_for_itself():
    x = np.random.default_rng(4).normal(size=(3, 2, 8)).astype(np.float32)
    x[1] = 0.5  # all tied
    budgets = np.array([3.0, 5.0, 20.0], np.float32)
    both = jax.vmap(lambda x, budget: mark([x], budget)[0])(x, budgets)
    for copy, budget, got in zip(x, budgets, both, strict=True):
        assert_marked([got], mark_jitted([copy], budget))


SPECS = [("data", "model"), (None, ("data", "model")), (("data", "model"), None)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_over_devices_the_same_are_marked_and_no_array_is_sent(spec):
    sharding = NamedSharding(make_mesh(8, 2), PartitionSpec(*spec))
    random = np.random.default_rng(5)
    # Rounded to quarters: many ties.
    xs = [np.round(random.normal(size=(16, 32)) * 4).astype(np.float32) for _ in "ab"]
    costs = [3.0, 1.0]

    def both(xs):
        return mark(xs, 700.0, costs), mark_highest(xs[0], 3, (0,))

    there = jax.device_put(xs, sharding)
    together, along = jax.jit(both)(there)
    expected, expected_along = both(xs)
    assert_marked([*together, along], [*expected, expected_along])
    for marked in together:
        assert marked.sharding.is_equivalent_to(sharding, 2)
    text = jax.jit(both).lower(there).compile().as_text()
    assert " all-reduce(" in text
    for other in ("all-gather", "all-to-all", "collective-permute"):
        assert other not in text
