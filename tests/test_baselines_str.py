"""STR: kernels that a trained threshold shrinks, and how both are trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pruning
import pytest
from tiny import config as tiny_config
from tiny import dataset, register

from experiments.baselines.str_ import str_
from experiments.methods import METHODS
from experiments.outcome import make_report
from experiments.train import train

STEPS = 8
SHAPES = {"a": (3, 2), "b": (3, 2, 5, 6)}
S = {"a": -1.5, "b": 0.25}


@pytest.fixture(autouse=True)
def _tiny_networks(monkeypatch):
    register(monkeypatch)


def config(**changes):
    return tiny_config(**{"mask_initial": -1.5, **changes})


def random_params(seed):
    return pruning.random_params(seed, SHAPES)


def wrapped(way, seed=0):
    """Return what is trained, with another threshold in every layer."""
    trained = way.wrap(random_params(seed))
    thresholds = {
        name: {**x, "kernel": jnp.full_like(x["kernel"], S[name])}
        for name, x in trained["thresholds"].items()
    }
    return {**trained, "thresholds": thresholds}


def sigmoid(s):
    return 1 / (1 + np.exp(-s))


def first_step(settings, gradient):
    """Return what is trained before and after a step."""
    way = str_(settings, STEPS)
    trained = wrapped(way)
    moves, _ = way.tx.update(gradient(trained), way.tx.init(trained), trained)
    return trained, optax.apply_updates(trained, moves)


def test_every_kernel_has_one_threshold_that_starts_where_the_config_says():
    params = random_params(0)
    trained = str_(config(mask_initial=-5.0), STEPS).wrap(params)
    jax.tree.map(np.testing.assert_array_equal, trained["weights"], params)
    for threshold in trained["thresholds"].values():
        assert threshold["bias"] is None
        assert threshold["kernel"].size == 1
        assert threshold["kernel"].item() == -5


@pytest.mark.parametrize("seen", ["effective", "fold"])
def test_kernels_are_shrunk_by_their_threshold_and_zero_below_it(seen):
    way = str_(config(), STEPS)
    trained = wrapped(way)
    shrunk = getattr(way, seen)(trained)
    for name, leaves in trained["weights"].items():
        w = np.array(leaves["kernel"], float)
        expected = np.sign(w) * np.maximum(np.abs(w) - sigmoid(S[name]), 0)
        kernel = np.array(shrunk[name]["kernel"])
        np.testing.assert_allclose(kernel, expected, rtol=1e-5, atol=1e-6)
        below = np.abs(w) <= sigmoid(S[name])
        assert 0 < below.sum() < w.size
        assert (kernel[below] == 0).all()
        assert not np.signbit(kernel[below]).any()
        assert (kernel[~below] != 0).all()
        np.testing.assert_array_equal(shrunk[name]["bias"], leaves["bias"])
    assert way.penalty(trained) == 0


def test_gradients_are_those_of_the_formulas():
    way = str_(config(), STEPS)
    trained = wrapped(way)
    of_loss = random_params(1)
    _, pull = jax.vjp(jax.jit(way.effective), trained)
    (gradient,) = pull(of_loss)
    for name, s in S.items():
        w, g = (
            np.array(tree[name]["kernel"], float)
            for tree in (trained["weights"], of_loss)
        )
        left = np.abs(w) > sigmoid(s)
        np.testing.assert_allclose(
            gradient["weights"][name]["kernel"], g * left, rtol=1e-6
        )
        slope = sigmoid(s) * (1 - sigmoid(s))
        np.testing.assert_allclose(
            gradient["thresholds"][name]["kernel"].item(),
            -slope * (np.sign(w) * g * left).sum(),
            rtol=1e-4,
        )
        np.testing.assert_array_equal(
            gradient["weights"][name]["bias"], of_loss[name]["bias"]
        )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_kernels_and_thresholds_decay_alike_and_biases_not(optimizer):
    settings = config(optimizer=optimizer, weight_decay=0.25)

    def nothing(trained):
        return jax.tree.map(jnp.zeros_like, trained)

    before, after = first_step(settings, nothing)
    kept = 1 - settings.learning_rate * 0.25
    for name in SHAPES:
        for field in ("weights", "thresholds"):
            old, new = (np.array(x[field][name]["kernel"]) for x in (before, after))
            np.testing.assert_allclose(new, kept * old, rtol=1e-5)
        biases = (x["weights"][name]["bias"] for x in (before, after))
        np.testing.assert_array_equal(*biases)


def test_thresholds_take_the_step_of_the_weights():
    settings = config(weight_decay=0.0)

    def threes(trained):
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, 3), trained)

    before, after = first_step(settings, threes)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(
            new, old - 3 * settings.learning_rate, rtol=1e-5, atol=1e-6
        )


def test_seeds_train_under_one_compilation_and_their_zeros_are_counted(monkeypatch):
    traced = []

    def noted(settings, steps):
        way = str_(settings, steps)

        def effective(trained):
            traced.append(1)
            return way.effective(trained)

        return way._replace(effective=effective)

    monkeypatch.setitem(METHODS, "str", noted)
    settings = config(model="two_layers", mask_initial=-4.0, seeds=2)
    trainings = train(settings, dataset(), "str")
    first = next(trainings)
    once = len(traced)
    (second,) = trainings
    assert len(traced) == once > 0
    for trained in (first, second):
        left = 0
        for name, threshold in trained.trained["thresholds"].items():
            s = threshold["kernel"].item()
            assert s != -4
            weight = np.array(trained.trained["weights"][name]["kernel"])
            folded = np.array(trained.folded[name]["kernel"])
            pruned = np.abs(weight) < sigmoid(s) - 1e-6
            assert (folded[pruned] == 0).all()
            assert pruned.any()
            left += np.count_nonzero(folded)
        assert 0 < left < 784 * 30 + 300
        assert trained.history[-1].nnz == left
        assert make_report(settings, trained).totals.nnz == left
    kernels = [trained.folded["Dense_0"]["kernel"] for trained in (first, second)]
    assert not np.array_equal(*kernels)
