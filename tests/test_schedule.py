"""What may be spent at each step, and which arguments cannot say so."""

import math
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scl_jax._schedule import Allowance

BEGIN, END, FREEZE, TOTAL = 20, 60, 100, 1000.0
STEPS = np.array([0, 19, 20, 21, 33, 40, 59, 60, 61, 99, 100, 5000])


def make(
    target=0.1, schedule="cubic", begin=BEGIN, end: int | None = END, freeze=FREEZE
):
    return Allowance(target, schedule, begin, end, freeze, "someone")


def at_each(allowance, steps=STEPS):
    at = jax.jit(lambda step: allowance.at(step, TOTAL))
    got = [at(jnp.int32(step)) for step in steps]
    assert {(x.shape, x.dtype) for x in got} == {((), np.dtype(np.float32))}
    return np.array(got)


def falling(target, power):
    """Return 1, from BEGIN on target + (1 - target) * (1 - t)**power."""
    t = np.clip((STEPS - BEGIN) / (END - BEGIN), 0, 1)
    return target + (1 - target) * (1 - t) ** power


# The schedules


@pytest.mark.parametrize(("schedule", "power"), [("cubic", 3), ("linear", 1)])
@pytest.mark.parametrize("target", [0.1, 0.37, 1e-4, 1.0])
def test_it_falls_from_everything_to_the_target_by_its_formula(schedule, power, target):
    got = at_each(make(target, schedule))
    np.testing.assert_allclose(got, falling(target, power), rtol=1e-5, atol=1e-7)
    assert np.all(got[STEPS <= BEGIN] == 1)
    np.testing.assert_array_equal(got[STEPS >= END], np.float32(target))


def test_a_constant_is_there_from_the_first_step_on():
    got = at_each(make(0.25, "constant"))
    np.testing.assert_array_equal(got, np.where(STEPS < BEGIN, 1, 0.25))


def test_the_end_is_at_nine_tenths_of_the_steps_where_none_is_given():
    allowance = make(0.5, "linear", begin=0, end=None)
    got = at_each(allowance, [0, 45, 90, 91])
    np.testing.assert_allclose(got, [1, 0.75, 0.5, 0.5])
    assert allowance.falls_for == 90
    assert make(begin=0, end=None, freeze=1).falls_for == 1


def test_what_it_falls_for_are_the_steps_between_begin_and_end():
    assert make().falls_for == END - BEGIN


@pytest.mark.parametrize("schedule", ["cubic", "linear", "constant"])
def test_a_target_cost_is_the_fraction_of_the_total(schedule):
    cost, fraction = make(250, schedule), make(0.25, schedule)
    assert cost.fraction(TOTAL) == fraction.fraction(TOTAL) == 0.25
    np.testing.assert_array_equal(at_each(cost), at_each(fraction))


@pytest.mark.parametrize(
    ("target", "fraction"),
    [(1000, 1.0), (1, 0.001), (1.0, 1.0), (np.int64(10), 0.01), (np.float32(0.5), 0.5)],
)
def test_the_least_and_the_greatest_target_are_accepted(target, fraction):
    got = make(target).fraction(TOTAL)
    assert (type(got), got) == (float, fraction)


USERS = {
    "optax": optax.cosine_decay_schedule(1.0, 60, alpha=0.1),
    "steps": lambda step: jnp.where(step < 30, 0.5, 0.1),
    "number": lambda step: 0.1,
    "nearly": lambda step: jnp.where(step < 60, 1.0, 0.1004),
}


