"""Snapshots of a training on its way."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from experiments.data import NO_EXAMPLES, Dataset
from experiments.snapshots import snapshots
from experiments.train import train

DATA = Dataset(tiny.images(23), NO_EXAMPLES, NO_EXAMPLES)


@pytest.fixture(autouse=True)
def _networks(monkeypatch):
    tiny.register(monkeypatch)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("method", ["dense", "scl"])
def test_last_snapshot_is_what_training_comes_to(method):
    config = tiny.config(model="normalized", augment="crop_flip")
    (trained,) = train(config, DATA, method, seeds=[5])
    *_, last = snapshots(config, DATA, method, [0, 2, config.epochs], seed=5)
    assert_same((last.trained, last.statistics), (trained.trained, trained.statistics))


def test_snapshot_on_the_way_keeps_its_values_and_the_schedules():
    config = tiny.config()
    first, second, last = snapshots(config, DATA, "scl", [0, 1, 3], seed=5)
    (alone,) = snapshots(config, DATA, "scl", [1], seed=5)
    assert [first.epoch, second.epoch, last.epoch] == [0, 1, 3]
    assert_same(second.trained, alone.trained)
    # The start values, from the config, after two more snapshots have been taken.
    mask = first.trained.masks["Dense_0"]["kernel"]
    np.testing.assert_array_equal(mask, np.full((784, 10), 0.1, np.float32))
    assert not np.array_equal(second.trained.masks["Dense_0"]["kernel"], mask)
    # A training of one epoch decays its learning rate at once: not the same.
    (short,) = snapshots(
        dataclasses.replace(config, epochs=1), DATA, "scl", [1], seed=5
    )
    kernels = [s.trained.weights["Dense_0"]["kernel"] for s in (second, short)]
    assert not np.array_equal(*kernels)


@pytest.mark.parametrize("epochs", [[2, 1], [1, 1], [-1], [4]])
def test_epochs_that_are_not_on_the_way_are_refused(epochs):
    with pytest.raises(ValueError, match=r"from 0 to those of the training, 3; got \["):
        list(snapshots(tiny.config(), DATA, "scl", epochs))
