"""Budgets that are refused: what is said, and how early."""

import numpy as np
import optax
import pytest

from scl_jax import UnknownMacs, meet_budget

SIZES = {"a": (24, 10), "c": (40, 15), "d": (6, 2)}
MACS = {"a": 49.0, "b": UnknownMacs("not masked"), "c": 1.5, "d": 12}
STEPS = {"freeze_step": 10}


@pytest.mark.parametrize(
    ("target", "options", "error", "words"),
    [
        (0.0, {}, ValueError, r"target fraction must be in \(0, 1\], got 0.0"),
        (1.5, {}, ValueError, r"must be in \(0, 1\], got 1.5; .* cost is an int"),
        (0, {}, ValueError, "target cost must be >= 1, got 0"),
        (True, {}, TypeError, "target must be a float, .*; got True"),
        ("0.1", {}, TypeError, "target must be a float, .*; got '0.1'"),
        (0.1, {"end_step": 11}, ValueError, "end_step <= freeze_step, got 0, 11, 10"),
        (0.1, {"begin_step": 9}, ValueError, "begin_step < end_step .*, got 9, 9, 10"),
        (0.1, {"begin_step": -1}, ValueError, "0 <= begin_step .*, got -1, 9, 10"),
        (0.1, {"end_step": 5.0}, TypeError, "must be ints, got 0, 5.0, 10"),
        (0.1, {"schedule": "square"}, ValueError, "cubic, .*; got 'square'"),
        (
            0.1,
            {"schedule": lambda t: 0.1 + t / 20},
            ValueError,
            "must not grow; .*0.15",
        ),
        (0.1, {"schedule": lambda t: 2.0 - t}, ValueError, "in .0, 1.; at step 0 .* 2"),
        (0.1, {"minimum": 0}, ValueError, "minimum must be >= 1, got 0"),
        (0.1, {"minimum": 1.0}, TypeError, "minimum must be an int, got 1.0"),
        (0.1, {"ste": 0.1}, TypeError, "ste must be a hashable callable.*; got 0.1"),
    ],
)
def test_arguments_that_are_refused(target, options, error, words):
    with pytest.raises(error, match=f"meet_budget: .*{words}"):
        meet_budget(optax.sgd(1.0), target, **{**STEPS, **options})


NEGATIVE = {**MACS, "c": -1.0}
ZERO = {"a": 0, "c": 0.0, "d": np.zeros((6, 2))}
LATE = {"schedule": lambda t: 1 - 0.05 * t}
DEAR = {"a": 1, "c": 1, "d": np.arange(12).reshape(6, 2)}  # its largest may cost 11


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        (853, {}, "target must be at most .* all connections, 852; got 853"),
        (2, {}, "must pay for the guard's minimum, 3; it is 2.0 of 852"),
        (0.04, {"minimum": 12}, "guard's minimum, 36; it is 34.1 of 852"),
        (0.03, {"feature_axes": -1}, "guard's minimum, 27; it is 25.6 of 852"),
        (12, {"costs": DEAR}, "guard's minimum, 13; it is 12.0 of 906"),
        (0.5, {"minimum": 13}, "size of every masked leaf; d has 12 .*, got 13"),
        (0.1, LATE, "have come to the target, 0.1, by freeze_step; at step 10 .* 0.5"),
        (0.1, {"costs": {"a": 1}}, "none for c; there are: a"),
        (0.1, {"costs": NEGATIVE}, "finite number >= 0; at c it is -1"),
        (0.1, {"costs": {**MACS, "d": -np.ones((6, 2))}}, "finite and >= 0; at d"),
        (0.1, {"costs": {**MACS, "d": np.ones(12)}}, r"at d they have \(12,\)"),
        (0.1, {"costs": {**MACS, "a": MACS["b"]}}, "at a the MACs are unknown: not m"),
        (0.1, {"costs": ZERO}, "connections that cost something; there are 852"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused_at_init(target, options, words):
    tx = meet_budget(optax.sgd(1.0), target, **{**STEPS, **options})
    with pytest.raises(ValueError, match=f"meet_budget: .*{words}"):
        tx.init({"b": None} | {name: np.ones(shape) for name, shape in SIZES.items()})
