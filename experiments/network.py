"""The network of a config as pure functions, from raw inputs to logits."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import scl_jax
from experiments.config import Config
from experiments.data import ABOUT
from experiments.models import MODELS

PyTree = Any


class Network(NamedTuple):
    """A network as functions of parameters and statistics.

    Attributes:
      init: key -> (parameters, statistics); the statistics are those that
        normalization layers keep, {} where there are none.
      apply: (parameters, statistics, inputs) -> logits, for evaluation.
      train: (parameters, statistics, inputs) -> (logits, new statistics).
      example: shape and type of a batch of one; inputs are uint8.
    """

    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    apply: Callable[[PyTree, PyTree, jax.Array], jax.Array]
    train: Callable[[PyTree, PyTree, jax.Array], tuple[jax.Array, PyTree]]
    example: jax.ShapeDtypeStruct


@functools.cache
def make_network(config: Config) -> Network:
    """Return the network of a config; those of equal configs are the same object."""
    about = ABOUT[config.dataset]
    model = MODELS[config.model](classes=about.classes, dtype=jnp.dtype(config.compute))
    shape = about.shape
    if config.image_size:
        shape = (config.image_size, config.image_size, shape[-1])
    example = jax.ShapeDtypeStruct((1, *shape), jnp.uint8)

    def as_input(inputs):
        if not about.mean:
            return inputs  # characters
        x = inputs.astype(jnp.float32) / 255
        if config.pixels == "unit":
            return x
        mean, deviation = (
            jnp.asarray(numbers, jnp.float32).reshape(1, 1, 1, -1)
            for numbers in (about.mean, about.deviation)
        )
        return (x - mean) / deviation

    def init(key):
        inputs = jnp.zeros(example.shape, example.dtype)
        variables = model.init(key, as_input(inputs))
        return variables.pop("params"), variables

    def apply(params, statistics, inputs) -> Any:
        return model.apply({"params": params, **statistics}, as_input(inputs))

    def train(params, statistics, inputs) -> Any:
        variables = {"params": params, **statistics}
        mutable = list(statistics)
        return model.apply(variables, as_input(inputs), train=True, mutable=mutable)

    return Network(init, apply, train, example)


@functools.cache
def network_macs(network: Network) -> PyTree:
    """Return the MACs per example of every parameter, as `count_macs` does."""
    params, statistics = jax.eval_shape(network.init, jax.random.key(0))

    def apply(params, inputs):
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), statistics)
        return network.apply(params, zeros, inputs)

    return scl_jax.count_macs(apply, params, network.example)


def macs_of_connections(network: Network) -> PyTree:
    """Return the MACs per example of a connection, for every parameter."""
    params, _ = jax.eval_shape(network.init, jax.random.key(0))
    return scl_jax.macs_per_connection(network_macs(network), params)
