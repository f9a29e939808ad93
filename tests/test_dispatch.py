"""What the host's share of a step is measured by."""

import jax
import numpy as np
import pytest

from experiments import dispatch


def test_times_are_of_calls_and_ratios_are_to_dense(monkeypatch):
    seconds = {"dense": [1.0, 2.0, 4.0], "scl": [2.0, 2.0, 6.0], "budget": [3.0] * 3}

    class Timer:
        def __init__(self, layers, kind):
            self.times, self.state = iter(seconds[kind]), [0.0] * layers

        def __call__(self):
            return next(self.times)

    monkeypatch.setattr(dispatch, "_Trainer", Timer)
    got = dispatch.dispatch_times(layers=5, steps=3)
    assert got["dense_us"] == pytest.approx(2e6)
    assert got["scl_us"] == pytest.approx(2e6)
    # 2, 1 and 1.5; 3, 1.5 and 0.75: the median of the ratios.
    assert (got["ratio"], got["budget_ratio"]) == (1.5, 1.5)
    assert got["arrays"] == [5, 5]


@pytest.mark.parametrize(("kind", "arrays"), [("dense", 8), ("scl", 15)])
def test_trainers_train_and_hold_what_they_are_said_to(kind, arrays):

    trainer = dispatch._Trainer(2, kind)
    before = [np.array(x) for x in jax.tree.leaves(trainer.state)]
    assert len(before) == arrays
    assert trainer() > 0
    after = jax.tree.leaves(trainer.state)
    assert all(np.any(x != y) for x, y in zip(before, after, strict=True))
