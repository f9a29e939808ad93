"""Tiny networks, made-up examples, and the parts of a training put together."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from experiments.config import Config
from experiments.data import Dataset, Split
from experiments.feed import Feed, make_feed
from experiments.mesh import make_mesh
from experiments.methods import METHODS
from experiments.models import MODELS, LanguageModel, Model
from experiments.models.transformer import mlp_layers
from experiments.network import make_network
from experiments.step import Objective, Run, TrainState, make_initial, make_run

# Flax's own initializers take most of a tiny test's time to compile.
uniform = nn.initializers.lecun_uniform()


class Linear(Model):
    """One kernel of shape (784, 10), so that NumPy's gradient is one line."""

    @nn.compact
    def __call__(self, x, *, train=False):
        del train
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(10, kernel_init=uniform, bias_init=nn.initializers.uniform())(x)


class TwoLayers(Model):
    """Kernels of several shapes."""

    next_layer: ClassVar[dict[str, str]] = {"Dense_0/kernel": "Dense_1/kernel"}

    @nn.compact
    def __call__(self, x, *, train=False):
        del train
        x = nn.Dense(30, kernel_init=uniform)(x.reshape(x.shape[0], -1))
        return nn.Dense(10, kernel_init=uniform)(nn.relu(x))


class Overflowing(Model):
    """The second layer's outputs are more than float32 can hold."""

    @nn.compact
    def __call__(self, x, *, train=False):
        del train
        x = nn.Dense(30, kernel_init=uniform)(x.reshape(x.shape[0], -1))
        return nn.Dense(10, kernel_init=nn.initializers.constant(3e38))(nn.relu(x))


class Normalized(Model):
    """A convolution of patches that do not overlap, which BatchNorm follows."""

    @nn.compact
    def __call__(self, x, *, train=False):
        dtype, init = self.dtype, uniform
        x = nn.Conv(6, (7, 7), 7, use_bias=False, kernel_init=init, dtype=dtype)(x)
        x = nn.BatchNorm(not train, momentum=0.9, dtype=dtype)(x)
        x = nn.relu(x).mean((1, 2))
        x = nn.Dense(10, kernel_init=init, dtype=dtype)(x)
        return x.astype(jnp.float32)


class TinyText(LanguageModel):
    """A language model with one block of width 8."""

    next_layer: ClassVar[dict[str, str]] = mlp_layers(1)
    width: ClassVar[int] = 8
    blocks: ClassVar[int] = 1
    heads: ClassVar[int] = 2
    mlp: ClassVar[int] = 16


def register(monkeypatch):
    """Make configs know the tiny networks, for one test."""
    own = {
        "linear": Linear,
        "two_layers": TwoLayers,
        "overflowing": Overflowing,
        "normalized": Normalized,
        "tiny_text": TinyText,
    }
    for name, model in own.items():
        monkeypatch.setitem(MODELS, name, model)


def config(**changes) -> Config:
    """Return a config on one device; 23 examples give four steps and three over."""
    defaults: dict[str, Any] = {
        "dataset": "mnist5k",
        "model": "linear",
        "epochs": 3,
        "batch_size": 5,
        "momentum": 0.75,
        "weight_decay": 0.01,
        "penalty": 1e-3,
        "mask_learning_rate": 0.03,
        "mask_momentum": 0.5,
        "freeze_at": 0.5,
        "seed": 7,
        "devices": 1,
    }
    return Config(**{**defaults, **changes})


def images(count, seed=3) -> Split:
    random = np.random.default_rng(seed)
    return Split(
        random.integers(0, 256, (count, 28, 28, 1)).astype(np.uint8),
        random.integers(0, 10, count).astype(np.int32),
    )


def text(count, seed=3) -> Split:
    """Return windows of characters, each with the one that follows it."""
    random = np.random.default_rng(seed)
    characters = random.integers(0, 5, (count, 129))  # of 97
    return Split(characters[:, :-1].astype(np.uint8), characters[:, 1:].astype("i4"))


class Untouchable:
    """A split that must not be looked at."""

    def __getattr__(self, name):
        raise AssertionError(f"the test split was asked for {name}")

    def __iter__(self):
        raise AssertionError("the test split was iterated over")


def dataset(count=23, held_out=0, kind=images) -> Dataset:
    return Dataset(kind(count), kind(held_out, seed=4), Untouchable())


def standardized(split):
    """Return mnist5k's images as rows of float64, with mean 0 and deviation 1."""
    return (split.inputs.reshape(len(split.labels), -1) / 255 - 0.1307) / 0.3081


class Parts(NamedTuple):
    """What `experiments.train` puts together, for one seed."""

    mesh: Mesh
    feed: Feed
    objective: Objective
    template: TrainState
    state: TrainState
    run: Run
    key: Any  # of the first epoch, as data

    def epoch(self, state, key=None):
        """Take the steps of an epoch; return the new state and what was seen."""
        key = self.key if key is None else key
        items = self.feed.items(0, key, 0, 0, self.feed.steps)
        return self.run(state, items)


def parts(config, split, method="scl", seed=7) -> Parts:
    mesh = make_mesh(config.devices, config.model_parallel)
    feed = make_feed(config, split, mesh)
    way = METHODS[method](config, config.epochs * feed.steps)
    objective = Objective(make_network(config), way, config.label_smoothing)
    initial, template = make_initial(objective, mesh)
    init_key, order_key = jax.random.split(jax.random.key(seed))
    run = make_run(objective, feed, mesh)
    key = jax.random.key_data(order_key)
    return Parts(mesh, feed, objective, template, initial(init_key), run, key)


def host(tree):
    """Copy to the host: what stays on the device is donated to the next epoch."""
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), tree)


def by_path(tree) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")
