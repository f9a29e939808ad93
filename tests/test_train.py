"""The training loop: against NumPy step by step, repeatable, and loud when it fails."""

import dataclasses
import hashlib
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

import scl_jax
from experiments import train as training
from experiments.config import Config
from experiments.data import PIXELS, Dataset, Split
from experiments.methods import METHODS
from experiments.models import MODELS
from experiments.train import (
    TrainingError,
    config_seeds,
    evaluate,
    initial_state,
    kernel_counts,
    make_epoch,
    make_network,
    shuffle,
    slow_in_scan,
    train,
)

ROOT = Path(__file__).parents[1]
# 23 examples in batches of 5: three of them are left out of every epoch.
CONFIG = Config(
    dataset="mnist5k",
    model="lenet300",
    epochs=3,
    batch_size=5,
    momentum=0.75,
    weight_decay=0.01,
    penalty=1e-3,
    mask_learning_rate=0.03,
    mask_momentum=0.5,
    freeze_at=0.5,
    seed=7,
)


class Linear(nn.Module):
    """One kernel of shape (784, 10), so that NumPy's gradient is one line."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


class Untouchable:
    """A split that must not be looked at."""

    def __getattr__(self, name):
        raise AssertionError(f"the test split was asked for {name}")

    def __iter__(self):
        raise AssertionError("the test split was iterated over")


@pytest.fixture
def linear(monkeypatch):
    """Make the network a linear one."""
    monkeypatch.setitem(MODELS, "lenet300", Linear)
    make_network.cache_clear()
    yield
    make_network.cache_clear()


def examples(count, seed=3):
    random = np.random.default_rng(seed)
    return Split(
        random.integers(0, 256, (count, 28, 28, 1)).astype(np.uint8),
        random.integers(0, 10, count).astype(np.int32),
    )


def dataset(count=23, held_out=0):
    return Dataset(examples(count), examples(held_out, seed=4), Untouchable())


def host(tree):
    """Copy to the host: what stays on the device is donated to the next epoch."""
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), tree)


def pixels(split):
    mean, deviation = PIXELS["mnist5k"]
    return (split.images.reshape(len(split.labels), -1) / 255 - mean) / deviation


def in_numpy(config, split, seed, method):
    """Train the linear network in float64, one step after the other.

    Returns kernel, bias, mask variables, and of each epoch (loss, accuracy).
    """
    network = make_network(config)
    examples = len(split.labels)
    per_epoch = examples // config.batch_size
    steps = config.epochs * per_epoch
    state = initial_state(network, METHODS[method](config, steps), seed)
    weights = state.trained if method == "dense" else state.trained.weights
    kernel, bias = (
        np.array(weights["Dense_0"][name], float) for name in ("kernel", "bias")
    )
    mask = np.full(kernel.shape, config.mask_initial)
    velocities = [0.0, 0.0, 0.0]
    key, step, history = state.key, 0, []
    for _ in range(config.epochs):
        key, order = shuffle(key, examples, config.batch_size)
        losses, correct = [], []
        for batch in np.asarray(order):
            x, labels = pixels(split)[batch], split.labels[batch]
            connected = mask >= 0
            logits = x @ (kernel * connected) + bias
            odds = np.exp(logits - logits.max(axis=1, keepdims=True))
            odds /= odds.sum(axis=1, keepdims=True)
            losses.append(-np.log(odds[range(len(labels)), labels]).mean())
            correct.append((logits.argmax(axis=1) == labels).mean())
            difference = (odds - np.eye(10)[labels]) / len(labels)
            gradient = x.T @ difference
            mask_gradient = gradient * kernel + config.penalty
            mask_gradient /= np.sqrt((mask_gradient**2).mean(axis=0))
            gradients = [
                gradient * connected + config.weight_decay * kernel,
                difference.sum(axis=0),
                mask_gradient,
            ]
            momenta = [config.momentum, config.momentum, config.mask_momentum]
            velocities = [
                momentum * velocity + g
                for momentum, velocity, g in zip(
                    momenta, velocities, gradients, strict=True
                )
            ]
            rate = config.learning_rate * 0.5 * (1 + np.cos(np.pi * step / steps))
            kernel = kernel - rate * velocities[0]
            bias = bias - rate * velocities[1]
            if method == "scl" and step < round(config.freeze_at * steps):
                mask = mask - config.mask_learning_rate * velocities[2]
            step += 1
        history.append((np.mean(losses), np.mean(correct)))
    return kernel, bias, mask, history


@pytest.mark.parametrize("method", ["dense", "scl"])
def test_training_equals_numpy_step_by_step(linear, method):
    data = dataset()
    (trained,) = train(CONFIG, data, method)
    kernel, bias, mask, history = in_numpy(CONFIG, data.train, CONFIG.seed, method)
    weights = trained.trained if method == "dense" else trained.trained.weights
    np.testing.assert_allclose(
        weights["Dense_0"]["kernel"], kernel, rtol=1e-3, atol=1e-5
    )
    np.testing.assert_allclose(weights["Dense_0"]["bias"], bias, rtol=1e-3, atol=1e-5)
    if method == "scl":
        got = trained.trained.masks["Dense_0"]["kernel"]
        np.testing.assert_allclose(got, mask, rtol=1e-3, atol=1e-4)
        # Not vacuous: some are pruned, some are not.
        assert 0.1 < (mask < 0).mean() < 0.9
    sure = np.abs(mask) > 1e-4  # the others hang on rounding
    assert sure.mean() > 0.99
    np.testing.assert_allclose(
        trained.folded["Dense_0"]["kernel"][sure],
        (kernel * (mask >= 0))[sure],
        rtol=1e-3,
        atol=1e-5,
    )
    for metrics, (loss, accuracy) in zip(trained.history, history, strict=True):
        assert metrics.loss == pytest.approx(loss, rel=1e-4)
        assert metrics.train_accuracy == pytest.approx(accuracy, abs=1e-6)
        assert metrics.seconds > 0
    assert abs(trained.history[-1].nnz - (mask >= 0).sum()) <= (~sure).sum()
    assert [m.epoch for m in trained.history] == [1, 2, 3]
    assert {(m.method, m.seed) for m in trained.history} == {(method, 7)}
    assert {m.validation_accuracy for m in trained.history} == {None}


class TwoLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(30)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


def test_two_layers_equal_optax_step_by_step(linear, monkeypatch):
    # Kernels of several shapes, with the method written down in place, without scan.
    monkeypatch.setitem(MODELS, "lenet300", TwoLayers)
    config = dataclasses.replace(CONFIG, epochs=2, momentum=0.9, penalty=1e-5)
    split = examples(23)
    steps, network = 8, make_network(config)
    order_key = jax.random.split(jax.random.key(7))[1]
    params = jax.jit(network.init)(jax.random.split(jax.random.key(7))[0])
    masks = {
        layer: jnp.full_like(params[layer]["kernel"], config.mask_initial)
        for layer in params
    }
    tx = optax.sgd(optax.cosine_decay_schedule(config.learning_rate, steps), 0.9)

    @jax.jit
    def gradients(params, masks, images, labels):
        used = {
            layer: {
                "kernel": own["kernel"] * (masks[layer] >= 0),
                "bias": own["bias"],
            }
            for layer, own in params.items()
        }

        def loss(used):
            logits = network.apply(used, images)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, labels
            ).mean()

        value, gradient = jax.value_and_grad(loss)(used)
        of_masks = {
            layer: own["kernel"] * params[layer]["kernel"] + config.penalty
            for layer, own in gradient.items()
        }
        of_params = {
            layer: {
                "kernel": own["kernel"] * (masks[layer] >= 0)
                + config.weight_decay * params[layer]["kernel"],
                "bias": own["bias"],
            }
            for layer, own in gradient.items()
        }
        return of_params, of_masks, value

    state, velocity, losses = tx.init(params), dict.fromkeys(params, 0.0), []
    for epoch in range(2):
        order_key, order = shuffle(order_key, 23, 5)
        for step, batch in enumerate(np.asarray(order), start=4 * epoch):
            of_params, of_masks, loss = gradients(
                params, masks, split.images[batch], split.labels[batch]
            )
            losses.append(float(loss))
            updates, state = tx.update(of_params, state, params)
            params = optax.apply_updates(params, updates)
            for layer, gradient in host(of_masks).items():
                size = np.sqrt((gradient.astype(float) ** 2).mean(axis=0))
                divided = gradient / np.where(size == 0, 1, size)
                velocity[layer] = config.mask_momentum * velocity[layer] + divided
                if step < 4:
                    moved = masks[layer] - config.mask_learning_rate * velocity[layer]
                    masks[layer] = jnp.float32(moved)

    (trained,) = train(config, dataset(), "scl")
    np.testing.assert_allclose(
        [m.loss for m in trained.history],
        np.reshape(losses, (2, 4)).mean(axis=1),
        rtol=1e-3,
    )
    for layer, mask in masks.items():
        got = np.asarray(trained.trained.masks[layer]["kernel"])
        assert ((got >= 0) != (np.asarray(mask) >= 0)).mean() < 1e-3
        assert 0.005 < (got < 0).mean() < 0.995
        np.testing.assert_allclose(
            trained.trained.weights[layer]["kernel"],
            params[layer]["kernel"],
            rtol=0.05,
            atol=1e-3,
        )


def test_an_epoch_sees_every_example_at_most_once():
    key = jax.random.key(0)
    next_key, order = shuffle(key, 23, 5)
    assert order.shape == (4, 5)
    seen = np.sort(np.ravel(order))
    assert len(set(seen.tolist())) == 20
    assert seen.min() >= 0
    assert seen.max() < 23
    _, again = shuffle(key, 23, 5)
    np.testing.assert_array_equal(order, again)
    _, other = shuffle(next_key, 23, 5)
    assert not np.array_equal(order, other)
    # Whole, where the batches fill it; in an order of its own.
    _, whole = shuffle(key, 20, 5)
    np.testing.assert_array_equal(np.sort(np.ravel(whole)), np.arange(20))
    assert not np.array_equal(np.ravel(whole), np.arange(20))


# A seed repeats


SCRIPT = """
import hashlib, jax, numpy as np
from flax import linen as nn
from experiments.config import Config
from experiments.data import Dataset, Split
from experiments.models import MODELS
from experiments.train import train

