"""Small states of trainings, and folders to keep them in."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import scl_jax
from experiments.checkpoint import Checkpoints
from experiments.mesh import by_shape
from experiments.step import TrainState

IDENTITY = {"method": "scl", "seed": 1, "config": {"model": "lenet5", "epochs": 3}}
RECORD = {"key": [17, 4294967295], "history": [["scl", 1, 0.1]], "sums": [1 / 3, 2.5]}
STEPS = (10, 20)


def state(seed=0, optimizer=None):
    """Return what a training has, and leaves of all other types."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "Conv_0": {"kernel": jax.random.normal(keys[0], (3, 3, 2, 8))},
        "Dense_0": {
            "kernel": jax.random.normal(keys[1], (16, 8)),
            "bias": jax.random.normal(keys[2], (8,)),
        },
    }
    masked = scl_jax.mask_params(params, dtype=jnp.bfloat16)
    tx = scl_jax.partition(optimizer or optax.adamw(0.1), optax.sgd(0.1, 0.9))
    statistics = {
        "batch_stats": {"mean": jax.random.normal(keys[3], (8,))},
        "flags": jnp.array([True, False, seed % 2 == 0]),
        "bytes": jnp.arange(seed, seed + 5, dtype=jnp.uint8),
        "half": jnp.full((2, 2), seed, jnp.float16),
        "count": jnp.int32(seed),
    }
    return TrainState(masked, statistics, tx.init(masked))


def small(seed=0):
    """Return a state of few leaves."""
    key = jax.random.key(seed)
    return {"kernel": jax.random.normal(key, (48, 48)), "count": jnp.int32(seed)}


def on(mesh, tree):
    """Put a state where it belongs on a mesh."""
    return jax.device_put(tree, by_shape(mesh, tree))


def template(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@contextlib.contextmanager
def opened(folder, identity=IDENTITY):
    with contextlib.closing(Checkpoints(folder, identity)) as checkpoints:
        yield checkpoints


def names(folder):
    return sorted(path.name for path in folder.iterdir())
