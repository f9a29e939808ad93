"""Gradients and connections of features, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import scl_jax
from experiments.anatomy import connections_per_feature, decades, gradient_norms
from experiments.data import Split
from experiments.network import make_network
from scl_jax import MaskedParams

PATH = "Dense_0/kernel"


@pytest.fixture(autouse=True)
def _networks(monkeypatch):
    tiny.register(monkeypatch)


def masked_linear(config, cut):
    """Return the linear network of a config with the first `cut` inputs cut."""
    params, statistics = make_network(config).init(jax.random.key(1))
    signs = jnp.where(jnp.arange(784) < cut, -1.0, 1.0)[:, None]
    return (
        scl_jax.mask_params(
            params, initial=lambda path, leaf: jnp.broadcast_to(signs, leaf.shape)
        ),
        statistics,
    )


def numpy_norms(masked, split):
    """Return the rms of G * W per unit of the linear network, pixels from 0 to 1."""
    weights = {
        k: np.asarray(v, np.float64) for k, v in masked.weights["Dense_0"].items()
    }
    kernel, bias = weights["kernel"], weights["bias"]
    connected = np.asarray(masked.masks["Dense_0"]["kernel"]) >= 0
    x = split.inputs.reshape(len(split.labels), -1) / 255
    logits = x @ (kernel * connected) + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(p)), split.labels] -= 1
    gradient = x.T @ p / len(p) * kernel
    return np.sqrt((gradient**2).mean(0))


@pytest.mark.parametrize("changes", [{}, {"sparsity": 0.5, "freeze_at": 0.9}])
def test_norm_is_that_of_the_task_gradient_times_the_weight(changes):
    # One batch of all examples: the order does not matter, nor does the penalty.
    config = tiny.config(pixels="unit", batch_size=23, penalty=0.5, **changes)
    split = tiny.images(23)
    masked, statistics = masked_linear(config, cut=300)
    norms = gradient_norms(config, split, masked, statistics, batches=1)
    assert list(norms) == [PATH]
    np.testing.assert_allclose(norms[PATH], numpy_norms(masked, split), rtol=1e-4)


def test_norms_are_averaged_over_batches_each_with_its_own_gradient():
    config = tiny.config(pixels="unit", batch_size=1)
    split = tiny.images(3)
    masked, statistics = masked_linear(config, cut=0)
    norms = gradient_norms(config, split, masked, statistics, batches=3)
    each = [
        numpy_norms(masked, Split(split.inputs[i : i + 1], split.labels[i : i + 1]))
        for i in range(3)
    ]
    np.testing.assert_allclose(norms[PATH], np.mean(each, axis=0), rtol=1e-4)


def test_straight_through_estimator_of_the_config_is_used():
    config = tiny.config(pixels="unit", batch_size=23, ste="relu")
    masked, statistics = masked_linear(config, cut=784)
    norms = gradient_norms(config, tiny.images(23), masked, statistics, batches=1)
    np.testing.assert_array_equal(norms[PATH], np.zeros(10))


@pytest.mark.parametrize(("norm", "expected"), [("rms", 1), ("l2", 1 / 28)])
def test_normalized_gradients_are_alike(norm, expected):
    # One batch: whether norms are averaged over the batches does not matter.
    config = tiny.config(freeze_at=0.9, sparsity=0.5, minimum_connections=2)
    masked, statistics = masked_linear(config, cut=300)
    norms = gradient_norms(
        config, tiny.images(23), masked, statistics, norm=norm, batches=1
    )
    np.testing.assert_allclose(norms[PATH], expected, rtol=1e-5)


def test_normalization_goes_on_from_batch_to_batch():
    config = tiny.config(norm="rms")
    masked, statistics = masked_linear(config, cut=300)
    norms = gradient_norms(
        config, tiny.images(23), masked, statistics, norm="rms", batches=4
    )
    # As it is in the last steps of a training, too, in which masks may rest.
    assert (norms[PATH] > 0.5).all()
    assert (norms[PATH] < 1.5).all()


def test_every_masked_kernel_is_measured():
    config = tiny.config(model="normalized")
    params, statistics = make_network(config).init(jax.random.key(1))
    masked = scl_jax.mask_params(params)
    norms = gradient_norms(config, tiny.images(23), masked, statistics, batches=4)
    assert {path: x.shape for path, x in norms.items()} == {
        "Conv_0/kernel": (6,),
        "Dense_0/kernel": (10,),
    }


@pytest.mark.parametrize("batches", [0, 5])
def test_more_batches_than_an_epoch_has_are_refused(batches):
    config = tiny.config()
    masked, statistics = masked_linear(config, cut=0)
    with pytest.raises(ValueError, match=f"those of an epoch, 4; got {batches}"):
        gradient_norms(config, tiny.images(23), masked, statistics, batches=batches)


def test_connections_are_counted_over_all_axes_but_the_features():
    random = np.random.default_rng(0)
    kernels = {name: random.normal(size=(2, 3, 4)) for name in ("a", "b")}
    kernels = {name: jnp.asarray(x, jnp.float32) for name, x in kernels.items()}
    tree = {**kernels, "bias": jnp.ones(4)}
    masked = MaskedParams(tree, {**kernels, "bias": None})

    def axes(path, leaf):
        del leaf
        return (-2, -1) if path == "a" else 0

    counts = connections_per_feature(masked, axes)
    connected = {name: np.asarray(x) >= 0 for name, x in kernels.items()}
    assert list(counts) == ["a", "b"]
    np.testing.assert_array_equal(counts["a"], connected["a"].sum(0).ravel())
    np.testing.assert_array_equal(counts["b"], connected["b"].sum((1, 2)))


def test_feature_axes_that_do_not_fit_are_refused():
    masked = scl_jax.mask_params({"kernel": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match="connections_per_feature: feature axes 2"):
        connections_per_feature(masked, 2)


def test_decades_leave_out_zeros_and_extremes():
    values = np.concatenate([np.zeros(500), np.logspace(-5, 0, 101), [1e-30, 1e30]])
    # 103 positive numbers, half of a hundredth of five decades more at either end.
    assert decades(values) == pytest.approx(4.08, abs=0.005)
    assert decades(values * 1e-7) == pytest.approx(decades(values))


@pytest.mark.parametrize(
    "values", [[], [0.0, 0.0], [1.0, -1.0], [1.0, np.nan], [1.0, np.inf]]
)
def test_decades_need_positive_finite_numbers(values):
    with pytest.raises(ValueError, match="decades: needs finite numbers"):
        decades(np.array(values))