class Grouped(nn.Module):
    @nn.compact
    def __call__(self, x):
        units = nn.Dense(300)(x.reshape(x.shape[0], -1))
        return units.reshape(x.shape[0], 10, 30).sum(axis=2)

MODELS["lenet300"] = Grouped

def fingerprint():
    random = np.random.default_rng(3)
    split = Split(
        random.integers(0, 256, (150, 28, 28, 1)).astype(np.uint8),
        random.integers(0, 10, 150).astype(np.int32),
    )
    empty = Split(split.images[:0], split.labels[:0])
    config = Config(
        dataset="mnist5k", model="lenet300", epochs=1, batch_size=50, penalty=1e-5,
        mask_learning_rate=0.03, seed=11,
    )
    digest = hashlib.sha256()
    (trained,) = train(config, Dataset(split, empty, None), "scl")
    for leaf in jax.tree.leaves(trained.trained):
        digest.update(np.asarray(leaf).tobytes())
    for metrics in trained.history:
        digest.update(repr(metrics._replace(seconds=0)).encode())
    return digest.hexdigest()
"""


def test_a_seed_repeats_bit_for_bit_in_two_processes():
    run = [sys.executable, "-c", f"{SCRIPT}\nprint(fingerprint())"]
    first, second = (
        subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    )
    digests = [process.communicate()[0].strip() for process in (first, second)]
    assert len(digests[0]) == len(hashlib.sha256().hexdigest())
    assert digests[0] == digests[1]


def test_a_seed_repeats_bit_for_bit_whatever_was_trained_before(linear):
    data, config = dataset(held_out=10), dataclasses.replace(CONFIG, seeds=2)
    both = list(train(config, data, "scl"))
    assert [trained.seed for trained in both] == [7, 8]
    again = list(train(config, data, "scl", seeds=[8, 7]))
    for first, second in zip(both, reversed(again), strict=True):
        jax.tree.map(np.testing.assert_array_equal, first.trained, second.trained)
        jax.tree.map(np.testing.assert_array_equal, first.folded, second.folded)
        for old, new in zip(first.history, second.history, strict=True):
            assert old._replace(seconds=0) == new._replace(seconds=0)
    kernels = [trained.folded["Dense_0"]["kernel"] for trained in both]
    assert not np.array_equal(*kernels)


def test_seeds_of_a_config_count_from_the_first():
    assert list(config_seeds(dataclasses.replace(CONFIG, seeds=3))) == [7, 8, 9]


def test_no_seeds_train_nothing(linear):
    assert list(train(CONFIG, dataset(), "scl", seeds=[])) == []


# The two loops


@pytest.mark.parametrize("method", ["dense", "scl"])
def test_both_loops_give_the_same(linear, monkeypatch, method):
    results = []
    for slow in (False, True):
        monkeypatch.setattr(training, "slow_in_scan", lambda network, slow=slow: slow)
        results.extend(train(CONFIG, dataset(held_out=10), method))
    scanned, dispatched = results
    for first, second in zip(
        jax.tree.leaves(scanned.trained),
        jax.tree.leaves(dispatched.trained),
        strict=True,
    ):
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-6)
    for old, new in zip(scanned.history, dispatched.history, strict=True):
        assert new.loss == pytest.approx(old.loss, rel=1e-5)
        assert new.train_accuracy == pytest.approx(old.train_accuracy)
        assert new.validation_accuracy == old.validation_accuracy
        assert new.nnz == old.nnz


def test_convolutions_are_not_scanned_on_a_cpu():
    assert not slow_in_scan(make_network(CONFIG))
    assert slow_in_scan(make_network(dataclasses.replace(CONFIG, model="lenet5")))


@pytest.mark.parametrize("slow", [False, True])
def test_an_epoch_takes_the_buffers_of_the_state(linear, monkeypatch, slow):
    monkeypatch.setattr(training, "slow_in_scan", lambda network: slow)
    network, way = make_network(CONFIG), METHODS["scl"](CONFIG, 12)
    state = initial_state(network, way, 0)
    old = jax.tree.leaves((state.trained, state.opt_state))
    split = jax.tree.map(jnp.asarray, examples(23))
    state, _ = make_epoch(network, way, 5)(state, split)
    assert all(leaf.is_deleted() for leaf in old)
    new = jax.tree.leaves((state.trained, state.opt_state, split))
    assert not any(leaf.is_deleted() for leaf in new)


def test_seeds_and_epochs_share_one_compilation(linear):
    traced = []

    def counted(trained):
        traced.append(1)
        return way.penalty(trained)

    network, way = make_network(CONFIG), METHODS["scl"](CONFIG, 12)
    epoch = make_epoch(network, way._replace(penalty=counted), 5)
    split = jax.tree.map(jnp.asarray, examples(23))
    state, _ = epoch(initial_state(network, way, 0), split)
    once = len(traced)
    for seed in (0, 1):
        state = initial_state(network, way, seed)
        for _ in range(2):
            state, _ = epoch(state, split)
    assert len(traced) == once


# What is reported


def test_metrics_are_those_of_the_folded_network(linear):
    data, seen = dataset(held_out=10), []
    (trained,) = train(CONFIG, data, "scl", on_epoch=seen.append)
    assert seen == trained.history
    last, folded = trained.history[-1], trained.folded
    kernel = np.asarray(folded["Dense_0"]["kernel"])
    assert last.nnz == (kernel != 0).sum()
    assert last.sparsity == pytest.approx((kernel == 0).mean())
    logits = pixels(data.validation) @ kernel + np.asarray(folded["Dense_0"]["bias"])
    correct = (logits.argmax(axis=1) == data.validation.labels).sum()
    assert last.validation_accuracy == correct / 10


def test_each_epoch_is_reported_before_the_next(linear):
    order = []
    for trained in train(
        dataclasses.replace(CONFIG, seeds=2),
        dataset(),
        "dense",
        on_epoch=lambda metrics: order.append((metrics.seed, metrics.epoch)),
    ):
        order.append(trained.seed)
    assert order == [(7, 1), (7, 2), (7, 3), 7, (8, 1), (8, 2), (8, 3), 8]


def broken(monkeypatch, method, at):
    """Make the update of one step NaN; there are four steps an epoch."""
    make = METHODS[method]

    def nan_at_a_step(config, steps):
        way = make(config, steps)
        spoil = optax.scale_by_schedule(lambda t: jnp.where(t == at, jnp.nan, 1.0))
        return way._replace(tx=optax.chain(way.tx, spoil))

    monkeypatch.setitem(METHODS, method, nan_at_a_step)


@pytest.mark.parametrize("method", ["dense", "scl"])
@pytest.mark.parametrize(("at", "epoch"), [(0, 1), (4, 2)])
def test_loss_that_is_nan_is_reported_where_it_happens(
    linear, monkeypatch, method, at, epoch
):
    broken(monkeypatch, method, at)
    seen = []
    with pytest.raises(TrainingError) as raised:
        list(train(CONFIG, dataset(), method, seeds=[9], on_epoch=seen.append))
    message = str(raised.value)
    for word in (method, "seed 9", "nan", f"epoch {epoch}", "0.1", "0.03"):
        assert word in message
    # The epoch is logged all the same.
    assert [metrics.epoch for metrics in seen] == [*range(1, epoch + 1)]
    assert np.isnan(seen[-1].loss)


@pytest.mark.parametrize("method", ["dense", "scl"])
def test_nan_of_the_very_last_step_is_reported_too(linear, monkeypatch, method):
    # No loss is computed after it: only the parameters show it.
    broken(monkeypatch, method, at=11)
    with pytest.raises(TrainingError, match=rf"{method}.*seed 7"):
        list(train(CONFIG, dataset(), method))


@pytest.mark.parametrize("method", ["dense", "scl"])
def test_batch_larger_than_the_training_split_is_refused(linear, method):
    with pytest.raises(ValueError, match=r"batch_size .*at most .*\b4; got 5"):
        next(train(CONFIG, dataset(4), method))
    (trained,) = train(CONFIG, dataset(5), method)
    assert len(trained.history) == 3


# Evaluation and counts


@pytest.mark.parametrize("count", [1, 7, 1000, 1003, 2001])
def test_accuracy_is_that_of_numpy(linear, count):
    network, split = make_network(CONFIG), examples(count, seed=count)
    params = network.init(jax.random.key(1))
    kernel, bias = (np.asarray(params["Dense_0"][n], float) for n in ("kernel", "bias"))
    predicted = (pixels(split) @ kernel + bias).argmax(axis=1)
    half = count // 2
    split.labels[:half] = predicted[:half]
    expected = (predicted == split.labels).mean()
    assert evaluate(network, params, split) == pytest.approx(expected, abs=1e-12)


def test_networks_of_equal_configs_are_shared():
    assert make_network(CONFIG) is make_network(dataclasses.replace(CONFIG))


@pytest.mark.parametrize("scale", ["standardized", "unit"])
@pytest.mark.parametrize("dataset", ["mnist5k", "fashion_mnist"])
def test_network_scales_the_pixels_of_its_data(linear, dataset, scale):
    config = dataclasses.replace(CONFIG, dataset=dataset, pixels=scale)
    network, images = make_network(config), examples(3).images
    params = network.init(jax.random.key(1))
    mean, deviation = {
        "mnist5k": (0.1307, 0.3081),
        "fashion_mnist": (0.2860, 0.3530),
    }[dataset]
    if scale == "unit":
        mean, deviation = 0, 1
    scaled = jnp.asarray((images / 255 - mean) / deviation, jnp.float32)
    np.testing.assert_allclose(
        network.apply(params, images),
        Linear().apply({"params": params}, scaled),
        rtol=1e-4,
        atol=1e-5,
    )


def test_kernel_counts_count_kernels_alone():
    params = {
        "Dense_0": {
            "kernel": jnp.array([[0.0, 2.0, -0.0], [1e-30, 0.0, 3.0]]),
            "bias": jnp.ones(3),
        },
        "Dense_1": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)},
        "norm": {"scale": jnp.ones(3)},
    }
    assert kernel_counts(params) == (3, 12)


def test_counts_are_those_of_the_masks(linear):
    (trained,) = train(CONFIG, dataset(), "scl")
    masks = scl_jax.binary_masks(trained.trained)
    connected = sum(int(m.sum()) for m in flatten_dict(masks).values() if m is not None)
    assert trained.history[-1].nnz == connected
    assert kernel_counts(trained.folded) == (connected, 7840)
