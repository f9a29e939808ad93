"""The norms of features in NumPy, float64: what tests compare the transform with."""

import jax.numpy as jnp
import numpy as np


def numpy_normalized(g, feature_axes, norm):
    """Normalize in float64, feature by feature, in a Python loop."""
    g = np.asarray(g).astype(np.float64)
    axes = [axis % g.ndim for axis in np.atleast_1d(feature_axes)]
    result = np.empty_like(g)
    for feature in np.ndindex(*(g.shape[axis] for axis in axes)):
        index = [slice(None)] * g.ndim
        for axis, i in zip(axes, feature, strict=True):
            index[axis] = i
        part = g[tuple(index)]
        size = {
            "rms": np.sqrt(np.mean(part**2)),
            "l2": np.sqrt(np.sum(part**2)),
            "max": np.max(np.abs(part)),
            "none": 1.0,
        }[norm]
        result[tuple(index)] = part / size if size > 0 else part
    return result


def numpy_running(gradients, feature_axes, norm, decay):
    """Normalize a sequence of one leaf's gradients, step by step in float64."""
    squares, results = 0.0, []
    for step, g in enumerate(np.asarray(gradients, np.float64), start=1):
        once = numpy_normalized(g, feature_axes, norm)
        # What the gradient was divided by, feature by feature, is what is averaged.
        squares = decay * squares + (1 - decay) * np.square(g / once)
        results.append(g / np.sqrt(squares / (1 - decay**step)))
    return np.stack(results)


def gradients(*shape, seed=0, dtype=jnp.float32):
    """Gradients whose features differ in size by orders of magnitude."""
    rng = np.random.default_rng(seed)
    g = rng.normal(size=shape) * 10.0 ** rng.integers(-4, 4, size=shape[-1:])
    return jnp.asarray(g, dtype)
