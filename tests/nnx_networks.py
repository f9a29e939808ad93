"""Small NNX networks, starts of their masks, and copies of what they hold."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import scl_jax
from scl_jax.nnx import Masked

X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32))


class Network(nnx.Module):
    """A list of layers, statistics and a random stream."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.features(x))

    def features(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.dropout(self.norm(x))


def start(path, leaf):
    """Return mask variables on both sides of the threshold."""
    random = np.random.default_rng(len(path) + leaf.size)
    return random.uniform(-0.05, 0.1, leaf.shape)


def linear(initial=0.1, **options):
    return Masked(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), initial=initial, **options)


def masks_tx(rate=1e-2):
    return optax.chain(scl_jax.normalize_by_feature(), optax.sgd(rate, 0.9))


def pure(tree):
    """Return copies as nested dictionaries of NumPy arrays, keys as bits."""

    def copy(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.array(x)

    return jax.tree.map(copy, nnx.to_pure_dict(nnx.state(tree)))


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)
