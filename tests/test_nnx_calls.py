"""The adapter for NNX: what a call computes, its gradients, what it leaves alone."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nnx_networks import Network, X, assert_same, linear, pure, start

import scl_jax
from scl_jax.nnx import TRAINED, Masked, MaskVariable


def test_call_has_the_gradients_of_the_method():
    s = np.array([[0.1, -0.1], [-0.2, 0.0], [0.3, -0.3]], np.float32)
    options = {"ste": scl_jax.LeakyReLU(0.5), "pruned_gradient": 0}
    model = linear(lambda path, leaf: s, **options)
    model.model.bias[...] = jnp.array([1.0, 2.0])
    w, x = np.asarray(model.model.kernel[...]), X[:, :3]
    np.testing.assert_allclose(
        model(x), np.asarray(x) @ (w * (s >= 0)) + [1.0, 2.0], rtol=1e-5, atol=1e-6
    )
    argnums = nnx.DiffState(0, TRAINED)
    gradient = nnx.grad(lambda model: model(x).sum(), argnums=argnums)(model)
    g = np.broadcast_to(np.asarray(x).sum(0)[:, None], (3, 2))
    np.testing.assert_allclose(
        gradient["model"]["kernel"][...], g * (s >= 0), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        gradient["masks"]["kernel"][...],
        g * w * np.where(s >= 0, 1.0, 0.5),
        rtol=1e-5,
        atol=1e-6,
    )


def test_call_leaves_every_weight_as_it_was_and_where_it_was():
    model = Masked(Network(), initial=-1.0)
    kernel, before = model.model.head.kernel, pure(nnx.state(model, nnx.Param))
    np.testing.assert_array_equal(model(X), np.zeros((16, 3)))
    nnx.jit(lambda model: model(X))(model)
    assert_same(pure(nnx.state(model, nnx.Param)), before)
    assert model.model.head.kernel is kernel


@pytest.mark.parametrize("around", ["eager", "jit", "grad", "tree mode"])
def test_statistics_and_random_streams_of_the_model_move_with_a_call(around):
    model, dense = Masked(Network()), Network()
    calls = {
        "eager": lambda m: m(X).sum(),
        "jit": nnx.jit(lambda m: m(X).sum()),
        "grad": nnx.grad(lambda m: m(X).sum()),
        "tree mode": nnx.jit(lambda m: m(X).sum(), graph=False),
    }
    calls[around](model)
    calls[around](dense)
    kept = nnx.Not(nnx.Param)
    assert_same(pure(nnx.state(model.model, kept)), pure(nnx.state(dense, kept)))
    assert int(model.model.dropout.rngs.count[...]) == 1
    assert np.asarray(model.model.norm.mean[...]).any()


def test_evaluation_mode_reaches_the_model():
    model = Masked(Network())
    model.eval()
    before = pure(model)
    assert_same(model(X), model(X))
    assert_same(pure(model), before)


def test_effective_model_has_the_methods_of_the_model():
    model = Masked(Network(), select=scl_jax.select("layers/.*/kernel"), initial=-1.0)
    model.eval()
    effective = model.effective()
    assert isinstance(effective, Network)
    np.testing.assert_array_equal(effective.features(X), np.zeros((16, 6)))


def test_kernel_that_two_layers_share_has_one_mask():
    class Tied(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(6, 6, use_bias=False, rngs=nnx.Rngs(0))
            self.second = nnx.Linear(6, 6, use_bias=False, rngs=nnx.Rngs(1))
            self.second.kernel = self.first.kernel

        def __call__(self, x):
            return self.second(self.first(x))

    model = Masked(Tied(), initial=start)
    [(_, mask)] = nnx.to_flat_state(nnx.state(model, MaskVariable))
    kernel = np.asarray(model.model.first.kernel[...]) * (mask[...] >= 0)
    np.testing.assert_allclose(model(X), X @ kernel @ kernel, rtol=1e-4, atol=1e-5)
    effective = model.effective()
    assert effective.first.kernel is effective.second.kernel


@pytest.mark.parametrize("part", [0, 0.25])
def test_pruned_weights_get_the_part_of_their_gradient_that_is_asked_for(part):
    dense = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    model = Masked(dense, initial=-1.0, pruned_gradient=part)

    def loss_fn(model):
        return model(jnp.ones((2, 4))).sum()

    gradient = nnx.grad(loss_fn, argnums=nnx.DiffState(0, TRAINED))(model)
    kernel = gradient["model"]["kernel"][...]
    np.testing.assert_allclose(kernel, np.full((4, 3), 2 * part), rtol=1e-6)


def test_part_of_the_gradient_that_is_out_of_range_is_refused():
    dense = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="Masked: pruned_gradient must be from 0 to 1"):
        Masked(dense, pruned_gradient=-1)
