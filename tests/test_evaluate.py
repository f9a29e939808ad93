"""Accuracy of splits of every size, of streams, and with running statistics."""

import jax
import numpy as np
import pytest
from tiny import config, images, register, standardized, text

from experiments.data import NO_EXAMPLES, Split
from experiments.evaluate import evaluate
from experiments.mesh import make_mesh
from experiments.network import make_network


@pytest.fixture(autouse=True)
def _tiny_networks(monkeypatch):
    register(monkeypatch)


def made(model, dataset="mnist5k"):
    """Return a network, random parameters, and the statistics of its layers."""
    network = make_network(config(dataset=dataset, model=model))
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    random = np.random.default_rng(1)
    # Above zero, because variances are among them.
    drawn = jax.tree.map(lambda x: random.uniform(0.1, 1, x.shape), shapes)
    params, statistics = jax.tree.map(np.float32, drawn)
    return network, jax.tree.map(lambda x: x - np.float32(0.5), params), statistics


def half_right(split, guesses):
    """Label the first half of a split as it is predicted; return the accuracy."""
    half = len(split.labels) // 2
    split.labels[:half] = guesses[:half]
    return (guesses == split.labels).mean()


class MadeUpStream:
    """All examples once, in batches of eight; black rows of label -1 fill the last."""

    def __init__(self, split):
        self.split = split

    def batches(self, start=0):
        for first in range(8 * start, len(self.split.labels), 8):
            inputs, labels = (x[first : first + 8] for x in self.split)
            missing = 8 - len(labels)
            inputs = np.pad(inputs, [(0, missing), (0, 0), (0, 0), (0, 0)])
            yield Split(inputs, np.pad(labels, (0, missing), constant_values=-1))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("count", [1, 7, 999, 1000, 1003, 2001])
def test_accuracy_is_that_of_numpy(count, devices):
    network, params, _ = made("linear")
    split = images(count, seed=count)
    kernel, bias = (np.asarray(params["Dense_0"][n], float) for n in ("kernel", "bias"))
    guesses = (standardized(split) @ kernel + bias).argmax(axis=1)
    expected = half_right(split, guesses)
    got = evaluate(network, params, {}, split, make_mesh(devices))
    assert got == pytest.approx(expected, abs=1e-12)
    # All right, and all wrong: no example is left out or counted twice.
    mesh = make_mesh(devices)
    right = split._replace(labels=guesses.astype(np.int32))
    assert evaluate(network, params, {}, right, mesh) == 1
    wrong = split._replace(labels=(guesses.astype(np.int32) + 1) % 10)
    assert evaluate(network, params, {}, wrong, mesh) == 0


@pytest.mark.parametrize("nothing", [NO_EXAMPLES, images(0), MadeUpStream(images(0))])
def test_nothing_has_no_accuracy(nothing):
    network, params, _ = made("linear")
    assert evaluate(network, params, {}, nothing, make_mesh(8)) is None


def test_batches_are_of_one_size_that_the_devices_divide(monkeypatch):
    network, params, _ = made("linear")
    sizes = []

    def apply(params, statistics, inputs):
        sizes.append(inputs.shape[0])  # once for each size, when it is traced
        return network.apply(params, statistics, inputs)

    counted = network._replace(apply=apply)
    evaluate(counted, params, {}, images(2001), make_mesh(8))
    evaluate(counted, params, {}, images(1007), make_mesh(8))
    evaluate(counted, params, {}, images(3), make_mesh(8))
    assert sizes == [1000, 8]


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("count", [3, 16, 21])
def test_stream_is_counted_without_what_fills_its_last_batch(count, devices):
    network, params, _ = made("linear")
    split, mesh = images(count), make_mesh(devices)
    kernel, bias = (np.asarray(params["Dense_0"][n], float) for n in ("kernel", "bias"))
    guesses = (standardized(split) @ kernel + bias).argmax(axis=1)
    expected = half_right(split, guesses)
    assert 0 < expected < 1
    got = evaluate(network, params, {}, MadeUpStream(split), mesh)
    assert got == pytest.approx(expected, abs=1e-12)


def test_characters_of_text_are_counted():
    network, params, _ = made("tiny_text", "python_docs")
    split = text(3)
    guesses = np.asarray(jax.jit(network.apply)(params, {}, split.inputs)).argmax(-1)
    split.labels[:] = guesses
    split.labels[1, :100] = (guesses[1, :100] + 1) % 97
    split.labels[2, 5] = (guesses[2, 5] + 1) % 97
    got = evaluate(network, params, {}, split, make_mesh(8))
    assert got == (3 * 128 - 101) / (3 * 128)


@pytest.mark.parametrize("devices", [1, 8])
def test_running_statistics_are_used_and_not_those_of_the_batch(devices):
    network, params, statistics = made("normalized")
    split = images(40)
    scaled = (split.inputs / 255 - 0.1307) / 0.3081
    patches = scaled.reshape(40, 4, 7, 4, 7).transpose(0, 1, 3, 2, 4).reshape(-1, 49)
    outputs = patches @ params["Conv_0"]["kernel"].reshape(49, 6).astype(float)

    def guesses(mean, variance):
        own = params["BatchNorm_0"]
        x = (outputs - mean) / np.sqrt(variance + 1e-5) * own["scale"] + own["bias"]
        x = np.maximum(x, 0).reshape(40, 16, 6).mean(axis=1)
        return (x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]).argmax(1)

    # Far from those of any batch.
    statistics["batch_stats"]["BatchNorm_0"]["mean"] += np.float32([9, 0, -9, 5, 0, -5])
    running = statistics["batch_stats"]["BatchNorm_0"]
    right = guesses(running["mean"], running["var"]).astype(np.int32)
    of_batch = guesses(outputs.mean(axis=0), outputs.var(axis=0))
    assert (right != of_batch).any()
    split = split._replace(labels=right)
    mesh = make_mesh(devices)
    assert evaluate(network, params, statistics, split, mesh) == 1
    split = split._replace(labels=of_batch.astype(np.int32))
    assert evaluate(network, params, statistics, split, mesh) < 1
