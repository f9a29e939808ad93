"""A seed repeats bit for bit, however the training is looked at."""

import dataclasses
import hashlib
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import config, dataset, register

from experiments import step
from experiments.train import train

ROOT = Path(__file__).parents[1]
SCRIPT = """
import hashlib, jax, numpy as np
from flax import linen as nn
from experiments.config import Config
from experiments.data import NO_EXAMPLES, Dataset, Split
from experiments.models import MODELS, Model
from experiments.train import train

class Grouped(Model):
    @nn.compact
    def __call__(self, x, *, train=False):
        units = nn.Dense(300)(x.reshape(x.shape[0], -1))
        return units.reshape(x.shape[0], 10, 30).sum(axis=2)

MODELS["grouped"] = Grouped
random = np.random.default_rng(3)
split = Split(
    random.integers(0, 256, (150, 28, 28, 1)).astype(np.uint8),
    random.integers(0, 10, 150).astype(np.int32),
)
config = Config(
    dataset="mnist5k", model="grouped", epochs=1, batch_size=50, penalty=1e-5,
    mask_learning_rate=0.03, seed=11, augment="crop_flip",
)
digest = hashlib.sha256()
(trained,) = train(config, Dataset(split, NO_EXAMPLES, None), "scl")
for leaf in jax.tree.leaves(trained.trained):
    digest.update(np.asarray(leaf).tobytes())
for metrics in trained.history:
    digest.update(repr(metrics._replace(seconds=0)).encode())
print(digest.hexdigest())
"""


@pytest.fixture(autouse=True)
def _tiny_networks(monkeypatch):
    register(monkeypatch)


def assert_same(first, second):
    """Compare two trainings bit for bit, and tell them from one that did nothing."""
    for field in ("trained", "statistics", "folded"):
        old, new = getattr(first, field), getattr(second, field)
        jax.tree.map(np.testing.assert_array_equal, old, new)
    assert np.abs(first.folded["Dense_0"]["kernel"]).max() > 0


def untimed(trained):
    return [metrics._replace(seconds=0) for metrics in trained.history]


def test_a_seed_repeats_bit_for_bit_in_two_processes():
    run = [sys.executable, "-c", SCRIPT]
    first, second = (
        subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    )
    digests = [process.communicate()[0].strip() for process in (first, second)]
    assert len(digests[0]) == len(hashlib.sha256().hexdigest())
    assert digests[0] == digests[1]


@pytest.mark.parametrize("devices", [1, 8])
def test_a_seed_repeats_bit_for_bit_whatever_was_trained_before(devices):
    data = dataset(held_out=10)
    settings = config(seeds=2, devices=devices, batch_size=8, epochs=2)
    both = list(train(settings, data, "scl"))
    assert [trained.seed for trained in both] == [7, 8]
    again = list(train(settings, data, "scl", seeds=[8, 7]))
    for first, second in zip(both, reversed(again), strict=True):
        assert_same(first, second)
        assert untimed(first) == untimed(second)
    kernels = [trained.folded["Dense_0"]["kernel"] for trained in both]
    assert not np.array_equal(*kernels)


# How often it is looked at


@pytest.mark.parametrize(
    ("model", "often"),
    [("linear", [1, 4, 100]), ("normalized", [4])],  # scanned, dispatched
)
def test_looking_more_often_changes_nothing(model, often):
    data = dataset(33, held_out=10)  # 6 steps
    settings = config(model=model, epochs=2, augment="crop_flip")
    (whole,) = train(settings, data, "scl")
    for every in often:
        seen = []
        changed = dataclasses.replace(settings, look_every=every)
        (other,) = train(changed, data, "scl", on_epoch=seen.append)
        assert seen == other.history
        assert_same(whole, other)
        for old, new in zip(untimed(whole), untimed(other), strict=True):
            assert new.loss == pytest.approx(old.loss, rel=1e-6)
            assert new.train_accuracy == pytest.approx(old.train_accuracy, rel=1e-6)
            summed = {"loss": 0, "train_accuracy": 0}
            assert new._replace(**summed) == old._replace(**summed)


# The two loops


def test_both_loops_give_the_same(monkeypatch):
    results = []
    for slow in (False, True):
        monkeypatch.setattr(step, "slow_in_scan", lambda network, slow=slow: slow)
        results.extend(train(config(), dataset(held_out=10), "scl"))
    scanned, dispatched = results
    jax.tree.map(
        lambda *both: np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-6),
        *(scanned.trained, dispatched.trained),
    )
    for old, new in zip(scanned.history, dispatched.history, strict=True):
        assert new.loss == pytest.approx(old.loss, rel=1e-5)
        assert new.train_accuracy == pytest.approx(old.train_accuracy)
        assert new.validation_accuracy == old.validation_accuracy
        assert new.nnz == old.nnz
