"""The gradient of J = task_loss(W * H(S)) + lambda * sum H(S), layer by layer.

The task loss is linear in a layer's output, sum(R * layer(x)), so that its
gradient G at W * H(S) is written by hand in NumPy, in float64, from the layer's
definition; nothing of JAX or of the library is used for it. Then

    dJ/dW = G * H(S)        dJ/dS = (G * W + lambda) * p(S)

and where pruned weights get a part of their gradient, dJ/dW = part * G for them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scl_jax import (
    Clipped,
    LeakyReLU,
    MaskedParams,
    ReLU,
    Softplus,
    apply_masks,
    connection_count,
    identity,
    mask_params,
    normalize_by_feature,
)

PENALTY, PART = 0.37, 0.25


def tent(s):
    """A user's own estimator: 1 + max(0, 1 - |s|)."""
    return 1.0 + jnp.maximum(0.0, 1.0 - jnp.abs(s))


STES = {
    "identity": (identity, np.ones_like),
    "leaky": (LeakyReLU(0.2), lambda s: np.where(s < 0, 0.2, 1.0)),
    "softplus": (Softplus(3.0), lambda s: 1 / (1 + np.exp(-3.0 * s))),
    "relu": (ReLU(), lambda s: np.where(s < 0, 0.0, 1.0)),
    "clipped": (Clipped(), lambda s: np.where(np.abs(s) > 1, 0.0, 1.0)),
    "user": (tent, lambda s: 1 + np.clip(1 - np.abs(s), 0, None)),
}


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


def normal(rng, shape):
    return rng.normal(size=shape).astype(np.float32)


def mask_variables(rng, shape):
    """On both sides of 0 and of 1, with the thresholds themselves among them."""
    s = 1.5 * normal(rng, shape)
    s.flat[:4] = [0.0, -0.0, 1.0, -1.0]
    return s


class Case(NamedTuple):
    masked: MaskedParams
    x: np.ndarray
    R: np.ndarray


def make_case(layer):
    rng = np.random.default_rng(0)
    x = normal(rng, layer.x_shape)
    y, variables = jax.eval_shape(layer.module.init_with_output, jax.random.key(0), x)
    assert variables["params"]["kernel"].shape == layer.kernel_shape
    params = jax.tree.map(lambda leaf: normal(rng, leaf.shape), variables["params"])
    masked = mask_params(
        params, initial=lambda _, leaf: mask_variables(rng, leaf.shape)
    )
    return Case(masked, x, normal(rng, y.shape))


def objective(masked, layer, case, ste, R=None):
    params = apply_masks(masked, ste=ste, pruned_gradient=PART)
    y = layer.module.apply({"params": params}, case.x)
    R = case.R if R is None else R
    return jnp.sum(R * y) + PENALTY * connection_count(masked, ste=ste)


def assert_close(got, expected):
    scale = np.max(np.abs(expected))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6 * scale)


def float64(array):
    return np.asarray(array, np.float64)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_weights_and_masks_are_those_of_the_formulas(name):
    layer = LAYERS[name]
    case = make_case(layer)
    W, S = case.masked.weights["kernel"], case.masked.masks["kernel"]
    W, S, x, R = float64(W), float64(S), float64(case.x), float64(case.R)
    G = layer.gradient(x, R, layer.kernel_shape)
    H = np.where(S >= 0, 1.0, 0.0)
    assert 0 < H.sum() < H.size
    bias = float64(case.masked.weights["bias"])
    bias_gradient = R.sum(axis=tuple(range(R.ndim - bias.ndim)))
    expected_value = (
        np.sum(G * W * H) + np.sum(bias_gradient * bias) + PENALTY * np.sum(H)
    )

    @jax.jit  # all estimators in one compilation
    def value_and_grad(masked):
        def of(ste):
            return jax.value_and_grad(objective)(masked, layer, case, ste)

        return {name: of(ste) for name, (ste, _) in STES.items()}

    for ste_name, (value, gradient) in value_and_grad(case.masked).items():
        _, proxy = STES[ste_name]
        np.testing.assert_allclose(value, expected_value, rtol=1e-5, atol=1e-4)
        assert_close(gradient.weights["kernel"], G * np.where(S >= 0, 1, PART))
        assert_close(gradient.masks["kernel"], (G * W + PENALTY) * proxy(S))
        assert_close(gradient.weights["bias"], bias_gradient)
        assert gradient.masks["bias"] is None


