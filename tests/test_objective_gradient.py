"""The gradient of J = task_loss(W * H(S)) + lambda * sum H(S), layer by layer.

The task loss is linear in a layer's output, sum(R * layer(x)), so that its
gradient G at W * H(S) is written by hand in NumPy, in float64, from the layer's
definition; nothing of JAX or of the library is used for it. Then

    dJ/dW = G * H(S)        dJ/dS = (G * W + lambda) * p(S)

and where pruned weights get a part of their gradient, dJ/dW = part * G for them.
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers_by_hand import LAYERS, dense_gradient

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
