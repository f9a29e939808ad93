"""Layers that lose their connections, and networks that no longer read their input."""

import dataclasses
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.config import Config
from experiments.data import NO_EXAMPLES, Dataset, Split
from experiments.health import Layer, collapse, kernel_counts
from experiments.models import MODELS
from experiments.models.base import Model
from experiments.models.language_model import LanguageModel
from experiments.models.resnet import ResNet
from experiments.network import make_network
from experiments.train import train

NOT_READING = "the output of the network does not depend on its input"
CONFIG = Config(dataset="mnist5k", model="lenet300", pixels="unit")
TEXT = Config(dataset="python_docs", model="language_model")
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(1, 256, (8, 28, 28, 1)).astype(np.uint8)
TEXTS = RANDOM.integers(0, 90, (8, 128)).astype(np.uint8)


class Chain(Model):
    """Three layers without biases: with positive weights, a path is a path."""

    skip: bool = False

    @nn.compact
    def __call__(self, x_BxHxWxC, *, train=False):
        x = nn.relu(nn.Dense(4, use_bias=False)(x_BxHxWxC.reshape(len(x_BxHxWxC), -1)))
        x = x * self.skip + nn.relu(nn.Dense(4, use_bias=False)(x))
        return nn.Dense(self.classes)(x)


class Residual(Chain):
    skip: bool = True


class SmallResNet(ResNet):
    depth: int = 8


class SmallText(LanguageModel):
    width, blocks, heads, mlp = 8, 1, 2, 8


@pytest.fixture
def networks(monkeypatch):
    """Put small networks in the places of others."""
    for name, made in (
        ("vgg16", Chain),
        ("vgg19", Residual),
        ("resnet20", SmallResNet),
        ("language_model", SmallText),
    ):
        monkeypatch.setitem(MODELS, name, made)
    make_network.cache_clear()
    yield
    make_network.cache_clear()


def made(name):
    config = TEXT if name == "language_model" else CONFIG
    return make_network(dataclasses.replace(config, model=name))


def found(network, params, statistics=None, inputs=IMAGES):
    counts = kernel_counts(params)
    return collapse(network, params, statistics or {}, jnp.asarray(inputs), counts)


def test_counts_are_those_of_numpy():
    random = np.random.default_rng(1)
    params = {
        "Conv_0": {"kernel": random.integers(-1, 2, (3, 3, 2, 8)).astype(np.float32)},
        "block": {"Dense_0": {"kernel": np.zeros((7, 5)), "bias": np.ones(5)}},
        "BatchNorm_0": {"scale": np.zeros(8)},
    }
    expected = {
        "Conv_0/kernel": Layer(np.count_nonzero(params["Conv_0"]["kernel"]), 144, 8),
        "block/Dense_0/kernel": Layer(0, 35, 5),
    }
    assert kernel_counts(jax.tree.map(jnp.asarray, params)) == expected


@pytest.mark.parametrize("name", ["lenet300", "lenet5", "resnet20", "language_model"])
def test_a_fresh_network_is_healthy(networks, name):
    network = made(name)
    params, statistics = network.init(jax.random.key(0))
    inputs = TEXTS if name == "language_model" else IMAGES
    assert found(network, params, statistics, inputs) == []


