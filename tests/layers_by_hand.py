"""Layers of every kind, and the gradients of their kernels by hand, in NumPy."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np


class Layer(NamedTuple):
    module: nn.Module
    x_shape: tuple[int, ...]
    kernel_shape: tuple[int, ...]
    feature_axes: Any
    # (x, R, kernel_shape) -> G, in float64
    gradient: Callable[[np.ndarray, np.ndarray, tuple[int, ...]], np.ndarray]


def dense_gradient(x, R, shape):
    """y[..., o] = sum_i x[..., i] k[i, o]."""
    G = np.zeros(shape)
    for i, o in np.ndindex(*shape):
        G[i, o] = np.sum(x[..., i] * R[..., o])
    return G


def conv_gradient(x, R, shape, strides):
    """y[b, p, o] = sum_{j, c} x[b, p * strides + j, c] k[j, c, o], c by group."""
    *window, in_per_group, features = shape
    groups = x.shape[-1] // in_per_group
    G = np.zeros(shape)
    for p in np.ndindex(*R.shape[1:-1]):
        for j in np.ndindex(*window):
            at = tuple(q * s + i for q, s, i in zip(p, strides, j, strict=True))
            for o in range(features):
                first = o // (features // groups) * in_per_group
                channels = x[:, *at, first : first + in_per_group]
                G[*j, :, o] += R[:, *p, o] @ channels
    return G


def conv_transpose_gradient(x, R, shape, strides, *, transpose_kernel):
    """Each input pixel adds a window of the kernel to the output.

    transpose_kernel=True: y[b, i * s + j, o] += x[b, i, c] k[j, o, c], the
    transpose of a convolution. False: the window is flipped and its channels
    are (in, out): y[b, i * s + K - 1 - j, o] += x[b, i, c] k[j, c, o].
    """
    *window, _, _ = shape
    G = np.zeros(shape)
    for i in np.ndindex(*x.shape[1:-1]):
        for j in np.ndindex(*window):
            put = j if transpose_kernel else [k - 1 - n for k, n in zip(window, j)]  # noqa: B905
            at = [p * s + n for p, s, n in zip(i, strides, put, strict=True)]
            in_by_out = np.einsum("bc,bo->co", x[:, *i], R[:, *at])
            G[*j] += in_by_out.T if transpose_kernel else in_by_out
    return G


def attention_projection_gradient(x, R, shape):
    """y[b, t, h, d] = sum_e x[b, t, e] k[e, h, d]: query, key and value."""
    G = np.zeros(shape)
    for e, h, d in np.ndindex(*shape):
        G[e, h, d] = np.sum(x[:, :, e] * R[:, :, h, d])
    return G


def attention_output_gradient(x, R, shape):
    """y[b, t, e] = sum_{h, d} x[b, t, h, d] k[h, d, e]."""
    G = np.zeros(shape)
    for h, d, e in np.ndindex(*shape):
        G[h, d, e] = np.sum(x[:, :, h, d] * R[:, :, e])
    return G


def conv(features, window, strides, **rest):
    return nn.Conv(features, window, strides, padding="VALID", **rest)


def conv_transpose(features, window, strides, transpose_kernel):
    return nn.ConvTranspose(
        features, window, strides, padding="VALID", transpose_kernel=transpose_kernel
    )


def strided(gradient, *strides, **rest):
    return functools.partial(gradient, strides=strides, **rest)


LAYERS = {
    "dense": Layer(nn.Dense(4), (6, 5), (5, 4), -1, dense_gradient),
    "dense_on_sequence": Layer(nn.Dense(4), (2, 3, 5), (5, 4), -1, dense_gradient),
    "conv1d": Layer(
        conv(4, (3,), (2,)),
        (2, 9, 3),
        (3, 3, 4),
        -1,
        strided(conv_gradient, 2),
    ),
    "conv2d": Layer(
        conv(4, (3, 2), (1, 2)),
        (2, 5, 6, 3),
        (3, 2, 3, 4),
        -1,
        strided(conv_gradient, 1, 2),
    ),
    "conv3d": Layer(
        conv(3, (2, 2, 3), (1, 1, 1)),
        (2, 3, 4, 4, 2),
        (2, 2, 3, 2, 3),
        -1,
        strided(conv_gradient, 1, 1, 1),
    ),
    "depthwise": Layer(
        conv(6, (3, 3), (1, 1), feature_group_count=3),
        (2, 5, 4, 3),
        (3, 3, 1, 6),
        -1,
        strided(conv_gradient, 1, 1),
    ),
    "grouped": Layer(
        conv(4, (3,), (1,), feature_group_count=2),
        (2, 6, 6),
        (3, 3, 4),
        -1,
        strided(conv_gradient, 1),
    ),
    "conv_transpose": Layer(
        conv_transpose(4, (3, 2), (2, 1), transpose_kernel=False),
        (2, 3, 4, 3),
        (3, 2, 3, 4),
        -1,
        strided(conv_transpose_gradient, 2, 1, transpose_kernel=False),
    ),
    "conv_transpose_transposed": Layer(
        conv_transpose(4, (3, 2), (2, 1), transpose_kernel=True),
        (2, 3, 4, 3),
        (3, 2, 4, 3),
        -2,
        strided(conv_transpose_gradient, 2, 1, transpose_kernel=True),
    ),
    "attention_projection": Layer(
        nn.DenseGeneral((2, 3)),
        (2, 3, 4),
        (4, 2, 3),
        (-2, -1),
        attention_projection_gradient,
    ),
    "attention_output": Layer(
        nn.DenseGeneral(4, axis=(-2, -1)),
        (2, 3, 2, 3),
        (2, 3, 4),
        -1,
        attention_output_gradient,
    ),
}
