"""Random masked layers, their MACs, and reports of them and of a single kernel."""

import math

import numpy as np

from scl_jax import MaskedParams
from scl_jax._report import report

# leaf -> (shape, feature axes, positions of the output per example)
LAYERS = {
    "conv": ((3, 3, 4, 6), (3,), 64),
    "dense": ((6 * 16, 8), (1,), 1),
    "head": ((8, 5), (1,), 1),
    "query": ((8, 2, 3), (1, 2), 7),
}
NEXT = {"conv": "dense", "dense": "head"}
READ = {"dense": 6, "head": 8}  # the number of features that a layer reads


def feature_axes(path, leaf):
    return (-2, -1) if path == "query/kernel" else -1


def make(seed=0, density=0.1, dtype=np.float32):
    """Return random masked layers with biases, as NumPy arrays."""
    rng = np.random.default_rng(seed)
    weights, masks = {}, {}
    for name, (shape, axes, _) in LAYERS.items():
        kernel = rng.normal(size=shape)
        kernel[rng.random(shape) < 0.2] = 0.0
        mask = np.where(rng.random(shape) < density, 1.0, -1.0) * rng.random(shape)
        # A feature without input, and one without output, whatever the seed.
        np.moveaxis(mask, axes, range(len(axes)))[(0,) * len(axes)] = -1.0
        if name in READ:
            mask[2 :: READ[name]] = -1.0
        bias = np.zeros([shape[axis] for axis in axes])
        weights[name] = {"kernel": kernel.astype(dtype), "bias": bias.astype(dtype)}
        masks[name] = {"kernel": mask.astype(dtype), "bias": None}
    return MaskedParams(weights, masks)


def dense_macs():
    return {
        name: {"kernel": positions * math.prod(shape), "bias": 0}
        for name, (shape, _, positions) in LAYERS.items()
    }


def full_report(masked):
    return report(
        masked,
        dense_macs(),
        feature_axes=feature_axes,
        next_layer={f"{a}/kernel": f"{b}/kernel" for a, b in NEXT.items()},
    )


def kernel_report(mask, weight=None, **kwargs):
    weight = np.ones(np.shape(mask), np.float32) if weight is None else weight
    return report(MaskedParams({"k": weight}, {"k": mask}), **kwargs)
