"""The network of a config: what it is fed, and what it keeps between batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny import Linear, TinyText, by_path, config, images, register, text

import scl_jax
from experiments.data import ABOUT
from experiments.models import MODELS, Model
from experiments.network import macs_of_connections, make_network, network_macs


class Echo(Model):
    """Returns what it is fed, for a network without parameters but one."""

    @nn.compact
    def __call__(self, x, *, train=False):
        del train
        return x + self.param("shift", nn.initializers.zeros, (1,) * x.ndim)


@pytest.fixture(autouse=True)
def _tiny_networks(monkeypatch):
    register(monkeypatch)
    monkeypatch.setitem(MODELS, "echo", Echo)


def made(**changes):
    network = make_network(config(**changes))
    return network, *jax.jit(network.init)(jax.random.key(1))


def test_networks_of_equal_configs_are_shared():
    assert make_network(config()) is make_network(dataclasses.replace(config()))
    assert make_network(config()) is not make_network(config(pixels="unit"))


@pytest.mark.parametrize("scale", ["standardized", "unit"])
@pytest.mark.parametrize(
    ("dataset", "mean", "deviation"),
    [
        ("mnist5k", [0.1307], [0.3081]),
        ("fashion_mnist", [0.2860], [0.3530]),
        ("cifar10", [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    ],
)
def test_network_scales_the_pixels_of_its_data(dataset, mean, deviation, scale):
    network, params, _ = made(dataset=dataset, model="echo", pixels=scale)
    shape = (3, *ABOUT[dataset].shape)
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    if scale == "unit":
        mean, deviation = [0.0], [1.0]
    expected = (pixels / 255 - np.array(mean)) / np.array(deviation)
    evaluated = network.apply(params, {}, pixels)
    trained, _ = network.train(params, {}, pixels)
    for got in (evaluated, trained):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", ["standardized", "unit"])
def test_characters_come_as_they_are(scale):
    settings = {"dataset": "python_docs", "model": "tiny_text", "pixels": scale}
    network, params, statistics = made(**settings)
    tokens = text(2).inputs
    assert statistics == {}
    assert network.example == jax.ShapeDtypeStruct((1, 128), np.uint8)
    expected = jax.jit(TinyText(classes=97).apply)({"params": params}, tokens)
    got = jax.jit(network.apply)(params, {}, tokens)
    assert got.shape == (2, 128, 97)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_network_without_normalization_keeps_nothing():
    network, params, statistics = made()
    assert statistics == {}
    logits, new = network.train(params, statistics, images(3).inputs)
    assert new == {}
    scaled = (images(3).inputs / 255 - 0.1307) / 0.3081
    expected = Linear().apply({"params": params}, jnp.float32(scaled))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_training_uses_and_notes_the_statistics_of_the_batch():
    network, params, statistics = made(model="normalized")
    assert set(params) == {"Conv_0", "BatchNorm_0", "Dense_0"}
    own = statistics["batch_stats"]["BatchNorm_0"]
    np.testing.assert_array_equal(own["mean"], np.zeros(6))
    np.testing.assert_array_equal(own["var"], np.ones(6))
    inputs = images(4).inputs
    logits, new = network.train(params, statistics, inputs)
    new = new["batch_stats"]["BatchNorm_0"]
    # With momentum 0.9, what was noted is a tenth of the batch's own.
    of_batch = {"mean": new["mean"] / 0.1, "var": (new["var"] - 0.9) / 0.1}
    assert np.abs(of_batch["mean"]).max() > 0.01
    with_them = {"batch_stats": {"BatchNorm_0": of_batch}}
    expected = network.apply(params, with_them, inputs)
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)
    # In evaluation an image's logits do not depend on its neighbours.
    together = network.apply(params, statistics, inputs)
    alone = network.apply(params, statistics, inputs[:1])
    np.testing.assert_allclose(together[:1], alone, rtol=1e-5, atol=1e-6)
    assert not np.allclose(together, logits, atol=1e-3)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_parameters_are_float32_whatever_is_computed_in(compute):
    network = make_network(config(model="normalized", compute=compute))
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    logits = jax.eval_shape(network.apply, *shapes, network.example)
    assert (logits.shape, logits.dtype) == ((1, 10), jnp.float32)


@pytest.mark.parametrize(("size", "side"), [(0, 224), (64, 64)])
def test_example_of_imagenet_has_the_size_that_is_asked_for(size, side):
    settings = config(dataset="imagenet2012", model="resnet50", image_size=size)
    network = make_network(settings)
    assert network.example == jax.ShapeDtypeStruct((1, side, side, 3), np.uint8)


# MACs


def test_macs_are_counted_without_statistics_as_with_those_of_a_training():
    network, params, statistics = made(model="normalized")
    _, trained = jax.jit(network.train)(params, statistics, images(4).inputs)
    assert np.abs(trained["batch_stats"]["BatchNorm_0"]["mean"]).max() > 0

    def apply(params, inputs):
        return network.apply(params, trained, inputs)

    macs = by_path(network_macs(network))
    assert macs == by_path(scl_jax.count_macs(apply, params, network.example))
    # 7x7 patches at 4 x 4 places to 6 features; 6 features to 10 classes.
    assert macs["Conv_0/kernel"] == 16 * 49 * 6
    assert macs["Dense_0/kernel"] == 6 * 10


def test_macs_of_a_connection_are_the_places_that_it_is_put_at():
    kernels = {
        "normalized": {"Conv_0/kernel": 16.0, "Dense_0/kernel": 1.0},
        "two_layers": {"Dense_0/kernel": 1.0, "Dense_1/kernel": 1.0},
    }
    for model, expected in kernels.items():
        costs = by_path(macs_of_connections(make_network(config(model=model))))
        assert {path: costs[path] for path in expected} == expected


def test_macs_of_a_network_are_counted_once(monkeypatch):
    network, counted = make_network(config(learning_rate=0.3)), []
    monkeypatch.setattr(
        scl_jax,
        "count_macs",
        lambda apply, params, example: counted.append(example) or params,
    )
    network_macs.cache_clear()
    assert network_macs(network) is network_macs(network)
    assert counted == [network.example]
    network_macs.cache_clear()
