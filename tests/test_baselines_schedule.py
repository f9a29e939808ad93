"""When baselines change their masks, and to what sparsity: against Zhu & Gupta."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pruning import STEPS, config, sparsity_by_hand
from tiny import register

from experiments.baselines.schedule import due, sparsity_at


@pytest.fixture(autouse=True)
def _known_networks(monkeypatch):
    register(monkeypatch)


@pytest.mark.parametrize(
    ("begin", "end"),
    [(0, 28), (4, 28), (12, 13), (0, 40)],
    ids=["from the start", "later", "at once", "to the last step"],
)
def test_sparsity_is_that_of_the_cubic_schedule(begin, end):
    settings = config(
        schedule_begin=begin / STEPS, schedule_end=end / STEPS, freeze_at=1.0
    )
    at = jax.jit(sparsity_at(settings, STEPS))
    found = [float(at(jnp.int32(taken))) for taken in range(1, STEPS + 1)]
    expected = [
        sparsity_by_hand(taken, begin=begin, end=end) for taken in range(1, STEPS + 1)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert found[end - 1 :] == [np.float32(0.85)] * (STEPS + 1 - end)
    assert found[:begin] == [0] * begin


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (5, [9, 14, 19, 24, 28]),
        (8, [12, 20, 28]),  # the end is due by both rules, once
        (1, list(range(5, 29))),
        (24, [28]),
        (100, [28]),
    ],
)
def test_masks_are_due_at_intervals_and_at_the_end(every, expected):
    is_due = due(config(prune_every=every), STEPS)
    found = jax.jit(jax.vmap(is_due))(jnp.arange(STEPS + 1))
    assert np.flatnonzero(found).tolist() == expected
    assert is_due(jnp.int32(3)).shape == ()


@pytest.mark.parametrize(("steps", "end"), [(1, 1), (10, 2)])
def test_schedule_that_rounds_to_nothing_has_a_step(steps, end):
    settings = config(schedule_begin=0.2, schedule_end=0.21, freeze_at=0.3)
    at, is_due = sparsity_at(settings, steps), due(settings, steps)
    found = [float(at(jnp.int32(taken))) for taken in (end - 1, end)]
    assert found == [0, np.float32(0.85)]
    assert [bool(is_due(jnp.int32(taken))) for taken in (end - 1, end)] == [0, 1]
