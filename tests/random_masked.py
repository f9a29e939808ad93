"""A small masked tree of random numbers, gradients of it, and an optimizer's steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from scl_jax import mask_params


def random_like(tree, seed):
    rng = np.random.default_rng(seed)

    def normal(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape).astype(np.float32))

    return jax.tree.map(normal, tree)


def make_masked(dtype=None):
    shapes = {
        "dense": {"kernel": jnp.ones((7, 5)), "bias": jnp.ones(5)},
        "norm": {"scale": jnp.ones(5)},
        "head": {"kernel": jnp.ones((5, 3))},
    }
    params, start = random_like(shapes, 0), random_like(shapes, 1)
    return mask_params(
        params,
        initial=lambda path, _: start[path.split("/")[0]]["kernel"],
        dtype=dtype,
    )


def run(tx, params, gradients, **extra_args):
    """Take a step for each gradient, eagerly; return updates and parameters."""
    state, history = tx.init(params), []
    for gradient in gradients:
        updates, state = tx.update(gradient, state, params, **extra_args)
        params = optax.apply_updates(params, updates)
        history.append((updates, params))
    return history


@functools.cache
def gradients():
    return [random_like(make_masked(), seed) for seed in range(10, 14)]
