"""Random parameters, and masks that prune about half of them."""

import jax
import jax.numpy as jnp
import numpy as np

from scl_jax import mask_params

F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16


def make_params(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32), dtype)

    return {
        "conv": {"kernel": normal(3, 3, 2, 4), "bias": normal(4)},
        "dense": {"kernel": normal(5, 3), "bias": normal(3)},
    }


def make_masked(seed=0, dtype=None):
    """Masked parameters of which about half are pruned."""
    rng = np.random.default_rng(100 + seed)
    return mask_params(
        make_params(seed),
        initial=lambda path, leaf: rng.normal(size=leaf.shape).astype(np.float32),
        dtype=dtype,
    )


def as_numpy(tree):
    return jax.tree.map(np.asarray, tree)