def with_connections(params, path, count):
    flat = flatten_dict(params, sep="/")
    kernel = np.zeros(flat[path].size, np.float32)
    kernel[:count] = 0.5
    kernel = jnp.asarray(kernel.reshape(flat[path].shape))
    return unflatten_dict({**flat, path: kernel}, sep="/")


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "has lost its last connection"),
        (1, "collapses: 1 connection is left of 235200"),
        (2, "collapses: 2 connections are left of 235200"),
        (3, "collapses: 3 connections are left of 235200"),
        (4, None),
    ],
)
def test_a_layer_is_named_before_its_last_connection_goes(count, words):
    network = made("lenet300")
    params, _ = network.init(jax.random.key(0))
    params = with_connections(params, "Dense_0/kernel", count)
    about = [line for line in found(network, params) if line != NOT_READING]
    assert about == ([f"Dense_0/kernel {words}"] if words else [])


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_not_reading_is_said_exactly_where_no_path_is_left(seed, residual):
    random = np.random.default_rng(seed)
    density = random.uniform(0.1, 0.5)
    shapes = [(784, 4), (4, 4), (4, 10)]
    first = np.zeros(shapes[0], bool)
    first[random.integers(784), :] = random.random(4) < density
    masks = [first, *(random.random(shape) < density for shape in shapes[1:])]
    middle = masks[1] | np.eye(4, dtype=bool) if residual else masks[1]
    path = (masks[0].astype(int) @ middle @ masks[2]).any()
    params = {
        f"Dense_{i}": {
            "kernel": jnp.asarray(mask * random.uniform(0.5, 1.5, mask.shape))
        }
        for i, mask in enumerate(masks)
    }
    params["Dense_2"]["bias"] = jnp.asarray(random.normal(size=10))
    model = Residual() if residual else Chain()
    network = made("lenet300")._replace(
        apply=lambda p, statistics, x: model.apply({"params": p}, x / 255)
    )
    assert (NOT_READING in found(network, params)) == (not path)


def test_a_cut_block_does_not_cut_a_residual_network(networks):
    network = made("resnet20")
    params, statistics = network.init(jax.random.key(0))
    cut = with_connections(params, "BasicBlock_1/Conv_0/kernel", 0)
    assert found(network, cut, statistics) == [
        "BasicBlock_1/Conv_0/kernel has lost its last connection"
    ]
    cut = with_connections(params, "Conv_0/kernel", 0)
    assert NOT_READING in found(network, cut, statistics)


def test_a_text_model_reads_until_its_head_is_cut(networks):
    network = made("language_model")
    params, _ = network.init(jax.random.key(0))
    kernels = [path for path in kernel_counts(params) if path != "Dense_0/kernel"]
    assert kernels
    cut = params
    for path in kernels:
        cut = with_connections(cut, path, 0)
    lines = found(network, cut, inputs=TEXTS)
    assert sorted(lines) == sorted(f"{p} has lost its last connection" for p in kernels)
    cut = with_connections(params, "Dense_0/kernel", 0)
    assert NOT_READING in found(network, cut, inputs=TEXTS)


PRUNING = dataclasses.replace(
    CONFIG,
    model="vgg16",
    epochs=12,  # of one step
    batch_size=16,
    learning_rate=1e-3,
    penalty=0.5,
    mask_learning_rate=0.02,
    mask_momentum=0.0,
    freeze_at=1.0,
    devices=1,
)


def pruned(caplog, **changes):
    """Train; return what was logged as (step, words), and the training."""
    images = np.random.default_rng(2).integers(0, 256, (16, 28, 28, 1))
    split = Split(images.astype(np.uint8), np.arange(16, dtype=np.int32) % 10)
    config = dataclasses.replace(PRUNING, **changes)
    with caplog.at_level(logging.WARNING, "experiments.train"):
        (done,) = train(config, Dataset(split, NO_EXAMPLES, NO_EXAMPLES), "scl")
    lines = [record.getMessage() for record in caplog.records]
    matches = [re.fullmatch(r"scl, seed 0, step (\d+): (.*)", line) for line in lines]
    return [(int(match[1]), match[2]) for match in matches if match], done


def test_collapse_is_logged_once_when_it_happens(networks, caplog):
    logged, done = pruned(caplog)
    gone = next(m.epoch for m in done.history if m.nnz == 0)
    assert 1 < gone < 12
    assert len({words for _, words in logged}) == len(logged)
    lost = {words: step for step, words in logged if "has lost" in words}
    assert set(lost) == {
        f"Dense_{i}/kernel has lost its last connection" for i in range(3)
    }
    assert max(lost.values()) == gone
    assert min(lost.values()) <= dict(map(reversed, logged))[NOT_READING] <= gone


def test_a_minimum_of_connections_keeps_every_layer(networks, caplog):
    logged, done = pruned(caplog, minimum_connections=4)
    counts = kernel_counts(done.folded)
    assert all(layer.nnz >= 4 for layer in counts.values())
    assert sum(layer.nnz for layer in counts.values()) < 30  # it did prune
    assert not any("has lost" in words for _, words in logged)