@pytest.mark.parametrize("schedule", USERS.values(), ids=[*USERS])
@pytest.mark.parametrize("target", [0.1, 100])
def test_a_users_schedule_is_followed(schedule, target):
    allowance = make(target, schedule)
    assert allowance.fraction(TOTAL) == 0.1
    expected = [schedule(step) for step in STEPS]
    np.testing.assert_allclose(at_each(allowance), expected, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cubic", USERS["optax"], USERS["steps"]])
def test_it_can_be_made_and_checked_inside_a_jitted_function(schedule):
    @jax.jit
    def allowed(step):
        return make(0.1, schedule).at(step, TOTAL)

    for step in (0, 40, 100):
        expected = make(0.1, schedule).at(jnp.int32(step), TOTAL)
        np.testing.assert_allclose(allowed(step), expected, rtol=1e-6)


# Errors


@pytest.mark.parametrize("target", [True, False, "x", None, [0.1], 1j, jnp.array(0.1)])
def test_target_must_be_a_number(target):
    words = "someone: target must be a float, the fraction that is left, or an int"
    with pytest.raises(TypeError, match=words):
        make(target)


@pytest.mark.parametrize(
    "target", [0.0, 1.5, -0.1, math.nan, math.inf, 2.0, np.float32(0), Fraction(3, 2)]
)
def test_target_fraction_must_be_above_0_and_at_most_1(target):
    words = (
        rf"someone: a target fraction must be in \(0, 1\], got {target}; an absolute"
    )
    with pytest.raises(ValueError, match=words):
        make(target)


@pytest.mark.parametrize("target", [0, -3, np.int32(0)])
def test_target_cost_must_be_positive(target):
    words = f"someone: a target cost must be >= 1, got {target}"
    with pytest.raises(ValueError, match=words):
        make(target)


def test_target_cost_above_that_of_all_connections_is_refused():
    words = (
        "someone: the target must be at most the cost of all connections, 1,000; "
        "got 1,001"
    )
    allowance = make(1001)
    with pytest.raises(ValueError, match=words):
        allowance.fraction(TOTAL)
    with pytest.raises(ValueError, match=words):
        allowance.at(jnp.int32(0), TOTAL)


@pytest.mark.parametrize(
    "steps", [(0.0, 60, 100), (0, True, 100), (0, None, 100.0), (0, 60, jnp.array(100))]
)
def test_steps_must_be_ints(steps):
    words = "someone: begin_step, end_step and freeze_step must be ints, got "
    with pytest.raises(TypeError, match=words):
        make(begin=steps[0], end=steps[1], freeze=steps[2])


@pytest.mark.parametrize(
    "steps", [(-1, 60, 100), (60, 60, 100), (61, 60, 100), (0, 101, 100), (0, 0, 0)]
)
def test_steps_must_be_in_order(steps):
    words = (
        "someone: steps must be 0 <= begin_step < end_step <= freeze_step, got "
        + ", ".join(map(str, steps))
    )
    with pytest.raises(ValueError, match=words):
        make(begin=steps[0], end=steps[1], freeze=steps[2])


@pytest.mark.parametrize(
    ("schedule", "error"),
    [("cosine", ValueError), ("", ValueError), (3, TypeError), (None, TypeError)],
)
def test_schedule_that_is_neither_name_nor_function_is_refused(schedule, error):
    words = (
        "someone: schedule must be one of cubic, linear, constant, or a function "
        f"step -> fraction; got {schedule!r}"
    )
    with pytest.raises(error, match=words):
        make(0.1, schedule)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (lambda step: step / 1000, "at step 0 it is 0"),
        (lambda step: 1.5 - step / 1000, "at step 0 it is 1.5"),
        (lambda step: 0.5 - step / 100, "at step 50 it is 0"),
        (lambda step: jnp.where(step < 9, 0.1, jnp.nan), "at step 9 it is nan"),
    ],
    ids=["zero", "above_1", "below_0", "nan"],
)
def test_schedule_outside_of_0_to_1_is_refused(schedule, words):
    words = f"someone: a schedule must give fractions in (0, 1]; {words}"
    with pytest.raises(ValueError, match=re.escape(words)):
        make(0.1, schedule)


def test_growing_schedule_is_refused():
    words = "someone: a schedule must not grow; it is 0.6 at step 70, after 0.5"
    with pytest.raises(ValueError, match=words):
        make(0.1, lambda step: jnp.where(step < 70, 0.5, 0.6))


@pytest.mark.parametrize("target", [0.1, 100])
def test_schedule_that_has_not_come_to_the_target_is_refused(target):
    words = (
        "someone: the schedule must have come to the target, 0.1, by freeze_step; at "
        "step 100 it is at 0.101"
    )
    allowance = make(target, lambda step: jnp.where(step < 60, 1.0, 0.101))
    with pytest.raises(ValueError, match=words):
        allowance.fraction(TOTAL)


def test_schedule_that_reaches_the_target_after_the_freeze_is_refused():
    late = make(0.1, optax.linear_schedule(1.0, 0.1, 101), begin=0)
    with pytest.raises(ValueError, match="by freeze_step; at step 100"):
        late.fraction(TOTAL)
    in_time = make(0.1, optax.linear_schedule(1.0, 0.1, 100), begin=0)
    assert in_time.fraction(TOTAL) == 0.1