@pytest.mark.parametrize("name", LAYERS)
def test_feature_axes_are_the_output_units_of_the_layer(name):
    # Scaling what one output unit receives scales its slice of the mask
    # gradients and no other: normalized, nothing changes. This holds only for
    # the axes that tell the output units apart.
    layer = LAYERS[name]
    case = make_case(layer)
    features = case.masked.weights["bias"].shape
    scale = np.ldexp(1.0, np.arange(math.prod(features)) - 2).reshape(features)
    scale = scale.astype(np.float32)

    factors = scale.reshape((1,) * (case.R.ndim - scale.ndim) + features)
    tx = normalize_by_feature(layer.feature_axes)

    @jax.jit
    def gradient_and_update(R):
        layer_objective = functools.partial(
            objective, layer=layer, case=case, ste=identity, R=R
        )
        masks = jax.grad(layer_objective)(case.masked).masks
        gradient = jax.tree.map(lambda g: g - PENALTY, masks)
        updates, _ = tx.update(gradient, tx.init(gradient))
        return gradient["kernel"], updates["kernel"]

    gradient, update = gradient_and_update(case.R)
    scaled_gradient, scaled_update = gradient_and_update(case.R * factors)
    assert not np.allclose(gradient, scaled_gradient, rtol=0.1)
    np.testing.assert_allclose(update, scaled_update, rtol=1e-3, atol=1e-4)


def stack_gradient(x, R, kernels):
    """Backpropagate by hand through y = x k[0] k[1] ... k[L - 1]."""
    inputs = [x]
    for k in kernels:
        inputs.append(inputs[-1] @ k)
    G, delta = np.zeros_like(kernels), R
    for i in reversed(range(len(kernels))):
        G[i] = inputs[i].T @ delta
        delta = delta @ kernels[i].T
    return G


class ScannedStack(nn.Module):
    """Three dense layers of one width, their kernels stacked by nn.scan."""

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            lambda dense, x, _: (dense(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return scan(nn.Dense(4, use_bias=False, name="layers"), x, None)[0]


def linen_stack(params, x):
    return ScannedStack().apply({"params": params}, x)


def lax_stack(params, x):
    return jax.lax.scan(lambda x, k: (x @ k, None), x, params["layers"]["kernel"])[0]


@pytest.mark.parametrize("forward", [linen_stack, lax_stack])
def test_gradients_of_a_stack_of_layers_are_those_of_the_formulas(forward):
    rng = np.random.default_rng(0)
    x, R = normal(rng, (5, 4)), normal(rng, (5, 4))
    shapes = jax.eval_shape(ScannedStack().init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: normal(rng, leaf.shape), shapes)
    assert params["layers"]["kernel"].shape == (3, 4, 4)
    masked = mask_params(
        params, initial=lambda _, leaf: mask_variables(rng, leaf.shape)
    )

    def stack_objective(masked, ste):
        y = forward(apply_masks(masked, ste=ste, pruned_gradient=PART), x)
        return jnp.sum(R * y) + PENALTY * connection_count(masked, ste=ste)

    @jax.jit
    def gradients(masked):
        return {
            name: jax.grad(stack_objective)(masked, ste)
            for name, (ste, _) in STES.items()
        }

    W = float64(masked.weights["layers"]["kernel"])
    S = float64(masked.masks["layers"]["kernel"])
    H = np.where(S >= 0, 1.0, 0.0)
    G = stack_gradient(float64(x), float64(R), W * H)
    for ste_name, gradient in gradients(masked).items():
        _, proxy = STES[ste_name]
        given = gradient.weights["layers"]["kernel"]
        assert_close(given, G * np.where(S >= 0, 1, PART))
        expected = (G * W + PENALTY) * proxy(S)
        assert_close(gradient.masks["layers"]["kernel"], expected)


def test_layers_of_a_vmapped_stack_are_masked_each_by_itself():
    rng = np.random.default_rng(0)
    x, R = normal(rng, (3, 5, 4)), normal(rng, (3, 5, 2))
    masked = mask_params(
        {"kernel": normal(rng, (3, 4, 2))},
        initial=lambda _, leaf: mask_variables(rng, leaf.shape),
    )

    def one_objective(masked, x, R):
        y = x @ apply_masks(masked, pruned_gradient=0)["kernel"]
        return jnp.sum(R * y) + PENALTY * connection_count(masked)

    gradient = jax.jit(jax.vmap(jax.grad(one_objective)))(masked, x, R)
    W, S = float64(masked.weights["kernel"]), float64(masked.masks["kernel"])
    G = np.stack(
        [dense_gradient(float64(x[i]), float64(R[i]), (4, 2)) for i in range(3)]
    )
    assert_close(gradient.weights["kernel"], G * (S >= 0))
    assert_close(gradient.masks["kernel"], G * W + PENALTY)
